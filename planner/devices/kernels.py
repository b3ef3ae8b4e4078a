"""Simulated annealing over device assignments for throughput, compiled by numba.

Pieces are moved: up to `PIECE` classes of one device connected by values. A move either hands a piece to another device
or exchanges two pieces of two devices. Loads are updated from the values that touch the moved classes alone. The energy
is a p-norm of the loads: with the maximum alone three instances of five stay far from their optimum. Callers choose
the share of exchanges and the norm.

Contiguity, where asked for, is tested on the forward nodes of both devices after each move that would be accepted.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mipipe.planner.devices.instances.instance import PlaceInstance
from mipipe.planner.kernel import kernel

PIECE = 16
"""Classes of the largest piece that moves at once."""


class Workload(NamedTuple):
    """An instance as the kernels take it; ``touched[touch_start[c]:touch_start[c + 1]]`` are class c's values.

    A class touches the values it makes and those it reads.
    """

    acc: np.ndarray
    cpu: np.ndarray
    size: np.ndarray
    supported: np.ndarray
    source: np.ndarray
    cost: np.ndarray
    start: np.ndarray
    readers: np.ndarray
    touch_start: np.ndarray
    touched: np.ndarray
    num_acc: int
    num_devices: int
    memory: float
    node_class: np.ndarray
    backward: np.ndarray
    edge_from: np.ndarray
    edge_to: np.ndarray


def workload_of(instance: PlaceInstance) -> Workload:
    """The kernels' view of an instance."""
    lists: list[list[int]] = [[] for _ in range(instance.num_classes)]
    for v, source in enumerate(instance.value_source.tolist()):
        for c in {source, *instance.readers[instance.reader_start[v]:instance.reader_start[v + 1]].tolist()}:
            lists[c].append(v)
    return Workload(
        instance.acc, instance.cpu, instance.size, instance.supported, instance.value_source, instance.value_cost,
        instance.reader_start, instance.readers, np.cumsum([0, *map(len, lists)]).astype(np.int64),
        np.array([v for row in lists for v in row], dtype=np.int64), instance.num_accelerators, instance.num_devices,
        float(instance.memory), instance.node_class, instance.node_backward,
        np.ascontiguousarray(instance.edges[:, 0]), np.ascontiguousarray(instance.edges[:, 1]))


@kernel
def touch(w, v, sign, device, loads, seen):
    """Add ``sign`` times value v's transfers to the loads. ``seen`` is scratch, one flag per device."""
    home = device[w.source[v]]
    outside = False
    for k in range(w.start[v], w.start[v + 1]):
        place = device[w.readers[k]]
        if place != home:
            outside = True
            if place < w.num_acc and not seen[place]:
                seen[place] = True
                loads[place] += sign * w.cost[v]
    for k in range(w.start[v], w.start[v + 1]):
        seen[device[w.readers[k]]] = False
    if outside and home < w.num_acc:
        loads[home] += sign * w.cost[v]


@kernel
def norm_of(loads, doublings):
    """The p-norm of the loads, p = 2^doublings: close to the largest load, but it sees the others too."""
    peak = loads.max()
    if peak <= 0.0:
        return 0.0
    total = 0.0
    for d in range(len(loads)):
        x = loads[d] / peak
        for _ in range(doublings):
            x = x * x
        total += x
    return peak * total ** (1.0 / 2 ** doublings)


@kernel
def all_loads(w, device):
    """Loads of all devices under an assignment."""
    loads = np.zeros(w.num_devices)
    seen = np.zeros(w.num_devices, np.bool_)
    for c in range(len(device)):
        loads[device[c]] += w.acc[c] if device[c] < w.num_acc else w.cpu[c]
    for v in range(len(w.source)):
        touch(w, v, 1.0, device, loads, seen)
    return loads


@kernel
def is_contiguous(w, target, device):
    """Whether no forward path leaves ``target`` and returns; edges are sorted by topological source."""
    after = np.zeros(len(w.node_class), np.bool_)
    for e in range(len(w.edge_from)):
        a, b = w.edge_from[e], w.edge_to[e]
        if w.backward[a] or w.backward[b]:
            continue
        if device[w.node_class[a]] == target:
            if device[w.node_class[b]] != target:
                after[b] = True
        elif after[a]:
            if device[w.node_class[b]] == target:
                return False
            after[b] = True
    return True


@kernel
def neighbour(w, c):
    """A random class at the other end of one of c's values (c itself where it reads its own)."""
    v = w.touched[np.random.randint(w.touch_start[c], w.touch_start[c + 1])]
    if w.source[v] != c:
        return w.source[v]
    return w.readers[np.random.randint(w.start[v], w.start[v + 1])]


@kernel
def grow(w, device, moved, begin, reach):
    """Extend ``moved[begin]`` to a connected piece of its device of up to ``reach`` classes; where it ends."""
    end = begin + 1
    while end < begin + reach:
        tip = moved[begin + np.random.randint(end - begin)]
        if w.touch_start[tip + 1] == w.touch_start[tip]:
            break
        extra = neighbour(w, tip)
        fresh = device[extra] == device[tip]
        for k in range(begin, end):
            fresh &= moved[k] != extra
        if not fresh:
            break
        moved[end] = extra
        end += 1
    return end


@kernel
def draw_move(w, device, moved, exchanges, large, small):
    """A random move into ``moved``: ``moved[:split]`` go to the device returned, ``moved[split:end]`` come back."""
    first = np.random.randint(len(device))
    moved[0] = first
    draw = np.random.random()
    if draw < exchanges:
        second = np.random.randint(len(device))
        new = device[second]
        if new == device[first]:
            return new, 0, 0
        reach = PIECE if np.random.random() < large else small
        split = grow(w, device, moved, 0, np.random.randint(1, reach + 1))
        moved[split] = second
        end = grow(w, device, moved, split, np.random.randint(1, reach + 1))
        return new, split, end
    if w.touch_start[first + 1] > w.touch_start[first] and draw < 0.5 + 0.5 * exchanges:
        new = device[neighbour(w, first)]
    else:
        new = np.random.randint(w.num_devices)
    if new == device[first]:
        return new, 0, 0
    end = grow(w, device, moved, 0, np.random.randint(1, PIECE + 1))
    return new, end, end


@kernel
def move_class(w, c, target, device, loads, seen):
    """Put class c on ``target``, loads kept up to date."""
    here = device[c]
    for j in range(w.touch_start[c], w.touch_start[c + 1]):
        touch(w, w.touched[j], -1.0, device, loads, seen)
    loads[here] -= w.acc[c] if here < w.num_acc else w.cpu[c]
    device[c] = target
    loads[target] += w.acc[c] if target < w.num_acc else w.cpu[c]
    for j in range(w.touch_start[c], w.touch_start[c + 1]):
        touch(w, w.touched[j], 1.0, device, loads, seen)


@kernel
def shift_of(w, moved, split, end, old, new):
    """Bytes that a move takes from ``old`` to ``new``; infinity where a class may not run there."""
    shift = 0.0
    for k in range(end):
        c = moved[k]
        shift += w.size[c] if k < split else -w.size[c]
        if not w.supported[c] and (new if k < split else old) < w.num_acc:
            return np.inf
    return shift


@kernel
def anneal_throughput(w, device, contiguous, steps, hot, cold, exchanges, large, small, doublings, seed, stop):
    """The best assignment seen and its largest load; ``device`` is the start and is not changed.

    Temperatures fall from ``hot`` to ``cold`` over ``steps`` moves, of which the share ``exchanges`` are exchanges,
    the share ``large`` of them of up to `PIECE` classes and the others of up to ``small``; ``stop[0]`` ends the run.
    """
    np.random.seed(seed)
    device = device.copy()
    seen = np.zeros(w.num_devices, np.bool_)
    used = np.zeros(w.num_devices)
    for c in range(len(device)):
        used[device[c]] += w.size[c]
    loads = all_loads(w, device)
    energy = norm_of(loads, doublings)
    best, best_load = device.copy(), loads.max()
    trial = loads.copy()
    decay = (cold / hot) ** (1.0 / max(steps, 1))
    heat = hot
    moved = np.empty(2 * PIECE, np.int64)
    for step in range(steps):
        if step & 1023 == 0 and stop[0]:
            break
        heat *= decay
        new, split, end = draw_move(w, device, moved, exchanges, large, small)
        if end == 0:
            continue
        old = device[moved[0]]
        shift = shift_of(w, moved, split, end, old, new)
        if shift == np.inf or (new < w.num_acc and used[new] + shift > w.memory) or (
                old < w.num_acc and used[old] - shift > w.memory):
            continue
        trial[:] = loads
        for k in range(end):
            move_class(w, moved[k], new if k < split else old, device, trial, seen)
        after = norm_of(trial, doublings)
        accept = after <= energy or np.random.random() < np.exp((energy - after) / heat)
        if accept and contiguous:
            accept = is_contiguous(w, old, device) and is_contiguous(w, new, device)
        if not accept:
            for k in range(end):
                device[moved[k]] = old if k < split else new
            continue
        loads[:] = trial
        energy = after
        used[old] -= shift
        used[new] += shift
        if loads.max() < best_load - 1e-12:
            best_load = loads.max()
            best[:] = device
    return best, best_load
