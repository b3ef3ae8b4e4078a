"""An order with overlapped pairs under annealing, compiled by numba: its tokens, their times, their memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mipipe.planner.kernel import kernel


class PairFacts(NamedTuple):
    """What a search never changes: arrays of `Instance`; ``weight[I]`` is the W that runs with it (-1: none),
    ``forward`` and ``backward`` number the durations of F nodes and of I + W, ``lasts[f, b]`` is that of their pair."""

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
    cls: np.ndarray
    alloc: np.ndarray
    free: np.ndarray
    work: np.ndarray
    kind: np.ndarray
    depth: np.ndarray
    own_microbatch: np.ndarray
    weight: np.ndarray
    forward: np.ndarray
    backward: np.ndarray
    lasts: np.ndarray


class Tokens(NamedTuple):
    """An order and its pairs. Of every token: duration, predecessors, memory, class (its own in a pair); of every node:
    ``lead``, the token it is part of, and ``mate`` (of an F: the I of its pair, else -1)."""

    seq: np.ndarray
    length: np.ndarray
    mate: np.ndarray
    lead: np.ndarray
    dur: np.ndarray
    waits: np.ndarray
    alloc: np.ndarray
    free: np.ndarray
    work: np.ndarray
    cls: np.ndarray


@kernel
def tokens_of(facts, seq, length, mate):
    """The tokens of an order with given mates; arrays are copied."""
    count = facts.dur.shape[0]
    state = Tokens(seq.copy(), length.copy(), np.full(count, -1, np.int64), np.arange(count), facts.dur.copy(),
                   facts.waits.copy(), facts.alloc.copy(), facts.free.copy(), facts.work.copy(), facts.cls.copy())
    for n in range(count):
        if mate[n] >= 0:
            join(facts, state, n, mate[n])
    return state


@kernel
def join(facts, state, f, i):
    w = facts.weight[i]
    state.mate[f] = i
    state.lead[i] = f
    state.lead[w] = f
    state.dur[f] = facts.lasts[facts.forward[f], facts.backward[i]]
    state.waits[f] = facts.waits[f] + facts.waits[i] + facts.waits[w] - 1  # W waits for I inside
    state.alloc[f] = facts.alloc[f] + facts.alloc[i] + facts.alloc[w]
    state.free[f] = facts.free[f] + facts.free[i] + facts.free[w]
    back = max(facts.work[i], facts.work[w])
    state.work[f] = max(facts.work[f], back) if facts.depth[f] == facts.depth[i] else facts.work[f] + back
    state.cls[f] = -1 - f


@kernel
def part_pair(facts, state, f):
    i = state.mate[f]
    state.mate[f] = -1
    state.lead[i] = i
    state.lead[facts.weight[i]] = facts.weight[i]
    state.dur[f] = facts.dur[f]
    state.waits[f] = facts.waits[f]
    state.alloc[f] = facts.alloc[f]
    state.free[f] = facts.free[f]
    state.work[f] = facts.work[f]
    state.cls[f] = facts.cls[f]


@kernel
def install(facts, state, k, row, mates, size):
    """Make ``row`` with its mates machine k's order."""
    for p in range(state.length[k]):
        if state.mate[state.seq[k, p]] >= 0:
            part_pair(facts, state, state.seq[k, p])
    for p in range(size):
        state.seq[k, p] = row[p]
        if mates[p] >= 0:
            join(facts, state, row[p], mates[p])
    state.length[k] = size


@kernel
def member(facts, state, n, part):
    """The node of a token: 0 itself (the F of a pair), 1 the I, 2 the W."""
    if part == 0:
        return n
    return state.mate[n] if part == 1 else facts.weight[state.mate[n]]


@kernel
def times(facts, state, start, waits, follow, queue):
    """Earliest starts of all tokens into ``start``; the makespan, or -1 for a deadlock."""
    total = 0
    last = 0
    for k in range(state.seq.shape[0]):
        total += state.length[k]
        for p in range(state.length[k]):
            n = state.seq[k, p]
            start[n] = 0
            waits[n] = state.waits[n] + (p > 0)
            follow[n] = state.seq[k, p + 1] if p + 1 < state.length[k] else -1
            if waits[n] == 0:
                queue[last] = n
                last += 1
    at = 0
    makespan = 0
    while at < last:
        n = queue[at]
        at += 1
        end = start[n] + state.dur[n]
        makespan = max(makespan, end)
        for part in range(3 if state.mate[n] >= 0 else 1):
            m = member(facts, state, n, part)
            for e in range(facts.succ_ptr[m], facts.succ_ptr[m + 1]):
                s = state.lead[facts.succ[e]]
                if s == n:
                    continue
                start[s] = max(start[s], end + facts.lag[e])
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
    return makespan if last == total else -1
