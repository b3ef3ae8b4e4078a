"""V-shaped schedules with controllable memory (Qi et al., Pipeline Parallelism with Controllable Memory, 2024).

Two stages per rank on a V (rank r holds r and 2P - 1 - r), one grain per F, I and W of a half stage. A *building block*
gives every action of one microbatch a start: F goes down the ranks with ``a`` grains per rank, up with ``b``, I down
with ``c`` and up with ``d``. It repeats every six grains, the work of one microbatch on a rank, so it must put the six
actions of a rank into six different grains modulo six. The memory of a rank is the sum of its activations' lifetimes
over six: (P - 1 - r)(a + d) + (P - 1 + r)(b + c) grains. (4, 2, 4, 2) holds as much as 1F1B (the paper's V-ZB),
(2, 1, 2, 1) half of it (V-Half), (1, 1, 1, 1) a third (V-Min).

The order of the repeated block is the schedule; running it as early as its dependencies allow squeezes the waits of
warm-up and cool-down out. As in the papers, weight gradients are then put where a rank would wait, for the durations at
hand and without holding more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.schedules.list_order import Shop, activations_held, best_order
from mipipe.planner.schedules.pattern import Pattern, Times, forward, input_gradient, one_copy, weight_gradient
from mipipe.planner.schedules.refill import refill_weights

_INTERVAL = 6
_MANY_ACTIONS = 30_000
"""Beyond these, only the block with one refilling is tried: a third of the time, a part in a thousand longer."""


def v_half(ranks: int, microbatches: int, times: Times | None = None) -> Pattern:
    """About half of 1F1B's activations."""
    return _refilled(ranks, microbatches, times, repeated_block(ranks, microbatches, (2, 1, 2, 1)))


def v_min(ranks: int, microbatches: int, times: Times | None = None) -> Pattern:
    """About a third of 1F1B's activations."""
    return _refilled(ranks, microbatches, times, repeated_block(ranks, microbatches, (1, 1, 1, 1)))


def zb_v(ranks: int, microbatches: int, times: Times | None = None) -> Pattern:
    """1F1B's activations and, where F, I and W are equal, no bubble between a rank's first and last action.

    The better of the building block and of list scheduling with equal durations, both with W refilled.
    """
    def by_turn(kind: ActionKind, stage: int, microbatch: int) -> tuple[Any, ...]:
        return kind is ActionKind.F, kind is not ActionKind.F or stage < ranks, microbatch, -stage

    def far_first(kind: ActionKind, stage: int, microbatch: int) -> tuple[Any, ...]:
        return kind is not ActionKind.F or stage < ranks, kind is ActionKind.F, microbatch, -stage

    block = repeated_block(ranks, microbatches, (4, 2, 4, 2))
    if 6 * ranks * microbatches > _MANY_ACTIONS:
        return _refilled(ranks, microbatches, times, block)
    listed = best_order(_shop(ranks, microbatches, Times(1, 1, 1), 2 * ranks), [by_turn, far_first])
    return _refilled(ranks, microbatches, times, block, one_copy(v_ranks(ranks), microbatches, listed, "v"))


def _shop(ranks: int, microbatches: int, times: Times, cap: int) -> Shop:
    """The V to be timed. Its stages are half as long as even ones, so a transfer counts twice beside them."""
    where = v_ranks(ranks)
    return Shop(ranks, 2 * ranks, microbatches, lambda stage, _: where[stage], replace(times, comm=2 * times.comm), cap,
                (range(microbatches),))


def _refilled(ranks: int, microbatches: int, times: Times | None, *patterns: Pattern) -> Pattern:
    """The fastest of the patterns and of what moving their weight gradients gives, with no more activations."""
    shop = _shop(ranks, microbatches, times or Times(1, 1, 1), max(activations_held(p.orders) for p in patterns))
    choices = (0.6,) if 6 * ranks * microbatches > _MANY_ACTIONS else (0.3, 0.6, 1.0)
    refilled = [refill_weights(shop, pattern.orders, patience) for pattern in patterns for patience in choices]
    given = [*(pattern.orders for pattern in patterns), *(orders for orders in refilled if orders is not None)]
    return one_copy(v_ranks(ranks), microbatches, best_order(shop, given=given), "v")


def repeated_block(ranks: int, microbatches: int, offsets: tuple[int, int, int, int]) -> Pattern:
    """The pattern of a building block with the given offsets per rank, with the least waits at its three turns."""
    starts = next(block for block in _blocks(ranks, offsets) if block is not None)
    orders: list[list[Action]] = []
    for block in starts:
        timed = [(start + _INTERVAL * m, kind(stage, m)) for start, kind, stage in block for m in range(microbatches)]
        orders.append([action for _, action in sorted(timed, key=lambda entry: entry[0])])
    return one_copy(v_ranks(ranks), microbatches, orders, "v")


def v_ranks(ranks: int) -> list[int]:
    """The rank of each of the 2 P stages of a V."""
    return [*range(ranks), *reversed(range(ranks))]


def _blocks(ranks: int, offsets: tuple[int, int, int, int]) -> Iterator[list[list[Any]] | None]:
    """Per rank the starts of one microbatch's actions, for growing waits at the turns; None where they collide."""
    for total in range(3 * _INTERVAL):
        for waits in product(range(_INTERVAL), repeat=3):
            if sum(waits) == total:
                yield _block(ranks, offsets, waits)


def _block(ranks: int, offsets: tuple[int, int, int, int], waits: tuple[int, ...]) -> list[list[Any]] | None:
    a, b, c, d = offsets
    last = ranks - 1
    turn_f = a * last + 1 + waits[0]  # F of stage P starts, on the last rank
    turn_i = turn_f + b * last + 1 + waits[1]  # I of stage 2P - 1 starts, on the first rank
    turn_b = turn_i + c * last + 1 + waits[2]  # I of stage P - 1 starts, on the last rank
    block = []
    for rank in range(ranks):
        far = 2 * ranks - 1 - rank
        starts = [(a * rank, forward, rank), (turn_f + b * (last - rank), forward, far),
                  (turn_i + c * rank, input_gradient, far), (turn_b + d * (last - rank), input_gradient, rank)]
        grains = {start % _INTERVAL for start, _, _ in starts}
        if len(grains) < 4:
            return None
        for after, stage in ((starts[2][0], far), (starts[3][0], rank)):
            start = next(after + wait for wait in range(1, _INTERVAL) if (after + wait) % _INTERVAL not in grains)
            grains.add(start % _INTERVAL)
            starts.append((start, weight_gradient, stage))
        block.append(starts)
    return block
