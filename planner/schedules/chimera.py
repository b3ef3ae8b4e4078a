"""Chimera: two 1F1B pipelines that run against each other on the same ranks (Li and Hoefler, 2021).

Stage s lives on ranks s and P - 1 - s; half of the microbatches go down, half up. One unit of P microbatches fills the
warm-up gaps of one direction with the other's actions; more microbatches follow unit by unit, and the forwards of one
unit fill the gaps at the end of the one before ("direct concatenation", section 3.5). Backward is one action.
"""

from __future__ import annotations

from typing import Any

from mipipe.graphs.errors import ProblemError
from mipipe.planner.actions import ActionKind
from mipipe.planner.schedules.list_order import ListProblem, best_order
from mipipe.planner.schedules.pattern import EvenTimes, StagePattern


def chimera(ranks: int, microbatches: int, times: EvenTimes | None = None) -> StagePattern:
    """The pattern for whole units of one microbatch per rank; at most P activations on a rank.

    Raises:
        ProblemError: an odd number of ranks, or microbatches that make no whole units.
    """
    if ranks % 2 or microbatches % ranks:
        raise ProblemError(f"Chimera: {microbatches} microbatches on {ranks} ranks; it exists only for an even number"
                           " of ranks and a multiple of the ranks as microbatches")
    half = ranks // 2
    up = [microbatch % ranks >= half for microbatch in range(microbatches)]
    routes = tuple(tuple(ranks - 1 - stage if turned else stage for turned in up) for stage in range(ranks))
    lines = tuple([m for m in range(microbatches) if up[m] is turned] for turned in (False, True))
    shop = ListProblem(ranks, ranks, microbatches, lambda stage, m: routes[stage][m], EvenTimes(1, 1, 1), ranks,
                       lines, fused=True)

    def in_units(kind: ActionKind, stage: int, microbatch: int) -> tuple[Any, ...]:
        return microbatch // ranks, kind is ActionKind.F, microbatch % half, -stage

    def backward_first(kind: ActionKind, stage: int, microbatch: int) -> tuple[Any, ...]:
        return kind is ActionKind.F, microbatch // ranks, microbatch % half, -stage

    orders = best_order(shop, [in_units, backward_first])
    return StagePattern(tuple((stage, ranks - 1 - stage) for stage in range(ranks)), routes, tuple(map(tuple, orders)),
                        "two-way")
