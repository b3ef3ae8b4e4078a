"""Following given moments, compiled by numba: the kernel of `mipipe.planner.search.follow`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mipipe.planner.kernel import kernel
from mipipe.planner.search.list_steps import first_to_start, fresh, passed_over, run
from mipipe.planner.sizes import NEVER_NS

AHEAD = 128
"""How many places an action that takes memory may overtake in its rank's given order."""


class FollowTask(NamedTuple):
    """Per node its priority ``prio`` (smallest first) and, among the nodes of its rank that take memory, its ``place``
    (-1: takes none) in the order that is followed; ``slack``: per rank (from ``slack_ptr``) and place the bytes that
    remain free there; a machine waits up to ``patience`` nanoseconds for a smaller priority."""

    prio: np.ndarray
    place: np.ndarray
    slack_ptr: np.ndarray
    slack: np.ndarray
    patience: int


@kernel
def follow(facts, task, seq, start):
    """Fill ``seq`` and ``start`` by list scheduling that memory cannot block; the makespan, or -1 if it does.

    The machine that can start first takes, of the heads of its classes that could start within ``patience`` of that
    moment, the one of smallest priority. A node that takes memory starts only when it fits and all such nodes before
    it in the given order still fit at their own places; all others may come early. So memory never blocks the list: of
    the nodes not yet run the first in the given order can always run, since its predecessors are done, and if it takes
    memory, at least the frees before it in that order are done and what came early has left its room. -1 only where
    the given order itself breaks the memory.
    """
    rank, base, alloc, free, work = facts.rank, facts.base, facts.alloc, facts.free, facts.work
    prio, place, slack_ptr, slack = task.prio, task.place, task.slack_ptr, task.slack.copy()
    state = fresh(facts, seq.shape[0])
    room = facts.cap.copy()
    first = slack_ptr[:-1].copy()
    started = np.zeros(slack.shape[0], np.bool_)
    makespan = 0
    for _ in range(rank.shape[0]):
        for k in range(seq.shape[0]):
            if not state.dirty[k]:
                continue
            state.dirty[k] = False
            state.best_node[k] = -1
            earliest = NEVER_NS
            for turn in range(2):
                best_prio = np.inf
                for index in range(state.ptr[k], state.ptr[k + 1]):
                    c = state.owned[index]
                    n = state.head[c]
                    if n >= base[c + 1] or state.waits[n] > 0:
                        continue
                    time = max(state.free_at[k], state.ready[n])
                    if passed_over(turn, time, earliest, task.patience, prio[n], best_prio):
                        continue
                    if place[n] >= 0:
                        r = rank[n]
                        at = slack_ptr[r] + place[n]
                        if alloc[n] + work[n] > room[r] or at > first[r] + AHEAD:
                            continue
                        fits = True
                        for other in range(first[r], at):
                            if not started[other] and slack[other] < alloc[n]:
                                fits = False
                                break
                        if not fits:
                            continue
                    if turn == 0:
                        earliest = time
                    else:
                        best_prio = prio[n]
                        state.best_node[k], state.best_class[k], state.best_time[k] = n, c, time
                if earliest == NEVER_NS:
                    break
        chosen = first_to_start(state)
        if chosen < 0:
            return -1
        n = state.best_node[chosen]
        makespan = max(makespan, run(facts, state, chosen, seq, start))
        r = rank[n]
        room[r] -= alloc[n] - free[n]
        if place[n] >= 0:
            at = slack_ptr[r] + place[n]
            for other in range(first[r], at):
                slack[other] -= alloc[n]
            started[at] = True
            while first[r] < slack_ptr[r + 1] and started[first[r]]:
                first[r] += 1
    return makespan


@kernel
def fill(facts, rows, row_length, filler, patience, seq, start):
    """Fill ``seq`` and ``start``: machine k runs ``rows[k, :row_length[k]]`` in this order and ``filler`` nodes, in the
    order of their classes, between them; the makespan, or -1 if memory or the order blocks it.

    A filler runs where the next of the row cannot start within its ``patience`` (ns, per node), or not for want of
    memory.
    """
    rank, base, alloc, free, work = facts.rank, facts.base, facts.alloc, facts.free, facts.work
    state = fresh(facts, seq.shape[0])
    room = facts.cap.copy()
    at = np.zeros(seq.shape[0], np.int64)
    makespan = 0
    for _ in range(rank.shape[0]):
        for k in range(seq.shape[0]):
            if not state.dirty[k]:
                continue
            state.dirty[k] = False
            node, cls, start_at = -1, -1, NEVER_NS
            if at[k] < row_length[k]:
                n = rows[k, at[k]]
                if state.waits[n] == 0 and alloc[n] + work[n] <= room[rank[n]]:
                    node, start_at = n, max(state.free_at[k], state.ready[n])
            best, first_ready = start_at, NEVER_NS
            if node >= 0:
                best -= patience[node]
            for index in range(state.ptr[k], state.ptr[k + 1]):
                c = state.owned[index]
                n = state.head[c]
                if n >= base[c + 1] or not filler[n] or state.waits[n] > 0 or alloc[n] + work[n] > room[rank[n]]:
                    continue
                time = max(state.free_at[k], state.ready[n])
                if time < best or (cls >= 0 and time == best and state.ready[n] < first_ready):
                    best, first_ready = time, state.ready[n]
                    node, cls, start_at = n, c, time
            state.best_node[k], state.best_class[k], state.best_time[k] = node, cls, start_at
        chosen = first_to_start(state)
        if chosen < 0:
            return -1
        n = state.best_node[chosen]
        if state.best_class[chosen] < 0:
            at[chosen] += 1
        makespan = max(makespan, run(facts, state, chosen, seq, start))
        room[rank[n]] -= alloc[n] - free[n]
    return makespan
