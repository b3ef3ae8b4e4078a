"""V-shaped schedules with controllable memory (Qi et al., Pipeline Parallelism with Controllable Memory, 2024).

Two stages per rank on a V (rank r holds r and 2P - 1 - r), one grain per F, I and W of a half stage. A *building block*
gives every action of one microbatch a start: F goes down the ranks with ``a`` grains per rank, up with ``b``, I down
with ``c`` and up with ``d``. It repeats every six grains, the work of one microbatch on a rank, so it must put the six
actions of a rank into six different grains modulo six. The memory of a rank is the sum of its activations' lifetimes
over six: (P - 1 - r)(a + d) + (P - 1 + r)(b + c) grains. (4, 2, 4, 2) holds as much as 1F1B (the paper's V-ZB),
(2, 1, 2, 1) half of it (V-Half), (1, 1, 1, 1) a third (V-Min).

V-Half and V-Min are the repeated block with its ends pulled together, action by action as in the authors' own code
(`mipipe.planner.schedules.v_reorder`). ZB-V is the better of the authors' greedy rule
(`mipipe.planner.schedules.v_greedy`) and of the block with its weight gradients put where a rank would wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from mipipe.planner.actions import Action
from mipipe.planner.schedules.list_order import ListProblem, best_order
from mipipe.planner.schedules.pattern import (
    EvenTimes,
    StagePattern,
    forward,
    input_gradient,
    one_copy,
    weight_gradient,
)
from mipipe.planner.schedules.refill import refill_weights
from mipipe.planner.schedules.v_greedy import greedy_v
from mipipe.planner.schedules.v_reorder import INTERVAL, pulled_together

_MANY_ACTIONS = 30_000
"""Beyond these, ZB-V is the greedy rule alone with both switches on: a tenth of the time."""


def v_half(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """About half of 1F1B's activations."""
    return _pulled(ranks, microbatches, (2, 1, 2, 1), (0, 0 if ranks % 2 else 3, 1))


def v_min(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """About a third of 1F1B's activations."""
    return _pulled(ranks, microbatches, (1, 1, 1, 1), (0, 0 if ranks % 3 else 2, 0))


def zb_v(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """1F1B's activations and, where F, I and W are equal, no bubble between a rank's first and last action."""
    times = times or EvenTimes(1, 1, 1)
    half = replace(times, comm=2 * times.comm)
    many = 2 * 3 * ranks * microbatches > _MANY_ACTIONS  # F, I and W of both stages
    switches = [(True, True)] if many else [(one, two) for one in (True, False) for two in (True, False)]
    tried = [greedy_v(ranks, microbatches, half, pair) for pair in switches]
    orders = [order for order in tried if order is not None]
    if not many or not orders:
        block = repeated_block(ranks, microbatches, (4, 2, 4, 2)).orders
        where = v_ranks(ranks)
        shop = ListProblem(ranks, 2 * ranks, microbatches, lambda stage, _: where[stage], half, 2 * ranks,
                           (range(microbatches),))
        refilled = [refill_weights(shop, block, patience) for patience in (0.3, 0.6, 1.0)]
        orders += [[list(order) for order in block], *(order for order in refilled if order is not None)]
        orders = [best_order(shop, given=orders)]
    return one_copy(v_ranks(ranks), microbatches, orders[0], "v")


def _pulled(ranks: int, microbatches: int, offsets: tuple[int, int, int, int], waits: tuple[int, ...]) -> StagePattern:
    """The block with its ends pulled together; the authors' waits at its three turns keep its grains apart."""
    block = _block(ranks, offsets, waits)
    assert block is not None
    starts = [[start for start, _, _ in row[:4]] for row in block]
    return one_copy(v_ranks(ranks), microbatches, pulled_together(starts, microbatches), "v")


def repeated_block(ranks: int, microbatches: int, offsets: tuple[int, int, int, int]) -> StagePattern:
    """The pattern of a building block with the given offsets per rank, with the least waits at its three turns."""
    starts = next(block for block in _blocks(ranks, offsets) if block is not None)
    orders: list[list[Action]] = []
    for block in starts:
        timed = [(start + INTERVAL * m, kind(stage, m)) for start, kind, stage in block for m in range(microbatches)]
        orders.append([action for _, action in sorted(timed, key=lambda entry: entry[0])])
    return one_copy(v_ranks(ranks), microbatches, orders, "v")


def v_ranks(ranks: int) -> list[int]:
    """The rank of each of the 2 P stages of a V."""
    return [*range(ranks), *reversed(range(ranks))]


def _blocks(ranks: int, offsets: tuple[int, int, int, int]) -> Iterator[list[list[Any]] | None]:
    """Per rank the starts of one microbatch's actions, for growing waits at the turns; None where they collide."""
    for total in range(3 * INTERVAL):
        for waits in product(range(INTERVAL), repeat=3):
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
        grains = {start % INTERVAL for start, _, _ in starts}
        if len(grains) < 4:
            return None
        for after, stage in ((starts[2][0], far), (starts[3][0], rank)):
            start = next(after + wait for wait in range(1, INTERVAL) if (after + wait) % INTERVAL not in grains)
            grains.add(start % INTERVAL)
            starts.append((start, weight_gradient, stage))
        block.append(starts)
    return block
