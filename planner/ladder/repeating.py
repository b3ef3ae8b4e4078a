"""Long steps from short ones: anneal a step of few microbatches and repeat its middle (an activity of the loop)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from mipipe.graphs.errors import PlanError
from mipipe.planner.jobs.arrays import Instance, build, mirror
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder import order_rungs as rungs
from mipipe.planner.ladder.activities import offer_orders
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.ladder.state import Run
from mipipe.planner.search import annealing as search
from mipipe.planner.search import best_list as lists
from mipipe.planner.search.repeat import stretched

SHORT = (4, 5, 6)
"""Microbatches for every two ranks of the short steps, in turns: warm-up and cool-down last about one per rank each."""

RUNG = "repeated middle"


@dataclass(slots=True)
class Repeating:
    """Short steps of the candidates, annealed in turns: the most promising two times of three, then the next."""

    run: Run
    shorts: list[tuple[Candidate, int, search.Search | None]] = field(default_factory=list)
    turns: int = 0

    def step(self, seconds: float) -> bool:
        """Anneal a short step for most of the seconds and stretch it; False where no step is much longer than one."""
        run = self.run
        ranks = run.problem.num_ranks
        sizes = [size * ranks // 2 for size in SHORT if size * ranks // 2 + ranks <= run.problem.num_microbatches]
        if not sizes:
            return False
        able = [found for found in run.candidates if found.bound.ns < run.makespan_ns and not found.two_streams
                and found.pairs is None]
        if not able:
            return False
        able.sort(key=lambda found: found.makespan_ns + found.bound.ns)
        found = able[self.turns % 3 // 2 % len(able)]
        size = sizes[self.turns // 3 % len(sizes)]
        self.turns += 1
        began, before = time.monotonic(), found.makespan_ns
        short = self._short(found, size)
        if short is None:
            return True
        search.advance(short, seconds, lambda: run.left <= 0)
        orders = stretched(short.instance, short.best, found.instance, lambda: run.left <= 0)
        if orders is not None and offer_orders(run, found, orders, RUNG, ("list", "annealing")):
            rungs.record(run, RUNG, found, before, began)
        return True

    def _short(self, found: Candidate, size: int) -> search.Search | None:
        """The search of a candidate's short step of so many microbatches; None where no list fits it."""
        for other, microbatches, known in self.shorts:
            if other is found and microbatches == size:
                return known
        short = short_instance(found, size)
        orders = None if short is None else lists.best_list(short, self.run.options.seed)
        made = None if short is None or orders is None else search.start(short, orders, self.run.options.seed + 3)
        self.shorts.append((found, size, made))
        if made is not None and (long := stretched(made.instance, made.best, found.instance,
                                                   lambda: self.run.left <= 0)) is not None:
            offer_orders(self.run, found, long, RUNG, ("list",))  # what lists give may repeat better than what follows
        return made


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
