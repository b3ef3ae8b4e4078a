"""Following given moments, compiled by numba: the kernel of `mipipe.planner.search.follow`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

_FAR = 1 << 62
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


@njit(cache=True, nogil=True)
def owners(machine, rank, base, num_machines):
    """Per machine its classes, ``owned[ptr[k]:ptr[k + 1]]``, and its rank."""
    class_machine = machine[base[:-1]]
    ptr = np.zeros(num_machines + 1, np.int64)
    ptr[1:] = np.cumsum(np.bincount(class_machine, minlength=num_machines))
    owned = np.argsort(class_machine, kind="mergesort")
    machine_rank = np.zeros(num_machines, np.int64)
    for n in range(machine.shape[0]):
        machine_rank[machine[n]] = rank[n]
    return ptr, owned, machine_rank


@njit(cache=True, nogil=True)
def hand_on(facts, n, end, ready, waits, dirty):
    """Note the end of a node at what waits for it; machines whose nodes wait no longer look again."""
    for e in range(facts.succ_ptr[n], facts.succ_ptr[n + 1]):
        s = facts.succ[e]
        ready[s] = max(ready[s], end + facts.lag[e])
        waits[s] -= 1
        if waits[s] == 0:
            dirty[facts.machine[s]] = True


@njit(cache=True, nogil=True)
def follow(facts, task, seq, start):
    """Fill ``seq`` and ``start`` by list scheduling that memory cannot block; the makespan, or -1 if it does.

    The machine that can start first takes, of the heads of its classes that could start within ``patience`` of that
    moment, the one of smallest priority. A node that takes memory starts only when it fits and all such nodes before
    it in the given order still fit at their own places (`mipipe.planner.milp.periodic.unroll` has the argument); -1
    only where the given order itself breaks the memory.
    """
    machine, rank, dur, base = facts.machine, facts.rank, facts.dur, facts.base
    alloc, free, work = facts.alloc, facts.free, facts.work
    prio, place, slack_ptr, slack = task.prio, task.place, task.slack_ptr, task.slack.copy()
    count, num_machines, num_classes = dur.shape[0], seq.shape[0], base.shape[0] - 1
    waits = facts.waits.copy()
    ready = np.zeros(count, np.int64)
    nxt = base[:num_classes].copy()
    ptr, owned, machine_rank = owners(machine, rank, base, num_machines)
    room = facts.cap.copy()
    first = slack_ptr[:-1].copy()
    started = np.zeros(slack.shape[0], np.bool_)
    free_at = np.zeros(num_machines, np.int64)
    length = np.zeros(num_machines, np.int64)
    best_time = np.full(num_machines, -1, np.int64)
    best_class = np.full(num_machines, -1, np.int64)
    dirty = np.ones(num_machines, np.bool_)
    makespan = 0
    for _ in range(count):
        chosen, chosen_time = -1, _FAR
        for k in range(num_machines):
            if dirty[k]:
                dirty[k] = False
                best_class[k] = -1
                earliest = _FAR
                for turn in range(2):
                    best_prio = np.inf
                    for index in range(ptr[k], ptr[k + 1]):
                        c = owned[index]
                        n = nxt[c]
                        if n >= base[c + 1] or waits[n] > 0:
                            continue
                        time = max(free_at[k], ready[n])
                        if turn == 0 and time >= earliest:
                            continue
                        if turn == 1 and (time > earliest + task.patience or prio[n] >= best_prio):
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
                            best_class[k] = c
                            best_time[k] = time
                    if earliest == _FAR:
                        break
            if best_class[k] >= 0 and best_time[k] < chosen_time:
                chosen, chosen_time = k, best_time[k]
        if chosen < 0:
            return -1
        c = best_class[chosen]
        n = nxt[c]
        nxt[c] += 1
        r = rank[n]
        start[n] = chosen_time
        end = chosen_time + dur[n]
        makespan = max(makespan, end)
        seq[chosen, length[chosen]] = n
        length[chosen] += 1
        free_at[chosen] = end
        room[r] -= alloc[n] - free[n]
        if place[n] >= 0:
            at = slack_ptr[r] + place[n]
            for other in range(first[r], at):
                slack[other] -= alloc[n]
            started[at] = True
            while first[r] < slack_ptr[r + 1] and started[first[r]]:
                first[r] += 1
        for other in range(num_machines):
            if machine_rank[other] == r:
                dirty[other] = True
        hand_on(facts, n, end, ready, waits, dirty)
    return makespan


@njit(cache=True, nogil=True)
def fill(facts, rows, row_length, filler, patience, seq, start):
    """Fill ``seq`` and ``start``: machine k runs ``rows[k, :row_length[k]]`` in this order and ``filler`` nodes, in the
    order of their classes, between them; the makespan, or -1 if memory or the order blocks it.

    A filler runs where the next of the row cannot start within its ``patience`` (ns, per node), or not for want of
    memory.
    """
    machine, rank, dur, base = facts.machine, facts.rank, facts.dur, facts.base
    alloc, free, work = facts.alloc, facts.free, facts.work
    count, num_machines, num_classes = dur.shape[0], seq.shape[0], base.shape[0] - 1
    waits = facts.waits.copy()
    ready = np.zeros(count, np.int64)
    nxt = base[:num_classes].copy()
    ptr, owned, machine_rank = owners(machine, rank, base, num_machines)
    room = facts.cap.copy()
    at = np.zeros(num_machines, np.int64)
    free_at = np.zeros(num_machines, np.int64)
    length = np.zeros(num_machines, np.int64)
    best_time = np.full(num_machines, -1, np.int64)
    best_class = np.full(num_machines, -1, np.int64)
    best_node = np.full(num_machines, -1, np.int64)
    dirty = np.ones(num_machines, np.bool_)
    makespan = 0
    for _ in range(count):
        chosen, chosen_time = -1, _FAR
        for k in range(num_machines):
            if dirty[k]:
                dirty[k] = False
                best_node[k], best_class[k], best_time[k] = -1, -1, _FAR
                if at[k] < row_length[k]:
                    n = rows[k, at[k]]
                    if waits[n] == 0 and alloc[n] + work[n] <= room[rank[n]]:
                        best_node[k], best_time[k] = n, max(free_at[k], ready[n])
                best, first_ready = best_time[k], _FAR
                if best_node[k] >= 0:
                    best -= patience[best_node[k]]
                for index in range(ptr[k], ptr[k + 1]):
                    c = owned[index]
                    n = nxt[c]
                    if n >= base[c + 1] or not filler[n] or waits[n] > 0 or alloc[n] + work[n] > room[rank[n]]:
                        continue
                    time = max(free_at[k], ready[n])
                    if time < best or (best_class[k] >= 0 and time == best and ready[n] < first_ready):
                        best, first_ready = time, ready[n]
                        best_node[k], best_time[k], best_class[k] = n, time, c
            if best_node[k] >= 0 and best_time[k] < chosen_time:
                chosen, chosen_time = k, best_time[k]
        if chosen < 0:
            return -1
        n = best_node[chosen]
        if best_class[chosen] >= 0:
            nxt[best_class[chosen]] += 1
        else:
            at[chosen] += 1
        r = rank[n]
        start[n] = chosen_time
        end = chosen_time + dur[n]
        makespan = max(makespan, end)
        seq[chosen, length[chosen]] = n
        length[chosen] += 1
        free_at[chosen] = end
        room[r] -= alloc[n] - free[n]
        for other in range(num_machines):
            if machine_rank[other] == r:
                dirty[other] = True
        hand_on(facts, n, end, ready, waits, dirty)
    return makespan
