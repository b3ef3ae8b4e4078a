"""Expert maps and their balance: loads and maps as data, the greedy rule, swaps."""
