"""Plans and merges executed under torchrun."""
