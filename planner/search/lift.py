"""From orders of the compute actions alone back to a whole problem: collectives take turns by urgency.

The compute orders stay. A clock runs over the step, and a collective stream that is free takes, of what is ready, the
action with the longest path to the end of the step (along the compute orders, collectives never waiting). Putting them
into the order in which they would be ready without each other costs more.
"""

from __future__ import annotations

import heapq
from itertools import pairwise

import numpy as np

from mipipe.planner.actions import Stream
from mipipe.planner.jobs import paths
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.search.orders import Orders, timed


def lift(instance: Instance, small: Instance, orders: Orders) -> Orders | None:
    """The whole instance's orders from ``orders`` of the compute actions alone (``small``); None if they deadlock."""
    node_of = {int(origin): n for n, origin in enumerate(instance.origin)}
    whole = [node_of[int(origin)] for origin in small.origin]
    length = instance.lengths()
    seq = np.full((instance.num_machines, int(length.max())), -1, dtype=np.int64)
    for row, k in enumerate(k for k, (_, stream) in enumerate(instance.machine_key) if stream is Stream.COMPUTE):
        seq[k, :length[k]] = [whole[n] for n in orders.seq[row, :orders.length[row]]]
    for k, served in _serve(instance, seq, length, _urgency(instance, small, orders, whole)).items():
        if len(served) < length[k]:
            return None
        seq[k, :length[k]] = served
    return timed(instance, seq, length)


def _urgency(instance: Instance, small: Instance, orders: Orders, whole: list[int]) -> list[int]:
    """For every node of the whole instance its longest path to the end, collectives never waiting for each other."""
    count = small.size
    back = np.full_like(orders.seq, -1)
    for row, size in enumerate(orders.length):
        back[row, :size] = orders.seq[row, :size][::-1]
    after = np.zeros(count, dtype=np.int64)
    paths.times(back, orders.length, small.dur, small.pred_ptr, small.pred, small.pred_lag, np.diff(small.succ_ptr),
                  after, *(np.zeros(count, dtype=np.int64) for _ in range(3)))
    known = dict(zip(whole, (after + small.dur).tolist(), strict=True))
    dur, succ, lag, pointer = (array.tolist() for array in (instance.dur, instance.succ, instance.lag,
                                                            instance.succ_ptr))

    def path(n: int) -> int:
        if n not in known:
            known[n] = dur[n] + max((lag[e] + path(succ[e]) for e in range(pointer[n], pointer[n + 1])), default=0)
        return known[n]

    return [path(n) for n in range(instance.size)]


def _serve(instance: Instance, seq: np.ndarray, length: np.ndarray, urgency: list[int]) -> dict[int, list[int]]:
    """The order of every collective machine under the compute orders of ``seq``; shorter than it should be where the
    compute orders deadlock."""
    free_at = {k: 0 for k, (_, stream) in enumerate(instance.machine_key) if stream is not Stream.COMPUTE}
    served: dict[int, list[int]] = {k: [] for k in free_at}
    queues: dict[int, list[tuple[int, int]]] = {k: [] for k in free_at}
    machine, dur, succ, lag, pointer = (array.tolist() for array in (
        instance.machine, instance.dur, instance.succ, instance.lag, instance.succ_ptr))
    waits = instance.waits.tolist()
    follow: dict[int, int] = {}
    for k in range(instance.num_machines):
        if k not in free_at:
            row = seq[k, :length[k]].tolist()
            follow.update(pairwise(row))
            for n in row[1:]:
                waits[n] += 1
    ready = [0] * instance.size
    # (moment, 0, node): a node becomes ready; (moment, 1, machine): a collective machine looks for work
    events = [(0, 0, n) for n in range(instance.size) if not waits[n]]
    heapq.heapify(events)

    def finish(n: int, end: int) -> None:
        others = [(succ[e], end + lag[e]) for e in range(pointer[n], pointer[n + 1])]
        if n in follow:
            others.append((follow[n], end))
        for other, moment in others:
            ready[other] = max(ready[other], moment)
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(events, (ready[other], 0, other))

    while events:
        now, what, n = heapq.heappop(events)
        if what == 0 and machine[n] not in free_at:
            finish(n, now + dur[n])
        elif what == 0:
            heapq.heappush(queues[machine[n]], (-urgency[n], n))
            heapq.heappush(events, (max(now, free_at[machine[n]]), 1, machine[n]))
        elif queues[n] and free_at[n] <= now:
            _, chosen = heapq.heappop(queues[n])
            served[n].append(chosen)
            free_at[n] = now + dur[chosen]
            finish(chosen, free_at[n])
            heapq.heappush(events, (free_at[n], 1, n))
    return served
