"""The race of placements: every candidate searched a little, the better half a little longer, until few are left.

Searches run in threads (the kernels release the GIL) and in slices, so that time limits and Ctrl-C are kept within a
fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

from mipipe.planner.jobs import paths as kernels
from mipipe.planner.jobs.arrays import orders_from, to_array, with_mirrors
from mipipe.planner.ladder.admission import RESERVES, reserve, start_again
from mipipe.planner.ladder.candidate import Candidate, first_orders, judge, offer_judged
from mipipe.planner.ladder.state import Run
from mipipe.planner.search import annealing as search
from mipipe.planner.search import pair_search
from mipipe.planner.search.lift import lift
from mipipe.planner.search.lists import Orders
from mipipe.planner.search.pair_search import PairSearch

FINALISTS = 2
"""Placements that share the time after the elimination rounds: the winner is among the first two nearly always."""

OUTLINE = 0.6
"""Share of the time limit in which problems with a collective stream are searched without it."""

OUTLINE_ROUNDS = 1
"""Rounds after which a large search without collectives ends: it hardly gains then, the whole one does."""

FAR = 1.08
"""Finalists this many times as long as the best are given up."""

LAST = 0.4
"""Share of the time limit after which only the most promising of the finalists is searched, by all threads."""

LEAST = 0.15
"""Share of the time limit that must be left for a last round (`mipipe.planner.search.annealing.finish`)."""


Worker = search.Search | PairSearch
"""A search at a candidate's placement, without overlapped pairs or with them."""


def race(run: Run, candidates: Sequence[Candidate], until: Callable[[], float]) -> None:
    """Successive halving over the candidates, then the finalists share the time; ``until()`` is the seconds left."""
    live = [found for found in candidates if found.search is not None]
    for found in live:
        if found.quick:
            start_again(run, found)
        if found.pairs is None and found.search is not None:
            found.pairs = pair_search.start(found.instance, found.search.best, run.options.seed + 5, found.bound.ns)
    slice_s = 0.3
    with ThreadPoolExecutor(run.options.threads) as pool:
        try:
            while live and until() > 0 and not run.closed:
                live = [found for found in live if found.bound.ns < run.makespan_ns and not found.closed]
                _round(run, pool, live, slice_s, until)
                late = run.seconds > LAST * run.options.time_limit_s
                live = _ranked(live)[:max(FINALISTS, (len(live) + 1) // 2)]
                if late and 0 < len(live) <= FINALISTS:
                    live = [min(live, key=_middle)]
                    _last_round(run, live[0], until())
                if len(live) <= FINALISTS:
                    live = [found for found in live if found.makespan_ns <= FAR * live[0].makespan_ns]
                slice_s = min(5.0, slice_s * 1.7)
        finally:
            run.stopped = True
    run.stopped = False


def _last_round(run: Run, found: Candidate, seconds: float) -> None:
    """Let every thread's search cool once over the time left, where that beats the usual rounds."""
    first = _worker(run, found)
    if isinstance(first, PairSearch):
        return
    if first is found.outline:
        seconds = OUTLINE * run.options.time_limit_s - run.seconds
    if not first.ends and first.instance.size <= search.LASTING and seconds > LEAST * run.options.time_limit_s:
        for worker in (first, *_helpers(run, found, run.options.threads - 1)):
            assert isinstance(worker, search.Search)
            search.finish(worker, seconds)


def _ranked(live: Sequence[Candidate]) -> list[Candidate]:
    """The shortest first, then by the middle between makespan and bound: what is near its own bound has little left."""
    shortest = min(live, key=lambda found: found.makespan_ns, default=None)
    return sorted(live, key=lambda found: (found is not shortest, _middle(found)))


def _middle(found: Candidate) -> int:
    return found.makespan_ns + found.bound.ns


def _round(run: Run, pool: ThreadPoolExecutor, live: Sequence[Candidate], slice_s: float,
           until: Callable[[], float]) -> None:
    """Advance every live candidate by a slice, as many at once as there are threads."""
    waiting = [(found, _worker(run, found)) for found in live]
    for found in live if len(live) < run.options.threads else ():
        waiting += [(found, other) for other in _helpers(run, found, run.options.threads // len(live) - 1)]
    busy: dict[Future[bool], tuple[Candidate, Worker]] = {}
    while waiting or busy:
        while waiting and len(busy) < run.options.threads and until() > 0 and not run.closed:
            found, worker = waiting.pop(0)
            assert worker is not None
            seconds = min(slice_s, max(0.05, until()))
            busy[pool.submit(_advance, worker, seconds, lambda: run.stopped)] = (found, worker)
        if not busy:
            return
        done, _ = wait(busy, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            found, worker = busy.pop(future)
            future.result()
            _harvest(run, found, worker)


def _advance(worker: Worker, seconds: float, stop: Callable[[], bool]) -> bool:
    if isinstance(worker, PairSearch):
        return pair_search.advance(worker, seconds, stop)
    return search.advance(worker, seconds, stop)


def _helpers(run: Run, found: Candidate, count: int) -> list[Worker]:
    """Further searches at one placement with other seeds, for threads that would idle."""
    first = _worker(run, found)
    if isinstance(first, PairSearch):
        return [*pair_search.helpers(first, count)]
    if found.helpers and found.helpers[0].instance is not first.instance:
        found.helpers.clear()
    while len(found.helpers) < count:
        seed = run.options.seed + 1009 * (len(found.helpers) + 1)
        found.helpers.append(search.start(first.instance, first.best, seed, found.bound.ns))
    best = min([first, *found.helpers], key=lambda worker: worker.best.makespan_ns).best
    for worker in (first, *found.helpers):
        worker.best = best
    return [*found.helpers[:count]]


def _worker(run: Run, found: Candidate) -> Worker:
    """The candidate's search: with overlapped pairs where they gain; without collectives for the first share of the
    time, where there are some."""
    assert found.search is not None
    if found.pairs is not None:
        return found.pairs
    outline = found.outline
    if outline is None or outline.finished or run.seconds > OUTLINE * run.options.time_limit_s:
        return found.search
    return found.search if outline.rounds > OUTLINE_ROUNDS and outline.instance.size >= search.LARGE else outline


def _harvest(run: Run, found: Candidate, worker: Worker) -> None:
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
    if orders.makespan_ns >= found.seen_ns:
        return
    found.seen_ns = orders.makespan_ns
    judged = judge(found.view, with_mirrors(found.instance, orders.lists()), saved_fit=True)
    if judged.fits:
        offer_judged(found, judged, "annealing", found.searched)
        run.note(found, "annealing")
    elif found.reserved < RESERVES:
        found.reserved += 1
        reserve(found, judged)
        found.seen_ns = found.makespan_ns
        found.helpers.clear()
        known = _known(found)
        again = known or first_orders(found, compiled=True, seed=run.options.seed + found.reserved)
        if again is not None:
            found.searched = found.lineage if known is not None else ("list",)
            found.search = search.start(found.instance, again, run.options.seed + found.reserved, found.bound.ns)


def _harvest_pairs(run: Run, found: Candidate, worker: PairSearch) -> None:
    """The same for a search with overlapped pairs."""
    if worker.best.makespan_ns >= worker.seen_ns:
        return
    worker.seen_ns = worker.best.makespan_ns
    judged = judge(found.view, pair_search.to_schedule(worker, worker.best))
    if judged.fits:
        offer_judged(found, judged, "annealing", found.searched)
        run.note(found, "annealing")
    elif worker.reserved < RESERVES:
        excess = np.array(judged.excess_bytes)
        pair_search.reserve(worker, np.maximum(excess, excess[::-1]) if found.halved else excess)


def _lift(found: Candidate, worker: search.Search) -> Orders | None:
    """The whole orders of what a search without collectives has found since last time, if they are the best so far."""
    assert found.search is not None
    if worker.best.makespan_ns >= found.seen_outline_ns:
        return None
    found.seen_outline_ns = worker.best.makespan_ns
    lifted = lift(found.instance, worker.instance, worker.best)
    if lifted is None or lifted.makespan_ns >= found.search.best.makespan_ns:
        return None
    found.search.best = lifted
    return lifted


def _known(found: Candidate) -> Orders | None:
    """The candidate's best schedule as orders, if it is within the reduced memory."""
    if found.best is None or found.halved or found.best.schedule.has_pairs:
        return None
    seq, instance = to_array(orders_from(found.instance, found.best.schedule)), found.instance
    length = instance.lengths()
    for k in range(instance.num_machines):
        cap = instance.cap[instance.rank[seq[k, 0]]]
        if not kernels.memory_fits(seq, k, 0, length[k] - 1, 0, instance.alloc, instance.free, instance.work, cap):
            return None
    return Orders(seq, length, found.makespan_ns)
