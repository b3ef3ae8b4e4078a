"""Simulated annealing over device assignments, compiled by numba.

Throughput: move a connected piece of up to 16 classes, or exchange two; loads are updated from the values that touch
the moved classes alone. The energy is the 16-norm of the loads: with the maximum alone three instances of five stay far
from their optimum [measured]. Contiguity, where asked for, is tested on the forward nodes of both devices after each
move that would be accepted.

Latency: move a connected piece to the subgraph of a neighbour, to a new one, or to the CPU; every candidate is
evaluated by one pass over the blocks in topological order (a cycle between blocks rejects the move).
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def touch(v, sign, device, source, cost, start, readers, num_acc, loads, seen):
    """Add ``sign`` times value v's transfers to the loads. ``seen`` is scratch, one flag per device."""
    home = device[source[v]]
    outside = False
    for k in range(start[v], start[v + 1]):
        place = device[readers[k]]
        if place != home:
            outside = True
            if place < num_acc and not seen[place]:
                seen[place] = True
                loads[place] += sign * cost[v]
    for k in range(start[v], start[v + 1]):
        seen[device[readers[k]]] = False
    if outside and home < num_acc:
        loads[home] += sign * cost[v]


@njit(cache=True, nogil=True)
def norm_of(loads):
    """The 16-norm of the loads: close to the largest, but it sees the others too."""
    peak = loads.max()
    if peak <= 0.0:
        return 0.0
    total = 0.0
    for d in range(len(loads)):
        x = loads[d] / peak
        x = x * x
        x = x * x
        x = x * x
        total += x * x
    return peak * total ** 0.0625


@njit(cache=True, nogil=True)
def all_loads(device, acc, cpu, source, cost, start, readers, num_acc, num_devices):
    """Loads of all devices under an assignment."""
    loads = np.zeros(num_devices)
    seen = np.zeros(num_devices, np.bool_)
    for c in range(len(device)):
        loads[device[c]] += acc[c] if device[c] < num_acc else cpu[c]
    for v in range(len(source)):
        touch(v, 1.0, device, source, cost, start, readers, num_acc, loads, seen)
    return loads


@njit(cache=True, nogil=True)
def is_contiguous(target, device, node_class, backward, edge_from, edge_to):
    """Whether no forward path leaves ``target`` and returns; edges are sorted by topological source."""
    after = np.zeros(len(node_class), np.bool_)
    for e in range(len(edge_from)):
        a, b = edge_from[e], edge_to[e]
        if backward[a] or backward[b]:
            continue
        if device[node_class[a]] == target:
            if device[node_class[b]] != target:
                after[b] = True
        elif after[a]:
            if device[node_class[b]] == target:
                return False
            after[b] = True
    return True


@njit(cache=True, nogil=True)
def neighbour(c, source, start, readers, touch_start, touched):
    """A random class at the other end of one of c's values (c itself where it reads its own)."""
    v = touched[np.random.randint(touch_start[c], touch_start[c + 1])]
    if source[v] != c:
        return source[v]
    return readers[np.random.randint(start[v], start[v + 1])]


@njit(cache=True, nogil=True)
def anneal_throughput(device, acc, cpu, size, supported, source, cost, start, readers, touch_start, touched,
                      num_acc, num_devices, memory, contiguous, node_class, backward, edge_from, edge_to, steps, hot,
                      cold, seed):
    """The best assignment seen and its largest load; ``device`` is the start and is not changed."""
    np.random.seed(seed)
    device = device.copy()
    count = len(device)
    seen = np.zeros(num_devices, np.bool_)
    used = np.zeros(num_devices)
    for c in range(count):
        used[device[c]] += size[c]
    loads = all_loads(device, acc, cpu, source, cost, start, readers, num_acc, num_devices)
    energy = norm_of(loads)
    best, best_load = device.copy(), loads.max()
    trial = loads.copy()
    decay = (cold / hot) ** (1.0 / max(steps, 1))
    heat = hot
    moved = np.empty(16, np.int64)
    for _ in range(steps):
        heat *= decay
        first = np.random.randint(count)
        old = device[first]
        second = -1
        amount = 1
        moved[0] = first
        draw = np.random.random()
        if draw < 0.3:
            second = np.random.randint(count)
            new = device[second]
        elif touch_start[first + 1] > touch_start[first] and draw < 0.8:
            new = device[neighbour(first, source, start, readers, touch_start, touched)]
        else:
            new = np.random.randint(num_devices)
        if new == old:
            continue
        if second < 0:
            reach = np.random.randint(1, 17)
            while amount < reach:  # grow a connected piece of the old device
                tip = moved[np.random.randint(amount)]
                if touch_start[tip + 1] == touch_start[tip]:
                    break
                extra = neighbour(tip, source, start, readers, touch_start, touched)
                fresh = device[extra] == old
                for k in range(amount):
                    fresh &= moved[k] != extra
                if not fresh:
                    break
                moved[amount] = extra
                amount += 1
        else:
            moved[1] = second
            amount = 2
        shift = 0.0
        fits = True
        for k in range(amount):
            c = moved[k]
            shift += -size[c] if c == second else size[c]
            fits &= supported[c] or (old if c == second else new) >= num_acc
        if not fits or (new < num_acc and used[new] + shift > memory) or (
                old < num_acc and used[old] - shift > memory):
            continue
        trial[:] = loads
        for k in range(amount):
            c = moved[k]
            target = old if c == second else new
            here = device[c]
            for j in range(touch_start[c], touch_start[c + 1]):
                touch(touched[j], -1.0, device, source, cost, start, readers, num_acc, trial, seen)
            trial[here] -= acc[c] if here < num_acc else cpu[c]
            device[c] = target
            trial[target] += acc[c] if target < num_acc else cpu[c]
            for j in range(touch_start[c], touch_start[c + 1]):
                touch(touched[j], 1.0, device, source, cost, start, readers, num_acc, trial, seen)
        after = norm_of(trial)
        accept = after <= energy or np.random.random() < np.exp((energy - after) / heat)
        if accept and contiguous:
            accept = (is_contiguous(old, device, node_class, backward, edge_from, edge_to)
                      and is_contiguous(new, device, node_class, backward, edge_from, edge_to))
        if accept:
            loads[:] = trial
            energy = after
            used[old] -= shift
            used[new] += shift
            if loads.max() < best_load - 1e-12:
                best_load = loads.max()
                best[:] = device
        else:
            for k in range(amount):
                device[moved[k]] = new if moved[k] == second else old
    return best, best_load


@njit(cache=True, nogil=True)
def latency_of(label, num_labels, per_acc, node_class, node_acc, node_cpu, node_cost, edge_from, edge_to, pred_start,
               preds):
    """Last finish under labels (-1: CPU, else ``acc * per_acc + subgraph``); infinity if blocks wait in a cycle.

    A subgraph that is not contiguous waits for itself through the nodes outside, so a cycle covers that case too.
    """
    nodes = len(node_class)
    blocks = num_labels + nodes
    block = np.empty(nodes, np.int64)
    length = np.zeros(blocks)
    for n in range(nodes):
        where = label[node_class[n]]
        block[n] = where if where >= 0 else num_labels + n
        length[block[n]] += node_acc[n] if where >= 0 else node_cpu[n]
    waits = np.zeros(blocks, np.int64)
    out = np.zeros(nodes, np.bool_)
    for n in range(nodes):  # inputs: each outside source once per reading subgraph
        for k in range(pred_start[n], pred_start[n + 1]):
            p = preds[k]
            if block[p] != block[n]:
                waits[block[n]] += 1
                out[p] = True
    reads = np.zeros((nodes, num_labels), np.bool_)
    for e in range(len(edge_from)):
        a, b = edge_from[e], edge_to[e]
        if block[a] != block[b] and block[b] < num_labels and not reads[a, block[b]]:
            reads[a, block[b]] = True
            length[block[b]] += node_cost[a]
    for n in range(nodes):
        if out[n] and block[n] < num_labels:
            length[block[n]] += node_cost[n]
    present = np.zeros(num_labels, np.bool_)
    for n in range(nodes):
        if block[n] < num_labels:
            present[block[n]] = True
    following = np.full(num_labels, -1, np.int64)
    for base in range(0, num_labels, per_acc):
        last = -1
        for j in range(base, base + per_acc):
            if present[j]:
                if last >= 0:
                    following[last] = j
                    waits[j] += 1
                last = j
    # nodes of each block, and their out-edges, by counting sort
    head = np.zeros(blocks + 1, np.int64)
    for e in range(len(edge_from)):
        if block[edge_from[e]] != block[edge_to[e]]:
            head[block[edge_from[e]] + 1] += 1
    for b in range(blocks):
        head[b + 1] += head[b]
    fill = head[:-1].copy()
    heads = np.empty(head[blocks], np.int64)
    for e in range(len(edge_from)):
        a, b = block[edge_from[e]], block[edge_to[e]]
        if a != b:
            heads[fill[a]] = b
            fill[a] += 1
    begin = np.zeros(blocks)
    stack = np.empty(blocks, np.int64)
    top = 0
    active = 0
    for b in range(blocks):
        exists = present[b] if b < num_labels else block[b - num_labels] == b
        if exists:
            active += 1
            if waits[b] == 0:
                stack[top] = b
                top += 1
    done = 0
    last_finish = 0.0
    while top:
        top -= 1
        b = stack[top]
        done += 1
        finish = begin[b] + length[b]
        last_finish = max(last_finish, finish)
        for k in range(head[b], head[b + 1]):
            c = heads[k]
            begin[c] = max(begin[c], finish)
            waits[c] -= 1
            if waits[c] == 0:
                stack[top] = c
                top += 1
        if b < num_labels and following[b] >= 0:
            c = following[b]
            begin[c] = max(begin[c], finish)
            waits[c] -= 1
            if waits[c] == 0:
                stack[top] = c
                top += 1
    return last_finish if done == active else np.inf


@njit(cache=True, nogil=True)
def anneal_latency(label, num_acc, per_acc, size, supported, memory, neighbour_start, neighbours, node_class, node_acc,
                   node_cpu, node_cost, edge_from, edge_to, pred_start, preds, steps, hot, cold, seed):
    """The best labels seen and their latency; moves one class, or a class with one of its neighbours."""
    np.random.seed(seed)
    label = label.copy()
    count = len(label)
    num_labels = num_acc * per_acc
    used = np.zeros(max(num_acc, 1))
    for c in range(count):
        if label[c] >= 0:
            used[label[c] // per_acc] += size[c]
    energy = latency_of(label, num_labels, per_acc, node_class, node_acc, node_cpu, node_cost, edge_from, edge_to,
                        pred_start, preds)
    best, best_energy = label.copy(), energy
    decay = (cold / hot) ** (1.0 / max(steps, 1))
    heat = hot
    moved = np.empty(8, np.int64)
    before = np.empty(8, np.int64)
    for _ in range(steps):
        heat *= decay
        moved[0] = np.random.randint(count)
        amount = 1
        degree = neighbour_start[moved[0] + 1] - neighbour_start[moved[0]]
        draw = np.random.random()
        if degree and draw < 0.7:
            other = neighbours[np.random.randint(neighbour_start[moved[0]], neighbour_start[moved[0] + 1])]
            new = label[other]
        elif num_labels and draw < 0.9:
            new = np.random.randint(num_labels)
        else:
            new = -1
        grow = np.random.random()
        while degree and grow < 0.5 and amount < 8:
            last = moved[amount - 1]
            extra = neighbours[np.random.randint(neighbour_start[last], neighbour_start[last + 1])]
            fresh = True
            for k in range(amount):
                fresh &= moved[k] != extra
            if not fresh:
                break
            moved[amount] = extra
            amount += 1
            grow = np.random.random()
        fits = True
        changed = False
        for k in range(amount):
            c = moved[k]
            before[k] = label[c]
            changed |= label[c] != new
            if label[c] >= 0:
                used[label[c] // per_acc] -= size[c]
            if new >= 0:
                used[new // per_acc] += size[c]
                fits &= supported[c]
            label[c] = new
        if new >= 0:
            fits &= used[new // per_acc] <= memory
        accept = False
        if fits and changed:
            after = latency_of(label, num_labels, per_acc, node_class, node_acc, node_cpu, node_cost, edge_from,
                               edge_to, pred_start, preds)
            accept = after <= energy or np.random.random() < np.exp((energy - after) / heat)
        if accept:
            energy = after
            if energy < best_energy - 1e-12:
                best_energy = energy
                best[:] = label
        else:
            for k in range(amount):
                c = moved[k]
                if new >= 0:
                    used[new // per_acc] -= size[c]
                if before[k] >= 0:
                    used[before[k] // per_acc] += size[c]
                label[c] = before[k]
    return best, best_energy
