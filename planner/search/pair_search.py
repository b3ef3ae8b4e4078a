"""Improving an order with overlapped pairs at one placement: rounds of annealing in slices, as for orders without.

Only where pairs gain (`PlanningProblem.pairs_gain`). The kernel decides which F overlaps which backward together with
the order of everything else (`mipipe.planner.search.pair_kernel`); the search begins with a list schedule without
pairs, or with any schedule that has some. Half of a mirrored placement is searched, as elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.jobs.arrays import Instance, with_mirrors
from mipipe.planner.jobs.dependencies import KINDS
from mipipe.planner.plan import RankOrder, Schedule
from mipipe.planner.search import pair_kernel
from mipipe.planner.search.annealing import COLD, LARGE, PRICE, SLICE, TILTS
from mipipe.planner.search.orders import Orders
from mipipe.planner.search.pair_state import PairFacts
from mipipe.planner.sizes import NEVER_NS

F, I, W = (KINDS.index(kind) for kind in (ActionKind.F, ActionKind.I, ActionKind.W))  # noqa: E741

TURNS = ("fresh", "price", "fresh", "wall")
"""How rounds differ: from the first order without pairs, or from the best so far; memory has a price but in ``wall``
(`mipipe.planner.search.anneal_kernel`). Rounds from the best alone stay where they are."""

FASTER, MOST = 2.5, 4_000_000
"""By how much a round is longer than the one before, and the moves of the longest: longer ones gain no more than
another beginning."""

DURATIONS = 1_000
"""Different durations of forwards, or of backwards, up to which pairs are searched: their table is the square."""


@dataclass(slots=True)
class Paired:
    """Rows of tokens (``seq[k, :length[k]]``), the I that every F is paired with (``mate``, -1: none), the makespan."""

    seq: np.ndarray
    length: np.ndarray
    mate: np.ndarray
    makespan_ns: int

    def copy(self) -> Paired:
        return Paired(self.seq.copy(), self.length.copy(), self.mate.copy(), self.makespan_ns)


@dataclass(slots=True)
class PairSearch:
    """A search in progress; ``best`` is its incumbent by the kernel's clock, ``first`` where it began.

    ``cap`` is the memory it may use, ``seen_ns`` the best that was judged. ``others`` are searches of the same with
    other seeds, for further threads.
    """

    instance: Instance
    facts: PairFacts
    seed: int
    best: Paired
    target_ns: int
    cap: np.ndarray
    current: Paired
    first: Paired
    rounds: int = 0
    length: int = 60_000
    seen_ns: int = NEVER_NS
    reserved: int = 0
    others: list[PairSearch] = field(default_factory=list)
    done: int = 0
    round_length: int = 0
    hot: float = 1.0
    tilt: float = 0.0
    wild: float = 0.2
    price: np.ndarray = field(default_factory=lambda: np.zeros(1))

    @property
    def finished(self) -> bool:
        return self.best.makespan_ns <= self.target_ns


def start(instance: Instance, orders: Orders, seed: int, target_ns: int) -> PairSearch | None:
    """A search that begins at ``orders``, without pairs yet; None where no action can be in one."""
    facts = facts_of(instance)
    if facts is None:
        return None
    first = Paired(orders.seq.copy(), orders.length.copy(), np.full(instance.size, -1, dtype=np.int64),
                   orders.makespan_ns)
    return PairSearch(instance, facts, seed, first, target_ns, instance.cap.copy(), first.copy(), first.copy(),
                      length=_round_moves(instance))


def _round_moves(instance: Instance) -> int:
    """Moves of the first round."""
    return max(2_000, min(100_000, 100 * instance.size))


def go_on_from(search: PairSearch, schedule: Schedule, makespan_ns: int) -> None:
    """Make a schedule of the placement the incumbent, if it is better; not where half of the placement is searched."""
    instance = search.instance
    if (instance.twin >= 0).any() or makespan_ns >= search.best.makespan_ns:
        return
    found = Paired(np.full_like(search.first.seq, -1), search.first.length.copy(),
                   np.full(instance.size, -1, dtype=np.int64), makespan_ns)
    for k, (rank, stream) in enumerate(instance.machine_key):
        row = []
        for action in schedule.ranks[rank].of(stream):
            parts = [instance.number[stage, kind, m] for kind, stage, m in action.parts()]
            if action.partner is not None:
                found.mate[parts[0]] = parts[1]
            row += parts[:1] if action.partner is not None else parts
        found.seq[k, :len(row)], found.length[k] = row, len(row)
    search.best = found
    search.seen_ns = min(search.seen_ns, makespan_ns)
    search.done = search.round_length = 0
    search.current = found.copy()


def reserve(search: PairSearch, excess: np.ndarray) -> None:
    """Search with less memory: values in flight, which the kernel does not see, overfill ranks by ``excess``."""
    search.reserved += 1
    search.cap = search.cap - excess
    search.best, search.seen_ns = search.first.copy(), NEVER_NS
    search.best.makespan_ns = NEVER_NS
    search.done = search.round_length = 0
    for other in search.others:
        other.cap, other.best = search.cap, search.best
    search.others.clear()


def helpers(search: PairSearch, count: int) -> list[PairSearch]:
    """Searches of the same with other seeds; all go on from the best of them."""
    while len(search.others) < count:
        seed = search.seed + 1009 * (len(search.others) + 1)
        search.others.append(replace(search, seed=seed, rounds=0, length=_round_moves(search.instance), done=0,
                                     round_length=0, others=[], price=np.zeros(1)))
    best = min([search, *search.others], key=lambda other: other.best.makespan_ns).best
    for other in (search, *search.others):
        other.best = best
    return search.others[:count]


def facts_of(instance: Instance) -> PairFacts | None:
    """What the kernel reads of an instance; None where nothing can overlap, or durations differ too much."""
    problem = instance.view.problem
    if not problem.pairs_gain:
        return None
    weight = np.full(instance.size, -1, dtype=np.int64)
    number = {(stage, m): n for (stage, kind, m), n in instance.number.items() if kind is ActionKind.W}
    forward, backward = np.full(instance.size, -1, dtype=np.int64), np.full(instance.size, -1, dtype=np.int64)
    for n in np.flatnonzero(instance.kind == I).tolist():
        weight[n] = number.get((int(instance.depth[n]), int(instance.own_microbatch[n])), -1)
    ahead, back = np.flatnonzero(instance.kind == F), np.flatnonzero(weight >= 0)
    if not len(back):
        return None
    one, forward[ahead] = np.unique(instance.dur[ahead], return_inverse=True)
    two, backward[back] = np.unique(instance.dur[back] + instance.dur[weight[back]], return_inverse=True)
    if max(len(one), len(two)) > DURATIONS:
        return None
    lasts = np.array([[problem.overlap.duration_ns(int(f), int(b)) for b in two] for f in one], dtype=np.int64)
    shared = {name: getattr(instance, name) for name in PairFacts._fields if hasattr(instance, name)}
    return PairFacts(**shared, weight=weight, forward=forward, backward=backward, lasts=lasts)


def advance(search: PairSearch, seconds: float, stop: Callable[[], bool] = lambda: False) -> bool:
    """Search for some seconds; whether the incumbent improved. Ends early at the target or on ``stop()``."""
    end, before = time.monotonic() + seconds, search.best.makespan_ns
    while not search.finished and not stop() and time.monotonic() < end:
        if search.done >= search.round_length:
            _begin_round(search)
        _slice(search)
    return search.best.makespan_ns < before


def _begin_round(search: PairSearch) -> None:
    rng = np.random.default_rng((search.seed, search.rounds))
    turn, small = TURNS[search.rounds % len(TURNS)], search.instance.size < LARGE
    search.current = (search.first if turn == "fresh" and small else search.best).copy()
    search.hot = 0.5 if turn == "fresh" and small else float(rng.choice([0.5, 0.25, 0.1] if small else [0.1, COLD]))
    search.tilt = TILTS[search.rounds % len(TILTS)]
    search.wild = float(rng.choice([0.1, 0.2, 0.3]))
    taken = search.instance.alloc[search.instance.alloc > 0]
    unit = float(search.instance.dur.mean() / taken.mean()) if len(taken) else 0.0
    search.price[0] = PRICE * unit if turn != "wall" else 0.0
    search.round_length = search.length
    search.length = min(int(search.length * FASTER), MOST)
    search.rounds += 1
    search.done = 0


def _slice(search: PairSearch) -> None:
    moves = max(50, min(25_000, SLICE // 4 // max(1, search.instance.size), search.round_length - search.done))
    scale = float(search.instance.dur.mean()) or 1.0
    first = search.hot * (COLD / search.hot) ** (search.done / search.round_length)
    search.done += moves
    last = min(first, search.hot * (COLD / search.hot) ** (search.done / search.round_length))
    found = search.current.copy()
    now = search.current
    makespan = pair_kernel.anneal(
        search.facts, now.seq, now.length, now.mate, search.cap, moves, first * scale, last * scale, search.tilt,
        search.wild, search.price, search.target_ns, search.seed * 7919 + search.rounds * 104729 + search.done,
        found.seq, found.length, found.mate)
    if makespan < search.best.makespan_ns:
        found.makespan_ns = int(makespan)
        search.best = found


def to_schedule(search: PairSearch, paired: Paired) -> Schedule:
    """The schedule of an order with pairs, mirror images written out."""
    instance = search.instance
    rows = [row[:size].tolist() for row, size in zip(paired.seq, paired.length, strict=True)]
    plain = with_mirrors(instance, rows)
    ranks = instance.view.problem.num_ranks
    orders = [list(rank.compute) for rank in plain.ranks]
    for (rank, _), row in zip(instance.machine_key, rows, strict=True):
        for place, n in enumerate(row):
            back = int(paired.mate[n])
            if back < 0:
                continue
            sides = [(rank, instance.own_microbatch)]
            if instance.twin[n] >= 0:
                sides.append((ranks - 1 - rank, instance.twin))
            for side, microbatch in sides:
                orders[side][place] = Action(int(instance.depth[n]), ActionKind.OVERLAP_F_B, int(microbatch[n]),
                                             (int(instance.depth[back]), int(microbatch[back])))
    return Schedule(tuple(RankOrder(tuple(order), rank.collective)
                          for order, rank in zip(orders, plain.ranks, strict=True)))
