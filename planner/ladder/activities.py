"""What the loop of a solve may do beside annealing: pace, polish and prove orders (`mipipe.planner.ladder.loop`).

Each is a small state and a step that takes about so many seconds and says whether there was anything to do.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from mipipe.graphs.errors import PlanError
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder import order_rungs
from mipipe.planner.ladder.candidate import Candidate, judge_orders, offer_judged
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.order import time_indexed
from mipipe.planner.milp.periodic import legs, pattern_mip, staircase
from mipipe.planner.milp.periodic.pattern import OperationKey, route_names
from mipipe.planner.search import annealing, follow, pair_search
from mipipe.planner.search.orders import Orders
from mipipe.planner.sizes import BOUNDED_S, NEVER_NS
from mipipe.planner.time_shares import SHARES

WINDOWS = (40, 60, 90)
"""Actions whose order is free at once, in turns: what small windows leave, larger ones may find."""

ROUTES = 4
"""Routes up to which microbatches repeat anything: a ring has one for nearly every microbatch."""

COLUMNS = 20_000
"""Columns up to which the time-indexed MIP is tried: HiGHS refutes relaxations of so many within about ten seconds."""

WAITING = 3
"""Patterns that wait for a round of annealing, at most."""


@dataclass(slots=True)
class Tightening:
    """The job-shop bound at the best placement, where it was too large for that when it was admitted."""

    run: Run

    def step(self, seconds: float) -> bool:
        """Bound the best candidate; False where it is bounded, or too large for the time limit."""
        found, limit = self.run.best, self.run.options.time_limit_s
        if found is None or found.bounded:
            return False
        size = 3 * found.view.num_stages * found.view.problem.num_microbatches
        if BOUNDED_S * size > min(self.run.left, SHARES.bounding * limit):
            return False
        found.bounded = True
        try:
            found.bound = max(found.bound, placement_bound(found.view), key=lambda bound: bound.ns)
        except PlanError as error:  # an action of no time holds its bytes for none, and the bound counts them
            found.notes.append(f"bound: {error}")
        return True


@dataclass(slots=True)
class Paced:
    """A candidate with a pattern that all its ranks share: its moments, and the waits tuned so far."""

    found: Candidate
    moments: np.ndarray
    waits: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Pacing:
    """The periodic schedule of one candidate after the other, those with the lowest bounds first: by the pattern that
    all ranks share where there is one, else by the general periodic MIP.

    The best plan's waits are tuned next. When all have been paced the most promising come again: where there is a
    shared pattern, with weight gradients put elsewhere between its forwards and input gradients; every second time by
    the general MIP, for longer.
    """

    run: Run
    done: list[Candidate] = field(default_factory=list)
    paced: list[Paced] = field(default_factory=list)
    turns: int = 0

    def step(self, seconds: float) -> bool:
        """Pace the next candidate; False if none is left."""
        run = self.run
        leading = [paced for paced in self.paced if paced.found is run.best and not paced.waits]
        if leading and not leading[0].found.closed:
            tune_waits(run, leading[0], seconds, 0)
            return True
        able = [found for found in run.candidates if found.bound.ns < run.makespan_ns]
        waiting = [found for found in able if not any(found is other for other in self.done)]
        if waiting:
            found = min(waiting, key=lambda found: found.bound.ns)
            self.done.append(found)
            paced = None if found.two_streams else shared_pattern(run, found, seconds)
            if paced is not None:
                self.paced.append(paced)
            else:
                general_pattern(run, found, seconds)
            return True
        if not able:
            return False
        self.turns += 1
        best = sorted(able, key=lambda found: found.makespan_ns)
        again = [paced for found in best for paced in self.paced if paced.found is found]
        if again and self.turns % 2:
            tune_waits(run, again[self.turns // 2 % min(2, len(again))], seconds, self.turns)
        else:
            found = best[self.turns // 2 % min(3, len(best))]
            general_pattern(run, found, seconds, middle_of(found) if self.turns % 4 < 2 else None)
        return True


def shared_pattern(run: Run, found: Candidate, seconds: float) -> Paced | None:
    """The pattern that all ranks of a candidate share, squeezed; None where there is none."""
    began, before = time.monotonic(), found.makespan_ns
    stairs = legs.staircase_of(found.view)
    if stairs is None:
        return None
    mirrored = found.halved and len({leg.route for leg in stairs.legs}) > 1
    pattern = staircase.pattern_of_staircase(stairs, mirrored=mirrored, time_limit_s=seconds, seed=run.options.seed)
    if pattern is None:
        return None
    moments = follow.moments_at(found.instance, pattern.period_ns, staircase.starts_of(found.view, stairs, pattern))
    orders = follow.squeezed(found.instance, moments, pattern.period_ns, stop=lambda: run.left <= 0)
    if orders is not None and not offer_orders(run, found, orders, staircase.NAME):
        begin_with(found, orders, staircase.NAME)
    order_rungs.record(run, staircase.NAME, found, before, began, pattern.outcome,
                 period=pattern.period_ns / run.problem.unit_ns)
    return Paced(found, moments)


def tune_waits(run: Run, paced: Paced, seconds: float, turn: int) -> None:
    """Vary how long ranks wait before a weight gradient fills the gap, forwards and input gradients as in the
    pattern."""
    found, began = paced.found, time.monotonic()
    before = found.makespan_ns
    orders, paced.waits = follow.tuned_fill(found.instance, paced.moments, seconds, run.options.seed + turn,
                                            paced.waits, stop=lambda: run.left <= 0)
    if orders is not None and offer_orders(run, found, orders, "tuned waits", (staircase.NAME,)):
        order_rungs.record(run, "tuned waits", found, before, began)


def middle_of(found: Candidate) -> dict[OperationKey, float] | None:
    """When the actions of the middle microbatch of every route start in the candidate's best schedule, in ns from the
    first of them: where the periodic MIP may begin."""
    if found.best is None or found.best.schedule.has_pairs:
        return None
    compiled, evaluation = evaluate(found.view, found.best.schedule)
    names = route_names(found.view)
    members = {name: [m for m, other in enumerate(names) if other == name] for name in set(names)}
    middle = {own[len(own) // 2]: name for name, own in members.items()}
    starts: dict[OperationKey, float] = {}
    for action, start in zip(compiled.actions, evaluation.starts, strict=True):
        if action.microbatch in middle:
            starts[action.stage, action.kind, middle[action.microbatch]] = float(start)
    begin = min(starts.values())
    return {key: start - begin for key, start in starts.items()}


def general_pattern(run: Run, found: Candidate, seconds: float, start: dict[OperationKey, float] | None = None) -> None:
    """The periodic MIP's pattern for a candidate, squeezed; ``start``: where the MIP may begin."""
    if len(set(route_names(found.view))) > ROUTES:
        return
    began, before = time.monotonic(), found.makespan_ns
    result = pattern_mip.pace(found.view, time_limit_s=seconds, seed=run.options.seed, start=start)
    if result.starts_ns is not None and result.period_ns is not None:
        moments = follow.moments_at(found.instance, result.period_ns, result.starts_ns)
        orders = follow.squeezed(found.instance, moments, result.period_ns, stop=lambda: run.left <= 0)
        if orders is not None and not offer_orders(run, found, orders, "periodic MIP"):
            begin_with(found, orders, "periodic MIP")
    order_rungs.record(run, "periodic MIP", found, before, began, result.outcome,
                 period=None if result.period_ns is None else result.period_ns / run.problem.unit_ns)


def offer_orders(run: Run, found: Candidate, orders: Orders, rung: str, after: tuple[str, ...] = ()) -> bool:
    """Offer a search's orders to a candidate; if better, the search goes on from them. Whether they were kept."""
    if orders.makespan_ns >= found.makespan_ns or not offer_judged(found, judge_orders(found, orders), rung, after):
        return False
    found.searched = found.lineage
    found.helpers.clear()
    if found.pairs is not None and found.best is not None:
        pair_search.go_on_from(found.pairs, found.best.schedule, found.makespan_ns)
    found.search = annealing.start(found.instance, orders, run.options.seed + 17, found.bound.ns)
    run.note(found, rung)
    return True


def begin_with(found: Candidate, orders: Orders, name: str) -> None:
    """Let the candidate's search begin a round with a pattern's orders, though they are no better than its best."""
    if found.search is not None and len(found.search.patterns) < WAITING:
        found.search.patterns.append((name, orders))


@dataclass(slots=True)
class Polishing:
    """Windows of the order MIP over the best plan, in rounds: another size and seed each time."""

    run: Run
    rounds: int = 0

    def step(self, seconds: float) -> bool:
        """Slide windows over the best schedule for some seconds; False where it is proven or cannot be better."""
        best = self.run.best
        if best is None or best.closed:
            return False
        order_rungs.polish_candidate(self.run, best, seconds, window=WINDOWS[self.rounds % len(WINDOWS)],
                                     turn=self.rounds)
        self.rounds += 1
        return True


@dataclass(slots=True)
class Proving:
    """The exact order MIP on candidates small enough for it, the one with the lowest bound first: better orders, or a
    higher bound at the placement."""

    run: Run

    def step(self, seconds: float) -> bool:
        """Work on the candidate that keeps the bound low; False where none is small enough."""
        run = self.run
        rivals = [found for found in run.candidates if found.bound.ns < run.makespan_ns and not found.closed
                  and found.instance.size <= order_rungs.EXACT_NODES]
        if not rivals:
            return False
        order_rungs.prove(run, min(rivals, key=lambda found: found.bound.ns), seconds)
        return True


@dataclass(slots=True)
class Indexing:
    """Relaxations of the time-indexed MIP for placements small enough for it: a higher bound there, or the proof.

    Of a fixed shape the placement with the lowest bound is next, which keeps the bound over all low; of free
    placements, where the bound of one says nothing of the others, the best plan's. (Its branch and bound is not for
    slices: HiGHS looks at the time too seldom in it.) ``ended``: the makespans from which on relaxations have nothing
    to say of a candidate: 0 if nothing is left, else the one with which its model was too large.
    """

    run: Run
    models: dict[Candidate, time_indexed.Indexed] = field(default_factory=dict)
    ended: dict[Candidate, int] = field(default_factory=dict)

    def step(self, seconds: float) -> bool:
        """Work on one placement; False where none is small enough, or has anything left to prove below the incumbent.
        """
        run = self.run
        waiting = [found for found in run.candidates if found.bounded and found.bound.ns < run.makespan_ns
                   and run.makespan_ns < self.ended.get(found, NEVER_NS)
                   and (found is run.best or run.options.placement != "free")]
        for found in sorted(waiting, key=lambda found: found.bound.ns):
            makespan_ns = run.makespan_ns
            if not self._small(found):
                self.ended[found] = makespan_ns
                continue
            if order_rungs.index(run, found, self.models[found], seconds):
                self.ended[found] = 0
            return True
        return False

    def _small(self, found: Candidate) -> bool:
        """Whether the candidate has a model of at most `COLUMNS`, now if not before; not where it would have more with
        a slot for each job, and where there is no bound by its jobs (as in `Tightening`)."""
        rows, ranks = 3 * found.view.num_stages, found.view.problem.num_ranks
        if found not in self.models and rows * rows * found.view.problem.num_microbatches // (2 * ranks) <= COLUMNS:
            try:
                model = time_indexed.indexed(found.view, makespan_ns=self.run.makespan_ns, lower_ns=found.bound.ns,
                                             max_columns=COLUMNS)
            except PlanError as error:
                found.notes.append(f"{time_indexed.NAME}: {error}")
                return False
            if model.exact:
                self.models[found] = model
        return found in self.models
