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

LONGEST_S = 1.0
"""Seconds of annealing after which a try ends in any case."""

FORGIVEN = 0.0005
"""Share of its makespan by which every try without success sets a line back behind the others."""

DRAWN = 400
"""Neighbours that are drawn for a line in vain, none with a bound below the incumbent, before it ends."""


@dataclass(slots=True)
class Line:
    """From a candidate's placement to others: ``found`` is where it stands, ``latest`` the moments of its actions,
    ``misses`` the tries since it became shorter, ``drawn`` the neighbours drawn in vain since the last try."""

    found: Candidate
    latest: Moments = field(default_factory=dict)
    seen_ns: int = NEVER_NS
    misses: int = 0
    drawn: int = 0

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
            self.latest, self.seen_ns = moments_of(self.found.view, best.schedule), best.makespan_ns
        return self.latest

    @property
    def over(self) -> bool:
        """Whether nothing is left to try: too many draws in vain, or a best order with overlapped pairs, of which none
        inherits."""
        return self.drawn >= DRAWN or self.found.best is None or self.found.best.schedule.has_pairs

    @property
    def aside_ns(self) -> int:
        """By how much the plan's clock is behind the search's (queueing, reductions, updates), at the line's best."""
        found = self.found
        return 0 if found.exact or found.search is None else max(0, found.makespan_ns - found.search.best.makespan_ns)


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
            self.lines = [line for line in self.lines if not line.over]
            line = min(self.lines, key=lambda line: line.promise, default=None)
            if line is None:
                return False
            found = self._neighbour(line, end)
            if found is not None:
                self._try(line, found, end)
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

    def _try(self, line: Line, found: Candidate, end: float) -> None:
        """Schedule a neighbour of a line by the order there, and go on from it if that is shorter. Orders are
        made until a moment of the monotonic clock."""
        run = self.run
        self.tries += 1
        line.misses += 1
        began, before = time.monotonic(), run.makespan_ns
        aim = line.found.makespan_ns - line.aside_ns
        found.instance.cap[:] -= in_flight(found.view)
        orders = inherited(line.moments, found.instance, lambda: run.left <= 0 or time.monotonic() >= end)
        if orders is None:
            return
        search = annealing.start(found.instance, orders, run.options.seed + 31 * self.tries, found.bound.ns)
        annealing.advance(search, LONGEST_S, lambda: run.left <= 0 or search.best.makespan_ns < aim,
                          1 + line.misses // PATIENT)
        judged = judge_orders(found, search.best) if search.best.makespan_ns < aim else None
        least = line.found.makespan_ns  # which the race may have shortened meanwhile
        if judged is None or judged.makespan_ns >= least or not offer_judged(found, judged, MOVING, line.found.lineage):
            return
        found.searched, found.search = found.lineage, search
        line.found, line.seen_ns, line.misses = found, NEVER_NS, 0
        if found.makespan_ns < run.makespan_ns:
            self.known.add(found)
            with run.lock:
                run.candidates.append(found)
                run.note(found, MOVING)
            order_rungs.record(run, MOVING, found, before, began)
        else:
            self.gained += 1 - found.makespan_ns / least

    def _neighbour(self, line: Line, end: float) -> Candidate | None:
        """A neighbour of a line's placement that is no candidate's and whose bound is below the incumbent; None where
        none was drawn by a moment of the monotonic clock."""
        run = self.run
        while line.drawn < DRAWN and time.monotonic() < end and not run.closed:
            clock.ask()
            line.drawn += 1
            placement = neighbour(run.problem, line.found.placement, self.rng)
            if (placement is None or not resident_fits(run.problem, placement)
                    or earliest_end(run.problem, placement, self.heads) >= run.makespan_ns
                    or any(order_rungs.same(other.placement, placement) for other in list(run.candidates))):
                continue
            try:
                found = candidate(run.problem, placement, then(line.found.proposer, MOVING))
            except PlanError:
                continue
            if found.bound.ns < run.makespan_ns:
                line.drawn = 0
                return found
        return None
