"""The inner loops of the planner, compiled by numba: longest paths, simulated annealing on orders.

All work on the arrays of `mipipe.planner.instance.Instance`. They hold no state, release the GIL (two searches run in
two threads), and return often enough for Ctrl-C. A schedule here is ``seq[k, :length[k]]``: the nodes of machine k in
order; classes (interchangeable microbatches) stay in their fixed internal order.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def memory_fits(seq, k, first, last, used, alloc, free, work, cap):
    """Whether positions first..last of machine k keep within ``cap`` when ``used`` is held before them."""
    for i in range(first, last + 1):
        n = seq[k, i]
        used += alloc[n]
        if used + work[n] > cap:
            return False
        used -= free[n]
    return True


@njit(cache=True, nogil=True)
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


@njit(cache=True, nogil=True)
def _trace(tip, start, dur, pred_ptr, pred, pred_lag, seq, pos, machine, path):
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


@njit(cache=True, nogil=True)
def _cost(makespan, seq, length, start, dur, tilt):
    """Makespan plus ``tilt`` times the mean end of the machines: a slope on the plateaus of the makespan."""
    if tilt == 0.0:
        return float(makespan)
    total = 0.0
    for k in range(seq.shape[0]):
        n = seq[k, length[k] - 1]
        total += start[n] + dur[n]
    return makespan + tilt * total / seq.shape[0]


@njit(cache=True, nogil=True)
def _reorder(lo, hi, seq, length, pos, machine, succ_ptr, succ, pred_ptr, pred, topo, tpos, waits, queue):
    """A topological order of the nodes at places lo..hi after a move among them, into ``queue``; False for a cycle.

    Only these places can change (Pearce and Kelly, 2006).
    """
    last = 0
    for place in range(lo, hi + 1):
        n = topo[place]
        wait = 0
        for e in range(pred_ptr[n], pred_ptr[n + 1]):
            if lo <= tpos[pred[e]] <= hi:
                wait += 1
        if pos[n] > 0 and lo <= tpos[seq[machine[n], pos[n] - 1]] <= hi:
            wait += 1
        waits[n] = wait
        if wait == 0:
            queue[last] = n
            last += 1
    at = 0
    while at < last:
        n = queue[at]
        at += 1
        for e in range(succ_ptr[n], succ_ptr[n + 1]):
            s = succ[e]
            if lo <= tpos[s] <= hi:
                waits[s] -= 1
                if waits[s] == 0:
                    queue[last] = s
                    last += 1
        if pos[n] + 1 < length[machine[n]]:
            s = seq[machine[n], pos[n] + 1]
            if lo <= tpos[s] <= hi:
                waits[s] -= 1
                if waits[s] == 0:
                    queue[last] = s
                    last += 1
    return last == hi - lo + 1


@njit(cache=True, nogil=True)
def _propagate(lo, pending, limit, seq, length, pos, machine, dur, succ_ptr, succ, pred_ptr, pred, pred_lag, tail, topo,
               kept, stamp, now, log_node, log_start):
    """Recompute the starts of the ``pending`` stamped nodes from place ``lo`` on, and of what follows from changes.

    Changes go into ``kept`` and the log; returns the log's length, or -1 - length when some path passes ``limit``.
    """
    changes = 0
    place = lo
    while pending > 0:
        n = topo[place]
        place += 1
        if stamp[n] != now:
            continue
        pending -= 1
        ready = 0
        for e in range(pred_ptr[n], pred_ptr[n + 1]):
            u = pred[e]
            ready = max(ready, kept[u] + dur[u] + pred_lag[e])
        k = machine[n]
        if pos[n] > 0:
            u = seq[k, pos[n] - 1]
            ready = max(ready, kept[u] + dur[u])
        if ready == kept[n]:
            continue
        log_node[changes] = n
        log_start[changes] = kept[n]
        changes += 1
        kept[n] = ready
        if ready + tail[n] > limit:
            return -1 - changes
        for e in range(succ_ptr[n], succ_ptr[n + 1]):
            if stamp[succ[e]] != now:
                stamp[succ[e]] = now
                pending += 1
        if pos[n] + 1 < length[k] and stamp[seq[k, pos[n] + 1]] != now:
            stamp[seq[k, pos[n] + 1]] = now
            pending += 1
    return changes


@njit(cache=True, nogil=True)
def _likely_cycle(seq, k, i, j, kept, dur, succ_ptr, succ, pred_ptr, pred):
    """Whether a shift from i to j (already made) probably closes a cycle: some neighbour of the moved node lies, in
    time, between it and what it passed. Exact only when False (Balas and Vazacopoulos, 1998)."""
    n = seq[k, j]
    if j > i:
        x = seq[k, j - 1]
        for e in range(succ_ptr[n], succ_ptr[n + 1]):
            if kept[succ[e]] + dur[succ[e]] <= kept[x]:
                return True
    else:
        x = seq[k, j + 1]
        for e in range(pred_ptr[n], pred_ptr[n + 1]):
            if kept[pred[e]] >= kept[x] + dur[x]:
                return True
    return False


@njit(cache=True, nogil=True)
def _pick(seq, length, pos, machine, path, size, wild):
    """A move (machine, from, to): out of a critical block, or, with probability ``wild``, any action a little way."""
    if np.random.random() < wild:
        n = np.random.randint(pos.shape[0])
        k = machine[n]
        i = pos[n]
        j = i + np.random.randint(1, 9) * (1 if np.random.random() < 0.5 else -1)
    else:
        at = np.random.randint(size)
        n = path[at]
        k = machine[n]
        i = pos[n]
        lo = at
        while lo + 1 < size and machine[path[lo + 1]] == k and pos[path[lo + 1]] == pos[path[lo]] - 1:
            lo += 1
        hi = at
        while hi > 0 and machine[path[hi - 1]] == k and pos[path[hi - 1]] == pos[path[hi]] + 1:
            hi -= 1
        first = pos[path[lo]]
        final = pos[path[hi]]
        choice = np.random.randint(4)
        if choice == 0:
            j = first
        elif choice == 1:
            j = final
        elif choice == 2:
            j = i + (1 if np.random.random() < 0.5 else -1)
        else:
            j = first - 1 + np.random.randint(final - first + 3)
    return k, i, min(max(j, 0), length[k] - 1)


@njit(cache=True, nogil=True)
def _tip(seq, length, kept, dur, makespan):
    """A machine's last action that ends at the makespan, at random."""
    tip = -1
    seen = 0
    for k in range(seq.shape[0]):
        n = seq[k, length[k] - 1]
        if kept[n] + dur[n] == makespan:
            seen += 1
            if np.random.randint(seen) == 0:
                tip = n
    return tip


@njit(cache=True, nogil=True)
def anneal(seq, length, machine, rank, dur, succ_ptr, succ, lag, pred_ptr, pred, pred_lag, waits0, tail, cls, alloc,
           free, work, cap, iterations, hot, cold, tilt, wild, target, seed, best):
    """Improve ``seq`` in place for some iterations of simulated annealing; ``best`` gets the best orders; its makespan.

    A move takes an action on a random critical path out of its block (a run of critical actions on one machine) to
    another place in or next to it, or, with probability ``wild``, any action to a place nearby. Moves that overfill the
    memory or deadlock are rejected. Stops early at ``target``.
    """
    np.random.seed(seed)
    count = dur.shape[0]
    machines = seq.shape[0]
    waits = np.zeros(count, np.int64)
    queue = np.zeros(count, np.int64)
    path = np.zeros(count + 1, np.int64)
    pos = np.zeros(count, np.int64)
    before = np.zeros((machines, seq.shape[1] + 1), np.int64)
    kept = np.zeros(count, np.int64)
    stamp = np.zeros(count, np.int64)
    log_node = np.zeros(count, np.int64)
    log_start = np.zeros(count, np.int64)
    tpos = np.zeros(count, np.int64)
    floor = dur.sum() / machines
    for k in range(machines):
        for i in range(length[k]):
            pos[seq[k, i]] = i
            before[k, i + 1] = before[k, i] + alloc[seq[k, i]] - free[seq[k, i]]
    makespan = times(seq, length, dur, succ_ptr, succ, lag, waits0, kept, log_node, waits, queue)
    topo = _by_time(kept, queue)
    for place in range(count):
        tpos[topo[place]] = place
    cost = _cost(makespan, seq, length, kept, dur, tilt)
    best[:] = seq
    best_makespan = makespan
    best_cost = cost
    size = 0
    now = 0
    cooling = (cold / hot) ** (1.0 / max(1, iterations))
    temperature = hot
    for _ in range(iterations):
        temperature *= cooling
        if size == 0:
            tip = _tip(seq, length, kept, dur, makespan)
            size = _trace(tip, kept, dur, pred_ptr, pred, pred_lag, seq, pos, machine, path)
        k, i, j = _pick(seq, length, pos, machine, path, size, wild)
        if j == i or (abs(i - j) == 1 and cls[seq[k, j]] == cls[seq[k, i]]):
            if np.random.random() < 0.1:
                size = 0
            continue
        shift(seq, k, i, j, cls)
        a = min(i, j)
        b = max(i, j)
        if (not memory_fits(seq, k, a, b, before[k, a], alloc, free, work, cap[rank[seq[k, i]]])
                or (np.random.random() < 0.7
                    and _likely_cycle(seq, k, i, j, kept, dur, succ_ptr, succ, pred_ptr, pred))):
            shift(seq, k, j, i, cls)
            continue
        lo = count
        hi = 0
        for p in range(a, b + 1):
            pos[seq[k, p]] = p
            lo = min(lo, tpos[seq[k, p]])
            hi = max(hi, tpos[seq[k, p]])
        if not _reorder(lo, hi, seq, length, pos, machine, succ_ptr, succ, pred_ptr, pred, topo, tpos, waits, queue):
            shift(seq, k, j, i, cls)
            for p in range(a, b + 1):
                pos[seq[k, p]] = p
            continue
        for place in range(lo, hi + 1):
            n = queue[place - lo]
            queue[place - lo] = topo[place]
            topo[place] = n
            tpos[n] = place
        now += 1
        until = min(b + 1, length[k] - 1)
        for p in range(a, until + 1):
            stamp[seq[k, p]] = now
        threshold = cost - temperature * np.log(1.0 - np.random.random())
        changes = _propagate(lo, until - a + 1, threshold - tilt * floor, seq, length, pos, machine, dur, succ_ptr,
                             succ, pred_ptr, pred, pred_lag, tail, topo, kept, stamp, now, log_node, log_start)
        accept = changes >= 0
        if accept:
            value = 0
            for q in range(machines):
                n = seq[q, length[q] - 1]
                value = max(value, kept[n] + dur[n])
            new = _cost(value, seq, length, kept, dur, tilt)
            accept = new <= threshold
        else:
            changes = -1 - changes
        if not accept:
            for at in range(changes):
                kept[log_node[at]] = log_start[at]
            for place in range(lo, hi + 1):
                topo[place] = queue[place - lo]
                tpos[topo[place]] = place
            shift(seq, k, j, i, cls)
            for p in range(a, b + 1):
                pos[seq[k, p]] = p
            continue
        for p in range(a, b + 1):
            before[k, p + 1] = before[k, p] + alloc[seq[k, p]] - free[seq[k, p]]
        makespan = value
        cost = new
        size = 0
        if cost < best_cost:
            best_cost = cost
            if makespan <= best_makespan:
                best[:] = seq
                if makespan < best_makespan:
                    best_makespan = makespan
                    if makespan <= target:
                        break
    return best_makespan


@njit(cache=True, nogil=True)
def _by_time(kept, queue):
    """The nodes by start, ties in the topological order ``queue``."""
    keys = np.zeros(queue.shape[0], np.int64)
    for at in range(queue.shape[0]):
        keys[at] = kept[queue[at]]
    return queue[np.argsort(keys, kind="mergesort")]
