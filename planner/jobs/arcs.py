"""Every elementary action of a placement and every arc between them, as arrays, for `mipipe.planner.jobs.arrays`.

Nothing here loops over microbatches in Python, so hundreds of thousands of actions are numbered at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mipipe.graphs.topology import Topology
from mipipe.planner.jobs.dependencies import KINDS, Dependency, StageKind, dependencies
from mipipe.planner.jobs.memory import effects
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.kernel import kernel
from mipipe.planner.sizes import COMPILED

Arcs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(from, to, lag): ``to`` starts at least ``lag`` after the end of ``from``."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """All elementary actions, stage by stage, kind by kind, by microbatch. ``first[stage, kind]`` is where a line of
    microbatches begins, ``kind`` a position in `KINDS`.
    ``alloc`` is taken at the start, ``free`` returned at the end, ``work`` held in between."""

    first: dict[StageKind, int]
    stage: np.ndarray
    kind: np.ndarray
    microbatch: np.ndarray
    rank: np.ndarray
    dur: np.ndarray
    alloc: np.ndarray
    free: np.ndarray
    work: np.ndarray


def nodes_of(view: StageView) -> Nodes:
    """The nodes of a placement."""
    count = view.problem.num_microbatches
    first: dict[StageKind, int] = {}
    columns: list[tuple[np.ndarray, ...]] = []
    for stage in range(view.num_stages):
        route = np.array(view.placement.routes[stage], dtype=np.int64)
        durations = (view.f_ns[stage], view.f_ns[stage], view.i_ns[stage], view.w_ns[stage])
        for name, memory in effects(view, stage).items():
            first[stage, name], kind = len(columns) * count, KINDS.index(name)
            columns.append((np.full(count, stage), np.full(count, kind), np.arange(count), route,
                            np.array(durations[kind]), memory.alloc, memory.free,
                            memory.beside + view.workspace_of(name, stage)))
    stacked = [np.concatenate([column[at] for column in columns]).astype(np.int64) for at in range(8)]
    return Nodes(first, *stacked)


def arcs_of(view: StageView, nodes: Nodes) -> Arcs:
    """Who waits for whom, with transfers as lags."""
    none = np.zeros(view.problem.num_microbatches, dtype=np.int64)
    topology, routes, each = view.problem.topology, view.placement.routes, np.arange(len(none))

    def lag(one: Dependency) -> np.ndarray:
        return none if one.edge < 0 else lags(topology, routes[one.maker[0]], routes[one.reader[0]], one.num_bytes)

    found = [(nodes.first[one.maker] + each, nodes.first[one.reader] + each, lag(one)) for one in dependencies(view)]
    if not found:
        return none[:0], none[:0], none[:0]
    return tuple(np.concatenate([arcs[at] for arcs in found]) for at in range(3))  # type: ignore[return-value]


def lags(topology: Topology, source: tuple[int, ...], target: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """Duration of every microbatch's transfer; each different one is worked out once."""
    known: dict[tuple[int, int, int], int] = {}
    result = np.zeros(len(source), dtype=np.int64)
    for m, key in enumerate(zip(source, target, size, strict=True)):
        if key[0] != key[1]:
            if key not in known:
                known[key] = topology.transfer_ns(*key)
            result[m] = known[key]
    return result


def to_csr(size: int, arcs: Arcs) -> Arcs:
    """Arcs sorted by their first node: (pointer per node, second nodes, lags)."""
    order = np.lexsort((arcs[2], arcs[1], arcs[0]))
    pointer = np.zeros(size + 1, dtype=np.int64)
    np.cumsum(np.bincount(arcs[0], minlength=size), out=pointer[1:])
    return pointer, arcs[1][order], arcs[2][order]


def longest(succ_ptr: np.ndarray, succ: np.ndarray, lag: np.ndarray, pred_ptr: np.ndarray, pred: np.ndarray,
            pred_lag: np.ndarray, dur: np.ndarray) -> np.ndarray:
    """Longest path from the start of every node to the end, by precedence alone (given predecessors first: from the
    beginning to the node's end)."""
    chosen = _longest if len(dur) >= COMPILED else _longest.py_func
    return chosen(succ_ptr, succ, lag, pred_ptr, pred, pred_lag, dur)


@kernel
def _longest(succ_ptr, succ, lag, pred_ptr, pred, pred_lag, dur):
    size = dur.shape[0]
    left = succ_ptr[1:] - succ_ptr[:-1]
    stack = np.zeros(size, np.int64)
    length = dur.copy()
    after = np.zeros(size, np.int64)
    top = 0
    for n in range(size):
        if left[n] == 0:
            stack[top] = n
            top += 1
    while top > 0:
        top -= 1
        n = stack[top]
        length[n] += after[n]
        for e in range(pred_ptr[n], pred_ptr[n + 1]):
            u = pred[e]
            after[u] = max(after[u], length[n] + pred_lag[e])
            left[u] -= 1
            if left[u] == 0:
                stack[top] = u
                top += 1
    return length
