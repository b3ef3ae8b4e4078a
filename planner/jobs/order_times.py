"""From an order to its times by arrays: what `mipipe.planner.jobs.times` does, for hundreds of thousands of actions.

The rules, and the ties, are those of that module, which says them; a test holds the two together. Nothing here loops
over actions in Python. Who reads a thousand times the same actions in other orders (the order MIPs, the windows) works
on that module's lists.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mipipe.planner import clock
from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.action_arrays import ActionArrays
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.kernel import kernel
from mipipe.planner.sizes import COMPILED


@dataclass(frozen=True, eq=False)
class OrderTimes:
    """Start of every action, and begin and end of every value's transfer (within a rank: when it was made, twice);
    the sums of gradients as (stage, start, end); the end of every rank's work, updates included."""

    actions: ActionArrays
    start: np.ndarray
    begin: np.ndarray
    over: np.ndarray
    reductions: list[tuple[int, int, int]]
    ends: np.ndarray

    @cached_property
    def end(self) -> np.ndarray:
        return self.start + self.actions.dur

    @property
    def makespan_ns(self) -> int:
        """Where nothing is reduced or updated, the end of the last action."""
        return int(max(self.end.max(initial=0), self.ends.max(initial=0)))

    @cached_property
    def moved(self) -> np.ndarray:
        """Whether a value goes to another rank."""
        return self.actions.value["channel"] >= 0

    def part_times(self) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of every part of the actions."""
        return self.start[self.actions.doer], self.end[self.actions.doer]


def times_of(actions: ActionArrays, since: np.ndarray | None = None,
             free: np.ndarray | None = None) -> OrderTimes | None:
    """The times of a schedule; None on a deadlock.

    ``since``: no rank begins before its moment here; ``free``: when each channel is free, which is kept up to date.
    """
    clock.ask()
    begin = np.zeros(actions.size, dtype=np.int64) if since is None else since[actions.rank]
    if free is None:
        free = no_channel_used(actions.view)
    follow = actions.follow
    waits = np.bincount(actions.reader, minlength=actions.size) + np.bincount(follow[follow >= 0],
                                                                              minlength=actions.size)
    made = np.zeros(len(actions.value["channel"]), dtype=np.int64)
    over = made.copy()
    chosen = _run if actions.size >= COMPILED else _run.py_func
    value = actions.value
    done = chosen(actions.dur, follow, waits, actions.ptr, actions.reader, actions.carried, value["channel"],
                  value["took"], value["occupied"], free, begin, made, over)
    if done < actions.size:
        return None
    return OrderTimes(actions, begin, made, over, *_finish(actions, begin))


def no_channel_used(view: StageView) -> np.ndarray:
    """When every channel is free at the beginning: at once."""
    return np.zeros(view.problem.topology.num_devices ** 2, dtype=np.int64)


@kernel
def _run(dur, follow, waits, ptr, reader, carried, channel, took, occupied, free, start, begin, over):
    """Run all actions, the earliest end first, into ``start``, ``begin`` and ``over``; how many could run."""
    heap = [(0, 0) for _ in range(0)]
    for n in range(dur.shape[0]):
        if waits[n] == 0:
            heapq.heappush(heap, (start[n] + dur[n], n))
    done = 0
    while len(heap) > 0:
        end, n = heapq.heappop(heap)
        done += 1
        for e in range(ptr[n], ptr[n + 1]):
            at, v = end, carried[e]
            if v >= 0:
                begin[v] = over[v] = end
                c = channel[v]
                if c >= 0:
                    begin[v] = max(end, free[c])
                    free[c] = begin[v] + occupied[v]
                    at = over[v] = begin[v] + took[v]
            r = reader[e]
            start[r] = max(start[r], at)
            waits[r] -= 1
            if waits[r] == 0:
                heapq.heappush(heap, (start[r] + dur[r], r))
        r = follow[n]
        if r >= 0:
            start[r] = max(start[r], end)
            waits[r] -= 1
            if waits[r] == 0:
                heapq.heappush(heap, (start[r] + dur[r], r))
    return done


def _finish(actions: ActionArrays, start: np.ndarray) -> tuple[list[tuple[int, int, int]], np.ndarray]:
    """The sums of gradients, in the order in which they become ready, and the end of every rank's work with updates."""
    view, end = actions.view, start + actions.dur
    ranks, count = view.problem.num_ranks, view.problem.num_microbatches
    ends, busy = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    np.maximum.at(ends, actions.rank, end)
    beside = actions.collective == 1
    np.maximum.at(busy, actions.rank[beside], end[beside])
    waiting = []
    for stage, placed in enumerate(view.placement.stages):
        if len(placed.ranks) > 1 and view.w_ns[stage] is not None:
            line = actions.nodes.first[stage, ActionKind.W]
            waiting.append((int(end[actions.doer[line:line + count]].max()), stage))
    found = []
    for ready, stage in sorted(waiting):
        members = list(view.placement.stages[stage].ranks)
        at = max(ready, int(busy[members].max()))
        busy[members] = at + view.reduce_ns(stage)
        found.append((stage, at, at + view.reduce_ns(stage)))
    updates = np.array(view.updates_ns(), dtype=np.int64)
    return found, np.maximum(ends, busy) + updates
