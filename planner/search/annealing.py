"""Improving the order at one placement: rounds of simulated annealing, in time slices, on one or two threads.

Rounds take turns in what helps some instances and hurts others: a slope on the mean end of the machines (``tilt``), and
memory as a wall, at a price, or eased. Where memory binds all through the step, the way to a good order leads through
one for more memory; elsewhere the wall is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.search import anneal_kernel, best_list
from mipipe.planner.search.orders import Orders

SLICE = 10_000_000
"""Moves of one kernel call times the nodes: a fraction of a second, which is how long Ctrl-C and the clock may wait."""

TILTS = (0.0, 0.3, 0.05)
"""Weights of the ranks' mean end beside the latest, in turns."""

LISTED = "list"
"""What fresh lists are called where a plan says how it came about."""

TURNS = ("wall", "eased", "price", "eased", "fresh")
"""How rounds differ: memory is a wall or has a price, from the best orders; a wall, from a fresh list schedule; or
``eased``: a search with ``EASE`` times the memory goes on for a round, and what it found is squeezed back by price."""

LARGE_TURNS = ("wall", "wall", "price", "wall", "eased")
"""The same for instances of `LARGE` nodes and more, where a round is too short for a detour or another beginning."""

EASE = 4 / 3
"""Memory of an ``eased`` search, in what there is."""

PRICE, LOW_PRICE = 0.5, 0.05
"""What an activation too many at one place of an order costs at first, in mean durations; low where most orders from
an eased search would be too dear."""

GROWTH = 1.6
"""By how much every round is longer than the one before."""

COLD = 0.05
"""Temperature at the end of a round, in mean durations."""

LARGE = 1200
"""Nodes from which rounds stay cool, the first at the temperature where others end: a hot round would not get back to
where it began in time."""

HEAT, HOTTEST, COLDEST = 360, 0.5, 0.03
"""A last round (`finish`) begins at ``HEAT`` mean durations per node, at most ``HOTTEST``, and ends at ``COLDEST``;
memory has its price there."""

LASTING = 2_500
"""Nodes up to which a last round beats the usual ones."""


@dataclass(slots=True)
class Search:
    """A search in progress at one placement; ``best`` is its incumbent by the kernel's own clock.

    A round cools from ``hot`` to ``COLD`` times the mean duration over ``length`` moves; rounds grow and take `TURNS`.
    ``easy`` is the search with more memory, ``easing`` whether it is its turn; such a search itself is ``plain``: its
    memory is a wall always. ``patterns``: orders with their names that fresh rounds begin with as long as there are
    some. ``source`` is what the round began with, ``origin`` what that round began with which found ``best``: a
    pattern's name, ``LISTED``, or nothing where it went on from the orders the search was given. What is found after a
    number of rounds depends on the seed alone, wherever fresh lists (`mipipe.planner.search.best_list`) are made within
    their time. A last round cools by the clock instead, from ``began`` until ``ends`` (0 where there is none).
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
    plain: bool = False
    easing: bool = False
    easy: Search | None = None
    began: float = 0.0
    ends: float = 0.0
    patterns: list[tuple[str, Orders]] = field(default_factory=list)
    source: str = ""
    origin: str = ""

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
        over = time.monotonic() >= search.ends if search.ends else search.done >= search.round_length
        if time.monotonic() >= end or (over and search.rounds >= last):
            break
        if over:
            _begin_round(search)
        _slice(search)
    return search.best.makespan_ns < before


def finish(search: Search, seconds: float) -> None:
    """Begin a last round from the best orders: one that cools over all the seconds left."""
    search.began = time.monotonic()
    search.ends = search.began + seconds
    search.current, search.source = search.best.seq.copy(), search.origin
    search.easing = False
    search.hot = min(HOTTEST, HEAT / max(1, search.instance.size))
    search.tilt, search.wild, search.price[0] = 0.0, 0.2, PRICE * _price_unit(search.instance)


def _slice(search: Search) -> None:
    if search.easing:
        assert search.easy is not None
        _slice(search.easy)
        if search.easy.done >= search.easy.round_length:
            search.easing, search.current = False, search.easy.best.seq.copy()
            search.source = search.easy.origin
        return
    instance = search.instance
    moves = max(200, min(50_000, SLICE // max(1, instance.size)))
    if not search.ends:
        moves = min(moves, search.round_length - search.done)
    scale = float(instance.dur.mean()) or 1.0
    first = _heat(search) * scale
    search.done += moves
    last = min(first, _heat(search) * scale)
    best = search.current.copy()
    makespan = anneal_kernel.anneal(
        instance.fixed, search.current, search.best.length, moves, first, last, search.tilt, search.wild,
        search.price, search.target_ns, search.seed * 7919 + search.rounds * 104729 + search.done, best)
    if makespan < search.best.makespan_ns:
        search.best, search.origin = Orders(best, search.best.length, int(makespan)), search.source


def _heat(search: Search) -> float:
    """The temperature now, in mean durations: by the moves made, in a last round by the clock."""
    if search.ends:
        passed = (time.monotonic() - search.began) / (search.ends - search.began)
        return search.hot * (COLDEST / search.hot) ** min(1.0, passed)
    return search.hot * (COLD / search.hot) ** (search.done / search.round_length)


def _begin_round(search: Search) -> None:
    rng = np.random.default_rng((search.seed, search.rounds))
    search.ends = 0.0
    small = search.instance.size < LARGE
    turns = (("wall", "wall", "fresh") if small else ("wall",)) if search.plain else TURNS if small else LARGE_TURNS
    turn = turns[search.rounds % len(turns)]
    fresh: Orders | None = None
    search.source = search.origin
    if turn == "fresh" and search.patterns:
        search.source, fresh = search.patterns.pop(0)
    elif turn == "fresh":
        fresh = best_list.best_list(search.instance, int(rng.integers(1 << 30)), 100)
        search.source = search.origin if fresh is None else LISTED
    search.current = (search.best if fresh is None else fresh).seq.copy()
    if search.rounds == 0:
        search.hot = 0.5 if small else COLD
    else:
        search.hot = float(rng.choice([2.0, 1.0, 0.5] if small else [0.3, 0.1, COLD]))
    search.tilt = TILTS[search.rounds % len(TILTS)]
    search.wild = float(rng.choice([0.1, 0.2, 0.5]))
    search.price[0] = {"price": PRICE, "eased": LOW_PRICE}.get(turn, 0.0) * _price_unit(search.instance)
    search.round_length = search.length
    if turn == "eased":
        _ease(search)
    search.length = min(int(search.length * GROWTH), 20_000_000)
    search.rounds += 1
    search.done = 0


def _ease(search: Search) -> None:
    """Begin a round of the search with more memory, half as long as its own."""
    if search.easy is None:
        easy = replace(search.instance, cap=(search.instance.cap * EASE).astype(np.int64))
        search.easy = Search(easy, search.seed + 1, search.best, search.target_ns, plain=True, origin=search.origin)
    search.easy.length = max(1, search.length // 2)
    _begin_round(search.easy)
    search.easing = True


def _price_unit(instance: Instance) -> float:
    """A mean duration per mean activation: ns per byte."""
    taken = instance.alloc[instance.alloc > 0]
    return float(instance.dur.mean() / taken.mean()) if len(taken) else 0.0
