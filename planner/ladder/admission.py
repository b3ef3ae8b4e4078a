"""How a placement becomes a candidate of a solve: its bound, then a list schedule, where some order fits its memory.

Bounds are cheap and say well where a search will end, lists take longer: so bounds come first, and lists go to the
placements with the lowest ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count, islice, takewhile

import numpy as np

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.bounds.over_placements import facts_of
from mipipe.planner.jobs.arrays import to_array, with_mirrors
from mipipe.planner.jobs.memory import in_flight
from mipipe.planner.ladder.candidate import Candidate, Judged, candidate, first_orders, judge, offer_judged
from mipipe.planner.ladder.large import chain_actions
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlacementName, PlanOptions
from mipipe.planner.placements.cuts import earliest_end
from mipipe.planner.placements.feasible import why_infeasible, with_recomputation
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.placements.shortages import shortage
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.search import annealing, best_list, follow, lists, streams
from mipipe.planner.search.lift import lift
from mipipe.planner.search.orders import Orders, timed
from mipipe.planner.sizes import CHECKED_S, COMPILED, VERY_MANY
from mipipe.planner.time_shares import SHARES

SHAPES_OF_MANY: tuple[PlacementName, ...] = ("chain", "two-way", "v")
"""The shapes that enter beyond `VERY_MANY` actions of a chain: time does not suffice for all."""

SEVERAL = 6
"""After so many candidates lists take less of the time: the most promising come first."""

OUTLINED = 100
"""Nodes from which quotas are tuned for the first list of a search without collectives."""

RESERVES = 8
"""How often a candidate's memory is cut by what values in flight took too much, before it is given up."""


def enter(run: Run) -> None:
    """Propose placements and schedule each by list, the first at once, the others the most promising first.

    The seconds per action of the placements so far say which of the rest can still be built in time.
    """
    limit = run.options.time_limit_s
    waiting = _most_promising(run, propose_shapes(run.problem, run.options.placement))
    if run.options.placement == "free" and chain_actions(run.problem) > VERY_MANY:
        waiting = filter(None, (_candidate(run, placement) for name in SHAPES_OF_MANY
                                for placement in propose_shapes(run.problem, name)))
    built, spent = 0, 0.0
    for found in waiting:
        until = SHARES.until_entered if len(run.candidates) < SEVERAL else SHARES.until_several
        if run.best is not None and run.past(until):
            run.leave_out(found.bound.ns)
            break
        size = len(found.placement.stages) * run.problem.num_microbatches
        expected = spent / built * size if built else 0.0
        late = run.left - expected < (1 - SHARES.until_entered) * limit
        if run.best is not None and (late or found.bound.ns >= run.makespan_ns):
            run.leave_out(found.bound.ns)
            continue
        began = run.seconds
        if not _admit(run, found) and shortage(run.problem, found.placement) is None:
            run.leave_out(found.bound.ns)  # one microbatch at a time fits, so other orders may
        built, spent = built + size, spent + run.seconds - began
        run.reserve_s = min(SHARES.checking * limit, max(0.5 * spent / built, 3 * CHECKED_S) * size)
    if run.options.placement != "free":  # few, and the bound is to hold for all of them
        for found in waiting:
            run.leave_out(found.bound.ns)
    run.entered = True


def _most_promising(run: Run, waiting: Iterator[Placement]) -> Iterator[Candidate]:
    """The first placement; then those that can be fitted in a tenth of the time, by their bounds; then the rest."""
    yield from filter(None, (_candidate(run, placement) for placement in islice(waiting, 1)))
    heads = facts_of(run.problem).head
    proposed: list[Placement] = []
    for placement in waiting:
        proposed.append(placement)
        if run.past(SHARES.until_proposed):
            break
    proposed.sort(key=lambda placement: earliest_end(run.problem, placement, heads))
    rest = iter(proposed)
    in_time = takewhile(lambda _: not run.past(SHARES.until_bounded), count())
    bounded = [_candidate(run, placement) for _, placement in zip(in_time, rest, strict=False)]
    yield from sorted(filter(None, bounded), key=lambda made: made.bound.ns)
    yield from filter(None, (_candidate(run, placement) for placement in chain(rest, waiting)))


def recomputing(run: Run) -> None:
    """Where nothing fits otherwise: every placement with F run again by all stages, and by the first half of them."""
    for placement in propose_shapes(run.problem, run.options.placement):
        for variant in with_recomputation(run.problem, placement):
            admit_placement(run, variant)


def has_plan(problem: PlanningProblem, options: PlanOptions) -> bool:
    """Whether a solve of the problem would find a plan: some placement that the first list fits, which it tries too."""
    run = Run(problem, options)
    placements: Iterator[Placement] = propose_shapes(problem, options.placement)
    if options.recompute:
        placements = chain(placements, (variant for placement in propose_shapes(problem, options.placement)
                                        for variant in with_recomputation(problem, placement)))
    for placement in placements:
        found = _candidate(run, placement) if shortage(problem, placement) is None else None
        if found is not None and seed_search(run, found, compiled=False):
            return True
    return False


def why_no_plan(run: Run, *, proven: bool = False) -> str:
    """Why nothing fits, with sizes and changes with which a plan was found; ``proven``: no placement at all does."""
    problem, options = run.problem, run.options
    may = any(group.recompute_bytes is not None for group in problem.groups)
    again: tuple[str, ...] = ()
    with suppress(clock.OutOfTimeError):
        if not options.recompute and may and has_plan(problem, replace(options, recompute=True)):
            again = ("recompute",)
        elif not options.recompute and not may and problem.graph_digest:  # whose groups offer it where it is asked for
            again = ("try recomputation",)
    return why_infeasible(problem, options.placement, lambda changed: has_plan(changed, options), proven=proven,
                          also=again)


def admit_placement(run: Run, placement: Placement) -> Candidate | None:
    """Make a placement a candidate if some order fits its memory; the candidate, or None."""
    found = _candidate(run, placement)
    return found if found is not None and _admit(run, found) else None


def take(run: Run, found: Candidate) -> bool:
    """Schedule a candidate by list and take it into the run; whether some order fits its memory."""
    return _admit(run, found)


def _candidate(run: Run, placement: Placement) -> Candidate | None:
    """The placement with its bound; None where it never fits."""
    try:
        return candidate(run.problem, placement)
    except PlanError:
        return None


def _admit(run: Run, found: Candidate) -> bool:
    """Schedule a candidate by list and take it into the run; whether some order fits its memory.

    As long as there is no plan, the first rule decides: it is quick, and what `has_plan` promises is then kept.
    """
    fits = run.best is None and seed_search(run, found, compiled=False)
    if not fits and (run.best is not None or found.instance.size > COMPILED):
        fits = seed_search(run, found)
    if fits:
        run.candidates.append(found)
    return fits


def seed_search(run: Run, found: Candidate, *, compiled: bool = True) -> bool:
    """Give a candidate its list schedule; False where no order fits its memory.

    Lists do not see values in flight. Where these overfill a rank, the list is made again with that much less memory;
    where that does not help (little else takes memory, say), one microbatch after the other may fit.
    """
    usual, cap = in_flight(found.view), found.instance.cap.copy()
    found.instance.cap[:] -= usual
    for turn in range(RESERVES):
        clock.ask()
        orders = (first_orders(found, compiled=True, seed=run.options.seed) if compiled else
                  lists.schedule(found.instance, lists.RULES[0], compiled=found.instance.size > COMPILED))
        if orders is None and turn == 0 and usual.any():
            found.instance.cap[:] += usual
            continue
        if orders is None:
            break
        if compiled and turn == 0:
            orders = _outlined(run, found, orders)
        found.quick = not compiled
        schedule = with_mirrors(found.instance, orders.lists(), clock.ask)
        clock.ask()
        judged = judge(found.view, schedule, saved_fit=True)
        if judged.fits:
            _begin(run, found, orders, judged)
            return True
        reserve(found, judged)
    found.instance.cap[:] = cap
    one_by_one = follow.serial(found.instance)
    try:
        judged = judge(found.view, with_mirrors(found.instance, one_by_one, clock.ask))
    except PlanError:  # mirror images wait for each other
        return False
    serial = timed(found.instance, to_array(one_by_one), found.instance.lengths()) if judged.fits else None
    if serial is None:
        return False
    _begin(run, found, serial, judged)
    return True


def _begin(run: Run, found: Candidate, orders: Orders, judged: Judged) -> None:
    """Take a first order that fits as the candidate's plan, and as where its search begins."""
    offer_judged(found, judged, "list")
    found.search = annealing.start(found.instance, orders, run.options.seed + 1, found.bound.ns)
    run.note(found, "list scheduling")


def _outlined(run: Run, found: Candidate, orders: Orders) -> Orders:
    """Start the search without collectives where there are some; its list lifted, if better than the given orders."""
    clock.ask()
    small = streams.relaxed(found.instance)
    if small is None or not run.options.use_search:
        return orders
    clock.ask()
    made = best_list.best_list(small, run.options.seed, few=OUTLINED)
    if made is None:
        return orders
    found.outline = annealing.start(small, made, run.options.seed + 3, found.bound.ns)
    clock.ask()
    lifted = lift(found.instance, small, made)
    return lifted if lifted is not None and lifted.makespan_ns < orders.makespan_ns else orders


def start_again(run: Run, found: Candidate) -> None:
    """The search of a candidate whose first list was interpreted, from the best of all lists."""
    found.quick = False
    orders = first_orders(found, compiled=True, seed=run.options.seed)
    assert found.search is not None
    if orders is not None:
        orders = _outlined(run, found, orders)
        if orders.makespan_ns < found.search.best.makespan_ns:
            found.search.best, found.search.origin = orders, ""


def reserve(found: Candidate, judged: Judged) -> None:
    """Take what a schedule lacked from the memory the search may use."""
    excess = np.array(judged.excess_bytes)
    if found.halved:
        excess = np.maximum(excess, excess[::-1])
    found.instance.cap[:] -= excess
