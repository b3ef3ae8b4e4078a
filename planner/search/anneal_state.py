"""An order under annealing with all that follows from it, compiled by numba: starts, memory, what one move changes.

Starts are recomputed only where they change: places of a topological order (Pearce and Kelly, 2006) from the first one
moved, and given up as soon as some path is too long. `mipipe.planner.search.anneal_kernel` chooses the moves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mipipe.planner.jobs.paths import by_time, cost_of, overflow, shift, times
from mipipe.planner.kernel import kernel


class AnnealState(NamedTuple):
    """An order with all that follows from it, and scratch space.

    ``seq`` and ``length`` are the order, ``pos`` every node's position, ``before[k, i]`` the bytes held before position
    i, ``kept`` the starts, ``topo`` a topological order and ``tpos`` its inverse. ``stamp`` marks nodes to look at,
    ``log_node`` and ``log_start`` the starts a move has overwritten.
    """

    seq: np.ndarray
    length: np.ndarray
    pos: np.ndarray
    before: np.ndarray
    kept: np.ndarray
    topo: np.ndarray
    tpos: np.ndarray
    waits: np.ndarray
    queue: np.ndarray
    stamp: np.ndarray
    log_node: np.ndarray
    log_start: np.ndarray


@kernel
def state_of(facts, seq, length):
    """The state of an order that does not deadlock."""
    count = facts.dur.shape[0]
    pos, kept, tpos, waits, queue, stamp, log_node, log_start = [np.zeros(count, np.int64) for _ in range(8)]
    before = np.zeros((seq.shape[0], seq.shape[1] + 1), np.int64)
    for k in range(seq.shape[0]):
        for i in range(length[k]):
            pos[seq[k, i]] = i
            before[k, i + 1] = before[k, i] + facts.alloc[seq[k, i]] - facts.free[seq[k, i]]
    times(seq, length, facts.dur, facts.succ_ptr, facts.succ, facts.lag, facts.waits, kept, log_node, waits, queue)
    topo = by_time(kept, queue)
    for place in range(count):
        tpos[topo[place]] = place
    return AnnealState(seq, length, pos, before, kept, topo, tpos, waits, queue, stamp, log_node, log_start)


@kernel
def makespan_of(facts, state):
    value = 0
    for k in range(state.seq.shape[0]):
        n = state.seq[k, state.length[k] - 1]
        value = max(value, state.kept[n] + facts.dur[n])
    return value


@kernel
def _reorder(facts, state, lo, hi):
    """A topological order of the nodes at places lo..hi after a move among them, into ``queue``; False for a cycle."""
    seq, length, pos, machine = state.seq, state.length, state.pos, facts.machine
    topo, tpos, waits, queue = state.topo, state.tpos, state.waits, state.queue
    last = 0
    for place in range(lo, hi + 1):
        n = topo[place]
        wait = 0
        for e in range(facts.pred_ptr[n], facts.pred_ptr[n + 1]):
            if lo <= tpos[facts.pred[e]] <= hi:
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
        for e in range(facts.succ_ptr[n], facts.succ_ptr[n + 1]):
            s = facts.succ[e]
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


@kernel
def _propagate(facts, state, lo, pending, limit, now):
    """Recompute the starts of the ``pending`` stamped nodes from place ``lo`` on, and of what follows from changes.

    Changes go into ``kept`` and the log; returns the log's length, or -1 - length when some path passes ``limit``.
    """
    seq, length, pos, machine, dur = state.seq, state.length, state.pos, facts.machine, facts.dur
    kept, stamp = state.kept, state.stamp
    changes = 0
    place = lo
    while pending > 0:
        n = state.topo[place]
        place += 1
        if stamp[n] != now:
            continue
        pending -= 1
        ready = 0
        for e in range(facts.pred_ptr[n], facts.pred_ptr[n + 1]):
            u = facts.pred[e]
            ready = max(ready, kept[u] + dur[u] + facts.pred_lag[e])
        k = machine[n]
        if pos[n] > 0:
            u = seq[k, pos[n] - 1]
            ready = max(ready, kept[u] + dur[u])
        if ready == kept[n]:
            continue
        state.log_node[changes] = n
        state.log_start[changes] = kept[n]
        changes += 1
        kept[n] = ready
        if ready + facts.tail[n] > limit:
            return -1 - changes
        for e in range(facts.succ_ptr[n], facts.succ_ptr[n + 1]):
            if stamp[facts.succ[e]] != now:
                stamp[facts.succ[e]] = now
                pending += 1
        if pos[n] + 1 < length[k] and stamp[seq[k, pos[n] + 1]] != now:
            stamp[seq[k, pos[n] + 1]] = now
            pending += 1
    return changes


@kernel
def likely_cycle(facts, state, k, i, j):
    """Whether a shift from i to j (already made) probably closes a cycle: some neighbour of the moved node lies, in
    time, between it and what it passed. Exact only when False (Balas and Vazacopoulos, 1998)."""
    n = state.seq[k, j]
    if j > i:
        x = state.seq[k, j - 1]
        for e in range(facts.succ_ptr[n], facts.succ_ptr[n + 1]):
            s = facts.succ[e]
            if state.kept[s] + facts.dur[s] <= state.kept[x]:
                return True
    else:
        x = state.seq[k, j + 1]
        for e in range(facts.pred_ptr[n], facts.pred_ptr[n + 1]):
            if state.kept[facts.pred[e]] >= state.kept[x] + facts.dur[x]:
                return True
    return False


@kernel
def _renumber(state, k, a, b):
    """Set the positions of machine k's nodes at a..b; the range of their places in the topological order."""
    lo = state.topo.shape[0]
    hi = 0
    for p in range(a, b + 1):
        n = state.seq[k, p]
        state.pos[n] = p
        lo = min(lo, state.tpos[n])
        hi = max(hi, state.tpos[n])
    return lo, hi


@kernel
def _swap_places(state, lo, hi):
    """Exchange places lo..hi of the topological order with what ``queue`` holds."""
    for place in range(lo, hi + 1):
        n = state.queue[place - lo]
        state.queue[place - lo] = state.topo[place]
        state.topo[place] = n
        state.tpos[n] = place


@kernel
def take(facts, state, k, i, j, now, tilt, fine, least, threshold):
    """Make the move that ``shift`` has made in ``seq`` if its cost stays within ``threshold``.

    ``fine`` is the price of memory after it, ``least`` what the tilt costs at least. Returns (makespan, cost); the
    makespan is -1 where the move was undone.
    """
    a, b = min(i, j), max(i, j)
    lo, hi = _renumber(state, k, a, b)
    if not _reorder(facts, state, lo, hi):
        shift(state.seq, k, j, i, facts.cls)
        _renumber(state, k, a, b)
        return -1, 0.0
    _swap_places(state, lo, hi)
    until = min(b + 1, state.length[k] - 1)
    for p in range(a, until + 1):
        state.stamp[state.seq[k, p]] = now
    changes = _propagate(facts, state, lo, until - a + 1, threshold - least - fine, now)
    if changes >= 0:
        makespan = makespan_of(facts, state)
        cost = cost_of(state.seq, state.length, state.kept, facts.dur, makespan, tilt, fine)
        if cost <= threshold:
            for p in range(a, b + 1):
                n = state.seq[k, p]
                state.before[k, p + 1] = state.before[k, p] + facts.alloc[n] - facts.free[n]
            return makespan, cost
    else:
        changes = -1 - changes
    for at in range(changes):
        state.kept[state.log_node[at]] = state.log_start[at]
    _swap_places(state, lo, hi)
    shift(state.seq, k, j, i, facts.cls)
    _renumber(state, k, a, b)
    return -1, 0.0


@kernel
def overfull(facts, seq, length):
    """Bytes beyond the limits, summed over all positions."""
    over = 0
    for k in range(seq.shape[0]):
        cap = facts.cap[facts.rank[seq[k, 0]]]
        over += overflow(seq, k, 0, length[k] - 1, 0, facts.alloc, facts.free, facts.work, cap)
    return over
