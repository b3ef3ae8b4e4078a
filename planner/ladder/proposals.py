"""New placements for a solve: the master MIP beside the known shapes, with the feedback of what was scheduled.

The master (`mipipe.planner.milp.placement.master`) is asked family by family: so many copies side by side, so many
positions. Its first proposals are the shapes with their cuts moved; then it looks around the best placement of the
family (the devices of a few positions are free, and all counts), now and then everywhere. What it proposed never comes
again: every placement that was looked at is a cut, for all renumberings of its devices. A placement whose own bound is
below the incumbent is scheduled and joins the race. (Logic-based Benders: Hooker and Ottosson, 2003.)

Where the problem is no chain of equal devices (branches, other devices or links), and where the families are closed,
the master is the placement MIP of units (`mipipe.planner.milp.placement.shares`), under the same cuts. Where memory
allows no replica its end is a proof: nothing but what was looked at can be shorter than the incumbent.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.bounds.at_placement import Bound, placement_bound
from mipipe.planner.bounds.joined import without_joint_bytes
from mipipe.planner.bounds.over_placements import facts_of
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.candidate import Candidate, candidate
from mipipe.planner.ladder.inherit import inherit
from mipipe.planner.ladder.order_rungs import same
from mipipe.planner.ladder.placement_rungs import record_placing, without_recomputation
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.highs import SolverOutcome
from mipipe.planner.milp.placement import master, shares
from mipipe.planner.placements import counts
from mipipe.planner.placements.counts import Chain, Cut
from mipipe.planner.placements.cuts import earliest_end
from mipipe.planner.placements.shapes import light_ends, propose_shapes, resident_fits
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.sizes import NEVER_NS

TURNS = (2, 1, 3, 4)
"""Positions per device that are tried, the most promising first."""

COPIES = (2, 1, 4)
"""Copies side by side that are tried where there is memory for them."""

FREE = 5
"""Positions whose devices are free in a neighbourhood."""

EVERYWHERE = 6
"""So many proposals of a family after which the whole of it is asked once."""

UNITS = 3
"""Every so many turns the model of units is asked, while the families have more to say."""

FORGIVEN = 0.004
"""Share of the value by which every proposal without success sets a family back behind the others."""

ASKED = ((1.0, 1.0, 1), (1.0, 1.0, 2), (0.0, 1.0, 1), (4.0, 1.0, 1), (0.25, 1.5, 2))
"""(weight of transfers, pressure on memory, replicas) of the model of units, in turns."""

Take = Callable[[Run, Candidate], bool]
"""Schedules a candidate by list and takes it into the run, if some order fits (`mipipe.planner.ladder.admission`)."""


@dataclass(slots=True)
class ProposalFamily:
    """Placements of so many copies and positions. ``value_ns``: the lowest bound of a placement seen, that of ``best``;
    ``misses``: proposals since the last that was better; ``closed``: nothing below the incumbent is left."""

    chain: Chain
    copies: int
    positions: int
    cuts: list[Cut] = field(default_factory=list)
    best: Cut | None = None
    value_ns: int = NEVER_NS
    asked: int = 0
    misses: int = 0
    closed: bool = False

    @property
    def promise(self) -> float:
        """By which families take turns: the smallest first."""
        return self.value_ns * (1 + FORGIVEN * self.misses)


@dataclass(slots=True)
class Proposing:
    """The master's proposals, one at a time."""

    run: Run
    take: Take
    families: list[ProposalFamily] | None = None
    known: list[Placement] = field(default_factory=list)
    asked: int = 0
    seen: int = 0
    turns: int = 0
    waiting: Iterator[Placement] | None = None
    heads: list[int] = field(default_factory=list)
    rng: random.Random = field(default_factory=random.Random)

    def step(self, seconds: float) -> bool:
        """Ask the master once and schedule what it proposes; False where it has nothing (more) to say."""
        run = self.run
        if self.families is None:
            self.families = families_of(run)
            self.rng.seed(run.options.seed)
        self._learn()
        if self._next_shape():
            return True
        open_ones = [family for family in self.families if not family.closed and family.value_ns < NEVER_NS]
        self.turns += 1
        if not open_ones or self.turns % UNITS == 0:
            return self._ask_units(seconds) or bool(open_ones)
        fresh = [family for family in open_ones if not family.asked]
        family = fresh[0] if fresh else min(open_ones, key=lambda family: family.promise)
        began, before = time.monotonic(), run.makespan_ns
        cut, outcome = self._ask(family, seconds)
        if cut is None:
            return True
        family.cuts.append(cut)
        if cut == family.best:  # a shape: it is a candidate already
            return True
        found = self._candidate(counts.placement_of(run.problem, family.chain, cut, family.copies))
        family.misses += 1
        if found is None:
            return True
        if found.bound.ns < family.value_ns:
            family.best, family.value_ns, family.misses = cut, found.bound.ns, 0
        if found.bound.ns < run.makespan_ns and self.take(run, found):
            found.proposer = (master.NAME,)
            inherit(run, found)
            record_placing(run, master.NAME, found.placement.name, before, began, outcome,
                           own=found.makespan_ns / run.problem.unit_ns)
        return True

    def _learn(self) -> None:
        """Take the run's candidates that came since last time as placements of their families."""
        run = self.run
        assert self.families is not None
        for found in run.candidates[self.seen:]:
            self.known.append(found.placement)
            for family in self.families:
                cut = counts.cut_of(family.chain, found.placement, family.copies)
                cut = None if cut is None else counts.stretched(cut, family.positions)
                if cut is not None and found.bound.ns < family.value_ns:
                    family.best, family.value_ns, family.misses = cut, found.bound.ns, 0
        self.seen = len(run.candidates)

    def _next_shape(self) -> bool:
        """Take the next known shape that there was no time for so far; whether there was one."""
        run = self.run
        if self.waiting is None:
            self.waiting = propose_shapes(run.problem, run.options.placement)
            self.heads = facts_of(run.problem).head
        for placed in self.waiting:
            clock.ask()
            if (any(same(found.placement, placed) for found in run.candidates)
                    or earliest_end(run.problem, placed, self.heads) >= run.makespan_ns):
                continue
            found = self._candidate(placed)
            if found is not None and found.bound.ns < run.makespan_ns and self.take(run, found):
                return True
        return False

    def _ask(self, family: ProposalFamily, seconds: float) -> tuple[Cut | None, SolverOutcome]:
        """The next proposal of a family; None where none was found, and the family is closed where there is none."""
        run, best = self.run, family.best
        everywhere = best is None or (family.asked > 0 and family.asked % EVERYWHERE == 0)
        devices = tuple(range(family.chain.devices))
        free: set[int] = set()
        if family.asked and best is not None:
            low = self.rng.randrange(max(1, family.positions - FREE + 1))
            free = (set(range(low, min(family.positions, low + FREE))) if family.asked % 2 else
                    set(self.rng.sample(range(family.positions), min(FREE, family.positions))))
        allowed = None if everywhere or best is None else [
            devices if k in free else (device,) for k, device in enumerate(best.devices)]
        proposal, outcome = master.propose(
            family.chain, family.positions, family.cuts, time_limit_s=seconds, seed=run.options.seed + family.asked,
            allowed=allowed, start=best if best not in family.cuts else None, cutoff_ns=run.makespan_ns)
        family.asked += 1
        if proposal is None:
            family.misses += 1
            family.closed = everywhere and outcome.infeasible
            return None, outcome
        return proposal.cut, outcome

    def _ask_units(self, seconds: float) -> bool:
        """Ask the model of units for a placement; False where it has proven that there is none below the incumbent."""
        run, problem = self.run, self.run.problem
        if run.options.placement != "free" or problem.num_ranks < 2 or run.best is None:
            return False
        single = not replicas_fit(problem)
        weight, pressure, replicas = ASKED[self.asked % len(ASKED)]
        self.asked += 1
        began, before = time.monotonic(), run.makespan_ns
        given = problem if run.options.recompute else without_recomputation(problem)
        proposal, outcome = shares.propose_beyond(
            given, self.known, hop_weight=weight, pressure=pressure, max_replicas=1 if single else replicas,
            cutoff_ns=run.makespan_ns, time_limit_s=seconds, seed=run.options.seed + self.asked)
        if proposal is None:
            proven = outcome.infeasible and pressure == 1.0 and single and not run.recomputes
            if proven:
                least = self._least_of_known()
                run.raise_bound(Bound(min(run.makespan_ns, least), "placement MIP: nothing else can be shorter"))
            return not proven
        self.known.append(proposal.placement)
        found = self._candidate(proposal.placement)
        if found is not None and found.bound.ns < run.makespan_ns and self.take(run, found):
            found.proposer = ("placement MIP",)
            inherit(run, found)
            record_placing(run, "placement MIP", found.placement.name, before, began, outcome,
                           own=found.makespan_ns / problem.unit_ns, estimate=proposal.estimate_ns / problem.unit_ns)
        return True

    def _least_of_known(self) -> int:
        """The least bound of the placements that were looked at, joined in any way; of those that may fit."""
        light, least = without_joint_bytes(self.run.problem), NEVER_NS
        for known in self.known:
            try:
                least = min(least, placement_bound(view(light, finest(light, known))).ns)
            except PlanError:  # it never fits
                continue
        return least

    def _candidate(self, proposed: Placement) -> Candidate | None:
        """The placement with its bound; None where it never fits."""
        if not resident_fits(self.run.problem, proposed):
            return None
        try:
            return candidate(self.run.problem, proposed)
        except PlanError:
            return None


def finest(problem: PlanningProblem, given: Placement) -> Placement:
    """Every group a stage of its own, where it was: of a problem `without_joint_bytes` its bounds hold for all ways to
    join groups into stages."""
    where = {g: (stage, route) for stage, route in zip(given.stages, given.routes, strict=True) for g in stage.groups}
    stages = tuple(replace(where[g][0], groups=(g,)) for g in range(len(problem.groups)))
    return replace(given, stages=stages, routes=tuple(where[g][1] for g in range(len(problem.groups))))


def replicas_fit(problem: PlanningProblem) -> bool:
    """Whether there is memory for a second replica of any group."""
    room = sum(resident_room(problem, rank) for rank in range(problem.num_ranks))
    sizes = [group.resident_bytes for group in problem.groups if not group.single]
    return bool(sizes) and sum(group.resident_bytes for group in problem.groups) + min(sizes) <= room


def families_of(run: Run) -> list[ProposalFamily]:
    """The families of a chain of equal devices that the options allow; none where the problem is no such chain."""
    problem = run.problem
    if run.options.placement != "free" or problem.num_ranks < 2:
        return []
    found = []
    total = sum(group.resident_bytes for group in problem.groups)
    light = tuple(light_ends(problem))
    for copies in COPIES:
        if copies > 1 and (problem.num_microbatches % copies or any(group.single for group in problem.groups)):
            continue
        for ends in ((), light) if light else ((),):
            chain = counts.chain_of(problem, copies, ends)
            if chain is None or chain.devices < 2 or copies * total > problem.num_ranks * resident_room(problem, 0):
                continue
            blocks = sum(one.count for one in chain.runs)
            sizes = dict.fromkeys(turns * chain.devices for turns in TURNS)
            found += [ProposalFamily(chain, copies, size) for size in sizes if size <= blocks]
    return found
