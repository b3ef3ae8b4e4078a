"""Cutting a sequence into intervals: the chains-on-chains part of coarsening, exact by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SLACK = 1.05
"""How far the heaviest interval may exceed the lightest possible heaviest one, for evenness and narrow cuts."""


def cut_intervals(costs: Sequence[int], crossing: Sequence[int], fixed: Sequence[int], count: int) -> list[int]:
    """The ends of ``count`` consecutive intervals of a sequence (the last end is its length).

    ``crossing[b]`` is what it costs to cut before item b, ``fixed`` lists the cuts that must be made. The heaviest
    interval is at most `SLACK` times the lightest possible; among those, the sum over intervals of (cost / mean)^2
    plus the sum over cuts of crossing / mean crossing is smallest.
    """
    size = len(costs)
    assert len(fixed) < count <= size
    prefix = np.concatenate(([0.0], np.cumsum(np.asarray(costs, dtype=np.float64))))
    run_start = np.zeros(size + 1, dtype=np.int64)
    for cut in fixed:
        run_start[cut + 1:] = cut
    cap = _smallest_cap(prefix, run_start, count) * SLACK
    low = np.maximum(run_start, np.searchsorted(prefix, prefix - cap * (1 + 1e-12)))
    mean = max(prefix[-1] / count, 1.0)
    inner = np.asarray(crossing[1:size], dtype=np.float64)
    toll = np.asarray(crossing, dtype=np.float64) / max(inner.mean() if inner.size else 1.0, 1.0)
    best = np.full(size + 1, np.inf)
    best[0] = 0.0
    choice = np.zeros((count + 1, size + 1), dtype=np.int64)
    for number in range(1, count + 1):
        following = np.full(size + 1, np.inf)
        for end in range(number, size + 1):
            start = int(low[end])
            span = slice(start, end)
            values = best[span] + ((prefix[end] - prefix[span]) / mean) ** 2
            if number > 1:
                values = values + toll[span]
            at = int(np.argmin(values)) if values.size else 0
            if values.size:
                following[end] = values[at]
            choice[number, end] = start + at
        best = following
    assert np.isfinite(best[size]), "the cap admits the wanted number of intervals"
    ends = [size]
    for number in range(count, 1, -1):
        ends.append(int(choice[number, ends[-1]]))
    return ends[::-1]


def _smallest_cap(prefix: np.ndarray, run_start: np.ndarray, count: int) -> float:
    """The lightest possible heaviest interval, by bisection over a greedy count."""
    size = len(prefix) - 1
    low, high = float(np.max(np.diff(prefix))), float(prefix[-1])
    while high - low > 1e-9 * max(high, 1.0):
        middle = (low + high) / 2
        if _greedy_count(prefix, run_start, middle, size) <= count:
            high = middle
        else:
            low = middle
    return high


def _greedy_count(prefix: np.ndarray, run_start: np.ndarray, cap: float, size: int) -> int:
    """How many intervals of at most ``cap`` cover the sequence, cut from the end."""
    end, number = size, 0
    while end > 0:
        start = int(np.searchsorted(prefix, prefix[end] - cap * (1 + 1e-12)))
        end = max(min(start, end - 1), int(run_start[end]))
        number += 1
    return number
