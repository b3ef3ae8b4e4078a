"""Improving the order at one placement: rounds of simulated annealing, in time slices, on one or two threads.

Measured on two cores (8 ranks x 20 microbatches, 9 activations, best of design.md's proven optima reached within):
two-way F,I,W = 1,1,1 / 1,1.1,0.9 / 2,2,1 / 10,12,8 with transfers of 1: 63, 63, 106, 636 in 0.1-1 s each, on the
mirror quotient of 240 nodes at some 300,000 moves a second; V of 16 half-stages: 664 in 3 s. A slope on the mean end of
the machines (``tilt``) helps some instances and hurts others, so rounds take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mipipe.planner import anneal, greedy
from mipipe.planner.greedy import Orders
from mipipe.planner.instance import Instance

SLICE = 10_000_000
"""Moves of one kernel call times the nodes: about 0.15 s, which is how long Ctrl-C and the clock may wait."""

TILTS = (0.0, 0.3, 0.05)

PRICES = (0.0, 0.5)
"""What rounds charge, in turn, for an activation too many at one place of an order, in mean durations; 0: a wall."""

COLD = 0.05
"""Temperature at the end of a round, in mean durations."""

LARGE = 1200
"""Nodes from which the first round starts cool: a hot round would not get back to where it began in time."""


@dataclass(slots=True)
class Search:
    """A search in progress at one placement; ``best`` is its incumbent by the kernel's own clock.

    A round cools from ``hot`` to ``cold`` times the mean duration over ``length`` moves;
    rounds grow, and take turns in starting from the best orders and from a fresh list schedule. What is found after a
    number of rounds depends on the seed alone, wherever fresh lists (``greedy.best_of``) are made within their time.
    """

    instance: Instance
    seed: int
    best: Orders
    target_ns: int = 0
    rounds: int = 0
    length: int = 60_000
    current: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    done: int = 0
    round_length: int = 0
    hot: float = 1.0
    tilt: float = 0.0
    wild: float = 0.2
    price: np.ndarray = field(default_factory=lambda: np.zeros(1))

    @property
    def finished(self) -> bool:
        return self.best.makespan_ns <= self.target_ns


def start(instance: Instance, orders: Orders, seed: int, target_ns: int = 0) -> Search:
    """A search that begins at ``orders``."""
    size = max(1, int(instance.size))
    return Search(instance, seed, orders, target_ns, length=max(2_000, min(100_000, 50 * size)))


def advance(search: Search, seconds: float, stop: Callable[[], bool] = lambda: False, rounds: int = 1 << 30) -> bool:
    """Search for some seconds or rounds; whether the incumbent improved. Ends early at the target or on ``stop()``."""
    end = time.monotonic() + seconds
    before, last = search.best.makespan_ns, search.rounds + rounds
    while not search.finished and not stop():
        over = search.done >= search.round_length
        if time.monotonic() >= end or (over and search.rounds >= last):
            break
        if over:
            _begin_round(search)
        _slice(search)
    return search.best.makespan_ns < before


def _slice(search: Search) -> None:
    instance = search.instance
    moves = min(max(200, min(50_000, SLICE // max(1, instance.size))), search.round_length - search.done)
    scale = float(instance.dur.mean()) or 1.0
    cool = COLD / search.hot
    first = search.hot * cool ** (search.done / search.round_length) * scale
    search.done += moves
    last = search.hot * cool ** (search.done / search.round_length) * scale
    best = search.current.copy()
    makespan = anneal.anneal(
        facts(instance), search.current, search.best.length, moves, first, last, search.tilt, search.wild,
        search.price, search.target_ns, search.seed * 7919 + search.rounds * 104729 + search.done, best)
    if makespan < search.best.makespan_ns:
        search.best = Orders(best, search.best.length, int(makespan))


def facts(instance: Instance) -> anneal.Facts:
    """What the kernel reads of an instance."""
    return anneal.Facts(**{name: getattr(instance, name) for name in anneal.Facts._fields})


def _begin_round(search: Search) -> None:
    rng = np.random.default_rng((search.seed, search.rounds))
    fresh = greedy.best_of(search.instance, 100, rng) if search.rounds % 3 == 2 else None
    search.current = (search.best if fresh is None else fresh.orders).seq.copy()
    if search.rounds == 0:
        search.hot = 0.5 if search.instance.size < LARGE else 0.3
    else:
        search.hot = float(rng.choice([2.0, 1.0, 0.5] if search.instance.size < LARGE else [1.0, 0.5, 0.2]))
    search.tilt = TILTS[search.rounds % len(TILTS)]
    search.wild = float(rng.choice([0.1, 0.2, 0.5]))
    search.price[0] = PRICES[search.rounds % len(PRICES)] * _price_unit(search.instance)
    search.round_length = search.length
    search.length = min(search.length * 2, 20_000_000)
    search.rounds += 1
    search.done = 0


def _price_unit(instance: Instance) -> float:
    """A mean duration per mean activation: ns per byte."""
    taken = instance.alloc[instance.alloc > 0]
    return float(instance.dur.mean() / taken.mean()) if len(taken) else 0.0
