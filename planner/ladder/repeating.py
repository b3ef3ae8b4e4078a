"""Long steps from short ones: anneal a step of few microbatches and repeat its middle (an activity of the loop)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from mipipe.graphs.errors import PlanError
from mipipe.planner.jobs.arrays import Instance, build, mirror
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder import order_rungs
from mipipe.planner.ladder.activities import offer_orders
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.ladder.state import Run
from mipipe.planner.search import annealing, best_list
from mipipe.planner.search.annealing import Search
from mipipe.planner.search.repeat import stretched
from mipipe.planner.sizes import NEVER_NS

SHORT = (4, 5, 6)
"""Microbatches for every two ranks of the short steps, in turns: warm-up and cool-down last about one per rank each."""

RUNG = "repeated middle"


@dataclass(slots=True)
class Short:
    """A candidate's short step of so many microbatches; ``long_ns``: the shortest schedule that repeating gave."""

    found: Candidate
    microbatches: int
    search: Search | None
    long_ns: int = NEVER_NS


@dataclass(slots=True)
class Repeating:
    """Short steps of the candidates, annealed in turns: the most promising two times of three, then the next. Of a
    candidate's lengths each once, then the one that gave most."""

    run: Run
    shorts: list[Short] = field(default_factory=list)
    turns: int = 0

    def step(self, seconds: float) -> bool:
        """Anneal a short step for most of the seconds and stretch it; False where no step is much longer than one."""
        run = self.run
        ranks = run.problem.num_ranks
        sizes = [size * ranks // 2 for size in SHORT if size * ranks // 2 + ranks <= run.problem.num_microbatches]
        able = [found for found in run.candidates if found.bound.ns < run.makespan_ns and not found.two_streams
                and found.pairs is None]
        if not sizes or not able:
            return False
        able.sort(key=lambda found: found.makespan_ns + found.bound.ns)
        found = able[self.turns % 3 // 2 % len(able)]
        self.turns += 1
        began, before = time.monotonic(), found.makespan_ns
        short = self._next(found, sizes)
        if short.search is None:
            return True
        annealing.advance(short.search, seconds, lambda: run.left <= 0)
        if self._stretch(short, ("list", "annealing")):
            order_rungs.record(run, RUNG, found, before, began)
        return True

    def _next(self, found: Candidate, sizes: list[int]) -> Short:
        """The first length that was not tried, repeated as its list is, or the one that gave the shortest schedule."""
        known = [short for short in self.shorts if short.found is found]
        if len(known) == len(sizes):
            return min(known, key=lambda short: short.long_ns)
        small = short_instance(found, sizes[len(known)])
        orders = None if small is None else best_list.best_list(small, self.run.options.seed)
        made = None if small is None or orders is None else annealing.start(small, orders, self.run.options.seed + 3)
        self.shorts.append(Short(found, sizes[len(known)], made))
        self._stretch(self.shorts[-1], ("list",))  # what lists give may repeat better than what comes of it
        return self.shorts[-1]

    def _stretch(self, short: Short, steps: tuple[str, ...]) -> bool:
        """Offer the short step with its middle repeated to its candidate; whether it was kept."""
        if short.search is None:
            return False
        orders = stretched(short.search.instance, short.search.best, short.found.instance, lambda: self.run.left <= 0)
        if orders is None:
            return False
        short.long_ns = min(short.long_ns, orders.makespan_ns)
        return offer_orders(self.run, short.found, orders, RUNG, steps)


def short_instance(found: Candidate, microbatches: int) -> Instance | None:
    """The candidate's placement with so many microbatches and the memory its search has; None where it is no longer
    the same for both (loads that differ, a symmetry lost)."""
    problem = found.view.problem
    if any(group.loads for group in problem.groups):
        return None
    placement = replace(found.placement, routes=tuple(route[:microbatches] for route in found.placement.routes))
    try:
        whole = view(problem.replace(num_microbatches=microbatches), placement)
    except PlanError:
        return None
    if (mirror(whole) is not None) < found.halved:
        return None
    short = build(whole, halve=found.halved)
    short.cap[:] = found.instance.cap
    return short
