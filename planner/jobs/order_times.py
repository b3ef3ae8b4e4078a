"""From an order to its times by arrays: what `mipipe.planner.jobs.times` does, for hundreds of thousands of actions.

The rules, and the ties, are those of that module, which says them; a test holds the two together. Nothing here loops
over actions in Python but the reading of a schedule. Who reads a thousand times the same actions in other orders (the
order MIPs, the windows) works on that module's lists.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from operator import attrgetter

import numpy as np

from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.jobs.arcs import Nodes, nodes_of
from mipipe.planner.jobs.dependencies import KINDS, dependencies
from mipipe.planner.jobs.memory import carries_bytes, holdings, peaks
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.kernel import kernel
from mipipe.planner.plan import Schedule
from mipipe.planner.sizes import COMPILED

COMPUTE_KINDS = (*KINDS, ActionKind.B, ActionKind.OVERLAP_F_B)
"""The kinds of a plan's actions; ``ActionArrays.kind`` counts in it."""

_CODE = {id(kind): code for code, kind in enumerate(COMPUTE_KINDS)}
_F, _I, _W, _B, _PAIR = (COMPUTE_KINDS.index(kind) for kind in (
    ActionKind.F, ActionKind.I, ActionKind.W, ActionKind.B, ActionKind.OVERLAP_F_B))


@dataclass(frozen=True, eq=False)
class ActionArrays:
    """The actions of a schedule, numbered rank by rank, the compute stream's before the collective's, in order.

    ``kind`` counts in `COMPUTE_KINDS`; ``partner`` is (stage, microbatch) of an overlapped backward, else -1. ``doer``
    is the action that does each part of ``nodes``. Values, one for each that passes between two stages for a
    microbatch, have the columns of `_values`. Arcs leave ``action`` n at ``ptr[n] .. ptr[n + 1]``: to ``reader``, with
    the value (-1: none passes).
    """

    view: StageView
    nodes: Nodes
    kind: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    partner: np.ndarray
    rank: np.ndarray
    collective: np.ndarray
    dur: np.ndarray
    doer: np.ndarray
    value: dict[str, np.ndarray]
    ptr: np.ndarray
    reader: np.ndarray
    carried: np.ndarray

    @property
    def size(self) -> int:
        return len(self.kind)

    @cached_property
    def follow(self) -> np.ndarray:
        """The next action of the same stream; -1 after the last."""
        found = np.arange(1, self.size + 1)
        lane = 2 * self.rank + self.collective
        found[:-1][lane[1:] != lane[:-1]] = -1
        found[-1:] = -1
        return found

    def action(self, number: int) -> Action:
        kind = COMPUTE_KINDS[self.kind[number]]
        stage, m, (other, back) = int(self.stage[number]), int(self.microbatch[number]), self.partner[number].tolist()
        return Action(stage, kind, m, (other, back) if other >= 0 else None)


@dataclass(frozen=True, eq=False)
class OrderTimes:
    """Start of every action, and begin and end of every value's transfer (within a rank: when it was made, twice);
    the sums of gradients as (stage, start, end); the end of every rank's work, updates included."""

    actions: ActionArrays
    start: np.ndarray
    begin: np.ndarray
    over: np.ndarray
    reductions: list[tuple[int, int, int]]
    ends: np.ndarray

    @cached_property
    def end(self) -> np.ndarray:
        return self.start + self.actions.dur

    @property
    def makespan_ns(self) -> int:
        """Where nothing is reduced or updated, the end of the last action."""
        return int(max(self.end.max(initial=0), self.ends.max(initial=0)))

    @cached_property
    def moved(self) -> np.ndarray:
        """Whether a value goes to another rank."""
        return self.actions.value["channel"] >= 0

    def part_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of every part of the actions."""
        return self.start[self.actions.doer], self.end[self.actions.doer]


def arrays_of(view: StageView, schedule: Schedule) -> ActionArrays | None:
    """The arrays of a schedule; None where it is incomplete, has an action twice, on a wrong rank or stream, or a pair
    whose backward needs its own forward (`mipipe.planner.jobs.times.evaluate` says which)."""
    nodes, ranks = nodes_of(view), view.problem.num_ranks
    orders = list(chain.from_iterable((order.compute, order.collective) for order in schedule.ranks))
    lane = np.repeat(np.arange(len(orders)), [len(order) for order in orders])
    actions = list(chain.from_iterable(orders))
    if len(orders) != 2 * ranks or not all(id(action.kind) in _CODE for action in actions):
        return None
    stage, m = (np.fromiter(map(attrgetter(name), actions), np.int64, len(actions)) for name in ("stage", "microbatch"))
    kind = np.fromiter((_CODE[id(action.kind)] for action in actions), np.int64, len(actions))
    partner = np.full((len(actions), 2), -1, dtype=np.int64)
    pairs = np.flatnonzero(kind == _PAIR)
    partner[pairs] = np.array([actions[n].partner for n in pairs.tolist()], dtype=np.int64).reshape(-1, 2)
    clock.ask()
    parts = _parts(view, nodes, kind, stage, m, partner)
    if parts is None:
        return None
    owner, part = parts
    streams = np.array([stream is Stream.COLLECTIVE for stream in view.streams])
    if (np.bincount(part, minlength=len(nodes.stage)) != 1).any() or (
            2 * nodes.rank[part] + streams[nodes.stage[part]] != lane[owner]).any():
        return None
    doer = np.empty(len(part), dtype=np.int64)
    doer[part] = owner
    dur = np.zeros(len(actions), dtype=np.int64)
    np.add.at(dur, owner, nodes.dur[part])
    if len(pairs) and Stream.COLLECTIVE not in view.streams:
        ahead = np.zeros(len(actions), dtype=np.int64)
        ahead[doer] = np.where(nodes.kind == KINDS.index(ActionKind.F), nodes.dur, 0)
        both = np.stack([ahead[pairs], dur[pairs] - ahead[pairs]], axis=1)
        different, which = np.unique(both, axis=0, return_inverse=True)
        dur[pairs] = np.array([view.problem.overlap.duration_ns(*row) for row in different.tolist()])[which.reshape(-1)]
    clock.ask()
    arcs = _arcs(view, nodes, doer, kind)
    if arcs is None:
        return None
    return ActionArrays(view, nodes, kind, stage, m, partner, lane // 2, lane % 2, dur, doer, *arcs)


def _parts(view: StageView, nodes: Nodes, kind: np.ndarray, stage: np.ndarray, m: np.ndarray,
           partner: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """(action, part of the nodes) of all parts of all actions; None where there is no such part."""
    first = np.full((view.num_stages, len(KINDS)), -1, dtype=np.int64)
    for (s, name), at in nodes.first.items():
        first[s, KINDS.index(name)] = at
    pair, block = np.flatnonzero(kind == _PAIR), np.flatnonzero(kind == _B)
    owner = np.concatenate([np.arange(len(kind)), block, pair, pair])
    what = np.concatenate([np.where(kind == _B, _I, np.where(kind == _PAIR, _F, kind)), np.full(len(block), _W),
                           np.full(len(pair), _I), np.full(len(pair), _W)])
    where = np.concatenate([stage, stage[block], partner[pair, 0], partner[pair, 0]])
    which = np.concatenate([m, m[block], partner[pair, 1], partner[pair, 1]])
    if len(owner) and (where.min() < 0 or where.max() >= view.num_stages or which.min() < 0
                       or which.max() >= view.problem.num_microbatches):
        return None
    line = first[where, what]
    return None if (line < 0).any() else (owner, line + which)


def _values(view: StageView, nodes: Nodes) -> dict[str, np.ndarray]:
    """Columns over all dependencies of all microbatches, microbatch by microbatch: ``maker`` and ``reader`` (parts),
    ``edge`` (-1 within a stage), ``backward``, ``num_bytes``, ``channel`` (-1 within a rank), and how long it ``took``
    and ``occupied`` that."""
    found, count, topology = dependencies(view), view.problem.num_microbatches, view.problem.topology
    each = np.arange(count)[:, None]

    def column(values: Iterable[int]) -> np.ndarray:
        return np.broadcast_to(np.fromiter(values, np.int64, len(found)), (count, len(found)))

    maker = column(nodes.first[one.maker] for one in found) + each
    reader = column(nodes.first[one.reader] for one in found) + each
    edge, backward = column(one.edge for one in found), column(one.backward for one in found)
    size = np.zeros((count, len(found)), dtype=np.int64)
    for at, one in enumerate(found):
        if one.num_bytes:
            size[:, at] = one.num_bytes
    source, target = nodes.rank[maker], nodes.rank[reader]
    away = (edge >= 0) & (source != target)
    channel = np.where(away, source * topology.num_devices + target, -1)
    sizes, of_size = np.unique(size, return_inverse=True)
    links, which = np.unique(channel.reshape(-1) * len(sizes) + of_size.reshape(-1), return_inverse=True)
    took, occupied = np.zeros(len(links), dtype=np.int64), np.zeros(len(links), dtype=np.int64)
    for at, link in enumerate(links.tolist()):
        number, amount = link // len(sizes), int(sizes[link % len(sizes)])
        if number >= 0:
            here, there = divmod(number, topology.num_devices)
            took[at] = topology.transfer_ns(here, there, amount)
            occupied[at] = topology.occupied_ns(here, there, amount)
    return {"maker": maker.reshape(-1), "reader": reader.reshape(-1), "edge": edge.reshape(-1),
            "backward": backward.reshape(-1), "num_bytes": size.reshape(-1), "channel": channel.reshape(-1),
            "took": took[which], "occupied": occupied[which]}


def _arcs(view: StageView, nodes: Nodes, doer: np.ndarray, kind: np.ndarray) -> tuple[
        dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray] | None:
    """The values between stages, and the arcs between actions: pointers, readers, the value of each."""
    every = _values(view, nodes)
    source, target = doer[every["maker"]], doer[every["reader"]]
    own = source == target
    if (own & (every["backward"] == 0) & (kind[source] == _PAIR) & (nodes.kind[every["maker"]] == _F)).any():
        return None
    number = np.cumsum(every["edge"] >= 0) - 1
    number[every["edge"] < 0] = -1
    order = np.flatnonzero(~own)
    order = order[np.argsort(source[order], kind="stable")]  # of one maker: by microbatch, then as dependencies come
    ptr = np.zeros(len(kind) + 1, dtype=np.int64)
    np.cumsum(np.bincount(source[order], minlength=len(kind)), out=ptr[1:])
    between = every["edge"] >= 0
    return {name: column[between] for name, column in every.items()}, ptr, target[order], number[order]


def times_of(actions: ActionArrays, since: np.ndarray | None = None,
             free: np.ndarray | None = None) -> OrderTimes | None:
    """The times of a schedule; None on a deadlock.

    ``since``: no rank begins before its moment here; ``free``: when each channel is free, which is kept up to date.
    """
    clock.ask()
    begin = np.zeros(actions.size, dtype=np.int64) if since is None else since[actions.rank]
    if free is None:
        free = no_channel_used(actions.view)
    follow = actions.follow
    waits = np.bincount(actions.reader, minlength=actions.size) + np.bincount(follow[follow >= 0],
                                                                              minlength=actions.size)
    made = np.zeros(len(actions.value["channel"]), dtype=np.int64)
    over = made.copy()
    chosen = _run if actions.size >= COMPILED else _run.py_func
    value = actions.value
    done = chosen(actions.dur, follow, waits, actions.ptr, actions.reader, actions.carried, value["channel"],
                  value["took"], value["occupied"], free, begin, made, over)
    if done < actions.size:
        return None
    return OrderTimes(actions, begin, made, over, *_finish(actions, begin))


def no_channel_used(view: StageView) -> np.ndarray:
    """When every channel is free at the beginning: at once."""
    return np.zeros(view.problem.topology.num_devices ** 2, dtype=np.int64)


@kernel
def _run(dur, follow, waits, ptr, reader, carried, channel, took, occupied, free, start, begin, over):
    """Run all actions, the earliest end first, into ``start``, ``begin`` and ``over``; how many could run."""
    heap = [(0, 0) for _ in range(0)]
    for n in range(dur.shape[0]):
        if waits[n] == 0:
            heapq.heappush(heap, (start[n] + dur[n], n))
    done = 0
    while len(heap) > 0:
        end, n = heapq.heappop(heap)
        done += 1
        for e in range(ptr[n], ptr[n + 1]):
            at, v = end, carried[e]
            if v >= 0:
                begin[v] = over[v] = end
                c = channel[v]
                if c >= 0:
                    begin[v] = max(end, free[c])
                    free[c] = begin[v] + occupied[v]
                    at = over[v] = begin[v] + took[v]
            r = reader[e]
            start[r] = max(start[r], at)
            waits[r] -= 1
            if waits[r] == 0:
                heapq.heappush(heap, (start[r] + dur[r], r))
        r = follow[n]
        if r >= 0:
            start[r] = max(start[r], end)
            waits[r] -= 1
            if waits[r] == 0:
                heapq.heappush(heap, (start[r] + dur[r], r))
    return done


def _finish(actions: ActionArrays, start: np.ndarray) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """The sums of gradients, in the order in which they become ready, and the end of every rank's work with updates."""
    view, end = actions.view, start + actions.dur
    ranks, count = view.problem.num_ranks, view.problem.num_microbatches
    ends, busy = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    np.maximum.at(ends, actions.rank, end)
    beside = actions.collective == 1
    np.maximum.at(busy, actions.rank[beside], end[beside])
    waiting = []
    for stage, placed in enumerate(view.placement.stages):
        if len(placed.ranks) > 1 and view.w_ns[stage] is not None:
            line = actions.nodes.first[stage, ActionKind.W]
            waiting.append((int(end[actions.doer[line:line + count]].max()), stage))
    found = []
    for ready, stage in sorted(waiting):
        members = list(view.placement.stages[stage].ranks)
        at = max(ready, int(busy[members].max()))
        busy[members] = at + view.reduce_ns(stage)
        found.append((stage, at, at + view.reduce_ns(stage)))
    updates = np.array(view.updates_ns(), dtype=np.int64)
    return found, np.maximum(ends, busy) + updates


Interval = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Columns of intervals of memory: rank, from, to, bytes."""


def held(times: OrderTimes) -> Interval:
    """What every rank holds from when to when, by the rules of `mipipe.planner.problem`, resident bytes left out.

    Exact where every action takes time: what takes none may be put anywhere at its moment by lowering.
    """
    actions = times.actions
    view, nodes, count = actions.view, actions.nodes, actions.view.problem.num_microbatches
    start, end = times.part_times()
    found: list[Interval] = []
    for stage, route in enumerate(view.placement.routes):
        rank = np.array(route, dtype=np.int64)
        for one in holdings(view, stage):
            since, until = (nodes.first[stage, kind] + np.arange(count) for kind in (one.since, one.until))
            found.append((rank, start[since], (start if one.replaced else end)[until],
                          np.array(one.num_bytes, dtype=np.int64)))
    workspace = np.array(view.workspace, dtype=np.int64)
    other = np.where((actions.partner[:, 0] >= 0) & (actions.partner[:, 0] != actions.stage),
                     workspace[actions.partner[:, 0]], 0)
    found.append((actions.rank, times.start, times.end, workspace[actions.stage] + other))
    if carries_bytes(view):
        found += _in_flight(times, start, end)
    rank, since, until, size = (np.concatenate([item[at] for item in found]) for at in range(4))
    kept = (size > 0) & (until > since)
    return rank[kept], since[kept], until[kept], size[kept]


def _in_flight(times: OrderTimes, start: np.ndarray, end: np.ndarray) -> list[Interval]:
    """Values between two stages: within a rank until they are read; on the way, at both ends."""
    value, moved = times.actions.value, times.moved
    maker, reader, size, rank = value["maker"], value["reader"], value["num_bytes"], times.actions.nodes.rank
    here = rank[reader]
    return [(rank[maker], end[maker], np.where(moved, times.over, start[reader]), size),
            (here[moved], postings(times)[moved], start[reader][moved], size[moved])]


def postings(times: OrderTimes) -> np.ndarray:
    """When the receive of every value that moves is posted: at the end of its reader's last compute action that ended
    by the transfer's begin; 0 before the first."""
    actions, value = times.actions, times.actions.value
    found, target = np.zeros(len(times.begin), dtype=np.int64), actions.nodes.rank[value["reader"]]
    computing = actions.collective == 0
    for rank in np.unique(target[times.moved]).tolist():
        ends = np.concatenate([[0], times.end[computing & (actions.rank == rank)]])
        own = times.moved & (target == rank)
        found[own] = ends[np.searchsorted(ends[1:], times.begin[own], side="right")]
    return found


def peaks_of(times: OrderTimes) -> list[int]:
    """Per rank the most bytes beyond resident ones."""
    rank, since, until, size = held(times)
    return peaks(rank, since, until, size, size, times.actions.view.problem.num_ranks)
