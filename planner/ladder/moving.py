"""Placements a move away from known ones, judged by their orders (a search, without a solver).

The master proposes by bounds, and where positions are many a bound says little of the order that a placement allows. A
placement one move away (`mipipe.planner.placements.moves`) allows nearly the same order: so it inherits that, annealed
for a moment. Every candidate begins a *line*, which goes on to a neighbour that became shorter than its record or
hardly longer (record-to-record travel: Dueck, Journal of Computational Physics 104, 1993); one that is shorter than the
run's best plan enters the run as a candidate, to be annealed and polished like any other.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.bounds.over_placements import facts_of
from mipipe.planner.how import then
from mipipe.planner.jobs.memory import in_flight
from mipipe.planner.ladder import order_rungs
from mipipe.planner.ladder.candidate import Candidate, candidate, judge_orders, offer_judged
from mipipe.planner.ladder.inherit import Moments, inherited, moments_of
from mipipe.planner.ladder.race import TRIED_S
from mipipe.planner.ladder.state import Run
from mipipe.planner.placements.cuts import earliest_end
from mipipe.planner.placements.moves import drawn, is_movable
from mipipe.planner.placements.shapes import keeps_shape, resident_fits
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.search import annealing
from mipipe.planner.search.orders import Orders
from mipipe.planner.sizes import NEVER_NS, VERY_MANY

MOVING = "moved stages"
"""What the search is called where a plan says how it came about."""

DEVIATION, FARTHEST = 0.002, 0.1
"""Shares of its record by which a line may become longer on its way: at first, doubled whenever all neighbours of where
it stands were tried in vain; and at most."""

SEVERAL = 3
"""Placements drawn for a try: the one whose busiest rank can end first is tried."""

FORGIVEN = 0.0005
"""Share of its makespan by which every try without success sets a line back behind the others."""

DRAWN = 400
"""Neighbours that are drawn for a line in vain before it looks farther and around."""

Key = tuple[object, ...]
"""A placement, whichever of equal microbatches comes first."""


@dataclass(slots=True)
class Line:
    """From a candidate's placement to others: ``found`` is where it stands, ``latest`` the moments of its actions,
    ``left_ns`` the shortest makespan where it stood before, ``misses`` the tries since its record, ``drawn`` the
    neighbours drawn in vain since the last try, ``farther`` the moves beyond one or two that these are away,
    ``looked_at`` those (`Key`) that do not come again until all have been tried or one was shorter, ``tries`` how many
    of them were, ``deviation`` the share by which it may become longer now, ``around`` whether bounds may as well, on
    the way to what is shorter."""

    found: Candidate
    latest: Moments = field(default_factory=dict)
    seen_ns: int = NEVER_NS
    left_ns: int = NEVER_NS
    misses: int = 0
    drawn: int = 0
    looked_at: set[Key] = field(default_factory=set)
    tries: int = 0
    farther: int = 0
    deviation: float = DEVIATION
    around: bool = False

    @property
    def promise(self) -> float:
        """By which lines take turns: the smallest first."""
        return (self.found.makespan_ns + self.found.bound.ns) / 2 * (1 + FORGIVEN * self.misses)

    @property
    def record_ns(self) -> int:
        """The shortest makespan on its way; others improve where it stands as well."""
        return min(self.left_ns, self.found.makespan_ns)

    @property
    def allowed_ns(self) -> int:
        """Below what the next makespan must be: the record itself will do, however short it is."""
        return round(self.record_ns * (1 + self.deviation)) + 1

    def go_on(self, found: Candidate) -> None:
        """Stand at another placement."""
        self.left_ns = self.record_ns
        self.found, self.seen_ns, self.farther = found, NEVER_NS, 0
        self.drawn = 0
        if found.makespan_ns < self.left_ns:
            self.begin_again()
            self.misses, self.deviation, self.around = 0, DEVIATION, False

    def begin_again(self) -> None:
        """Let all neighbours come again."""
        self.looked_at.clear()
        self.drawn = self.tries = 0

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
        """Whether nothing is left to try: a best order with overlapped pairs, of which none inherits."""
        return self.found.best is None or self.found.best.schedule.has_pairs

    @property
    def aside_ns(self) -> int:
        """By how much the plan's clock is behind the search's (queueing, reductions, updates), at the line's best."""
        found = self.found
        return 0 if found.exact or found.search is None else max(0, found.makespan_ns - found.search.best.makespan_ns)


@dataclass(slots=True)
class Try:
    """A neighbour of a line that is being ordered, for so many rounds of annealing, by the moments of the line's
    actions; ``aim_ns`` is what it must be below."""

    line: Line
    found: Candidate
    moments: Moments
    aim_ns: int
    number: int
    rounds: int
    began: float


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

    def step(self, seconds: float, threads: int = 1) -> bool:
        """Try neighbours for some seconds, as many at once as there are threads; False where there is nothing to
        move."""
        run, end, halted = self.run, time.monotonic() + seconds, threading.Event()
        if not self.heads:
            self.heads = facts_of(run.problem).head
            self.rng.seed(run.options.seed)

        def over() -> bool:
            return halted.is_set() or run.left <= 0

        busy: dict[Future[Orders | None], Try] = {}
        with ThreadPoolExecutor(threads) as pool:
            try:
                while busy or (not over() and not run.closed and time.monotonic() < end):
                    self._begin_lines()
                    self.lines = [line for line in self.lines if not line.over]
                    if not self.lines and not busy:
                        return False
                    while self.lines and len(busy) < threads and not over() and time.monotonic() < end:
                        made = self._next(end)
                        if made is None:
                            break
                        busy[pool.submit(self._ordered, made, end, over)] = made
                    for future in wait(busy, timeout=0.2, return_when=FIRST_COMPLETED).done:
                        self._judge(busy.pop(future), future.result())
            finally:
                halted.set()
        return True

    def _begin_lines(self) -> None:
        """Begin lines at candidates that are no line's yet."""
        run = self.run
        if run.problem.num_ranks < 2 or run.of_shape:
            return
        for found in run.candidates:
            if (found not in self.known and found.best is not None and not found.best.schedule.has_pairs
                    and 3 * found.view.num_stages * run.problem.num_microbatches <= VERY_MANY
                    and is_movable(run.problem, found.placement)):
                self.lines.append(Line(found))
            self.known.add(found)

    def _next(self, end: float) -> Try | None:
        """A neighbour of the line whose turn it is, with the moments it inherits; None where none was drawn in time."""
        line = min(self.lines, key=lambda line: line.promise)
        found = self._neighbour(line, end)
        if found is None:
            return None
        self.tries += 1
        line.misses += 1
        # moves of an end of a stage: when as many failed, or many of few, rounds are too short
        several = max(2 * found.view.num_stages, DRAWN // 8)
        return Try(line, found, line.moments, line.allowed_ns - line.aside_ns, self.tries,
                   1 + line.misses // several, time.monotonic())

    def _ordered(self, made: Try, end: float, over: Callable[[], bool]) -> Orders | None:
        """The orders that a neighbour inherits, if it does until a moment of the monotonic clock, annealed; in any
        thread."""
        found, usual = made.found, in_flight(made.found.view)
        found.instance.cap[:] -= usual
        orders = inherited(made.moments, found.instance, lambda: over() or time.monotonic() >= end)
        if orders is None and usual.any():  # they may not all be there at once
            found.instance.cap[:] += usual
            orders = inherited(made.moments, found.instance, lambda: over() or time.monotonic() >= end)
        if orders is None:
            return None
        search = annealing.start(found.instance, orders, self.run.options.seed + 31 * made.number, found.bound.ns)
        annealing.advance(search, TRIED_S, lambda: over() or search.best.makespan_ns < made.aim_ns, made.rounds)
        found.search = search
        return search.best

    def _judge(self, made: Try, orders: Orders | None) -> None:
        """Let the line go on from a neighbour if that is short enough."""
        run, line, found = self.run, made.line, made.found
        if orders is None or orders.makespan_ns >= made.aim_ns:
            return
        judged, allowed = judge_orders(found, orders), line.allowed_ns  # others may have shortened the line meanwhile
        if judged.makespan_ns >= allowed or not offer_judged(found, judged, MOVING, line.found.lineage):
            return
        before, record = run.makespan_ns, line.record_ns
        found.searched = found.lineage
        line.go_on(found)
        if found.makespan_ns < before:
            self.known.add(found)
            with run.lock:
                run.candidates.append(found)
                run.note(found, MOVING)
            order_rungs.record(run, MOVING, found, before, made.began)
        elif found.makespan_ns < record:
            self.gained += 1 - found.makespan_ns / record

    def _neighbour(self, line: Line, end: float) -> Candidate | None:
        """A neighbour of a line's placement that is no candidate's and whose bound is below the incumbent, or, around,
        below what the line may become; None where none was drawn by a moment of the monotonic clock."""
        run = self.run
        while line.drawn < DRAWN and time.monotonic() < end and not run.closed:
            clock.ask()
            line.drawn += 1
            several = [one for one in (self._drawn(line) for _ in range(SEVERAL))
                       if one is not None and key_of(run.problem, one) not in line.looked_at
                       and resident_fits(run.problem, one)]
            ends = [earliest_end(run.problem, one, self.heads) for one in several]
            placement = several[ends.index(min(ends))] if several else None
            if placement is None:
                continue
            line.looked_at.add(key_of(run.problem, placement))
            limit = line.allowed_ns if line.around else run.makespan_ns
            if min(ends) >= limit or any(order_rungs.same(other.placement, placement)
                                         for other in list(run.candidates)):
                continue
            try:
                found = candidate(run.problem, placement, then(line.found.proposer, MOVING))
            except PlanError:
                continue
            if found.bound.ns < limit:
                line.drawn = 0
                line.tries += 1
                return found
        if line.drawn >= DRAWN:
            if not line.tries:  # what is nearer has no better bound
                line.farther = (line.farther + 1) % (len(run.problem.groups) + 1)
            line.begin_again()
            line.deviation, line.around = min(FARTHEST, 2 * line.deviation), True
        return None

    def _drawn(self, line: Line) -> Placement | None:
        """A placement a move or two from where a line stands; of the shape asked for, if any, that shape cut otherwise.
        """
        run, known = self.run, line.found.placement
        made = drawn(run.problem, known, self.rng, again=run.recomputes, farther=line.farther, around=line.around)
        if made is None or run.options.placement == "free":
            return made
        return replace(made, name=known.name) if keeps_shape(known, made) else None


def key_of(problem: PlanningProblem, placement: Placement) -> Key:
    """The stages, and where the microbatches run: sorted, where these are equal."""
    stages = tuple((stage.groups, stage.recompute) for stage in placement.stages)
    places = list(zip(*placement.routes, strict=True))
    return stages, tuple(places if any(group.loads for group in problem.groups) else sorted(places))
