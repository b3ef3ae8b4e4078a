"""What a published schedule has every rank do and hold, whatever its stages are: counts of microbatches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.milp.placement.mixed import Held, RankOrders
from mipipe.planner.schedules.pattern import StagePattern

_FORWARD = frozenset({ActionKind.F, ActionKind.OVERLAP_F_B})
_BACKWARD = frozenset({ActionKind.I, ActionKind.B, ActionKind.OVERLAP_F_B})


def orders_of(pattern: StagePattern) -> tuple[RankOrders, ...]:
    """What every rank does and holds."""
    return tuple(_orders(order, [stage for stage, ranks in enumerate(pattern.stage_ranks) if rank in ranks])
                 for rank, order in enumerate(pattern.orders))


def _orders(order: Sequence[Action], stages: list[int]) -> RankOrders:
    ahead, behind = Counter[int](), Counter[int]()
    forwards, backwards = (Counter[tuple[int, bool]](), Counter[tuple[int, bool]]())
    turn = None
    for action in order:
        in_pair = action.partner is not None
        back = action.partner[0] if action.partner is not None else action.stage
        if action.kind in _FORWARD:
            forwards[action.stage, in_pair] += 1
            if turn is None and not in_pair:
                ahead[action.stage] += 1
            last = action.stage
            behind.clear()
        if action.kind in _BACKWARD:
            backwards[back, in_pair] += 1
            turn = back if turn is None else turn
            end = back
            if not in_pair:
                behind[back] += 1

    def counted(found: Counter[tuple[int, bool]]) -> tuple[tuple[int, int, int], ...]:
        return tuple((stage, found[stage, False], found[stage, True]) for stage in stages)

    assert turn is not None
    return RankOrders(_most(order, stages), counted(forwards), counted(backwards), tuple(ahead.items()),
                      tuple(behind.items()), order[0].stage, turn, last, end)


def _most(order: Sequence[Action], stages: list[int]) -> tuple[Held, ...]:
    """Rows are moments at which an action begins, columns the counts (fi, fw, iw) of every stage."""
    at = {stage: 3 * number for number, stage in enumerate(stages)}
    now = np.zeros(3 * len(stages), dtype=np.int64)
    rows = {tuple(now.tolist())}
    for action in order:
        place = at[action.stage]
        if action.kind in (ActionKind.F, ActionKind.OVERLAP_F_B):
            now[place:place + 2] += 1
        elif action.kind is ActionKind.I:
            now[place + 2] += 1
        rows.add(tuple(now.tolist()))
        if action.kind is ActionKind.I:
            now[place] -= 1
        elif action.kind is ActionKind.W:
            now[place + 1:place + 3] -= 1
        elif action.kind in (ActionKind.B, ActionKind.OVERLAP_F_B):
            back = at[action.stage if action.partner is None else action.partner[0]]
            now[back:back + 2] -= 1
    every = np.array(sorted(rows, reverse=True))
    kept: list[np.ndarray] = []
    for row in every:  # whatever is above a row in everything comes before it
        if not any((other >= row).all() for other in kept):
            kept.append(row)
    return tuple(tuple((stage, *map(int, row[place:place + 3])) for stage, place in at.items())  # type: ignore[misc]
                 for row in kept)
