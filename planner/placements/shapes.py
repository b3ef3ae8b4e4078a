"""Known placement shapes, fitted to a problem: chain, V, interleaved, wave, two-way, two-way V, twins, ring, encoders
apart.

A shape says which rank holds the k-th of its stages, in one or two directions; `mipipe.planner.placements.cuts` fits it
to the groups (even loads, and less for ranks that start late), `mipipe.planner.placements.ring` shares replicas out
unevenly, `mipipe.planner.placements.branches` gives encoders places of their own. Groups without resident bytes at
either end (an embedding or a head whose parameters are not counted, or that fit everywhere) may be spread over several
ranks by microbatch where the placement is free, and so may be the whole model where it fits on every rank (``copies``);
a shape asked for by name is that shape (a chain can be exported, a spread head cannot).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise

from mipipe.graphs.operator_graph import Tags
from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.placements import branches
from mipipe.planner.placements.cuts import Shape, deal_ends, fit_cuts, place, place_spread, units
from mipipe.planner.placements.ring import rings
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem

SHIFTED = 4096
"""Ranks x microbatches up to which every shape is also cut with less for ranks that start late: beyond, the time for
another candidate is better spent searching. A named shape is cut in every way, as often as they go into it."""


def shapes(ranks: int, name: str = "free") -> list[Shape]:
    """The shapes a placement option allows, simplest first.

    A twin is two copies of a shape on half of the ranks each, side by side, with half of the microbatches each: for
    two-way and bidirectional schedules what Hanayo's waves (Liu et al., SC 2023) are for Chimera's. Every rank of a
    wave holds early and late stages, so its first gradient comes soon, and both copies have half as many transfers as a
    wave over all ranks.
    """
    forth = tuple(range(ranks))
    back = forth[::-1]
    half = forth[:ranks // 2]
    turn = half + half[::-1]
    one = [Shape("chain", forth), Shape("v", forth + back), Shape("interleaved", forth * 2),
           Shape("interleaved", forth * 3),
           Shape("interleaved", forth * 4), Shape("wave", (forth + back) * 2), Shape("wave", (forth + back) * 3)]
    two = [Shape("two-way", forth, True), Shape("two-way-v", forth + back, True),
           Shape("two-way-interleaved", forth * 2, True)]
    twins = [Shape("twin-chain", half, True), Shape("twin-v", turn, True), Shape("twin-wave", turn * 2, True),
             Shape("twin-wave", turn * 3, True)]
    found = one + (two + (twins if ranks > 2 else twins[:1]) if ranks % 2 == 0 else [Shape("two-way", forth, True)])
    if ranks == 1:
        found = one[:1]
    return [shape for shape in found if name in ("free", shape.name)]


def resident_bytes(problem: PlanningProblem, placement: Placement) -> list[int]:
    """Bytes of weights and optimizer state on every rank."""
    held = [0] * problem.num_ranks
    for stage in placement.stages:
        for rank in stage.ranks:
            held[rank] += sum(problem.groups[group].resident_bytes for group in stage.groups)
    return held


def keeps_single(problem: PlanningProblem, placement: Placement) -> bool:
    """Whether no group that may have one replica only has more."""
    return not any(len(stage.ranks) > 1 and any(problem.groups[group].single for group in stage.groups)
                   for stage in placement.stages)


def resident_fits(problem: PlanningProblem, placement: Placement) -> bool:
    """Whether every rank has room for the weights and states of its stages, and groups have the replicas they may."""
    held = enumerate(resident_bytes(problem, placement))
    return keeps_single(problem, placement) and all(size <= resident_room(problem, rank) for rank, size in held)


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


def propose_shapes(problem: PlanningProblem, name: str = "free") -> Iterator[Placement]:
    """Placements of the allowed shapes whose weights fit, simplest first."""
    return (placement for placement in all_placements(problem, name) if resident_fits(problem, placement))


def _equal(problem: PlanningProblem, shape: Shape) -> bool:
    """Whether all layers are equal, as many for every stage, and devices of one kind."""
    blocks = [[replace(problem.groups[g], name="", segments=(), tags=Tags()) for g in block]
              for block in units(problem)]
    kinds = {device.kind for device in problem.topology.devices}
    return len(blocks) % shape.num_stages == 0 and len(kinds) == 1 and all(block == blocks[0] for block in blocks)


def proposes_all(problem: PlanningProblem, name: str) -> bool:
    """Whether `propose_shapes` gives every placement of a named shape, so that a bound may be one over these: where it
    can be cut in few ways, or all layers are equal (a named shape of these is the published one, in equal stages). Of
    ``free`` placements it does not."""
    own, blocks = shapes(problem.num_ranks, name), len(units(problem))
    return name != "free" and bool(own) and all(blocks <= shape.num_stages or _few_cuts(problem, shape)
                             or _equal(problem, shape) for shape in own)


def _few_cuts(problem: PlanningProblem, shape: Shape) -> bool:
    """Whether all cuts of a shape into stages that are not empty are few."""
    count = math.comb(len(units(problem)) - 1, shape.num_stages - 1)
    return count * problem.num_ranks * problem.num_microbatches <= SHIFTED


def _all_cuts(problem: PlanningProblem, shape: Shape) -> Iterator[Placement]:
    """A shape cut in every way into stages that are not empty."""
    blocks = units(problem)
    for cuts in combinations(range(1, len(blocks)), shape.num_stages - 1):
        ends = (0, *cuts, len(blocks))
        yield place(problem, shape, [[g for block in blocks[low:high] for g in block] for low, high in pairwise(ends)])


def keeps_shape(known: Placement, other: Placement) -> bool:
    """Whether a placement differs from a known one in where its groups are cut alone: as many stages, on the same
    ranks, each of consecutive groups."""
    groups = [g for stage in other.stages for g in stage.groups]
    return (groups == sorted(groups) and known.routes == other.routes
            and [(stage.ranks, stage.recompute) for stage in known.stages]
            == [(stage.ranks, stage.recompute) for stage in other.stages])


def all_placements(problem: PlanningProblem, name: str = "free") -> Iterator[Placement]:
    """Placements of the allowed shapes, whether or not their weights fit."""
    ends = light_ends(problem)
    blocks = len(units(problem))
    for shape in shapes(problem.num_ranks, name):
        clock.ask()
        if blocks < shape.num_stages:
            if shape.name == "chain":
                yield place(problem, Shape("chain", shape.rank_of[:blocks]),
                            fit_cuts(problem, Shape("chain", shape.rank_of[:blocks])))
            continue
        even = fit_cuts(problem, shape)
        yield place(problem, shape, even)
        few = problem.num_ranks > 1 and problem.num_ranks * problem.num_microbatches <= SHIFTED
        if few and (name == "free" or not _equal(problem, shape)):  # a named shape of equal layers is the published one
            shifted = fit_cuts(problem, shape, by_head=True, start=even)
            if shifted != even:
                yield place(problem, shape, shifted)
            if name != "free" and _few_cuts(problem, shape):
                known = [place(problem, shape, cut).stages for cut in (even, shifted)]
                yield from (made for made in _all_cuts(problem, shape) if made.stages not in known)
        if name == "free" and ends and problem.num_ranks > 1 and blocks - len(ends) >= shape.num_stages:
            yield place_spread(problem, shape, ends)
    yield from rings(problem, name)
    yield from branches.branch_placements(problem, name)
    if name == "free" and problem.num_ranks > 1:
        yield deal_ends(problem, Placement((), (), "copies"), (), range(len(problem.groups)), two_way=False)
