"""Simulated annealing over subgraphs for the latency of one sample, compiled by numba.

A label says where a class runs: ``acc * per_acc + subgraph``, or -1 for the CPU. Most moves put a connected piece on
the label of a neighbour, on any other or on the CPU; a few exchange or merge two whole subgraphs. Every candidate is
evaluated by one pass over the blocks (subgraphs, CPU nodes) in topological order; a cycle between blocks rejects it,
and covers a subgraph that is not contiguous, which waits for itself through the nodes outside.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from mipipe.planner.devices.instance import PlaceInstance

SUBGRAPHS_PER_ACCELERATOR = 4
"""More subgraphs never helped on the benchmark and slow every evaluation."""

PIECE = 32
WHOLE = 0.03  # share of moves that exchange or merge whole subgraphs


class Graph(NamedTuple):
    """An instance as the kernels take it, nodes by topological position.

    ``preds[pred_start[n]:pred_start[n + 1]]`` are node n's predecessors, ``near[near_start[c]:near_start[c + 1]]`` the
    classes next to class c.
    """

    num_acc: int
    num_labels: int
    size: np.ndarray
    supported: np.ndarray
    memory: float
    node_class: np.ndarray
    node_acc: np.ndarray
    node_cpu: np.ndarray
    node_cost: np.ndarray
    edge_from: np.ndarray
    edge_to: np.ndarray
    pred_start: np.ndarray
    preds: np.ndarray
    near_start: np.ndarray
    near: np.ndarray


def graph_of(instance: PlaceInstance) -> Graph:
    """The kernels' view of an instance."""
    source = np.ascontiguousarray(instance.edges[:, 0])
    target = np.ascontiguousarray(instance.edges[:, 1])
    counts = np.bincount(target, minlength=len(instance.node_class))
    near: list[set[int]] = [set() for _ in range(instance.num_classes)]
    for a, b in zip(instance.node_class[source].tolist(), instance.node_class[target].tolist(), strict=True):
        if a != b:
            near[a].add(b)
            near[b].add(a)
    return Graph(
        instance.num_accelerators, instance.num_accelerators * SUBGRAPHS_PER_ACCELERATOR, instance.size,
        instance.supported, float(instance.memory), instance.node_class, instance.node_acc, instance.node_cpu,
        instance.node_cost, source, target, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        source[np.argsort(target, kind="stable")], np.cumsum([0, *map(len, near)]).astype(np.int64),
        np.array([c for row in near for c in sorted(row)], dtype=np.int64))


@njit(cache=True, nogil=True)
def blocks_of(g, label):
    """The block of every node (labels first, then CPU nodes), and the time each block takes with its transfers."""
    nodes = len(g.node_class)
    block = np.empty(nodes, np.int64)
    length = np.zeros(g.num_labels + nodes)
    for n in range(nodes):
        where = label[g.node_class[n]]
        block[n] = where if where >= 0 else g.num_labels + n
        length[block[n]] += g.node_acc[n] if where >= 0 else g.node_cpu[n]
    out = np.zeros(nodes, np.bool_)
    reads = np.zeros((nodes, g.num_labels), np.bool_)
    for e in range(len(g.edge_from)):
        a = g.edge_from[e]
        reader = block[g.edge_to[e]]
        if block[a] == reader:
            continue
        out[a] = True
        if reader < g.num_labels and not reads[a, reader]:  # each outside value once per reading subgraph
            reads[a, reader] = True
            length[reader] += g.node_cost[a]
    for n in range(nodes):
        if out[n] and block[n] < g.num_labels:
            length[block[n]] += g.node_cost[n]
    return block, length


@njit(cache=True, nogil=True)
def following_of(g, block):
    """The next subgraph on the same accelerator for every label (-1: none, or no such subgraph)."""
    present = np.zeros(g.num_labels, np.bool_)
    for n in range(len(block)):
        if block[n] < g.num_labels:
            present[block[n]] = True
    following = np.full(g.num_labels, -1, np.int64)
    for base in range(0, g.num_labels, SUBGRAPHS_PER_ACCELERATOR):
        last = -1
        for j in range(base, base + SUBGRAPHS_PER_ACCELERATOR):
            if present[j]:
                if last >= 0:
                    following[last] = j
                last = j
    return following


@njit(cache=True, nogil=True)
def last_finish(g, block, length):
    """When the last block ends; infinity if blocks wait in a cycle. Nodes enter by topological position."""
    nodes, blocks = len(block), len(length)
    following = following_of(g, block)
    waits = np.zeros(blocks, np.int64)
    head = np.zeros(blocks + 1, np.int64)
    for e in range(len(g.edge_from)):
        a, b = block[g.edge_from[e]], block[g.edge_to[e]]
        if a != b:
            waits[b] += 1
            head[a + 1] += 1
    for j in range(g.num_labels):
        if following[j] >= 0:
            waits[following[j]] += 1
    for b in range(blocks):
        head[b + 1] += head[b]
    fill = head[:-1].copy()
    heads = np.empty(head[blocks], np.int64)
    for e in range(len(g.edge_from)):
        a, b = block[g.edge_from[e]], block[g.edge_to[e]]
        if a != b:
            heads[fill[a]] = b
            fill[a] += 1
    begin = np.zeros(blocks)
    seen = np.zeros(blocks, np.bool_)
    stack = np.empty(blocks, np.int64)
    top = active = done = 0
    for n in range(nodes):
        b = block[n]
        if not seen[b]:
            seen[b] = True
            active += 1
            if waits[b] == 0:
                stack[top] = b
                top += 1
    last = 0.0
    while top:
        top -= 1
        b = stack[top]
        done += 1
        finish = begin[b] + length[b]
        last = max(last, finish)
        for k in range(head[b], head[b + 1] + 1):
            if k < head[b + 1]:
                c = heads[k]
            elif b < g.num_labels and following[b] >= 0:
                c = following[b]
            else:
                break
            begin[c] = max(begin[c], finish)
            waits[c] -= 1
            if waits[c] == 0:
                stack[top] = c
                top += 1
    return last if done == active else np.inf


@njit(cache=True, nogil=True)
def latency_of(g, label):
    """The last finish under labels; infinity where blocks wait in a cycle."""
    block, length = blocks_of(g, label)
    return last_finish(g, block, length)


@njit(cache=True, nogil=True)
def relabel_blocks(g, label, moved, before):
    """Exchange two random subgraphs, or merge one into another or into the CPU; how many classes that moved."""
    one, two = np.random.randint(g.num_labels), np.random.randint(-1, g.num_labels)
    both = two >= 0 and np.random.random() < 0.5
    amount = 0
    if one == two:
        return amount
    for c in range(len(label)):
        if label[c] == one or (both and label[c] == two):
            moved[amount] = c
            before[amount] = label[c]
            label[c] = two if label[c] == one else one
            amount += 1
    return amount


@njit(cache=True, nogil=True)
def relabel_piece(g, label, moved, before):
    """Put a random connected piece on one label; how many classes it has. Half of the pieces are of one label."""
    first = np.random.randint(len(label))
    degree = g.near_start[first + 1] - g.near_start[first]
    draw = np.random.random()
    if degree and draw < 0.7:
        new = label[g.near[np.random.randint(g.near_start[first], g.near_start[first + 1])]]
    elif g.num_labels and draw < 0.85:
        new = np.random.randint(g.num_labels)
    else:
        new = -1
    same = np.random.random() < 0.5
    if same and new == label[first]:
        return 0
    moved[0] = first
    amount = 1
    reach = np.random.randint(1, PIECE + 1)
    for _ in range(2 * PIECE):
        if amount == reach or not degree:
            break
        tip = moved[np.random.randint(amount)]
        extra = g.near[np.random.randint(g.near_start[tip], g.near_start[tip + 1])]
        fresh = not same or label[extra] == label[first]
        for k in range(amount):
            fresh &= moved[k] != extra
        if fresh:
            moved[amount] = extra
            amount += 1
    for k in range(amount):
        before[k] = label[moved[k]]
        label[moved[k]] = new
    return amount


@njit(cache=True, nogil=True)
def account(g, label, moved, before, amount, used):
    """Move the bytes of relabelled classes in ``used``; whether anything changed and everything fits."""
    changed, fits = False, True
    for k in range(amount):
        c = moved[k]
        changed |= label[c] != before[k]
        if before[k] >= 0:
            used[before[k] // SUBGRAPHS_PER_ACCELERATOR] -= g.size[c]
        if label[c] >= 0:
            used[label[c] // SUBGRAPHS_PER_ACCELERATOR] += g.size[c]
            fits &= g.supported[c]
    for d in range(g.num_acc):
        fits &= used[d] <= g.memory
    return changed and fits


@njit(cache=True, nogil=True)
def anneal_latency(g, label, steps, hot, cold, seed, stop):
    """The best labels seen and their latency; ``stop[0]`` ends the run early."""
    np.random.seed(seed)
    label = label.copy()
    used = np.zeros(max(g.num_acc, 1))
    for c in range(len(label)):
        if label[c] >= 0:
            used[label[c] // SUBGRAPHS_PER_ACCELERATOR] += g.size[c]
    energy = latency_of(g, label)
    best, best_latency = label.copy(), energy
    decay = (cold / hot) ** (1.0 / max(steps, 1))
    heat = hot
    moved, before = np.empty(len(label) + PIECE, np.int64), np.empty(len(label) + PIECE, np.int64)
    for step in range(steps):
        if step & 255 == 0 and stop[0]:
            break
        heat *= decay
        if g.num_labels and np.random.random() < WHOLE:
            amount = relabel_blocks(g, label, moved, before)
        else:
            amount = relabel_piece(g, label, moved, before)
        accept = False
        if account(g, label, moved, before, amount, used):
            after = latency_of(g, label)
            accept = after <= energy or np.random.random() < np.exp((energy - after) / heat)
        if accept:
            energy = after
            if energy < best_latency - 1e-12:
                best_latency = energy
                best[:] = label
        else:
            for k in range(amount):
                label[moved[k]], before[k] = before[k], label[moved[k]]
            account(g, label, moved, before, amount, used)
    return best, best_latency
