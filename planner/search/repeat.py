"""Many microbatches from few: the middle of a short schedule repeated (Tessel's repetend, Lin et al., 2024).

Warm-up and cool-down do not depend on the number of microbatches, but what a search can do in a minute does. So it
works on a short step of the same placement, and its result is stretched: of every class (stage, phase and rank) the
actions that start in a window of the short step are repeated, a window's length later each time, and the rest follows.
The moments that this gives are followed as an order (`mipipe.planner.search.follow`), which keeps precedence and memory
whatever was cut where; several windows are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from mipipe.planner import clock
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.milp.periodic.pattern import PACES
from mipipe.planner.search import lists
from mipipe.planner.search.follow import filled, followed, plain
from mipipe.planner.search.orders import Orders, start_times

BEGINS = np.linspace(0.22, 0.62, 41)
"""Where a window may begin, in shares of the short step."""

KEPT = 8
"""Windows that are followed: those in which the classes' actions are closest to what is repeated."""

PATIENCE = (0.1, 0.0, 0.05, 0.2, 0.4)
"""Mean durations for which a rank waits for an earlier action, and weight gradients for a gap."""


def stretched(short: Instance, orders: Orders, long: Instance,
              stop: Callable[[], bool] = lambda: False) -> Orders | None:
    """The shortest schedule of ``long`` found by repeating the middle of ``orders``, a schedule of ``short``.

    Both are instances of one placement with different numbers of microbatches. None where the classes do not match, or
    where time is up before one was found.
    """
    pairs = _classes(short, long)
    if pairs is None:
        return None
    starts = start_times(short, orders)
    weight = long.kind == 3
    scale = float(long.dur.mean())
    best: Orders | None = None
    for moments in _windows(short, starts, orders.makespan_ns, long, pairs):
        found = [plain(long, moments)]
        for patience in PATIENCE:
            clock.ask()
            if best is not None and stop():
                break
            found.append(filled(long, moments, weight, int(patience * scale)))
            found.append(followed(long, moments, moments, int(patience * scale)))
        best = min((one for one in (best, *found) if one is not None), key=lambda one: one.makespan_ns, default=None)
        if stop():
            break
    return best


def _classes(short: Instance, long: Instance) -> list[tuple[int, int]] | None:
    """Pairs of equal classes; None where they differ, or one has fewer nodes in the long instance."""
    def keys(instance: Instance) -> dict[tuple[int, int, int], int]:
        first = instance.base[:-1]
        rows = zip(instance.depth[first].tolist(), instance.kind[first].tolist(), instance.rank[first].tolist(),
                   strict=True)
        return {key: c for c, key in enumerate(rows)}

    one, two = keys(short), keys(long)
    if one.keys() != two.keys() or len(one) != len(short.base) - 1 or len(two) != len(long.base) - 1:
        return None
    found = [(one[key], two[key]) for key in one]
    less = any(_count(long, b) < _count(short, a) for a, b in found)
    return None if less else found


def _count(instance: Instance, c: int) -> int:
    return int(instance.base[c + 1] - instance.base[c])


def _windows(short: Instance, starts: np.ndarray, makespan: int, long: Instance,
             pairs: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    """Moments of the long instance's nodes for one window after the other, the most regular first."""
    added = {b: _count(long, b) - _count(short, a) for a, b in pairs}
    most = max(added.values())
    if most <= 0:
        return
    pace = lists.period(long) * long.view.problem.num_microbatches / max(_count(long, b) for _, b in pairs)
    begins = BEGINS * makespan
    found = []
    for repeats in sorted({round(most / size) for size in range(1, most + 1)}):
        length = most / repeats
        if length * pace > 0.45 * makespan or length < 1:
            continue
        uneven = sum(count % repeats != 0 for count in added.values())
        for factor in PACES:
            period = length * pace * factor
            miss = np.zeros(len(begins))
            for a, b in pairs:
                own = starts[short.base[a]:short.base[a + 1]]
                inside = np.searchsorted(own, begins + period) - np.searchsorted(own, begins)
                miss += np.abs(inside - added[b] / repeats)
            at = int(miss.argmin())
            # what is missed once is missed every time; a slower pace is lost as well
            cost = repeats * (miss[at] + uneven) + most * len(pairs) * (factor - 1)
            found.append((cost, begins[at], period, repeats))
    for _, begin, period, repeats in sorted(found)[:KEPT]:
        yield _moments(short, starts, int(begin), period, repeats, long, pairs)


def _moments(short: Instance, starts: np.ndarray, begin: int, period: float, repeats: int, long: Instance,
             pairs: list[tuple[int, int]]) -> np.ndarray:
    """Moments where what starts from ``begin`` on for a period is repeated so many times."""
    moments = np.zeros(long.size)
    for a, b in pairs:
        own = starts[short.base[a]:short.base[a + 1]].astype(float)
        added = _count(long, b) - len(own)
        first = int(np.searchsorted(own, begin))
        parts = [own[:first]]
        for turn in range(repeats):
            size = (turn + 1) * added // repeats - turn * added // repeats
            piece = own[first:first + size]
            if len(piece) < size:  # too near the end: the last ones, a period of the class apart
                last = own[-1] if len(own) else float(begin)
                piece = np.concatenate([piece, last + period * (1 + np.arange(size - len(piece))) / max(1, size)])
            parts.append(piece + turn * period)
        parts.append(own[first:] + repeats * period)
        moments[long.base[b]:long.base[b + 1]] = np.maximum.accumulate(np.concatenate(parts))
    return moments
