"""The race of placements: every candidate searched a little, the better half a little longer, until few are left.

Candidates may join while it runs; those given up come back where the others are done.

Searches run in threads (the kernels release the GIL) and in slices, so that time limits and Ctrl-C are kept within a
fraction of a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from mipipe.planner import clock
from mipipe.planner.ladder.admission import start_again
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.ladder.harvest import Worker, harvest
from mipipe.planner.ladder.state import Run
from mipipe.planner.search import annealing, pair_search
from mipipe.planner.search.pair_search import PairSearch
from mipipe.planner.time_shares import SHARES

FINALISTS = 2
"""Placements that share the time after the elimination rounds: the winner is among the first two nearly always."""

TRIALS = 3
"""Slices that every candidate has before it may be given up."""

TURN_S = 1.0
"""Seconds of a turn of annealing, after which another activity may have its own."""

TRIED_S = 1.0
"""Seconds of the longest slice on trial."""

FIRST, LONGEST = 0.18, 5.0
"""Seconds of a slice before the first round, and of the longest: every round's are 1.7 times as long."""

OUTLINE_ROUNDS = 1
"""Rounds after which a large search without collectives ends: it hardly gains then, the whole one does."""

FAR = 1.08
"""Finalists this many times as long as the best are given up."""


@dataclass(slots=True)
class Race:
    """The searches of a solve, in rounds that can be left and taken up again (`step`).

    ``live``: the candidates of the round; ``queue``: searches that have not had their slice of it yet; ``known``:
    candidates that have joined; ``trials``: of those that joined late, the slices they have before they may be given
    up.
    """

    run: Run
    live: list[Candidate] = field(default_factory=list)
    queue: list[tuple[Candidate, Worker, float]] = field(default_factory=list)
    known: list[Candidate] = field(default_factory=list)
    trials: list[tuple[Candidate, int]] = field(default_factory=list)
    slice_s: float = FIRST

    def step(self, seconds: float, threads: int, stop: Callable[[], bool] = lambda: False) -> bool:
        """Search for some seconds; False where no candidate is left that a search could improve."""
        end = time.monotonic() + seconds
        run = self.run

        def until() -> float:
            return 0.0 if stop() else min(end - time.monotonic(), run.left)

        try:
            with clock.watched(lambda: run.left):  # a thread of its own may run this
                self._enter()
        except clock.OutOfTimeError:
            return True
        run.stopped = False
        with ThreadPoolExecutor(threads) as pool:
            try:
                while until() > 0 and not run.closed:
                    if not self.queue and not self._begin_round(threads):
                        return False
                    _round(run, pool, self.queue, threads, until)
            finally:
                run.stopped = True
        return bool(self.live)

    def _enter(self) -> None:
        """Let the candidates in that have come since last time."""
        begins = not self.known
        for found in self.run.candidates:
            if found.search is None or any(found is other for other in self.known):
                continue
            self.known.append(found)
            if found.quick:
                start_again(self.run, found)
            if found.pairs is None:
                found.pairs = pair_search.start(found.instance, found.search.best, self.run.options.seed + 5,
                                                found.bound.ns)
            if begins:
                self.live.append(found)
            else:
                self.trials.append((found, TRIALS))

    def _begin_round(self, threads: int) -> bool:
        """Choose who searches in the next round; whether there is anyone.

        The better half of the last round's, and those on trial; where nobody is left the most promising of those given
        up.
        """
        run = self.run

        def able(found: Candidate) -> bool:
            return found.bound.ns < run.makespan_ns and not found.closed

        kept = _ranked([found for found in self.live if able(found)])
        if self.slice_s > FIRST:
            kept = kept[:max(FINALISTS, (len(kept) + 1) // 2)]
        if run.seconds > SHARES.until_raced * run.options.time_limit_s and 0 < len(kept) <= FINALISTS:
            kept = [min(kept, key=_middle)]
            _last_round(run, kept[0], run.left, run.options.threads)
        if 1 < len(kept) <= FINALISTS:
            kept = [found for found in kept if found.makespan_ns <= FAR * kept[0].makespan_ns]
        tried = [found for found, _ in self.trials if able(found) and not any(found is other for other in kept)]
        self.trials = [(found, left - 1) for found, left in self.trials if left > 1]
        self.live = kept + tried or _ranked([found for found in self.known if able(found)])[:FINALISTS]
        self.slice_s = min(LONGEST, self.slice_s * 1.7)
        on_trial = {id(found) for found in tried}
        self.queue = [(found, _worker(run, found), min(TRIED_S if id(found) in on_trial else LONGEST, self.slice_s))
                      for found in self.live]
        for found in self.live if len(self.live) < threads else ():
            self.queue += [(found, other, self.slice_s)
                           for other in _helpers(run, found, threads // len(self.live) - 1)]
        return bool(self.live)


def _last_round(run: Run, found: Candidate, seconds: float, threads: int) -> None:
    """Let every thread's search cool once over the time left, where that beats the usual rounds."""
    first = _worker(run, found)
    if isinstance(first, PairSearch):
        return
    if first is found.outline:
        seconds = SHARES.until_outlined * run.options.time_limit_s - run.seconds
    enough = seconds > SHARES.last_round * run.options.time_limit_s
    if enough and not first.ends and first.instance.size <= annealing.LASTING:
        for worker in (first, *_helpers(run, found, threads - 1)):
            assert isinstance(worker, annealing.Search)
            annealing.finish(worker, seconds)


def _ranked(live: Sequence[Candidate]) -> list[Candidate]:
    """The shortest first, then by the middle between makespan and bound: what is near its own bound has little left."""
    shortest = min(live, key=lambda found: found.makespan_ns, default=None)
    return sorted(live, key=lambda found: (found is not shortest, _middle(found)))


def _middle(found: Candidate) -> int:
    return found.makespan_ns + found.bound.ns


def _round(run: Run, pool: ThreadPoolExecutor, waiting: list[tuple[Candidate, Worker, float]], threads: int,
           until: Callable[[], float]) -> None:
    """Advance every search that waits by a slice, as many at once as there are threads; who had its slice is taken from
    ``waiting``."""
    busy: dict[Future[bool], tuple[Candidate, Worker]] = {}
    while waiting or busy:
        while waiting and len(busy) < threads and until() > 0 and not run.closed:
            found, worker, seconds = waiting.pop(0)
            seconds = min(seconds, max(clock.LEAST_S, until()))
            busy[pool.submit(_advance, worker, seconds, lambda: run.stopped or until() <= 0)] = (found, worker)
        if not busy:
            return
        done, _ = wait(busy, timeout=0.2, return_when=FIRST_COMPLETED)
        for future in done:
            found, worker = busy.pop(future)
            future.result()
            harvest(run, found, worker)


def _advance(worker: Worker, seconds: float, stop: Callable[[], bool]) -> bool:
    if isinstance(worker, PairSearch):
        return pair_search.advance(worker, seconds, stop)
    return annealing.advance(worker, seconds, stop)


def _helpers(run: Run, found: Candidate, count: int) -> list[Worker]:
    """Further searches at one placement with other seeds, for threads that would idle."""
    first = _worker(run, found)
    if isinstance(first, PairSearch):
        return [*pair_search.helpers(first, count)]
    if found.helpers and found.helpers[0].instance is not first.instance:
        found.helpers.clear()
    while len(found.helpers) < count:
        seed = run.options.seed + 1009 * (len(found.helpers) + 1)
        found.helpers.append(annealing.start(first.instance, first.best, seed, found.bound.ns))
    ahead = min([first, *found.helpers], key=lambda worker: worker.best.makespan_ns)
    for worker in (first, *found.helpers):
        worker.best, worker.origin = ahead.best, ahead.origin
    return [*found.helpers[:count]]


def _worker(run: Run, found: Candidate) -> Worker:
    """The candidate's search: with overlapped pairs where they gain; without collectives for the first share of the
    time, where there are some."""
    assert found.search is not None
    if found.pairs is not None:
        return found.pairs
    outline = found.outline
    if outline is None or outline.finished or run.seconds > SHARES.until_outlined * run.options.time_limit_s:
        return found.search
    return found.search if outline.rounds > OUTLINE_ROUNDS and outline.instance.size >= annealing.LARGE else outline
