"""The checker's clock by arrays: when everything happens under a plan's order, as `mipipe.planner.check.times` has it.

A transfer is ready when its producer ends; a channel serves transfers in the order in which they become ready, the
next as soon as the bytes of the one before are through. No code is shared with the planner's own clock.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from mipipe.planner.check.facts import Demands
from mipipe.planner.kernel import kernel


@dataclass(frozen=True, slots=True)
class ArrayTimes:
    """Start and end of every action, what is held of values in flight as columns (rank, from, to, bytes), the end of
    everything."""

    start: np.ndarray
    end: np.ndarray
    in_flight: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    makespan_ns: int


def run_clock(facts: Demands, rank: np.ndarray, lane: np.ndarray, duration: np.ndarray, doer: np.ndarray,
              flows: np.ndarray, followings: np.ndarray) -> ArrayTimes | None:
    """The times of actions that are numbered by rank, stream and position; None where they wait for each other.

    Args:
        facts: of the plan.
        rank, lane, duration: of every action; lane 1 is the collective stream.
        doer: the action of every part.
        flows: (maker, reader, bytes) in three rows; maker and reader are parts.
        followings: (part, the part that waits for it in its stage) in two rows.
    """
    topology, size = facts.plan.problem.topology, len(rank)
    maker, reader = doer[flows[0]], doer[flows[1]]
    apart = maker != reader
    maker, reader, amount = maker[apart], reader[apart], flows[2][apart]
    here, there = rank[maker], rank[reader]
    sizes, of_size = np.unique(amount, return_inverse=True)
    keys, which = np.unique((here * topology.num_devices + there) * len(sizes) + of_size, return_inverse=True)
    ways = [(*divmod(key // len(sizes), topology.num_devices), int(sizes[key % len(sizes)])) for key in keys.tolist()]
    lasts = np.array([topology.transfer_ns(*way) for way in ways], dtype=np.int64)
    latency = np.array([0 if a == b else topology.link(a, b).latency_ns for a, b, _ in ways], dtype=np.int64)
    local = doer[followings]
    local = local[:, local[0] != local[1]]
    same = np.flatnonzero((rank[1:] == rank[:-1]) & (lane[1:] == lane[:-1]))
    local = np.concatenate([local, np.stack([same, same + 1])], axis=1)
    waits = np.bincount(np.concatenate([reader, local[1]]), minlength=size)
    by_maker, by_first = np.argsort(maker, kind="stable"), np.argsort(local[0], kind="stable")
    start, end, moved = np.zeros(size, np.int64), np.full(size, -1, dtype=np.int64), np.zeros((2, len(maker)), np.int64)
    if len(duration) and not _run(duration, waits, _pointers(maker, size), by_maker, reader, here != there,
                                  here * topology.num_devices + there, lasts[which], latency[which],
                                  _pointers(local[0], size), local[1][by_first],
                                  np.zeros(topology.num_devices ** 2, np.int64), start, end, moved):
        return None
    away = here != there
    posted = _posted(rank, lane, end, there, moved[0], away)
    made, taken = end[maker], start[reader]
    in_flight = [(here, made, np.where(away, moved[1], taken), amount),
                 (there[away], posted[away], taken[away], amount[away])]
    return ArrayTimes(start, end, in_flight, max(int(moved[1].max(initial=0)), _end(facts, rank, lane, end, doer)))


def _pointers(first: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(first, minlength=size))])


@kernel
def _run(duration, waits, flow_ptr, by_maker, reader, away, channel, lasts, latency, next_ptr, following, free, start,
         end, moved):
    """Let everything happen as early as it can; False where some actions wait for each other."""
    size = duration.shape[0]
    coming = [(0, 0) for _ in range(0)]
    for n in range(size):
        if waits[n] == 0:
            heapq.heappush(coming, (duration[n], n))
    ended = 0
    while len(coming) > 0:
        now, n = heapq.heappop(coming)
        end[n] = now
        ended += 1
        for place in range(flow_ptr[n], flow_ptr[n + 1]):
            flow = by_maker[place]
            there = now
            if away[flow]:
                begin = max(now, free[channel[flow]])
                there = begin + lasts[flow]
                moved[0, flow], moved[1, flow] = begin, there
                free[channel[flow]] = there - latency[flow]
            other = reader[flow]
            start[other] = max(start[other], there)
            waits[other] -= 1
            if waits[other] == 0:
                heapq.heappush(coming, (start[other] + duration[other], other))
        for place in range(next_ptr[n], next_ptr[n + 1]):
            other = following[place]
            start[other] = max(start[other], now)
            waits[other] -= 1
            if waits[other] == 0:
                heapq.heappush(coming, (start[other] + duration[other], other))
    return ended == size


def _posted(rank: np.ndarray, lane: np.ndarray, end: np.ndarray, target: np.ndarray, begin: np.ndarray,
            away: np.ndarray) -> np.ndarray:
    """When receives are posted: at the end of the reader's last compute action that ended by the transfer's start."""
    found = np.zeros(len(begin), dtype=np.int64)
    for receiver in np.unique(target[away]).tolist():
        mine = away & (target == receiver)
        ends = end[(rank == receiver) & (lane == 0)]
        before = np.searchsorted(ends, begin[mine], side="right")
        found[mine] = np.concatenate([[0], ends])[before]
    return found


def _end(facts: Demands, rank: np.ndarray, lane: np.ndarray, end: np.ndarray, doer: np.ndarray) -> int:
    """When all actions, reductions and updates are over."""
    placement, count = facts.plan.placement, facts.plan.problem.num_microbatches
    last = [[int(end[(rank == r) & on].max(initial=0)) for on in (lane >= 0, lane == 1)]
            for r in range(facts.plan.problem.num_ranks)]
    weights = doer.reshape(4, -1, count)[-1]  # the last kind of parts
    ready = sorted((int(end[weights[stage]].max()), stage) for stage in facts.reduced_stages())
    for moment, stage in ready:
        members = placement.stages[stage].ranks
        begin = max(moment, *(last[member][1] for member in members))
        for member in members:
            last[member][1] = begin + facts.reduce_ns(stage)
    return max(max(ends) + facts.update_ns(r) for r, ends in enumerate(last))
