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

from mipipe.planner.teams.degrees import Degrees
from mipipe.planner.teams.pricing import PieceCost, Pricer

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


def packed(pricer: Pricer, degrees: Degrees, global_batch: int) -> tuple[float, float]:
    """Seconds that the busiest rank works at least in a step where every piece is on one rank and runs once, and of
    these seconds the least where overlapped pairs hide collectives behind kernels or kernels behind collectives."""
    model, costs = pricer.model, pricer.costs(degrees)
    counts = [0] * len(model.kinds)
    of_kind: list[PieceCost] = [costs[0]] * len(model.kinds)
    for piece, cost in zip(model.pieces, costs, strict=True):
        counts[piece.kind] += 1
        of_kind[piece.kind] = cost
    kernels = [sum(phase.compute for phase in (cost.f, cost.i, cost.w) if phase) for cost in of_kind]
    whole = [cost.f.total + cost.backward for cost in of_kind]
    talk = [both - own for both, own in zip(whole, kernels, strict=True)]
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    rounding = 2e-9 * (microbatches + 1)  # a problem's durations are whole nanoseconds
    each, first, second = (microbatches * least_busiest(times, counts, degrees.ranks) - rounding
                           for times in (whole, kernels, talk))
    return each, max(first, second)
