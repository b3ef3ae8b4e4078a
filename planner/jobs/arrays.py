"""A placement's scheduling problem as arrays: nodes, precedence, machines, memory. What the search kernels work on.

Where all microbatches have equal loads, the actions of one stage and phase on a rank form a *class* that runs in the
order of microbatches. With equal routes that is without loss (swapping two changes nothing but names); with routes that
differ in a spread end it is a restriction that pays: a search that may reorder them finds 2-10 % worse orders in equal
time. Where loads differ, only microbatches of equal route and loads form a class. Node numbers follow classes: class
``c`` owns nodes ``base[c] .. base[c + 1] - 1``.

A two-way pipeline that looks the same from both ends (`mirror`) is searched on half its ranks: a schedule that is equal
on rank r and its mirror image is a schedule of the *quotient*, in which a dependency that crosses the middle comes back
to the rank it left. Nothing in the kernels knows about it; `with_mirrors` writes both halves out.

Left out: values in flight (they need times, not only orders) and the queueing of transfers on a channel; both are
judged by `mipipe.planner.jobs.times` and the checker afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.jobs.arcs import arcs_of, longest, nodes_of, to_csr
from mipipe.planner.jobs.dependencies import KINDS
from mipipe.planner.jobs.memory import capacity
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.plan import RankOrder, Schedule


class FixedArrays(NamedTuple):
    """What the compiled searches read and never change: arrays of `Instance`, and the predecessor counts of its nodes
    (``waits``)."""

    machine: np.ndarray
    rank: np.ndarray
    dur: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray
    lag: np.ndarray
    pred_ptr: np.ndarray
    pred: np.ndarray
    pred_lag: np.ndarray
    waits: np.ndarray
    tail: np.ndarray
    cls: np.ndarray
    base: np.ndarray
    alloc: np.ndarray
    free: np.ndarray
    work: np.ndarray
    cap: np.ndarray
    microbatch: np.ndarray


@dataclass(frozen=True, eq=False)
class Instance:
    """Arrays over nodes (N), machines (K), classes (C), ranks (R) and microbatches.

    ``succ[succ_ptr[n]:succ_ptr[n+1]]`` wait for node n and ``lag`` more; ``pred`` is the same backwards. ``alloc`` is
    taken when a node starts, ``free`` returned when it ends, ``work`` needed while it runs, all on ``rank``.
    ``microbatch`` is
    shared by a microbatch and its mirror image, ``own_microbatch`` is the node's and ``twin`` the image's (or -1).
    ``origin[n]`` is the place of n's action among those of `mipipe.planner.jobs.arcs.Nodes`.
    """

    view: StageView
    machine: np.ndarray
    rank: np.ndarray
    dur: np.ndarray
    succ_ptr: np.ndarray
    succ: np.ndarray
    lag: np.ndarray
    pred_ptr: np.ndarray
    pred: np.ndarray
    pred_lag: np.ndarray
    cls: np.ndarray
    base: np.ndarray
    alloc: np.ndarray
    free: np.ndarray
    work: np.ndarray
    cap: np.ndarray
    microbatch: np.ndarray
    own_microbatch: np.ndarray
    kind: np.ndarray
    depth: np.ndarray
    origin: np.ndarray
    twin: np.ndarray
    head: np.ndarray
    tail: np.ndarray
    machine_key: tuple[tuple[int, Stream], ...]

    @property
    def size(self) -> int:
        return len(self.dur)

    @property
    def num_machines(self) -> int:
        return len(self.machine_key)

    @property
    def waits(self) -> np.ndarray:
        """Number of predecessors of each node."""
        return np.diff(self.pred_ptr)

    @cached_property
    def fixed(self) -> FixedArrays:
        """The arrays as the kernels take them; not copies."""
        return FixedArrays(**{name: getattr(self, name) for name in FixedArrays._fields})

    @cached_property
    def number(self) -> dict[tuple[int, ActionKind, int], int]:
        """The node of every (stage, kind, microbatch); a halved instance has those of its own half."""
        kinds = [KINDS[kind] for kind in self.kind.tolist()]
        return {key: n for n, key in enumerate(zip(self.depth.tolist(), kinds, self.own_microbatch.tolist(),
                                                   strict=True))}

    def lengths(self) -> np.ndarray:
        """Number of nodes on each machine."""
        return np.bincount(self.machine, minlength=self.num_machines)


def signatures(view: StageView) -> list[int]:
    """For each microbatch the number of its kind: equal where route and loads are equal."""
    numbers: dict[tuple[Any, ...], int] = {}
    loads = [group.loads for group in view.problem.groups if group.loads]
    result = []
    for m in range(view.problem.num_microbatches):
        key = (tuple(route[m] for route in view.placement.routes), tuple(load[m] for load in loads))
        result.append(numbers.setdefault(key, len(numbers)))
    return result


def mirror(view: StageView) -> list[int] | None:
    """The microbatch that is each microbatch's image under r -> R-1-r; None where there is no such symmetry."""
    ranks = view.problem.num_ranks
    devices = view.problem.topology.devices
    if ranks % 2 or view.problem.topology.overrides or any(group.loads for group in view.problem.groups):
        return None
    if any(devices[r].kind != devices[ranks - 1 - r].kind or capacity(view, r) != capacity(view, ranks - 1 - r)
           for r in range(ranks)) or len({device.host for device in devices}) > 1:
        return None
    by_route: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for m in range(view.problem.num_microbatches):
        by_route[tuple(route[m] for route in view.placement.routes)].append(m)
    image = [-1] * view.problem.num_microbatches
    for route, members in by_route.items():
        others = by_route.get(tuple(ranks - 1 - rank for rank in route), [])
        if len(others) != len(members) or others is members:
            return None
        for m, other in zip(members, others, strict=True):
            image[m] = other
    return image


def build(view: StageView, halve: bool = False) -> Instance:
    """The instance of a placement; its quotient under `mirror` where ``halve`` and the symmetry exists."""
    nodes = nodes_of(view)
    image = mirror(view) if halve else None
    ranks, count = view.problem.num_ranks, view.problem.num_microbatches
    mine = np.arange(count) if image is None else np.array(image, dtype=np.int64)
    sign = np.array(signatures(view))[nodes.microbatch] if any(group.loads for group in view.problem.groups) else (
        nodes.rank)
    kept = np.flatnonzero(nodes.rank < ranks // 2) if image is not None else np.arange(len(nodes.stage))
    kept = kept[np.lexsort((nodes.microbatch[kept], sign[kept], nodes.kind[kept], nodes.stage[kept]))]
    number = np.full(len(nodes.stage), -1, dtype=np.int64)
    number[kept] = np.arange(len(kept))
    twin = np.full(len(kept), -1, dtype=np.int64)
    if image is not None:
        line = np.arange(len(nodes.stage)) - nodes.microbatch
        number = np.where(number >= 0, number, number[line + mine[nodes.microbatch]])
        twin = mine[nodes.microbatch[kept]]
    source, target, lag = arcs_of(view, nodes)
    inside = nodes.rank[source] < ranks // 2 if image is not None else slice(None)
    arcs = number[source[inside]], number[target[inside]], lag[inside]
    succ_ptr, succ, lag = to_csr(len(kept), arcs)
    pred_ptr, pred, pred_lag = to_csr(len(kept), (arcs[1], arcs[0], arcs[2]))
    compute = np.array([stream is Stream.COMPUTE for stream in view.streams], dtype=np.int64)
    keys, machine = np.unique(2 * nodes.rank[kept] + compute[nodes.stage[kept]], return_inverse=True)
    class_key = np.stack([nodes.stage[kept], nodes.kind[kept], sign[kept]])
    new = np.ones(len(kept), dtype=bool)
    new[1:] = (class_key[:, 1:] != class_key[:, :-1]).any(axis=0)
    own, dur = nodes.microbatch[kept], nodes.dur[kept]
    return Instance(
        view, machine.astype(np.int64), nodes.rank[kept], dur, succ_ptr, succ, lag, pred_ptr, pred, pred_lag,
        np.cumsum(new) - 1, np.append(np.flatnonzero(new), len(kept)), nodes.alloc[kept], nodes.free[kept],
        nodes.work[kept], np.array([capacity(view, r) for r in range(ranks)], dtype=np.int64),
        np.minimum(own, mine[own]), own, nodes.kind[kept], nodes.stage[kept], kept, twin,
        longest(pred_ptr, pred, pred_lag, succ_ptr, succ, lag, dur) - dur,
        longest(succ_ptr, succ, lag, pred_ptr, pred, pred_lag, dur),
        tuple((int(key) // 2, Stream.COMPUTE if key % 2 else Stream.COLLECTIVE) for key in keys))


def with_mirrors(instance: Instance, orders: list[list[int]], ask: Callable[[], None] = lambda: None) -> Schedule:
    """The schedule of orders of nodes, one per machine, with mirror images written out; ``ask`` before each machine:
    half a million actions take a second."""
    ranks = instance.view.problem.num_ranks
    compute: list[tuple[Action, ...]] = [() for _ in range(ranks)]
    collective: list[tuple[Action, ...]] = [() for _ in range(ranks)]
    for (rank, stream), order in zip(instance.machine_key, orders, strict=True):
        ask()
        target = compute if stream is Stream.COMPUTE else collective
        at = np.array(order, dtype=np.int64)
        stages, kinds = instance.depth[at].tolist(), [KINDS[kind] for kind in instance.kind[at].tolist()]
        target[rank] = tuple(map(Action, stages, kinds, instance.own_microbatch[at].tolist()))
        if order and instance.twin[at[0]] >= 0:
            target[ranks - 1 - rank] = tuple(map(Action, stages, kinds, instance.twin[at].tolist()))
    return Schedule(tuple(RankOrder(a, b) for a, b in zip(compute, collective, strict=True)))


def to_array(orders: list[list[int]]) -> np.ndarray:
    """Orders as an array [machines, longest], padded with -1."""
    seq = np.full((len(orders), max(map(len, orders))), -1, dtype=np.int64)
    for row, order in zip(seq, orders, strict=True):
        row[:len(order)] = order
    return seq


def orders_from(instance: Instance, schedule: Schedule) -> list[list[int]]:
    """A schedule's orders in the instance's node numbers; blocks (B, OVERLAP_F_B) are written as their parts."""
    number = instance.number
    result = []
    for rank, stream in instance.machine_key:
        order = schedule.ranks[rank].of(stream)
        result.append([number[stage, kind, m] for action in order for kind, stage, m in action.parts()])
    return [_in_class_order(instance, order) for order in result]


def _in_class_order(instance: Instance, order: list[int]) -> list[int]:
    """The same order of classes with every class in its fixed internal order."""
    seen: dict[int, int] = defaultdict(int)
    result = []
    for node in order:
        c = int(instance.cls[node])
        result.append(int(instance.base[c]) + seen[c])
        seen[c] += 1
    return result
