"""What the exact model is built from: jobs of all groups, their arcs, transfers and pairs; plain numbers, no solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.jobs.dependencies import dependencies, kinds_of
from mipipe.planner.jobs.longest import heads_of, tails_of
from mipipe.planner.jobs.memory import effects
from mipipe.planner.jobs.stages import StageView, groups_apart
from mipipe.planner.placements.cuts import colocated
from mipipe.planner.problem import Group, PlanningProblem

Operation = tuple[int, ActionKind, int]
"""(group, kind, microbatch)."""


@dataclass(frozen=True, slots=True)
class MipTransfer:
    """A value that may have to travel from the producer job to the consumer; by channel, in units: it takes
    ``times[d, e]`` to arrive and occupies the channel for ``occupied[d, e]`` of them."""

    producer: int
    consumer: int
    times: dict[tuple[int, int], float]
    occupied: dict[tuple[int, int], float]


@dataclass(frozen=True, slots=True)
class Sketch:
    """The numbers of `mipipe.planner.milp.order.exact`; times in ``unit`` nanoseconds, ``duration[j][d]`` by device.

    ``whole``: every time is a whole number of units, so that makespans are as well.
    ``arcs`` hold without a transfer (one unit, or FIFO); ``pairs`` are the jobs whose order is open if they meet on a
    device; ``meetings`` the pairs of transfers that could meet on a channel.
    """

    problem: PlanningProblem
    unit: float
    whole: bool
    units: list[list[int]]
    jobs: list[Operation]
    unit_of: list[int]
    stream: list[Stream]
    duration: list[list[float]]
    arcs: list[tuple[int, int]]
    transfers: list[MipTransfer]
    pairs: list[tuple[int, int]]
    meetings: list[tuple[int, int]]
    head: list[float]
    tail: list[float]
    alloc: list[int]
    free: list[int]
    workspace: list[int]
    resident: list[int]
    horizon: float
    reach: np.ndarray
    interchangeable: bool

    def precedes(self, a: int, b: int) -> bool:
        """Whether arcs and transfers put a before b."""
        return bool(self.reach[a, b])


def sketch(problem: PlanningProblem, horizon_ns: int | None) -> Sketch:
    """All numbers of the exact model of a problem."""
    units, apart = colocated(problem), groups_apart(problem)
    unit_of_group = {g: u for u, members in enumerate(units) for g in members}
    jobs = [(g, kind, m) for m in range(problem.num_microbatches) for g in range(len(problem.groups))
            for kind in kinds_of(apart, g)]
    index = {job: j for j, job in enumerate(jobs)}
    kinds = [device.kind for device in problem.topology.devices]
    exact = [[_duration(problem.groups[g], kind, device, m) for device in kinds] for g, kind, m in jobs]
    arcs, moved = _dependencies(apart, index, unit_of_group)
    times = [value for row in exact for value in row] + [value for _, _, table in moved for value in table.values()]
    times += [problem.topology.link(*pair).latency_ns for _, _, table in moved for pair in table]
    unit = math.gcd(*times) or 1
    horizon = horizon_ns if horizon_ns is not None else sum(map(max, exact)) + sum(
        max(table.values(), default=0) for _, _, table in moved)
    whole = horizon // unit <= 10**6
    if not whole:
        unit = horizon // 10**6
    links = [*arcs, *((a, b) for a, b, _ in moved)]
    head, tail, reach = _closure([min(row) for row in exact], links)
    memory = [effects(apart, g) for g in range(len(problem.groups))]
    alloc = [int(memory[g][kind].taken[m]) for g, kind, m in jobs]
    free = [int(memory[g][kind].returned[m]) for g, kind, m in jobs]
    stream = [problem.groups[g].stream for g, _, _ in jobs]
    meets = [(a, b) for a, b in combinations(range(len(jobs)), 2)
             if stream[a] is stream[b] and not reach[a, b] and not reach[b, a]]
    transfers = [MipTransfer(a, b, {pair: value / unit for pair, value in table.items()},
                             {pair: (value - problem.topology.link(*pair).latency_ns) / unit
                              for pair, value in table.items()}) for a, b, table in moved]
    return Sketch(problem, unit, whole, units, jobs, [unit_of_group[g] for g, _, _ in jobs], stream,
                  [[value / unit for value in row] for row in exact], arcs, transfers, meets,
                  _meetings(transfers, exact, unit, len(set(stream))), [value / unit for value in head],
                  [value / unit for value in tail], alloc, free,
                  [apart.workspace_of(kind, g) for g, kind, _ in jobs],
                  [sum(problem.groups[g].resident_bytes for g in members) for members in units], horizon / unit, reach,
                  not problem.topology.overrides)


def num_jobs(problem: PlanningProblem) -> int:
    """The exact model's jobs: every group's phases for every microbatch."""
    apart = groups_apart(problem)
    return problem.num_microbatches * sum(len(kinds_of(apart, g)) for g in range(len(problem.groups)))


def _duration(group: Group, kind: ActionKind, device: str, microbatch: int) -> int:
    phases = group.times[device]
    amount = {ActionKind.F: phases.f_ns, ActionKind.I: phases.i_ns, ActionKind.W: phases.w_ns}[kind] or 0
    return round(amount * group.loads[microbatch]) if group.loads else amount


def _dependencies(apart: StageView, index: dict[Operation, int], unit_of: dict[int, int],
                  ) -> tuple[list[tuple[int, int]], list[tuple[int, int, dict[tuple[int, int], int]]]]:
    """Arcs within a unit and between equal microbatches; data arcs between units with their transfer times."""
    problem = apart.problem
    arcs: set[tuple[int, int]] = set()
    sizes: list[tuple[int, int, int]] = []
    if not any(group.loads for group in problem.groups):
        arcs |= {(j, index[g, kind, m + 1]) for (g, kind, m), j in index.items() if (g, kind, m + 1) in index}
    for one in dependencies(apart):
        (maker, made), (reader, read) = one.maker, one.reader
        ends = [(index[maker, made, m], index[reader, read, m]) for m in range(problem.num_microbatches)]
        if unit_of[maker] == unit_of[reader]:
            arcs.update(ends)
        else:
            sizes += [(*pair, size) for pair, size in zip(ends, one.num_bytes, strict=True)]
    ranks = range(problem.num_ranks)
    moved = [(a, b, {(d, e): problem.topology.transfer_ns(d, e, size) for d in ranks for e in ranks if d != e})
             for a, b, size in sizes]
    return sorted(arcs), moved


def _closure(durations: list[int], links: list[tuple[int, int]]) -> tuple[list[int], list[int], np.ndarray]:
    """Heads, tails (from start to the end of the step) and reachability over the links."""
    count = len(durations)
    found = heads_of(durations, ((a, b, 0) for a, b in links))
    reach = np.zeros((count, count), dtype=bool)
    for j in reversed(found.order):
        for b, _ in found.after[j]:
            reach[j, b] = True
            reach[j] |= reach[b]
    return found.heads, tails_of(found, durations), reach


def _meetings(transfers: list[MipTransfer], exact: list[list[int]], unit: float, streams: int) -> list[tuple[int, int]]:
    """Pairs of transfers that could wait for each other.

    None do if every job sends once, takes as long as any transfer occupies its channel, and all senders of a device
    share a stream.
    """
    longest = max((value for moved in transfers for value in moved.occupied.values()), default=0.0)
    shortest = min((min(exact[moved.producer]) for moved in transfers), default=0) / unit
    once = len({moved.producer for moved in transfers}) == len(transfers)
    if not longest or (once and streams == 1 and longest <= shortest):
        return []
    return list(combinations(range(len(transfers)), 2))
