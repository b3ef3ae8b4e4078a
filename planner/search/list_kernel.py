"""List scheduling, compiled by numba: the kernel of `mipipe.planner.search.lists`. See `mipipe.planner.jobs.paths`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mipipe.planner.kernel import kernel
from mipipe.planner.search.list_steps import first_to_start, fresh, passed_over, run
from mipipe.planner.sizes import NEVER_NS


class ListTask(NamedTuple):
    """What a rule says: per node whether it ``holds`` memory for later (forwards, first or again), whether it is a
    ``weight`` gradient, and its priority ``prio``; ``delay`` in nanoseconds, ``limit`` of the ``microbatches``."""

    holds: np.ndarray
    weight: np.ndarray
    prio: np.ndarray
    delay: int
    limit: int
    microbatches: int


@kernel
def list_schedule(facts, task, seq, start):
    """Fill ``seq`` and ``start`` by list scheduling; the makespan, or -1 if memory blocks everything.

    At every step the machine that can start first takes, of the actions it could start within ``delay`` of that moment,
    the one with the smallest ``prio``. An action that takes memory starts only if afterwards the microbatches already
    under way could still be finished one after the other, oldest first (the banker's rule of Dijkstra, 1965): so memory
    never deadlocks the schedule. Within one microbatch the rest of its forwards must fit together; a gradient that
    takes more than it returns may always run for the oldest, whose weight gradient returns it all. At most ``limit``
    microbatches are between their first action and their last that is no ``weight`` gradient.

    ``facts``: `mipipe.planner.jobs.arrays.FixedArrays`; ``task``: `ListTask`.
    """
    rank, microbatch, base, cls = facts.rank, facts.microbatch, facts.base, facts.cls
    alloc, free, work, cap = facts.alloc, facts.free, facts.work, facts.cap
    holds, weight, prio, delay, limit, num_micro = (task.holds, task.weight, task.prio, task.delay, task.limit,
                                                    task.microbatches)
    count, num_machines, num_ranks = rank.shape[0], seq.shape[0], cap.shape[0]
    state = fresh(facts, num_machines)
    need = np.zeros((num_ranks, num_micro), np.int64)
    held = np.zeros((num_ranks, num_micro), np.int64)
    extra = np.zeros((num_ranks, num_micro), np.int64)
    left = np.zeros((num_ranks, num_micro), np.int64)
    for n in range(count):
        if holds[n]:
            need[rank[n], microbatch[n]] += alloc[n]
        left[rank[n], microbatch[n]] += 1
        extra[rank[n], microbatch[n]] = max(extra[rank[n], microbatch[n]], work[n] + (0 if holds[n] else alloc[n]))
    used = np.zeros(num_ranks, np.int64)
    last_free = np.zeros(num_machines, np.int64)
    admitted = np.zeros(num_micro, np.int64)
    in_list = np.zeros(num_micro, np.bool_)
    todo = np.zeros(num_micro, np.int64)
    core = np.zeros(num_micro, np.int64)
    for n in range(count):
        todo[microbatch[n]] += 1
        if not weight[n]:
            core[microbatch[n]] += 1
    # microbatches enter in the order in which shared classes run them: the oldest never waits for a younger one
    earlier = np.zeros(num_micro, np.int64)
    for c in range(base.shape[0] - 1):
        for n in range(base[c], base[c + 1]):
            if n > base[c] and microbatch[n - 1] < microbatch[n]:
                earlier[microbatch[n]] += 1
    # nodes of each microbatch: nodes[owns[m]:owns[m + 1]]
    owns = np.zeros(num_micro + 1, np.int64)
    owns[1:] = np.cumsum(np.bincount(microbatch, minlength=num_micro))
    nodes = np.argsort(microbatch, kind="mergesort")
    num_admitted = 0
    flying = 0
    full = False
    makespan = 0
    for _ in range(count):
        for k in range(num_machines):
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
                    if passed_over(turn, time, earliest, delay, prio[n], best_prio):
                        continue
                    if flying >= limit and not in_list[microbatch[n]]:
                        full = True
                        continue
                    if earlier[microbatch[n]] > 0:
                        continue
                    r = rank[n]
                    pending = 0
                    pending_until = 0
                    for other in range(num_machines):
                        if other != k and state.rank[other] == r and state.free_at[other] > time:
                            pending += last_free[other]
                            pending_until = max(pending_until, state.free_at[other])
                    room = cap[r] - used[r] - alloc[n] - work[n]
                    if room < 0:
                        continue
                    if room < pending:
                        time = max(time, pending_until)
                        if passed_over(turn, time, earliest, delay, prio[n], best_prio):
                            continue
                    if alloc[n] > 0:
                        m = microbatch[n]
                        own = alloc[n] if holds[n] else 0
                        room = cap[r] - used[r] - alloc[n] + free[n]
                        safe = True
                        new = not in_list[m]
                        for slot in range(num_admitted + 1):
                            if slot == num_admitted:
                                if not new:
                                    break
                                q = m
                            else:
                                q = admitted[slot]
                            short = need[r, q] + extra[r, q] - (own if q == m else 0)
                            if left[r, q] > 0 and short > room:
                                safe = False
                                break
                            room += held[r, q] + (alloc[n] - free[n] if q == m else 0)
                        oldest = num_admitted > 0 and admitted[0] == m and (not holds[n] or num_admitted == 1)
                        if not safe and num_admitted > 0 and not oldest:
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
        m = microbatch[n]
        last_free[chosen] = free[n]
        used[r] += alloc[n] - free[n]
        held[r, m] += alloc[n] - free[n]
        if holds[n]:
            need[r, m] -= alloc[n]
        if not in_list[m]:
            in_list[m] = True
            admitted[num_admitted] = m
            num_admitted += 1
            flying += 1
            for index in range(owns[m], owns[m + 1]):
                later = nodes[index] + 1
                if later < base[cls[nodes[index]] + 1] and microbatch[later] > m:
                    earlier[microbatch[later]] -= 1
            state.dirty[:] = True  # what others had chosen may not be safe any more
        left[r, m] -= 1
        todo[m] -= 1
        if not weight[n]:
            core[m] -= 1
            if core[m] == 0:
                flying -= 1
                if full:
                    state.dirty[:] = True
                    full = False
        if todo[m] == 0:
            at = 0
            for slot in range(num_admitted):
                if admitted[slot] != m:
                    admitted[at] = admitted[slot]
                    at += 1
            num_admitted = at
            state.dirty[:] = True  # another microbatch is now the oldest
    return makespan
