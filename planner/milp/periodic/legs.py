"""The legs of a placement: the ways of its microbatches over consecutive ranks. Plain numbers, no solver.

What `mipipe.planner.milp.periodic.staircase` has to place: a chain is one leg, a V two, a two-way pipeline one each
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.jobs.memory import capacity
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.milp.periodic.pattern import route_names, roving

MOST_CLASSES = 2
"""Routes up to which microbatches share one pattern."""


@dataclass(frozen=True, slots=True)
class Leg:
    """Stages on consecutive ranks, ``direction`` 1 or -1; durations and bytes of the longest and largest of them.

    ``lag_ns``: of a transfer on the way (forwards or backwards), ``turn_ns``: of that to the next leg.
    """

    route: int
    stages: tuple[int, ...]
    direction: int
    duration_ns: dict[ActionKind, int]
    lag_ns: int
    turn_ns: int
    saved_fi: int
    saved_fw: int
    saved_iw: int


@dataclass(frozen=True, slots=True)
class Staircase:
    """The legs of a placement over ranks ``low .. low + ranks - 1``, what they have of memory, and their load per
    microbatch of a route."""

    low: int
    ranks: int
    legs: tuple[Leg, ...]
    capacity: int
    load_ns: int

    @property
    def least_period_ns(self) -> int:
        """What one microbatch of every route takes on a rank, all stages as long as the longest of their leg."""
        return max(self.load_ns, sum(sum(leg.duration_ns.values()) for leg in self.legs))


def staircase_of(view: StageView) -> Staircase | None:
    """The legs of a placement; None where it is no staircase (branches, collectives, recomputation, other routes, or
    stages dealt to all ranks between others)."""
    chained = all(edge.target == edge.source + 1 for edge in view.edges)
    if (not chained or any(stream is not Stream.COMPUTE for stream in view.streams)
            or any(stage.recompute for stage in view.placement.stages)):
        return None
    names, rove = route_names(view), roving(view)
    kept = [s for s in range(view.num_stages) if not rove[s]]
    if not kept or kept != list(range(kept[0], kept[-1] + 1)):
        return None
    if len(set(names)) > MOST_CLASSES or any(view.i_ns[s] is None for s in kept):
        return None
    legs: list[Leg] = []
    spans = set()
    for name in sorted(set(names)):
        runs = _runs([(s, view.rank(s, name)) for s in kept])
        ends = [run[-1][1] for run in runs], [run[0][1] for run in runs[1:]]
        for number, run in enumerate(runs):
            ranks = [rank for _, rank in run]
            spans.add((min(ranks), max(ranks)))
            turn = _lag(view, run[-1][0], ends[0][number], ends[1][number]) if number + 1 < len(runs) else 0
            legs.append(_leg(view, name, run, turn))
    if len(spans) == 2 and len(set(names)) == 2:  # twins side by side: one stands for the other
        first = sorted(set(names))[0]
        legs = [leg for leg in legs if leg.route == first]
        spans = {(min(ranks), max(ranks)) for ranks in [[view.rank(s, first) for s in leg.stages] for leg in legs]}
    if len(spans) != 1:
        return None
    low, high = spans.pop()
    if high == low:
        return None
    load = [0] * view.problem.num_ranks
    for s in range(view.num_stages):
        for m, rank in enumerate(view.placement.routes[s]):
            load[rank] += sum(phase[m] for phase in (view.f_ns[s], view.i_ns[s], view.w_ns[s]) if phase is not None)
    rooms = [capacity(view, rank) for rank in range(low, high + 1)]
    return Staircase(low, high - low + 1, tuple(legs), min(rooms), -(-max(load) // max(map(names.count, set(names)))))


def _runs(way: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """A microbatch's (stage, rank) pairs in runs over consecutive ranks."""
    runs = [[way[0]]]
    for one, two in pairwise(way):
        step = two[1] - one[1]
        run = runs[-1]
        if abs(step) == 1 and (len(run) == 1 or run[1][1] - run[0][1] == step):
            run.append(two)
        else:
            runs.append([two])
    return runs


def _lag(view: StageView, stage: int, one: int, two: int) -> int:
    """The longer of a transfer forth and of one back between a stage and the next."""
    topology = view.problem.topology
    return max((max(topology.transfer_ns(one, two, max(edge.num_bytes)),
                    topology.transfer_ns(two, one, max(edge.grad_bytes or (0,))))
                for edge in (view.edges[e] for e in view.outgoing[stage])), default=0) if one != two else 0


def _leg(view: StageView, name: int, run: Sequence[tuple[int, int]], turn_ns: int) -> Leg:
    stages = tuple(s for s, _ in run)
    phases = {ActionKind.F: view.f_ns, ActionKind.I: view.i_ns, ActionKind.W: view.w_ns}
    longest = {kind: max(row[name] for s in stages if (row := table[s]) is not None)
               for kind, table in phases.items() if any(table[s] is not None for s in stages)}
    lag = max((_lag(view, one[0], one[1], two[1]) for one, two in pairwise(run)), default=0)
    return Leg(name, stages, run[1][1] - run[0][1] if len(run) > 1 else 1, longest, lag, turn_ns,
               *(max(table[s][name] for s in stages) for table in (view.saved_fi, view.saved_fw, view.saved_iw)))
