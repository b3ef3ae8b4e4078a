"""What a search found since last time, judged and taken as its candidate's best plan."""

from __future__ import annotations

import numpy as np

from mipipe.planner.ladder.admission import RESERVES, reserve
from mipipe.planner.ladder.candidate import Candidate, first_orders, judge, judge_orders, offer_judged
from mipipe.planner.ladder.state import Run
from mipipe.planner.search import annealing, pair_search
from mipipe.planner.search.lift import lift
from mipipe.planner.search.orders import Orders, memory_holds, orders_of_schedule
from mipipe.planner.search.pair_search import PairSearch
from mipipe.planner.sizes import JUDGED_S
from mipipe.planner.time_shares import SHARES

ANNEALING = "annealing"
"""What the searches are called where a plan says how it came about."""

JUDGE_LATE_S = 0.5
"""Seconds beyond the limit and a share of it in which a schedule may still be judged."""


Worker = annealing.Search | PairSearch
"""A search at a candidate's placement, without overlapped pairs or with them."""


def _time_to_judge(run: Run, found: Candidate) -> bool:
    """Whether a schedule of this size is judged in what is left of the limit, and a little more."""
    problem = found.view.problem
    actions = 3 * found.view.num_stages * problem.num_microbatches
    limit = run.options.time_limit_s
    return actions * JUDGED_S <= limit - run.seconds + SHARES.late * limit + JUDGE_LATE_S


def harvest(run: Run, found: Candidate, worker: Worker) -> None:
    """Judge what a search found since last time; where values in flight overfill a rank, search with less memory."""
    if isinstance(worker, PairSearch):
        _harvest_pairs(run, found, worker)
        return
    orders = worker.best
    if worker.instance is not found.instance:
        lifted = _lift(found, worker)
        if lifted is None:
            return
        orders = lifted
    if orders.makespan_ns >= found.seen_ns or not (found.exact or _time_to_judge(run, found)):
        return
    found.seen_ns = orders.makespan_ns
    judged = judge_orders(found, orders)
    if judged.fits:
        offer_judged(found, judged, ANNEALING, (worker.origin,) if worker.origin else found.searched)
        run.note(found, ANNEALING)
    elif found.reserved < RESERVES:
        found.reserved += 1
        reserve(found, judged)
        found.seen_ns = found.makespan_ns
        found.helpers.clear()
        known = _known(found)
        again = known or first_orders(found, compiled=True, seed=run.options.seed + found.reserved)
        if again is not None:
            found.searched = found.lineage if known is not None else ("list",)
            found.search = annealing.start(found.instance, again, run.options.seed + found.reserved, found.bound.ns)


def _harvest_pairs(run: Run, found: Candidate, worker: PairSearch) -> None:
    """The same for a search with overlapped pairs."""
    if worker.best.makespan_ns >= worker.seen_ns or not _time_to_judge(run, found):
        return
    worker.seen_ns = worker.best.makespan_ns
    judged = judge(found.view, pair_search.to_schedule(worker, worker.best))
    if judged.fits:
        offer_judged(found, judged, ANNEALING, found.searched)
        run.note(found, ANNEALING)
    elif worker.reserved < RESERVES:
        excess = np.array(judged.excess_bytes)
        pair_search.reserve(worker, np.maximum(excess, excess[::-1]) if found.halved else excess)


def _lift(found: Candidate, worker: annealing.Search) -> Orders | None:
    """The whole orders of what a search without collectives has found since last time, if they are the best so far."""
    assert found.search is not None
    if worker.best.makespan_ns >= found.seen_outline_ns:
        return None
    found.seen_outline_ns = worker.best.makespan_ns
    lifted = lift(found.instance, worker.instance, worker.best)
    if lifted is None or lifted.makespan_ns >= found.search.best.makespan_ns:
        return None
    found.search.best, found.search.origin = lifted, worker.origin
    return lifted


def _known(found: Candidate) -> Orders | None:
    """The candidate's best schedule as orders, if it is within the reduced memory."""
    if found.best is None or found.halved or found.best.schedule.has_pairs:
        return None
    known = orders_of_schedule(found.instance, found.best.schedule)
    return known if known is not None and memory_holds(found.instance, known.seq, known.length) else None
