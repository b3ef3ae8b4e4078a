"""Placements next to a given one: a boundary moved, a unit with another host, hosts exchanged, microbatches rerouted.

A *host* is what a stage says of where it runs: its ranks, the rank of every microbatch, and whether F runs again. Moves
only hand hosts of the placement from unit to unit (groups that must stay together), so copies stay copies and mirror
images stay mirror images (`neighbour`); or they make new hosts, by which replicas share microbatches as no shape has it
(`rerouted`). F runs again only where all groups of the stage that comes of it can.
"""

from __future__ import annotations

import random
from dataclasses import replace

from mipipe.planner.placements.cuts import units
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import PlanningProblem

Host = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Ranks, the rank of every microbatch, and whether F runs again."""

KINDS = ("boundary", "boundary", "boundary", "exchange", "rehost", "stages")
"""Moves, as often as they are drawn: the first or last unit of a stage joins the stage beside it; two units exchange
hosts; a unit takes the host of another; two stages exchange hosts."""

MOVED = "+moved"
"""What the name of a placement ends in that is no longer what was proposed."""


class UnitHosts:
    """A placement unit by unit: the host of each, and whether it begins a stage."""

    def __init__(self, problem: PlanningProblem, placement: Placement) -> None:
        """Raise `ValueError` where a stage is no run of consecutive whole units."""
        self.blocks = [tuple(block) for block in units(problem)]
        self.again = [group.recompute_bytes is not None for group in problem.groups]
        self.hosts: list[Host] = []
        self.begins: list[bool] = []
        paired = zip(placement.stages, placement.routes, strict=True)
        for stage, route in sorted(paired, key=lambda pair: pair[0].groups):
            at, first = 0, True
            while at < len(stage.groups):
                block = self.blocks[len(self.hosts)]
                if stage.groups[at:at + len(block)] != block:
                    raise ValueError("a stage that is no run of whole units")
                self.hosts.append((stage.ranks, route, stage.recompute))
                self.begins.append(first)
                at, first = at + len(block), False

    def placement(self, name: str) -> Placement:
        """The placement of the hosts and beginnings as they are."""
        stages: list[Stage] = []
        routes: list[tuple[int, ...]] = []
        for b, (block, host) in enumerate(zip(self.blocks, self.hosts, strict=True)):
            if b and not self.begins[b] and host == self.hosts[b - 1]:
                stages[-1] = replace(stages[-1], groups=(*stages[-1].groups, *block))
            else:
                stages.append(Stage(block, host[0], host[2]))
                routes.append(host[1])
        kept = tuple(stage if not stage.recompute or all(self.again[g] for g in stage.groups)
                     else replace(stage, recompute=False) for stage in stages)
        return Placement(kept, tuple(routes), name)

    def shift(self, boundary: int, *, left: bool) -> None:
        """Let the unit behind a boundary join the stage before it, or (``left`` False) the one before join the next."""
        if left:
            self.hosts[boundary] = self.hosts[boundary - 1]
            self.begins[boundary] = False
            if boundary + 1 < len(self.begins):
                self.begins[boundary + 1] = True
        else:
            self.hosts[boundary - 1] = self.hosts[boundary]
            self.begins[boundary - 1], self.begins[boundary] = True, False

    def give(self, unit: int, host: Host) -> None:
        """Give a unit a host; it joins a stage beside it that has the same one."""
        self.hosts[unit] = host
        self.begins[unit] = unit == 0 or self.hosts[unit - 1] != host
        if unit + 1 < len(self.hosts):
            self.begins[unit + 1] = self.hosts[unit + 1] != host

    def stage_of(self, unit: int) -> range:
        """The units of the stage that a unit is in."""
        first, last = unit, unit + 1
        while not self.begins[first]:
            first -= 1
        while last < len(self.begins) and not self.begins[last]:
            last += 1
        return range(first, last)


def unit_hosts(problem: PlanningProblem, placement: Placement) -> UnitHosts | None:
    """A placement unit by unit; None where a stage is no run of consecutive whole units, as moves take it."""
    try:
        return UnitHosts(problem, placement)
    except ValueError:
        return None


def is_movable(problem: PlanningProblem, placement: Placement) -> bool:
    """Whether a placement has moves: every stage a run of whole units, at least two hosts."""
    found = unit_hosts(problem, placement)
    return found is not None and len(set(found.hosts)) > 1


def moved_name(placement: Placement) -> str:
    """The name of a placement that a move makes of another."""
    return placement.name if placement.name.endswith(MOVED) else placement.name + MOVED


def drawn(problem: PlanningProblem, placement: Placement, rng: random.Random) -> Placement | None:
    """A placement one or two moves away; of M microbatches one move in M + 1 reroutes some, as that changes about the
    M-th part of a stage's work. None where a move comes to nothing."""
    found: Placement | None = placement
    for _ in range(rng.choice((1, 1, 2))):
        move = rerouted if rng.random() * (problem.num_microbatches + 1) < 1 else neighbour
        found = found and move(problem, found, rng)
    return found


def neighbour(problem: PlanningProblem, placement: Placement, rng: random.Random) -> Placement | None:
    """A placement one random move away; None where the placement has no such moves."""
    found = unit_hosts(problem, placement)
    if found is None:
        return None
    size = len(found.blocks)
    if size < 2 or len(set(found.hosts)) < 2:
        return None
    move, one, two = rng.choice(KINDS), *rng.sample(range(size), 2)
    if move == "boundary":
        boundary = rng.choice([b for b in range(1, size) if found.begins[b]] or [one or two])
        found.shift(boundary, left=rng.random() < 0.5)
    elif move == "stages":
        first, second = found.stage_of(one), found.stage_of(two)
        here, there = found.hosts[one], found.hosts[two]
        for unit in first:
            found.hosts[unit] = there
        for unit in second:
            found.hosts[unit] = here
    else:
        here, there = found.hosts[one], found.hosts[two]
        found.give(one, there)
        if move == "exchange":
            found.give(two, here)
    made = found.placement(moved_name(placement))
    return None if (made.stages, made.routes) == (placement.stages, placement.routes) else made


def rerouted(problem: PlanningProblem, placement: Placement, rng: random.Random) -> Placement | None:
    """A placement in which one microbatch of a unit, or of the whole stage that the unit is in, runs on another rank,
    or two of its microbatches have exchanged ranks; None where the groups allow one replica only.

    Replicas come and go with the microbatches they run; whether they fit is not looked at here.
    """
    found = unit_hosts(problem, placement)
    if found is None:
        return None
    unit = rng.randrange(len(found.blocks))
    _, route, again = found.hosts[unit]
    moved = found.stage_of(unit) if rng.random() < 0.5 else range(unit, unit + 1)
    if any(problem.groups[g].single for u in moved for g in found.blocks[u]):
        return None
    changed, one, two = list(route), rng.randrange(len(route)), rng.randrange(len(route))
    if route[one] != route[two]:
        changed[one], changed[two] = route[two], route[one]
    else:
        changed[one] = rng.choice([rank for rank in range(problem.num_ranks) if rank != route[one]])
    for u in moved:
        found.give(u, (tuple(sorted(set(changed))), tuple(changed), again))
    return found.placement(moved_name(placement))


def toggled(problem: PlanningProblem, placement: Placement, rng: random.Random) -> Placement | None:
    """A placement in which one stage runs F again that did not, or no more; None where its groups cannot."""
    chosen = rng.randrange(len(placement.stages))
    stage = placement.stages[chosen]
    if any(problem.groups[g].recompute_bytes is None for g in stage.groups):
        return None
    stages = list(placement.stages)
    stages[chosen] = replace(stage, recompute=not stage.recompute)
    return Placement(tuple(stages), placement.routes, moved_name(placement))


def elsewhere(problem: PlanningProblem, placement: Placement, rng: random.Random) -> Placement | None:
    """A placement in which one unit runs on one rank, whichever, for all microbatches; None where it does already."""
    found = unit_hosts(problem, placement)
    if found is None:
        return None
    unit, rank = rng.randrange(len(found.blocks)), rng.randrange(problem.num_ranks)
    if found.hosts[unit][0] == (rank,):
        return None
    found.give(unit, ((rank,), (rank,) * problem.num_microbatches, found.hosts[unit][2]))
    return found.placement(moved_name(placement))
