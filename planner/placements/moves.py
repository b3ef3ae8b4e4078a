"""Placements next to a given one: units that join another stage, take another host or part, microbatches rerouted.

A *host* is what a stage says of where it runs: its ranks, the rank of every microbatch, and whether F runs again. A
placement is taken apart into units (groups that must share a rank, `mipipe.planner.placements.cuts.colocated`), each
with a host and the stage it is in, whatever the graph: what is beside a unit are the units that its values go to and
come from, and those before and after it by number. What a move leaves of a stage is put together anew (`UnitHosts`), so
that stages are of one stream and in topological order. `neighbour` only hands hosts of the placement from unit to unit,
so copies stay copies and mirror images stay mirror images; `rerouted`, `elsewhere` and `toggled` make new hosts, by
which replicas share microbatches as no shape has it. F runs again only where all groups of the stage that comes of it
can.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from mipipe.planner.placements.cuts import colocated
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import PlanningProblem

Host = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Ranks, the rank of every microbatch, and whether F runs again."""

KINDS = ("boundary", "boundary", "boundary", "exchange", "rehost", "stages", "part")
"""Moves, as often as they are drawn: a unit joins the stage of one beside it; two units exchange hosts; a unit takes
the host of another; two stages exchange hosts; a unit becomes a stage of its own."""

MOVED = "+moved"
"""What the name of a placement ends in that is no longer what was proposed."""


class UnitHosts:
    """A placement unit by unit: the host of each, and the label of the stage it is in.

    ``beside``: pairs of units with a value between them, or that follow each other by number.
    """

    def __init__(self, problem: PlanningProblem, placement: Placement) -> None:
        """Raise `ValueError` where the groups of a unit have several hosts."""
        self.problem = problem
        self.blocks = [tuple(block) for block in colocated(problem)]
        stage_of = {g: s for s, stage in enumerate(placement.stages) for g in stage.groups}
        self.unit_of = unit_of = {g: u for u, block in enumerate(self.blocks) for g in block}
        self.hosts: list[Host] = []
        self.labels: list[int] = []
        for block in self.blocks:
            own = sorted({stage_of[g] for g in block})
            hosts = {(placement.stages[s].ranks, placement.routes[s]) for s in own}
            if len(hosts) > 1:
                raise ValueError("a unit on several hosts")
            self.hosts.append((*hosts.pop(), any(placement.stages[s].recompute for s in own)))
            self.labels.append(own[0])
            for other in {self.labels[unit_of[g]] for s in own[1:] for g in placement.stages[s].groups
                          if unit_of[g] < len(self.labels)}:  # stages that a unit is in both of go on as one
                self.labels = [own[0] if label == other else label for label in self.labels]
        linked = {(unit_of[edge.source], unit_of[target]) for edge in problem.edges for target in edge.targets}
        self.beside = sorted({(u, v) for u, v in linked | set(pairwise(range(len(self.blocks)))) if u != v})

    def placement(self, name: str) -> Placement:
        """The placement of the hosts and labels as they are; a label is several stages where one would mix streams or
        not be convex."""
        problem = self.problem
        sources: list[set[int]] = [set() for _ in problem.groups]
        for edge in problem.edges:
            for target in edge.targets:
                sources[target].add(edge.source)
        stages: list[list[int]] = []
        owner: list[int] = []
        after: list[set[int]] = []
        stage_of = [0] * len(problem.groups)
        latest: dict[tuple[int, str], int] = {}
        for g, group in enumerate(problem.groups):
            key = self.labels[self.unit_of[g]], group.stream
            before, into = {stage_of[one] for one in sources[g]}, latest.get(key)
            if into is None or any(_reaches(after, into, one) for one in before - {into}):
                into = latest[key] = len(stages)
                stages.append([])
                owner.append(self.unit_of[g])
                after.append(set())
            stages[into].append(g)
            stage_of[g] = into
            for one in before - {into}:
                after[one].add(into)
        order = _topological(after)
        made = []
        for s in order:
            ranks, _, again = self.hosts[owner[s]]
            can = all(problem.groups[g].recompute_bytes is not None for g in stages[s])
            made.append(Stage(tuple(stages[s]), ranks, again and can))
        return Placement(tuple(made), tuple(self.hosts[owner[s]][1] for s in order), name)

    def apart(self, unit: int) -> None:
        """Let a unit be a stage of its own."""
        self.labels[unit] = max(self.labels) + 1

    def join(self, unit: int, other: int) -> None:
        """Let a unit join the stage of another."""
        self.hosts[unit], self.labels[unit] = self.hosts[other], self.labels[other]

    def give(self, given: Sequence[int], host: Host, *, join: bool = True) -> None:
        """Give some units of one stage, or one unit, a host; they are a stage, or (``join``) one with the stages beside
        them that have the same one."""
        own = max(self.labels) + 1
        for unit in given:
            self.hosts[unit], self.labels[unit] = host, own
        if join:
            beside = {v for pair in self.beside for u, v in (pair, pair[::-1]) if u in given and self.hosts[v] == host}
            merged = {self.labels[v] for v in beside}
            self.labels = [own if label in merged else label for label in self.labels]

    def stage_of(self, unit: int) -> list[int]:
        """The units of the stage that a unit is in."""
        return [u for u, label in enumerate(self.labels) if label == self.labels[unit]]


def _reaches(after: Sequence[set[int]], one: int, other: int) -> bool:
    """Whether values get from a stage to another."""
    waiting, seen = [one], {one}
    while waiting:
        for following in after[waiting.pop()] - seen:
            if following == other:
                return True
            seen.add(following)
            waiting.append(following)
    return False


def _topological(after: Sequence[set[int]]) -> list[int]:
    """The stages in topological order, by number where that leaves a choice."""
    waits = [0] * len(after)
    for following in after:
        for s in following:
            waits[s] += 1
    ready = [s for s, count in enumerate(waits) if not count]
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for s in after[order[-1]]:
            waits[s] -= 1
            if not waits[s]:
                heapq.heappush(ready, s)
    return order


def unit_hosts(problem: PlanningProblem, placement: Placement) -> UnitHosts | None:
    """A placement unit by unit, as moves take it; None where the groups of a unit have several hosts."""
    try:
        return UnitHosts(problem, placement)
    except ValueError:
        return None


def is_movable(problem: PlanningProblem, placement: Placement) -> bool:
    """Whether a placement has moves: more than one rank, and units that are whole."""
    return problem.num_ranks > 1 and unit_hosts(problem, placement) is not None


def moved_name(placement: Placement) -> str:
    """The name of a placement that a move makes of another."""
    return placement.name if placement.name.endswith(MOVED) else placement.name + MOVED


def drawn(problem: PlanningProblem, placement: Placement, rng: random.Random, *, again: bool = False,
          farther: int = 0, around: bool = False) -> Placement | None:
    """A placement one or two moves away, or so many ``farther``; of M microbatches one move in M + 1 makes new hosts,
    most of which reroute some, as that changes about the M-th part of a stage's work, and ``around`` every second one
    does. None where a move comes to nothing. ``again``: forwards may run again, or no more."""
    found: Placement | None = placement
    making = (rerouted, rerouted, elsewhere, *((toggled,) if again else ()))
    for _ in range(rng.choice((1, 1, 2)) + farther):
        makes = rng.random() < (0.5 if around else 1 / (problem.num_microbatches + 1))
        found = found and (rng.choice(making) if makes else neighbour)(problem, found, rng)
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
        pairs = [pair for pair in found.beside if found.labels[pair[0]] != found.labels[pair[1]]]
        one, two = rng.choice(pairs)
        found.join(*((one, two) if rng.random() < 0.5 else (two, one)))
    elif move == "stages":
        first, second = found.stage_of(one), found.stage_of(two)
        here, there = found.hosts[one], found.hosts[two]
        for unit in first:
            found.hosts[unit] = there
        for unit in second:
            found.hosts[unit] = here
    elif move == "part":
        found.apart(one)
    else:
        here, there, join = found.hosts[one], found.hosts[two], rng.random() < 0.5
        found.give([one], there, join=join)
        if move == "exchange":
            found.give([two], here, join=join)
    return _made(found, placement)


def _made(found: UnitHosts, placement: Placement) -> Placement | None:
    """What moves made of a placement; None where that is the same."""
    made = found.placement(moved_name(placement))
    return None if (made.stages, made.routes) == (placement.stages, placement.routes) else made


def rerouted(problem: PlanningProblem, placement: Placement, rng: random.Random) -> Placement | None:
    """A placement in which one microbatch of a unit, of the whole stage that the unit is in, or of all units that run
    it on the same rank, runs on another rank, or two of its microbatches have exchanged ranks; None where the groups
    allow one replica only.

    Replicas come and go with the microbatches they run; whether they fit is not looked at here.
    """
    found = unit_hosts(problem, placement)
    if found is None:
        return None
    unit, one, two = rng.randrange(len(found.blocks)), *(rng.randrange(problem.num_microbatches) for _ in range(2))
    here, there = (found.hosts[unit][1][m] for m in (one, two))
    exchanged = here != there
    if not exchanged:
        there = rng.choice([rank for rank in range(problem.num_ranks) if rank != here])
    width = rng.random()
    moved = ([unit] if width < 0.4 else found.stage_of(unit) if width < 0.8 else
             [u for u, (_, route, _) in enumerate(found.hosts) if route[one] == here])
    may = [not any(problem.groups[g].single for g in found.blocks[u]) for u in moved]
    if not (any if width >= 0.8 else all)(may):
        return None
    for u in (u for u, free in zip(moved, may, strict=True) if free):
        _, route, again = found.hosts[u]
        changed = list(route)
        changed[one] = there
        if exchanged and route[two] == there:
            changed[two] = here
        found.give([u], (tuple(sorted(set(changed))), tuple(changed), again))
    return _made(found, placement)


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
    """A placement in which one unit, or the whole stage that it is in, runs on one rank, whichever, for all
    microbatches; None where it does already."""
    found = unit_hosts(problem, placement)
    if found is None:
        return None
    unit, rank = rng.randrange(len(found.blocks)), rng.randrange(problem.num_ranks)
    if found.hosts[unit][0] == (rank,):
        return None
    moved = found.stage_of(unit) if rng.random() < 0.5 else [unit]
    found.give(moved, ((rank,), (rank,) * problem.num_microbatches, found.hosts[unit][2]), join=rng.random() < 0.5)
    return found.placement(moved_name(placement))
