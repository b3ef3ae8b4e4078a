"""A schedule's actions as arrays, with the values that pass between them and the arcs along which they pass.

Durations are here; when actions run follows from the order (`mipipe.planner.jobs.order_times`).
"""

from __future__ import annotations

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
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.plan import Schedule

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
