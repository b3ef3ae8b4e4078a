"""Placements a move away from known ones, judged by their orders (a search, without a solver).

The master proposes by bounds, and where positions are many a bound says little of the order that a placement allows. A
placement one move away (`mipipe.planner.placements.moves`) allows nearly the same order: so it inherits that, annealed
for a moment. Every candidate begins a *line*, which goes on to a neighbour that became shorter than where it stands;
one that is shorter than the run's best plan enters the run as a candidate, to be annealed and polished like any other.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.bounds.over_placements import facts_of
from mipipe.planner.how import then
from mipipe.planner.jobs.memory import in_flight
from mipipe.planner.ladder import order_rungs
from mipipe.planner.ladder.candidate import Candidate, candidate, judge_orders, offer_judged
from mipipe.planner.ladder.inherit import Moments, inherited, moments_of
from mipipe.planner.ladder.race import TURN_S
from mipipe.planner.ladder.state import Run
from mipipe.planner.placements.cuts import earliest_end
from mipipe.planner.placements.moves import is_movable, neighbour
from mipipe.planner.placements.shapes import resident_fits
from mipipe.planner.search import annealing
from mipipe.planner.sizes import NEVER_NS, VERY_MANY

MOVING = "moved stages"
"""What the search is called where a plan says how it came about."""

PATIENT = 8
"""Tries without success after which every further one is annealed a round longer."""

FORGIVEN = 0.0005
"""Share of its makespan by which every try without success sets a line back behind the others."""

DRAWN = 400
"""Neighbours that are drawn until one has a bound below the incumbent."""


@dataclass(slots=True)
class Line:
    """From a candidate's placement to others: ``found`` is where it stands, ``known`` the moments of the actions there,
    ``misses`` the tries since it became shorter."""

    found: Candidate
    known: Moments = field(default_factory=dict)
    seen_ns: int = NEVER_NS
    misses: int = 0

    @property
    def promise(self) -> float:
        """By which lines take turns: the smallest first."""
        return (self.found.makespan_ns + self.found.bound.ns) / 2 * (1 + FORGIVEN * self.misses)

    @property
    def moments(self) -> Moments:
        """When the groups' actions start in the line's best schedule, which others improve as well."""
        best = self.found.best
        assert best is not None
        if best.makespan_ns < self.seen_ns:
            self.known, self.seen_ns = moments_of(self.found.view, best.schedule), best.makespan_ns
        return self.known


@dataclass(slots=True)
class Moving:
    """The lines of a run, in turns. ``known``: candidates that began a line or came of one; ``gained``: the shares by
    which lines became shorter."""

    run: Run
    lines: list[Line] = field(default_factory=list)
    known: set[Candidate] = field(default_factory=set)
    heads: list[int] = field(default_factory=list)
    tries: int = 0
    gained: float = 0.0
    rng: random.Random = field(default_factory=random.Random)

    def step(self, seconds: float) -> bool:
        """Try neighbours for some seconds; False where there is nothing to move."""
        run, end = self.run, time.monotonic() + seconds
        if not self.heads:
            self.heads = facts_of(run.problem).head
            self.rng.seed(run.options.seed)
        while run.left > 0 and not run.closed:
            self._begin_lines()
            line = min(self.lines, key=lambda line: line.promise, default=None)
            if line is None:
                return False
            if not self._try(line):
                self.lines.remove(line)
            if time.monotonic() >= end:
                break
        return True

    def _begin_lines(self) -> None:
        """Begin lines at candidates that are no line's yet."""
        run = self.run
        if run.options.placement != "free" or run.problem.num_ranks < 2:
            return
        for found in run.candidates:
            if (found not in self.known and found.best is not None and not found.best.schedule.has_pairs
                    and not found.two_streams and 3 * found.view.num_stages * run.problem.num_microbatches <= VERY_MANY
                    and is_movable(run.problem, found.placement)):
                self.lines.append(Line(found))
            self.known.add(found)

    def _try(self, line: Line) -> bool:
        """Schedule a neighbour of a line's placement; False where none may become the best."""
        run = self.run
        found = self._neighbour(line.found)
        if found is None:
            return False
        self.tries += 1
        line.misses += 1
        began, before, least = time.monotonic(), run.makespan_ns, line.found.makespan_ns
        found.instance.cap[:] -= in_flight(found.view)
        orders = inherited(line.moments, found.instance, lambda: run.left <= 0)
        if orders is None:
            return True
        search = annealing.start(found.instance, orders, run.options.seed + 31 * self.tries, found.bound.ns)
        annealing.advance(search, TURN_S, lambda: run.left <= 0 or search.best.makespan_ns < least,
                          1 + line.misses // PATIENT)
        if search.best.makespan_ns >= least or not offer_judged(
                found, judge_orders(found, search.best), MOVING, line.found.lineage):
            return True
        found.searched, found.search = found.lineage, search
        line.found, line.seen_ns, line.misses = found, NEVER_NS, 0
        if found.makespan_ns < before:
            self.known.add(found)
            with run.lock:
                run.candidates.append(found)
                run.note(found, MOVING)
            order_rungs.record(run, MOVING, found, before, began)
        else:
            self.gained += 1 - found.makespan_ns / least
        return True

    def _neighbour(self, base: Candidate) -> Candidate | None:
        """A neighbour of a candidate's placement whose bound is below the incumbent; None where none was drawn."""
        run = self.run
        for _ in range(DRAWN):
            clock.ask()
            placement = neighbour(run.problem, base.placement, self.rng)
            if (placement is None or not resident_fits(run.problem, placement)
                    or earliest_end(run.problem, placement, self.heads) >= run.makespan_ns):
                continue
            try:
                found = candidate(run.problem, placement, then(base.proposer, MOVING))
            except PlanError:
                continue
            if found.bound.ns < run.makespan_ns:
                return found
        return None
