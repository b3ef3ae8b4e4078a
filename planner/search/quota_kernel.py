"""List scheduling under quotas, compiled by numba: the kernel of `mipipe.planner.search.quotas`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mipipe.planner.kernel import kernel
from mipipe.planner.sizes import NEVER_NS


class QuotaTask(NamedTuple):
    """Per machine ``cap`` bytes and its classes, ``class_list[class_ptr[k]:class_ptr[k + 1]]``; per class its ``line``,
    what it is to it, and the ``offset`` of its priority; per line ``quota`` and ``ramp``; per node its ``place``."""

    class_ptr: np.ndarray
    class_list: np.ndarray
    line: np.ndarray
    enters: np.ndarray
    leaves: np.ndarray
    filler: np.ndarray
    place: np.ndarray
    cap: np.ndarray
    quota: np.ndarray
    ramp: np.ndarray
    offset: np.ndarray
    age: float
    delay: int
    in_turn: bool


@kernel
def quota_schedule(facts, task, seq, start):
    """Fill ``seq`` and ``start``; the makespan, or -1 if quotas and memory block everything.

    A clock runs; a machine that is free takes, of the heads of its classes that are ready and within quota and memory,
    the one with the smallest ``offset[class] + age * place[n]``. Where only ``filler`` actions are ready, it waits for
    another one that comes within ``delay``. ``quota[line[c]]`` is the most microbatches between the start of an
    action of an ``enters`` class and the end of one of a ``leaves`` class of the line (a stage on a rank); before the
    first one has left, it is ``ramp``. With ``in_turn`` actions of ``enters`` classes that take memory never overtake
    each other on a machine: then no order whose values would fit the memory is blocked by what comes early.

    ``facts``: `mipipe.planner.jobs.arrays.FixedArrays`, one machine per rank; ``task``: `QuotaTask`.
    """
    machine, dur, base, cls = facts.machine, facts.dur, facts.base, facts.cls
    succ_ptr, succ, lag = facts.succ_ptr, facts.succ, facts.lag
    alloc, free, work, cap = facts.alloc, facts.free, facts.work, task.cap
    class_ptr, class_list, line = task.class_ptr, task.class_list, task.line
    enters, leaves, filler, place = task.enters, task.leaves, task.filler, task.place
    quota, ramp, offset = task.quota, task.ramp, task.offset
    age, delay, in_turn = task.age, task.delay, task.in_turn
    count = dur.shape[0]
    machines = class_ptr.shape[0] - 1
    waits = facts.waits.copy()
    ready = np.zeros(count, np.int64)
    nxt = base[:-1].copy()
    flying = np.zeros(quota.shape[0], np.int64)
    left = np.zeros(quota.shape[0], np.bool_)
    used = np.zeros(machines, np.int64)
    free_at = np.zeros(machines, np.int64)
    length = np.zeros(machines, np.int64)
    wake = np.zeros(machines, np.int64)
    done = 0
    makespan = 0
    while done < count:
        k = 0
        now = wake[0]
        for other in range(1, machines):
            if wake[other] < now:
                now = wake[other]
                k = other
        if now >= NEVER_NS:
            return -1
        chosen = -1
        urgency = np.inf
        only_filler = True
        later = NEVER_NS
        turn = np.inf
        if in_turn:
            for index in range(class_ptr[k], class_ptr[k + 1]):
                c = class_list[index]
                if enters[c] and nxt[c] < base[c + 1] and alloc[nxt[c]] > 0:
                    turn = min(turn, offset[c] + age * place[nxt[c]])
        for index in range(class_ptr[k], class_ptr[k + 1]):
            c = class_list[index]
            n = nxt[c]
            if n >= base[c + 1] or waits[n] > 0:
                continue
            if enters[c] and alloc[n] > 0 and offset[c] + age * place[n] > turn:
                continue
            if enters[c] and flying[line[c]] >= (quota[line[c]] if left[line[c]] else ramp[line[c]]):
                continue
            if used[k] + alloc[n] + work[n] > cap[k]:
                continue
            if ready[n] > now:
                later = min(later, ready[n])
                continue
            value = offset[c] + age * place[n]
            if value < urgency:
                urgency = value
                chosen = n
                only_filler = filler[c]
        if chosen < 0 or (only_filler and later <= now + delay):
            wake[k] = later
            continue
        n = chosen
        c = cls[n]
        end = now + dur[n]
        start[n] = now
        seq[k, length[k]] = n
        length[k] += 1
        nxt[c] += 1
        free_at[k] = end
        wake[k] = end
        used[k] += alloc[n] - free[n]
        if enters[c]:
            flying[line[c]] += 1
        if leaves[c]:
            flying[line[c]] -= 1
            left[line[c]] = True
        makespan = max(makespan, end)
        done += 1
        for e in range(succ_ptr[n], succ_ptr[n + 1]):
            s = succ[e]
            ready[s] = max(ready[s], end + lag[e])
            waits[s] -= 1
            if waits[s] == 0:
                q = machine[s]
                wake[q] = min(wake[q], max(free_at[q], ready[s]))
    return makespan
