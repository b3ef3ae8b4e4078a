"""From moments to orders: a list schedule that takes every action's moment as its priority and keeps the memory.

Moments come from a periodic pattern (`mipipe.planner.milp.periodic.pattern_mip`,
`mipipe.planner.milp.periodic.staircase`) or from a shorter schedule whose middle is repeated
(`mipipe.planner.search.repeat`). As an order they are valid for any number of microbatches, but the ends are slack:
gradients wait for forwards that no longer exist. `squeezed` lets ranks run early what is ready, in several ways, and
keeps the shortest. Weight gradients fill gaps: standing back by some periods they fill more of them, until memory runs
short.

Ranks with a collective stream share their memory between two machines; there the orders are judged by the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mipipe.planner import clock
from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.jobs.dependencies import KINDS
from mipipe.planner.milp.periodic.pattern import WEIGHT_DELAYS, route_names
from mipipe.planner.search.follow_kernel import FollowTask, fill, follow
from mipipe.planner.search.orders import Orders, memory_holds, timed
from mipipe.planner.sizes import NEVER_NS

PATIENCE = (0.3, 0.1, 0.03, 0.0)
"""Shares of a period a rank waits for an earlier action that is on its way."""

SPANS = 4
"""Parts of the step, and of the ranks, with waits of their own in `tuned_fill`."""

FILLING = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)
"""Mean durations of a weight gradient that a rank would wait before one fills the gap (`filled`)."""


def squeezed(instance: Instance, moments: np.ndarray, period_ns: float,
             stop: Callable[[], bool] = lambda: False) -> Orders | None:
    """The shortest schedule found that follows ``moments`` (ns per node); None where their order breaks the memory.

    Orders within a class are kept: moments must not fall along one.
    """
    weight = instance.kind == KINDS.index(ActionKind.W)
    best = plain(instance, moments)
    for delay in WEIGHT_DELAYS:
        for patience in PATIENCE:
            if best is not None and stop():
                return best
            clock.ask()
            found = followed(instance, moments, moments + delay * period_ns * weight, int(patience * period_ns))
            if found is not None and (best is None or found.makespan_ns < best.makespan_ns):
                best = found
    scale = float(instance.dur[weight].mean()) if weight.any() else 0.0
    tried = [(share, filled(instance, moments, weight, int(share * scale))) for share in FILLING]
    for step in (0.02, 0.005) if weight.any() else ():  # finer and finer around the best
        share = min((item for item in tried if item[1] is not None), key=_length, default=(0.0, None))[0]
        for near in (share + turn * step for turn in (-3, -2, -1, 1, 2, 3) if share + turn * step >= 0):
            if best is not None and stop():
                break
            clock.ask()
            tried.append((near, filled(instance, moments, weight, int(near * scale))))
    return min((orders for orders in (best, *(orders for _, orders in tried)) if orders is not None),
               key=lambda orders: orders.makespan_ns, default=None)


def tuned_fill(instance: Instance, moments: np.ndarray, seconds: float, seed: int, start: Sequence[float] = (),
               stop: Callable[[], bool] = lambda: False) -> tuple[Orders | None, list[float]]:
    """The shortest of `filled` found in some seconds by varying how long ranks wait for what, and the best waits.

    A wait is a share of the mean weight gradient; there is one for each of `SPANS` parts of the step and each phase,
    and one for each of `SPANS` parts of the ranks. ``start``: waits to begin with.
    """
    rng, end = np.random.default_rng(seed), time.monotonic() + seconds
    weight = instance.kind == KINDS.index(ActionKind.W)
    scale = float(instance.dur[weight].mean()) if weight.any() else 0.0
    when = np.minimum(SPANS - 1, (np.argsort(np.argsort(moments)) * SPANS // max(1, instance.size)))
    cell = when + SPANS * (instance.kind == 0)
    place = instance.rank * SPANS // max(1, len(instance.cap))
    waits = np.array(start or [0.3] * (2 * SPANS) + [0.0] * SPANS)
    best: Orders | None = None
    current = NEVER_NS
    while best is None or (time.monotonic() < end and not stop()):
        clock.ask()
        trial = waits.copy()
        if best is not None:
            chosen = rng.random(len(trial)) < rng.choice([0.1, 0.3, 1.0])
            trial[chosen] += rng.normal(0.0, rng.choice([0.02, 0.1, 0.3]), int(chosen.sum()))
        shares = np.maximum(0.0, trial[cell] + trial[2 * SPANS + place])
        found = filled(instance, moments, weight, (shares * scale).astype(np.int64))
        if found is None and best is None:
            return None, list(waits)
        if found is not None and found.makespan_ns <= current:
            current, waits = found.makespan_ns, trial
            best = found if best is None or found.makespan_ns < best.makespan_ns else best
    return best, list(waits)


def _length(tried: tuple[float, Orders | None]) -> int:
    return NEVER_NS if tried[1] is None else tried[1].makespan_ns


def moments_at(instance: Instance, period_ns: float, starts: Mapping[tuple[int, ActionKind, int], float]) -> np.ndarray:
    """When a periodic pattern starts every node, in ns.

    Args:
        period_ns: of one microbatch of every route; a route with fewer microbatches is spread over the same time.
        starts: per (stage, kind, route) the start of the route's first microbatch, a route named by its first
            microbatch (`mipipe.planner.milp.periodic.pattern.route_names`).
    """
    names = route_names(instance.view)
    count: dict[int, int] = {}
    position = []
    for name in names:
        position.append(count.get(name, 0))
        count[name] = position[-1] + 1
    longest = max(count.values())
    shift = [at * longest / count[name] * period_ns for at, name in zip(position, names, strict=True)]
    rows = zip(instance.depth.tolist(), instance.kind.tolist(), instance.own_microbatch.tolist(), strict=True)
    return np.array([starts[stage, KINDS[kind], names[m]] + shift[m] for stage, kind, m in rows])


def filled(instance: Instance, moments: np.ndarray, filler: np.ndarray, patience_ns: np.ndarray | int) -> Orders | None:
    """The schedule in which the ``filler`` nodes (bool per node) go where a machine would wait for ``patience_ns`` (of
    what comes next: per node, or one for all) or has no memory for it; all others run in the order of ``moments``. None
    where that blocks."""
    length = instance.lengths()
    seq = np.full((instance.num_machines, int(length.max())), -1, dtype=np.int64)
    rows, own_length = np.full_like(seq, -1), np.zeros_like(length)
    for k in range(instance.num_machines):
        own = np.flatnonzero((instance.machine == k) & ~filler)
        own_length[k] = len(own)
        rows[k, :len(own)] = own[np.lexsort((own, moments[own]))]
    patience = np.broadcast_to(np.asarray(patience_ns, dtype=np.int64), (instance.size,)).copy()
    makespan = fill(instance.fixed, rows, own_length, filler, patience, seq, np.zeros(instance.size, dtype=np.int64))
    return None if makespan < 0 else Orders(seq, length, int(makespan))


def followed(instance: Instance, moments: np.ndarray, priority: np.ndarray, patience_ns: int) -> Orders | None:
    """The list schedule by ``priority`` whose memory is that of the order of ``moments``; None if that breaks it."""
    length = instance.lengths()
    seq = np.full((instance.num_machines, int(length.max())), -1, dtype=np.int64)
    start = np.zeros(instance.size, dtype=np.int64)
    place, pointer, slack = _places(instance, moments)
    task = FollowTask(priority.astype(np.float64), place, pointer, slack, patience_ns)
    makespan = follow(instance.fixed, task, seq, start)
    return None if makespan < 0 else Orders(seq, length, int(makespan))


def plain(instance: Instance, moments: np.ndarray) -> Orders | None:
    """The orders of the moments themselves; None where they deadlock or break the memory."""
    length = instance.lengths()
    seq = np.full((instance.num_machines, int(length.max())), -1, dtype=np.int64)
    for k in range(instance.num_machines):
        own = np.flatnonzero(instance.machine == k)
        seq[k, :length[k]] = own[np.lexsort((own, moments[own]))]
    return timed(instance, seq, length) if memory_holds(instance, seq, length) else None


def serial(instance: Instance) -> list[list[int]]:
    """One microbatch after the other on every machine, each straight through: what leaves fewest values in flight."""
    forward, stages = instance.kind == KINDS.index(ActionKind.F), instance.view.num_stages
    within = np.where(forward, instance.depth, 2 * stages - instance.depth + instance.kind / len(KINDS))
    order = np.lexsort((within, instance.own_microbatch))
    return [order[instance.machine[order] == k].tolist() for k in range(instance.num_machines)]


def _places(instance: Instance, moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(place of every node that takes memory, first slack of every rank, slack): see `FollowTask`."""
    order = np.lexsort((np.arange(instance.size), moments, instance.rank))
    change = instance.alloc - instance.free
    taker = (instance.alloc[order] > 0) | (instance.work[order] > 0)
    ranks = len(instance.cap)
    held = np.cumsum(change[order]) - change[order]
    begin = np.searchsorted(instance.rank[order], np.arange(ranks))
    base = np.append(held, 0)[begin]
    held -= base[instance.rank[order]]
    chosen = order[taker]
    pointer = np.searchsorted(instance.rank[chosen], np.arange(ranks + 1))
    place = np.full(instance.size, -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen)) - pointer[instance.rank[chosen]]
    slack = instance.cap[instance.rank[chosen]] - held[taker] - instance.alloc[chosen] - instance.work[chosen]
    return place, pointer.astype(np.int64), slack.astype(np.int64)
