"""Known placement shapes, fitted to a problem: chain, V, interleaved, wave, two-way, two-way V, encoders apart.

A shape says which rank holds the k-th of its stages, in one or two directions. The groups, in topological order, are
cut into that many consecutive stages; the cuts start even (equal counts) or balanced and are then moved, one at a time,
while the load of the busiest rank falls. Groups without resident bytes at either end (an embedding or a
head whose parameters are not counted, or that fit everywhere) may be spread over several ranks by microbatch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from mipipe.planner.actions import Stream
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import PlanningProblem

DESCENT_S = 1.0
"""Most seconds one set of cuts is improved: enough for 100 stages."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``rank_of[k]`` is the rank of stage k; ``two_way`` adds a replica of every stage at its mirror image."""

    name: str
    rank_of: tuple[int, ...]
    two_way: bool = False

    @property
    def num_stages(self) -> int:
        return len(self.rank_of)


def shapes(ranks: int, name: str = "free") -> list[Shape]:
    """The shapes a placement option allows, simplest first."""
    forth = tuple(range(ranks))
    back = forth[::-1]
    one = [Shape("chain", forth), Shape("v", forth + back), Shape("interleaved", forth * 2),
           Shape("interleaved", forth * 3),
           Shape("interleaved", forth * 4), Shape("wave", (forth + back) * 2), Shape("wave", (forth + back) * 3)]
    two = [Shape("two-way", forth, True), Shape("two-way-v", forth + back, True),
           Shape("two-way-interleaved", forth * 2, True)]
    found = one + (two if ranks % 2 == 0 or ranks == 1 else [Shape("two-way", forth, True)])
    if ranks == 1:
        found = one[:1]
    return [shape for shape in found if name in ("free", shape.name)]


def units(problem: PlanningProblem) -> list[list[int]]:
    """Runs of consecutive groups that must stay together: colocated sets, with whatever lies between their ends."""
    end = list(range(len(problem.groups)))
    for members in problem.colocate:
        for group in range(min(members), max(members) + 1):
            end[group] = max(end[group], max(members))
    result: list[list[int]] = []
    last = -1
    for group in range(len(problem.groups)):
        if group > last:
            result.append([])
        result[-1].append(group)
        last = max(last, end[group])
    return result


def loads(problem: PlanningProblem) -> list[list[int]]:
    """``loads[group][rank]``: compute time of one average microbatch; 0 for groups on the collective stream."""
    result = []
    for group in problem.groups:
        scale = sum(group.loads) / len(group.loads) if group.loads else 1.0
        result.append([round(group.times[device.kind].total_ns * scale) if group.stream is Stream.COMPUTE else 0
                       for device in problem.topology.devices])
    return result


def fit_cuts(problem: PlanningProblem, shape: Shape, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Stages as lists of groups: the cuts of the shape with the smallest estimated makespan.

    Resident bytes that do not fit come first, then the load of the busiest rank, then how even the loads are.
    """
    wanted = set(range(len(problem.groups)) if groups is None else groups)
    blocks = [block for block in units(problem) if wanted.issuperset(block)]
    count = shape.num_stages
    work = loads(problem)
    sizes = [[sum(work[g][r] for g in block) for r in range(problem.num_ranks)] for block in blocks]
    weight = [sum(problem.groups[g].resident_bytes for g in block) for block in blocks]
    room = [resident_room(problem, r) for r in range(problem.num_ranks)]
    by_kind = {device.kind: r for r, device in enumerate(problem.topology.devices)}
    kind_sums = {kind: [0, *accumulate(size[r] for size in sizes)] for kind, r in by_kind.items()}
    sums = [kind_sums[device.kind] for device in problem.topology.devices]
    weights = [0, *accumulate(weight)]
    if len(set(map(tuple, sizes))) == 1 == len(set(weight)) and len(blocks) % count == 0 and len(by_kind) == 1:
        return [[g for block in blocks[k * len(blocks) // count:(k + 1) * len(blocks) // count] for g in block]
                for k in range(count)]

    def cost(cuts: Sequence[int]) -> tuple[float, float, float]:
        load = [0.0] * problem.num_ranks
        bytes_ = [0.0] * problem.num_ranks
        for k in range(count):
            low, high = cuts[k], cuts[k + 1]
            rank = shape.rank_of[k]
            ends = [(rank, 0.5), (problem.num_ranks - 1 - rank, 0.5)] if shape.two_way else [(rank, 1.0)]
            for where, share in ends:
                load[where] += share * (sums[where][high] - sums[where][low])
                bytes_[where] += weights[high] - weights[low]
        over = sum(max(0.0, have - limit) for have, limit in zip(bytes_, room, strict=True))
        empty = sum(cuts[k] == cuts[k + 1] for k in range(count))
        estimate = max(problem.num_microbatches * l for l in load)  # noqa: E741
        return over, estimate + empty * 1e-9, sum(l * l for l in load)  # noqa: E741

    best: tuple[tuple[float, float, float], list[int]] | None = None
    for start in (_even(len(blocks), count), _balanced([max(size) for size in sizes], count)):
        cuts = _descend(start, cost)
        value = cost(cuts)
        if best is None or value < best[0]:
            best = (value, cuts)
    assert best is not None
    cuts = best[1]
    return [[g for b in range(cuts[k], cuts[k + 1]) for g in blocks[b]] for k in range(count)]


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
    end = time.monotonic() + DESCENT_S
    rounds = 0
    while improved and rounds < 200 and time.monotonic() < end:
        improved = False
        rounds += 1
        for low in range(1, len(cuts) - 1):
            if time.monotonic() > end:
                break
            for high in range(low, min(len(cuts) - 1, low + 12)):
                for step in (-1, 1):
                    trial = [cut + step if low <= k <= high else cut for k, cut in enumerate(cuts)]
                    if any(a > b for a, b in pairwise(trial)):
                        continue
                    new = cost(trial)
                    if new < value:
                        cuts, value, improved = trial, new, True
    return cuts


def resident_room(problem: PlanningProblem, rank: int) -> int:
    """Bytes of weights and optimizer state a rank may hold."""
    limit = problem.limits.resident_bytes
    memory = problem.topology.devices[rank].memory_bytes
    return memory if limit is None else min(limit, memory)


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


def resident_bytes(problem: PlanningProblem, placement: Placement) -> list[int]:
    """Bytes of weights and optimizer state on every rank."""
    held = [0] * problem.num_ranks
    for stage in placement.stages:
        for rank in stage.ranks:
            held[rank] += sum(problem.groups[group].resident_bytes for group in stage.groups)
    return held


def resident_fits(problem: PlanningProblem, placement: Placement) -> bool:
    """Whether every rank has room for the weights and states of its stages."""
    return all(held <= resident_room(problem, rank) for rank, held in enumerate(resident_bytes(problem, placement)))


def light_ends(problem: PlanningProblem) -> list[int]:
    """The first and the last group, where they may run anywhere: in no colocated set, one stream, on every rank they
    would fit beside an even share of the rest."""
    total = sum(group.resident_bytes for group in problem.groups)
    tied = {group for members in problem.colocate for group in members}
    found = []
    for index in (0, len(problem.groups) - 1):
        group = problem.groups[index]
        share = (total - group.resident_bytes) // problem.num_ranks
        room = min(resident_room(problem, rank) for rank in range(problem.num_ranks))
        if index not in tied and group.stream is Stream.COMPUTE and share + group.resident_bytes <= room:
            found.append(index)
    return found if len(problem.groups) > problem.num_ranks + 1 else []


def place_spread(problem: PlanningProblem, shape: Shape, ends: Sequence[int]) -> Placement:
    """A shape for all groups but the ends, which every rank holds; each microbatch takes them where the load is lowest.

    In a two-way shape every second microbatch is routed as the mirror image of the one before it.
    """
    rest = [group for group in range(len(problem.groups)) if group not in ends]
    base = place(problem, shape, fit_cuts(problem, shape, rest))
    work = loads(problem)
    load = [0] * problem.num_ranks
    for stage, route in zip(base.stages, base.routes, strict=True):
        for rank in route:
            load[rank] += sum(work[group][rank] for group in stage.groups)
    routes: dict[int, list[int]] = {end: [0] * problem.num_microbatches for end in ends}
    step = 2 if shape.two_way else 1
    heavy = sorted(ends, key=lambda end: -work[end][0])
    for end in heavy:
        recent = [-1] * problem.num_ranks
        for m in range(0, problem.num_microbatches, step):
            rank = min(range(problem.num_ranks), key=lambda r: (load[r], recent[r], r))
            for offset in range(min(step, problem.num_microbatches - m)):
                where = problem.num_ranks - 1 - rank if offset else rank
                routes[end][m + offset] = where
                load[where] += work[end][where]
                recent[where] = m
    used = {end: tuple(sorted(set(route))) for end, route in routes.items()}
    first = [(Stage((end,), used[end]), tuple(routes[end])) for end in ends if end == 0]
    last = [(Stage((end,), used[end]), tuple(routes[end])) for end in ends if end != 0]
    stages = [*first, *zip(base.stages, base.routes, strict=True), *last]
    return Placement(tuple(stage for stage, _ in stages), tuple(route for _, route in stages), f"{shape.name}+spread")


def propose(problem: PlanningProblem, name: str = "free") -> Iterator[Placement]:
    """Placements of the allowed shapes whose weights fit, simplest first."""
    return (placement for placement in all_placements(problem, name) if resident_fits(problem, placement))


def all_placements(problem: PlanningProblem, name: str = "free") -> Iterator[Placement]:
    """Placements of the allowed shapes, whether or not their weights fit."""
    ends = light_ends(problem)
    blocks = len(units(problem))
    for shape in shapes(problem.num_ranks, name):
        if blocks < shape.num_stages:
            if shape.name == "chain":
                yield place(problem, Shape("chain", shape.rank_of[:blocks]),
                            fit_cuts(problem, Shape("chain", shape.rank_of[:blocks])))
            continue
        yield place(problem, shape, fit_cuts(problem, shape))
        if ends and problem.num_ranks > 1 and blocks - len(ends) >= shape.num_stages:
            yield place_spread(problem, shape, ends)
