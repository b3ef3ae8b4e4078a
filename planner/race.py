"""The race of placements: every candidate searched a little, the better half a little longer, until few are left.

`Run` is one solve in progress: its clock, candidates, incumbent, history and bound. Searches run in threads (the
kernels release the GIL) and in slices, so that time limits and Ctrl-C are kept within a fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mipipe.planner import kernels, lists, relax, search
from mipipe.planner.candidate import Candidate, Judged, first_orders, in_flight, judge, offer_judged
from mipipe.planner.greedy import Orders, to_array
from mipipe.planner.instance import expand, orders_from
from mipipe.planner.lift import lift
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem

FINALISTS = 2
"""Placements that share the time after the elimination rounds. With 8 ranks the winner of a 60 s race was among the
first two after 1 s each in all cases tried."""


OUTLINE = 0.6
"""Share of the time limit in which problems with a collective stream are searched without it."""

OUTLINED = 100
"""Nodes from which quotas are tuned for the first list of a search without collectives."""

OUTLINE_ROUNDS = 1
"""Rounds after which a large search without collectives ends: it hardly gains then, the whole one does (16 ranks x 64
microbatches, seconds of one core: 4,739 after 1.4 and 4,731 after 3.2 without, lifted 4,862; 4,764 after 1.9 more)."""

FAR = 1.08
"""Finalists this many times as long as the best are given up."""

LAST = 0.6
"""Share of the time limit after which only the best placement is searched, by all threads."""


@dataclass(frozen=True, slots=True)
class Incumbent:
    """One improvement of a solve: when, how good, found by which rung at which placement."""

    seconds: float
    makespan_ns: int
    rung: str
    placement: str


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress callback sees: the phase, the incumbent and bound so far (None before the first)."""

    seconds: float
    phase: str
    makespan_ns: int | None
    bound_ns: int | None
    placement: str = ""
    rung: str = ""


@dataclass(slots=True)
class Run:
    """One solve in progress."""

    problem: PlanningProblem
    options: PlanOptions
    on_progress: Callable[[Progress], None] | None = None
    began: float = field(default_factory=time.monotonic)
    candidates: list[Candidate] = field(default_factory=list)
    best: Candidate | None = None
    bound_ns: int | None = None
    history: list[Incumbent] = field(default_factory=list)
    ablation: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    interrupted: bool = False
    reserve_s: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until the limit, less what the last check of the plan takes; none after Ctrl-C."""
        return 0.0 if self.interrupted else self.options.time_limit_s - self.reserve_s - self.seconds

    @property
    def makespan_ns(self) -> int:
        return self.best.makespan_ns if self.best else 1 << 62

    @property
    def closed(self) -> bool:
        """Whether nothing allowed can be better (or better by more than the gap asked for)."""
        if self.best is None:
            return False
        if self.bound_ns is not None and self.makespan_ns <= self.bound_ns * (1 + self.options.gap):
            return True
        return all(found.bound.ns >= self.makespan_ns for found in self.candidates) and self.options.placement != "free"

    def report(self, phase: str) -> None:
        """Tell the callback where the solve stands."""
        if self.on_progress is not None:
            best = self.best
            self.on_progress(Progress(self.seconds, phase, best.makespan_ns if best else None, self.bound_ns,
                                      best.placement.name if best else "", best.rung if best else ""))

    def note(self, found: Candidate, phase: str) -> bool:
        """Make a candidate's incumbent the solve's if it is better; whether it was."""
        if found.best is None:
            return False
        known = self.history[-1].makespan_ns if self.history else 1 << 62
        if found.makespan_ns >= known:
            return False
        self.best = found
        self.history.append(Incumbent(self.seconds, found.makespan_ns, found.rung, found.placement.name))
        self.report(phase)
        return True


RESERVES = 8
"""How often a candidate's memory is cut by what values in flight took too much, before it is given up."""


def seed_search(run: Run, found: Candidate, *, compiled: bool = True) -> bool:
    """Give a candidate its list schedule; False where no order fits its memory.

    Lists do not see values in flight. Where these overfill a rank, the list is made again with that much less memory.
    """
    usual = in_flight(found.view)
    found.instance.cap[:] -= usual
    for turn in range(RESERVES):
        orders = first_orders(found, compiled=compiled, seed=run.options.seed)
        if orders is None and turn == 0 and usual.any():
            found.instance.cap[:] += usual
            continue
        if orders is None:
            return False
        if compiled and turn == 0:
            orders = _outlined(run, found, orders)
        found.quick = not compiled
        judged = judge(found.view, expand(found.instance, orders.lists()), saved_fit=True)
        if judged.fits:
            offer_judged(found, judged, "list")
            found.search = search.start(found.instance, orders, run.options.seed + 1, found.bound.ns)
            run.note(found, "list scheduling")
            return True
        reserve(found, judged)
    return False


def _outlined(run: Run, found: Candidate, orders: Orders) -> Orders:
    """Start the search without collectives where there are some; its list lifted, if better than the given orders."""
    small = relax.relaxed(found.instance)
    if small is None or not run.options.use_search:
        return orders
    made = lists.best_list(small, run.options.seed, few=OUTLINED)
    if made is None:
        return orders
    found.outline = search.start(small, made, run.options.seed + 3, found.bound.ns)
    lifted = lift(found.instance, small, made)
    return lifted if lifted is not None and lifted.makespan_ns < orders.makespan_ns else orders


def _start_again(run: Run, found: Candidate) -> None:
    """The search of a candidate whose first list was interpreted, from the best of all lists."""
    found.quick = False
    orders = first_orders(found, compiled=True, seed=run.options.seed)
    assert found.search is not None
    if orders is not None:
        orders = _outlined(run, found, orders)
        if orders.makespan_ns < found.search.best.makespan_ns:
            found.search.best = orders


def reserve(found: Candidate, judged: Judged) -> None:
    """Take what a schedule lacked from the memory the search may use."""
    excess = np.array(judged.excess_bytes)
    if found.halved:
        excess = np.maximum(excess, excess[::-1])
    found.instance.cap[:] -= excess


def race(run: Run, candidates: Sequence[Candidate], until: Callable[[], float]) -> None:
    """Successive halving over the candidates, then the finalists share the time; ``until()`` is the seconds left."""
    live = [found for found in candidates if found.search is not None]
    for found in live:
        if found.quick:
            _start_again(run, found)
    slice_s = 0.3
    with ThreadPoolExecutor(run.options.threads) as pool:
        try:
            while live and until() > 0 and not run.closed:
                live = [found for found in live if found.bound.ns < run.makespan_ns and not found.closed]
                _round(run, pool, live, slice_s, until)
                live = _ranked(live)
                fewest = 1 if run.seconds > LAST * run.options.time_limit_s else FINALISTS
                live = live[:max(fewest, (len(live) + 1) // 2)]
                if len(live) <= FINALISTS:
                    live = [found for found in live if found.makespan_ns <= FAR * live[0].makespan_ns]
                slice_s = min(5.0, slice_s * 1.7)
        finally:
            run.stopped = True
    run.stopped = False


def _ranked(live: Sequence[Candidate]) -> list[Candidate]:
    """The shortest first, then by the middle between makespan and bound: what is near its own bound has little left.

    Two streams, 8 ranks x 20 microbatches: two-way is first for long (1,562 of at least 1,548), interleaved
    half-stages end at 1,529 (at least 1,456).
    """
    shortest = sorted(live, key=lambda found: found.makespan_ns)
    return shortest[:1] + sorted(shortest[1:], key=lambda found: found.makespan_ns + found.bound.ns)


def _round(run: Run, pool: ThreadPoolExecutor, live: Sequence[Candidate], slice_s: float,
           until: Callable[[], float]) -> None:
    """Advance every live candidate by a slice, as many at once as there are threads."""
    waiting = [(found, _worker(run, found)) for found in live]
    for found in live if len(live) < run.options.threads else ():
        waiting += [(found, other) for other in _helpers(run, found, run.options.threads // len(live) - 1)]
    busy: dict[Future[bool], tuple[Candidate, search.Search]] = {}
    while waiting or busy:
        while waiting and len(busy) < run.options.threads and until() > 0 and not run.closed:
            found, worker = waiting.pop(0)
            assert worker is not None
            seconds = min(slice_s, max(0.05, until()))
            busy[pool.submit(search.advance, worker, seconds, lambda: run.stopped)] = (found, worker)
        if not busy:
            return
        done, _ = wait(busy, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            found, worker = busy.pop(future)
            future.result()
            _harvest(run, found, worker)


def _helpers(run: Run, found: Candidate, count: int) -> list[search.Search]:
    """Further searches at one placement with other seeds, for threads that would idle."""
    first = _worker(run, found)
    if found.helpers and found.helpers[0].instance is not first.instance:
        found.helpers.clear()
    while len(found.helpers) < count:
        seed = run.options.seed + 1009 * (len(found.helpers) + 1)
        found.helpers.append(search.start(first.instance, first.best, seed, found.bound.ns))
    best = min([first, *found.helpers], key=lambda worker: worker.best.makespan_ns).best
    for worker in (first, *found.helpers):
        worker.best = best
    return found.helpers[:count]


def _worker(run: Run, found: Candidate) -> search.Search:
    """The candidate's search: without collectives for the first share of the time, where there are some."""
    assert found.search is not None
    outline = found.outline
    if outline is None or outline.finished or run.seconds > OUTLINE * run.options.time_limit_s:
        return found.search
    return found.search if outline.rounds > OUTLINE_ROUNDS and outline.instance.size >= search.LARGE else outline


def _harvest(run: Run, found: Candidate, worker: search.Search) -> None:
    """Judge what a search found since last time; where values in flight overfill a rank, search with less memory."""
    orders = worker.best
    if worker.instance is not found.instance:
        lifted = _lift(found, worker)
        if lifted is None:
            return
        orders = lifted
    if orders.makespan_ns >= found.seen_ns:
        return
    found.seen_ns = orders.makespan_ns
    judged = judge(found.view, expand(found.instance, orders.lists()), saved_fit=True)
    if judged.fits:
        offer_judged(found, judged, "search")
        run.note(found, "search")
    elif found.reserved < RESERVES:
        found.reserved += 1
        reserve(found, judged)
        found.seen_ns = found.makespan_ns
        found.helpers.clear()
        again = _known(found) or first_orders(found, compiled=True, seed=run.options.seed + found.reserved)
        if again is not None:
            found.search = search.start(found.instance, again, run.options.seed + found.reserved, found.bound.ns)


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
    if found.best is None or found.halved:
        return None
    seq, instance = to_array(orders_from(found.instance, found.best.schedule)), found.instance
    length = instance.lengths()
    for k in range(instance.num_machines):
        cap = instance.cap[instance.rank[seq[k, 0]]]
        if not kernels.memory_fits(seq, k, 0, length[k] - 1, 0, instance.alloc, instance.free, instance.work, cap):
            return None
    return Orders(seq, length, found.makespan_ns)
