"""From a shape to a placement: which rank holds the k-th stage, and where the groups are cut into stages.

The groups, in topological order, are cut into as many consecutive stages as the shape has; the cuts start even (equal
counts) or balanced and are then moved, one at a time, while the load of the busiest rank falls. Groups may be left out
of the cuts and float: every rank holds them, and each microbatch takes them where the load is lowest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import PlanningProblem

DESCENT_WORK = 100_000
"""Most trials x stages in improving one set of cuts: counted, so that cuts are the same on a machine at any load."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``rank_of[k]`` is the rank of stage k; ``two_way`` adds a replica of every stage at its mirror image."""

    name: str
    rank_of: tuple[int, ...]
    two_way: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)


def units(problem: PlanningProblem, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Runs of consecutive groups (of the given ones) that must stay together: colocated sets, with whatever lies
    between their ends."""
    chosen = list(range(len(problem.groups)) if groups is None else groups)
    position = {group: at for at, group in enumerate(chosen)}
    end = list(range(len(chosen)))
    for members in problem.colocate:
        places = [position[group] for group in members if group in position]
        for at in range(min(places, default=0), max(places, default=-1) + 1):
            end[at] = max(end[at], max(places))
    result: list[list[int]] = []
    last = -1
    for at, group in enumerate(chosen):
        if at > last:
            result.append([])
        result[-1].append(group)
        last = max(last, end[at])
    return result


def colocated(problem: PlanningProblem) -> list[list[int]]:
    """The groups as units: colocated sets, joined where they overlap, by their first group."""
    leader = list(range(len(problem.groups)))
    for members in problem.colocate:
        old = {leader[g] for g in members}
        leader = [min(old) if name in old else name for name in leader]
    return [[g for g, name in enumerate(leader) if name == first] for first in sorted(set(leader))]


def loads(problem: PlanningProblem) -> list[list[int]]:
    """``loads[group][rank]``: compute time of one average microbatch; 0 for groups on the collective stream."""
    kinds = [device.kind for device in problem.topology.devices]
    result = []
    for group in problem.groups:
        scale = sum(group.loads) / len(group.loads) if group.loads else 1.0
        load = {kind: round(group.times[kind].total_ns * scale) if group.stream is Stream.COMPUTE else 0
                for kind in set(kinds)}
        result.append([load[kind] for kind in kinds])
    return result


def fit_cuts(problem: PlanningProblem, shape: Shape, groups: Sequence[int] | None = None,
             beside: Sequence[tuple[int, Sequence[int]]] = (), *, by_head: bool = False,
             start: Sequence[Sequence[int]] = ()) -> list[list[int]]:
    """Stages as lists of groups: the cuts of the shape with the smallest estimated makespan.

    Resident bytes that do not fit come first, then the load of the busiest rank, then how even the loads are.
    ``groups``: what to cut (default: all), in a topological order. ``beside``: (rank, groups) already placed.
    ``by_head``: to a rank's load over the step comes its head, the forwards before its first stage, so that ranks that
    start late get less. ``start``: stages to begin with (default: cuts by count and by load).
    """
    blocks = units(problem, groups)
    count = shape.num_stages
    work = loads(problem)
    ranks, microbatches = problem.num_ranks, problem.num_microbatches
    base = np.array([float(sum(work[g][r] for where, held in beside if where == r for g in held))
                     for r in range(ranks)])
    base_bytes = np.array([float(sum(problem.groups[g].resident_bytes for where, held in beside if where == r
                                     for g in held)) for r in range(ranks)])
    sizes = [[sum(work[g][r] for g in block) for r in range(ranks)] for block in blocks]
    weight = [sum(problem.groups[g].resident_bytes for g in block) for block in blocks]
    room = np.array([float(resident_room(problem, r)) for r in range(ranks)])
    by_kind = {device.kind: r for r, device in enumerate(problem.topology.devices)}
    kind_sums = {kind: [0, *accumulate(size[r] for size in sizes)] for kind, r in by_kind.items()}
    sums = np.array([kind_sums[device.kind] for device in problem.topology.devices], dtype=np.float64)
    weights = np.array([0, *accumulate(weight)], dtype=np.float64)
    heads = _heads(problem, blocks) if by_head else []
    alike = len(set(map(tuple, sizes))) == 1 == len(set(weight)) and len(by_kind) == 1
    if alike and len(blocks) % count == 0 and not beside and not by_head:
        return [[g for block in blocks[k * len(blocks) // count:(k + 1) * len(blocks) // count] for g in block]
                for k in range(count)]

    stage = np.tile(np.arange(count), 2 if shape.two_way else 1)  # of every holder of a stage, beside ``where`` it is
    where = np.array([*shape.rank_of, *((ranks - 1 - rank for rank in shape.rank_of) if shape.two_way else ())])
    share = 0.5 if shape.two_way else 1.0

    def cost(cuts: Sequence[int]) -> tuple[float, float, float]:
        at = np.array(cuts)
        low, high = at[:-1][stage], at[1:][stage]
        load = base + np.bincount(where, share * (sums[where, high] - sums[where, low]), ranks)
        have = base_bytes + np.bincount(where, weights[high] - weights[low], ranks)
        ends = microbatches * load + (np.array(_waits(shape, cuts, heads, ranks)) if by_head else 0)
        empty = int((at[1:] == at[:-1]).sum())
        return float(np.maximum(0.0, have - room).sum()), float(ends.max()) + empty * 1e-9, float(ends @ ends)

    best: tuple[tuple[float, float, float], list[int]] | None = None
    starts = (_even(len(blocks), count), _balanced([max(size) for size in sizes], count))
    if start:
        held = [sum(block[0] in stage for block in blocks) for stage in map(set, start)]
        starts = ([0, *accumulate(held)],)  # type: ignore[assignment]
    for first in starts:
        cuts = _descend(first, cost)
        value = cost(cuts)
        if best is None or value < best[0]:
            best = (value, cuts)
    assert best is not None
    cuts = best[1]
    return [[g for b in range(cuts[k], cuts[k + 1]) for g in blocks[b]] for k in range(count)]


def _heads(problem: PlanningProblem, blocks: Sequence[Sequence[int]]) -> list[int]:
    """For every block the forwards of one microbatch before it, one after the other, on the fastest device."""
    ahead = [sum(min(times.f_ns for times in problem.groups[g].times.values()) for g in block) for block in blocks]
    return [0, *accumulate(ahead)]


def _waits(shape: Shape, cuts: Sequence[int], heads: Sequence[int], ranks: int) -> list[int]:
    """For every rank the head of its first stage; 0 for a rank without any."""
    first = [-1] * ranks
    for k, rank in enumerate(shape.rank_of):
        if cuts[k] < cuts[k + 1]:
            for where in (rank, ranks - 1 - rank) if shape.two_way else (rank,):
                first[where] = heads[cuts[k]] if first[where] < 0 else min(first[where], heads[cuts[k]])
    return [max(0, wait) for wait in first]


def _even(blocks: int, count: int) -> list[int]:
    return [round(k * blocks / count) for k in range(count + 1)]


def _balanced(sizes: list[int], count: int) -> list[int]:
    """Cuts where the running total passes equal shares."""
    total = sum(sizes)
    cuts, passed = [0], 0
    for index, size in enumerate(sizes):
        while len(cuts) < count and (passed + size / 2) * count >= total * len(cuts):
            cuts.append(index)
        passed += size
    return cuts + [len(sizes)] * (count + 1 - len(cuts))


def _descend(cuts: list[int], cost: Callable[[Sequence[int]], tuple[float, float, float]]) -> list[int]:
    """Move single cuts, then runs of cuts, while the cost falls."""
    value = cost(cuts)
    improved = True
    left = DESCENT_WORK // len(cuts)
    while improved and left > 0:
        clock.ask()
        improved = False
        for low in range(1, len(cuts) - 1):
            if left <= 0:
                break
            for high in range(low, min(len(cuts) - 1, low + 12)):
                for step in (-1, 1):
                    trial = [cut + step if low <= k <= high else cut for k, cut in enumerate(cuts)]
                    if any(a > b for a, b in pairwise(trial)):
                        continue
                    left -= 1
                    new = cost(trial)
                    if new < value:
                        cuts, value, improved = trial, new, True
    return cuts


def split_streams(problem: PlanningProblem, groups: Sequence[int]) -> list[list[int]]:
    """A stage as runs of groups on one stream, in order."""
    result: list[list[int]] = []
    for group in groups:
        if not result or problem.groups[result[-1][-1]].stream is not problem.groups[group].stream:
            result.append([])
        result[-1].append(group)
    return result


def place(problem: PlanningProblem, shape: Shape, parts: Sequence[Sequence[int]]) -> Placement:
    """The placement of a shape with given stages; microbatches take the two directions in turn."""
    last = problem.num_ranks - 1
    stages, routes = [], []
    for rank, groups in zip(shape.rank_of, parts, strict=True):
        for part in split_streams(problem, groups):
            ranks = tuple(sorted({rank, last - rank})) if shape.two_way else (rank,)
            stages.append(Stage(tuple(part), ranks))
            routes.append(tuple(last - rank if shape.two_way and m % 2 else rank
                                for m in range(problem.num_microbatches)))
    return Placement(tuple(stages), tuple(routes), shape.name)


def place_spread(problem: PlanningProblem, shape: Shape, ends: Sequence[int],
                 encoder: Sequence[int] = ()) -> Placement:
    """A shape for all groups but the ends and the encoder, which every rank holds; each microbatch takes them where the
    load is lowest.

    ``ends``: the first group, the last, or both; the encoder's groups come before all others. In a two-way shape every
    second microbatch is routed as the mirror image of the one before it.
    """
    rest = [group for group in range(len(problem.groups)) if group not in ends and group not in encoder]
    return deal_ends(problem, place(problem, shape, fit_cuts(problem, shape, rest)), ends, encoder,
                     two_way=shape.two_way)


def deal_ends(problem: PlanningProblem, base: Placement, ends: Sequence[int], encoder: Sequence[int] = (), *,
              two_way: bool) -> Placement:
    """A placement of all other groups, with the ends and the encoder dealt out as `place_spread` does."""
    work = loads(problem)
    load = [0.0] * problem.num_ranks
    for stage, route in zip(base.stages, base.routes, strict=True):
        for rank in route:
            load[rank] += sum(work[group][rank] for group in stage.groups)
    floating = [*([encoder] if encoder else []), *([end] for end in ends)]
    routes = {tuple(part): route for part, route in _deal(problem, two_way, floating, load)}
    first = [(tuple(part), routes[tuple(part)]) for part in floating if part[0] == 0 or part is encoder]
    last = [(tuple(part), routes[tuple(part)]) for part in floating if tuple(part) not in dict(first)]
    stages, ways = [], []
    for part, way in first:
        for run in split_streams(problem, part):
            stages.append(Stage(tuple(run), tuple(sorted(set(way)))))
            ways.append(tuple(way))
    stages += base.stages
    ways += base.routes
    for part, way in last:
        stages.append(Stage(part, tuple(sorted(set(way)))))
        ways.append(tuple(way))
    return Placement(tuple(stages), tuple(ways), f"{base.name}+spread")


def _deal(problem: PlanningProblem, two_way: bool, parts: Sequence[Sequence[int]],
          load: list[float]) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Each floating part, heaviest first, with a rank for every microbatch: where the load is lowest then.

    Ranks that are equally loaded take turns. ``load`` is the time of the whole step and is added to.
    """
    times = [[[group.times[device.kind].total_ns for device in problem.topology.devices]
              for group in (problem.groups[g] for g in part)] for part in parts]
    order = sorted(range(len(parts)), key=lambda at: -sum(row[0] for row in times[at]))
    step = 2 if two_way else 1
    for at in order:
        clock.ask()
        route = [0] * problem.num_microbatches
        recent = [-1] * problem.num_ranks
        for m in range(0, problem.num_microbatches, step):
            rank = min(range(problem.num_ranks), key=lambda r: (load[r], recent[r], r))
            for offset in range(min(step, problem.num_microbatches - m)):
                where = problem.num_ranks - 1 - rank if offset else rank
                route[m + offset] = where
                for g, row in zip(parts[at], times[at], strict=True):
                    sizes = problem.groups[g].loads
                    load[where] += row[where] * (sizes[m + offset] if sizes else 1.0)
                recent[where] = m
        yield parts[at], route


def earliest_end(problem: PlanningProblem, placement: Placement, heads: Sequence[int]) -> float:
    """No rank's work can end before this: the largest over ranks of load (at its share in overlapped pairs) and
    earliest start.

    ``heads``: per group the earliest start of its first forward (`mipipe.planner.bounds.over_placements.facts_of`).
    """
    ratio = float(pair_gain(problem).ratio)
    load = [0.0] * problem.num_ranks
    first: dict[int, int] = {}
    for stage, route in zip(placement.stages, placement.routes, strict=True):
        begin = min(heads[g] for g in stage.groups)
        groups = [problem.groups[g] for g in stage.groups if problem.groups[g].stream is Stream.COMPUTE]
        for rank, count in Counter(route).items():
            kind = problem.topology.devices[rank].kind
            for group in groups:
                times = group.times[kind]
                phases = (times.f_ns, times.i_ns or 0, times.w_ns or 0, times.f_ns if stage.recompute else 0)
                load[rank] += ratio * (sum(round(phase * size) for size, where in zip(group.loads, route, strict=True)
                                           if where == rank for phase in phases)
                                       if group.loads else count * sum(phases))
            first[rank] = min(first.get(rank, begin), begin)
    return max(load[rank] + begin for rank, begin in first.items())
