"""What the compiled searches share: longest paths, memory along an order, a move, a critical path. All in numba.

All work on the arrays of `mipipe.planner.jobs.arrays.Instance`. They hold no state, release the GIL (two searches run
in two threads), and return often enough for Ctrl-C. A schedule here is ``seq[k, :length[k]]``: the nodes of machine k
in order; classes (interchangeable microbatches) stay in their fixed internal order.
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.kernel import kernel


@kernel
def times(seq, length, dur, succ_ptr, succ, lag, waits0, start, follow, waits, queue):
    """Earliest starts under the given orders, into ``start``; the makespan, or -1 if the orders deadlock.

    ``queue`` gets a topological order.
    """
    count = dur.shape[0]
    for n in range(count):
        waits[n] = waits0[n]
        start[n] = 0
        follow[n] = -1
    for k in range(seq.shape[0]):
        for i in range(1, length[k]):
            follow[seq[k, i - 1]] = seq[k, i]
            waits[seq[k, i]] += 1
    last = 0
    for n in range(count):
        if waits[n] == 0:
            queue[last] = n
            last += 1
    at = 0
    makespan = 0
    while at < last:
        n = queue[at]
        at += 1
        end = start[n] + dur[n]
        makespan = max(makespan, end)
        for e in range(succ_ptr[n], succ_ptr[n + 1]):
            s = succ[e]
            start[s] = max(start[s], end + lag[e])
            waits[s] -= 1
            if waits[s] == 0:
                queue[last] = s
                last += 1
        s = follow[n]
        if s >= 0:
            start[s] = max(start[s], end)
            waits[s] -= 1
            if waits[s] == 0:
                queue[last] = s
                last += 1
    return makespan if last == count else -1


@kernel
def memory_fits(seq, k, first, last, used, alloc, free, work, cap):
    """Whether positions first..last of machine k keep within ``cap`` when ``used`` is held before them."""
    for i in range(first, last + 1):
        n = seq[k, i]
        used += alloc[n]
        if used + work[n] > cap:
            return False
        used -= free[n]
    return True


@kernel
def overflow(seq, k, first, last, used, alloc, free, work, cap):
    """Bytes beyond ``cap``, summed over positions first..last of machine k, when ``used`` is held before them."""
    total = 0
    for i in range(first, last + 1):
        n = seq[k, i]
        used += alloc[n]
        total += max(0, used + work[n] - cap)
        used -= free[n]
    return total


@kernel
def cost_of(seq, length, start, dur, makespan, tilt, fine):
    """Makespan plus ``tilt`` times the mean end of the machines (a slope on its plateaus) plus the price of memory."""
    total = 0.0
    if tilt > 0.0:
        for k in range(seq.shape[0]):
            n = seq[k, length[k] - 1]
            total += start[n] + dur[n]
    return makespan + tilt * total / seq.shape[0] + fine


@kernel
def shift(seq, k, i, j, cls):
    """Move the node at position i of machine k to position j, keeping every class in its internal order."""
    moved = seq[k, i]
    step = 1 if j > i else -1
    at = i
    hole = i
    # the moved element's class is renamed along the way: the k-th of a class stays the k-th
    c = cls[moved]
    while at != j:
        at += step
        n = seq[k, at]
        if cls[n] == c:
            seq[k, hole] = moved
            moved = n
        else:
            seq[k, hole] = n
        hole = at
    seq[k, j] = moved


@kernel
def trace(tip, start, dur, pred_ptr, pred, pred_lag, seq, pos, machine, path):
    """A critical path backwards from ``tip`` into ``path``; its length. Ties are broken at random."""
    size = 0
    n = tip
    while True:
        path[size] = n
        size += 1
        at = start[n]
        if at == 0:
            return size
        choice = -1
        seen = 0
        i = pos[n]
        if i > 0:
            u = seq[machine[n], i - 1]
            if start[u] + dur[u] == at:
                choice = u
                seen = 1
        for e in range(pred_ptr[n], pred_ptr[n + 1]):
            u = pred[e]
            if u != choice and start[u] + dur[u] + pred_lag[e] == at:
                seen += 1
                if np.random.randint(seen) == 0:
                    choice = u
        if choice < 0:
            return size
        n = choice


@kernel
def by_time(kept, queue):
    """The nodes by start, ties in the topological order ``queue``."""
    keys = np.zeros(queue.shape[0], np.int64)
    for at in range(queue.shape[0]):
        keys[at] = kept[queue[at]]
    return queue[np.argsort(keys, kind="mergesort")]
