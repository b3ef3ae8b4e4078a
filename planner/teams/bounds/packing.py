"""How long the busiest of equal ranks works at least, where no piece is divided: bin packing with few kinds of pieces.

Of the most numerous kind a rank holds as many pieces as fit beside the others. So, for a given time, the most pieces of
that kind that some ranks hold beside the others is a recursion over ranks, whose state is how many of every other kind
they hold as well; the least time in which all fit is found by bisection, from below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np

TOLERANCE = 5e-4
"""Relative width at which the bisection ends; the answer is its lower end."""
STATES = 256
"""States beyond which the answer is the mean: several long branches."""


def least_busiest(seconds: Sequence[float], counts: Sequence[int], ranks: int) -> float:
    """Seconds below which the busiest rank cannot be: ``counts[k]`` pieces of ``seconds[k]`` each on ``ranks``."""
    least = max(sum(size * count for size, count in zip(seconds, counts, strict=True)) / ranks,
                max(seconds, default=0.0))
    major = max(range(len(counts)), key=lambda kind: counts[kind])
    minor = [kind for kind in range(len(counts)) if kind != major and seconds[kind] > TOLERANCE * least]
    shape = [counts[kind] + 1 for kind in minor]
    if ranks == 1 or math.prod(shape) > STATES or seconds[major] <= TOLERANCE * least:
        return least
    states = np.array(list(product(*(range(size) for size in shape))), dtype=np.int64).reshape(
        math.prod(shape), len(minor))
    loads = states @ np.array([seconds[kind] for kind in minor])
    place = np.array([math.prod(shape[at + 1:]) for at in range(len(shape))], dtype=np.int64)
    within: np.ndarray = np.all(states[:, None, :] >= states[None, :, :], axis=2)
    rest = np.where(within, (states[:, None, :] - states[None, :, :]) @ place, 0)
    low = high = least
    while not _holds(high, loads, seconds[major], within, rest, counts[major], ranks):
        low, high = high, 1.1 * high
    while high - low > TOLERANCE * low:
        middle = (low + high) / 2
        if _holds(middle, loads, seconds[major], within, rest, counts[major], ranks):
            high = middle
        else:
            low = middle
    return low


def _holds(limit: float, loads: np.ndarray, size: float, within: np.ndarray, rest: np.ndarray, count: int,
           ranks: int) -> bool:
    """Whether all pieces fit within a time: ``loads`` of every state's pieces; ``within[a, b]``: state b is part of a,
    ``rest[a, b]`` is the state of what is left."""
    room = np.floor((limit - loads) / size + 1e-9)
    here = np.where(within & (room >= 0), room, -np.inf)
    most = np.full(len(loads), -np.inf)
    most[0] = 0.0
    for _ in range(ranks):
        most = (here + most[rest]).max(axis=1)
    return bool(most[-1] >= count)
