"""The loop of a solve: propose, order and prove in turns, until the proof, the gap asked for, the limit or Ctrl-C.

Activities (`Activity`) share the time by one rule. Each has a *worth*: what it has gained lately for the seconds it
took lately, gains being the shares by which the makespan fell and the bound rose, or by which the lowest bound of a
candidate fell (a proposal that leaves room for better orders), or by what it says itself (`Activity.progress`: stages
moved towards a better plan). The worthiest goes next. What gains nothing gets longer slices, more seldom: it may only
need more time at once, and its seconds count against it, less and less while it waits, so that none waits for ever.
New activities count as worth trying. Where there is more than one thread, one of them works for the chosen activity and
the others anneal (`mipipe.planner.ladder.race`), or work for it as well where they can and it gained more lately, but
for the end of the time, which is left to annealing; with one, annealing is an activity like the others.

Nothing here knows how large a problem is: what is too slow for it gains nothing and stands back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from mipipe.planner import clock
from mipipe.planner.ladder.harvest import ANNEALING
from mipipe.planner.ladder.race import TURN_S, Race
from mipipe.planner.ladder.state import Incumbent, Run
from mipipe.planner.time_shares import SHARES

HOPE = 1e-4
"""Share of the makespan that every activity is thought to gain beyond what it did: what is never tried again never
gains."""

LONGER = 1.6
"""By how much the next slice of an activity is longer that gained nothing."""

COUNTED_S = 0.02
"""Seconds that a slice counts at least, however soon it ended: what ends at once must not go on for ever."""


@dataclass(slots=True)
class Activity:
    """Something that improves the plan or the bound. ``step(seconds)`` works about so long and says whether there was
    anything to do; where there was not, it rests until the incumbent, the candidates or the bound change.

    ``progress()``: the shares gained so far by what may become the best, but is not yet. ``wide(seconds, threads)``: a
    step on several threads, where there is one.
    """

    name: str
    step: Callable[[float], bool]
    slice_s: float
    gained: float = 0.0
    spent_s: float = 0.0
    resting: tuple[int, ...] | None = None
    turn: int = 0
    progress: Callable[[], float] = lambda: 0.0
    wide: Callable[[float, int], bool] | None = None

    @property
    def worth(self) -> float:
        """Gain per second, lately."""
        return (self.gained + HOPE) / max(1e-3, self.spent_s)

    def note(self, gain: float, seconds: float) -> None:
        """Count a slice."""
        self.gained = SHARES.remembered * self.gained + gain
        self.spent_s = SHARES.remembered * self.spent_s + max(COUNTED_S, seconds)
        if gain <= 0:
            self.slice_s *= LONGER


def loop(run: Run, activities: Sequence[Activity], race: Race | None) -> None:
    """Work until the solve is closed, its time is up, or nothing is left that could be done."""
    threads, longest, turn = run.options.threads, SHARES.longest_slice * run.options.time_limit_s, 0
    annealing = None if race is None else Activity(ANNEALING, lambda seconds: race.step(seconds, threads), TURN_S)
    everything = [*activities, *([annealing] if annealing is not None else [])]
    while run.left > 0 and not run.closed:
        state = (run.makespan_ns, len(run.candidates), run.lowest_ns or 0)
        able = [activity for activity in everything if activity.resting != state]
        if not able:
            return
        chosen = max(able, key=lambda activity: (activity.worth, -activity.turn))  # of equals who has waited longest
        turn += 1
        chosen.turn = turn
        seen, bound, began = len(run.history), run.lowest_ns or 0, time.monotonic()
        room, progress = least_bound(run), chosen.progress()
        given = min(chosen.slice_s, longest, max(clock.LEAST_S, run.left))
        wide = chosen.wide if annealing is not None and chosen.gained > annealing.gained and (
            run.left > 2 * SHARES.last_round * run.options.time_limit_s) else None
        if wide is not None:
            active = wide(given, threads)
        else:
            with beside(run, race if chosen is not annealing else None, threads - 1):
                active = chosen.step(given)
        seconds = time.monotonic() - began
        for activity in everything:
            if activity is not chosen and (activity is not annealing or threads < 2):
                activity.spent_s *= 0.5 ** (seconds / (SHARES.half_forgotten * run.options.time_limit_s))
        by_annealing, by_others = gains(run.history[max(0, seen - 1):])
        risen = max(0, (run.lowest_ns or 0) - bound) / max(1, bound)
        if chosen is annealing:
            chosen.note(by_annealing, seconds)
            chosen.slice_s = TURN_S
        else:
            own = chosen.progress() - progress
            chosen.note(by_others + risen + own + max(0.0, 1 - least_bound(run) / room), seconds)
            if annealing is not None and threads > 1 and wide is None:
                annealing.note(by_annealing, seconds)
                annealing.slice_s = TURN_S
        if not active:
            chosen.resting = state


def least_bound(run: Run) -> int:
    """The lowest bound of a candidate: what the searches may hope for."""
    return max(1, min((found.bound.ns for found in run.candidates), default=1))


def gains(history: Sequence[Incumbent]) -> tuple[float, float]:
    """The shares by which the makespan fell from incumbent to incumbent: by annealing, by all else."""
    found = [0.0, 0.0]
    for one, two in pairwise(history):
        found[two.rung != ANNEALING] += 1 - two.makespan_ns / one.makespan_ns
    return found[0], found[1]


@contextmanager
def beside(run: Run, race: Race | None, threads: int) -> Iterator[None]:
    """Let the race go on in threads of its own meanwhile; it has stopped when this ends, whatever ends it."""
    if race is None or threads < 1:
        yield
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(race.step, run.left, threads, stop.is_set)
        try:
            yield
        finally:
            stop.set()
            going.result()
