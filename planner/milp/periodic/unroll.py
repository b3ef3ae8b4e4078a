"""From a periodic pattern to a schedule of all M microbatches, with warm-up and cool-down squeezed.

The pattern gives every action a moment. Taken as an order it is valid for every M, but its ends are slack: gradients
wait for forwards that no longer exist. So the moments serve as priorities of a list schedule in which a rank takes the
action that is ready and comes first. Memory can never block it: an action that takes memory starts only when it fits
and when all such actions before it in the pattern still fit at their own places; all others may come early. (Of all
actions not yet done the first in the pattern's order can always run: its predecessors are done, and if it takes memory,
at least the frees before it in the pattern are done and what came early has left its room.)
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.job_shop import Jobs, job_shop
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.jobs.times import Evaluation, run_orders
from mipipe.planner.milp.order.job_shop import fits, to_schedule
from mipipe.planner.milp.periodic.pattern import route_names
from mipipe.planner.milp.periodic.pattern_mip import PeriodicResult
from mipipe.planner.plan import Schedule

PATIENCE = (0.0, 0.1)
"""Shares of a period a rank waits for an earlier action that is on its way."""

WEIGHT_DELAYS = (0.0, 1.0, 3.0, 8.0)
"""Periods by which weight gradients stand back. Which pair of these wins differs from case to case: all are tried."""

MANY = 5_000
"""Jobs beyond which one pair alone is tried: each costs time in proportion to the jobs."""


def unroll(view: StageView, result: PeriodicResult) -> Schedule | None:
    """The shortest schedule found from a pattern; None if even its plain order breaks memory (loads that differ)."""
    jobs = job_shop(view, fifo=False)
    best: tuple[int, dict[int, list[int]]] | None = None
    for orders in variants(jobs, result):
        evaluation = _evaluate(jobs, orders)
        if evaluation is not None and (best is None or evaluation.makespan_ns < best[0]):
            best = evaluation.makespan_ns, orders
    return to_schedule(jobs, best[1]) if best else None


def variants(jobs: Jobs, result: PeriodicResult) -> list[dict[int, list[int]]]:
    """Orders per machine: the pattern's own, and list schedules that squeeze it."""
    assert result.period_ns is not None
    when = moments(jobs, result)
    found = [{machine: sorted(members, key=lambda job: (when[job], job))
              for machine, members in jobs.by_machine().items()}]
    tries = [(patience, delay) for patience in PATIENCE for delay in WEIGHT_DELAYS]
    for patience, delay in tries if jobs.count <= MANY else tries[-1:]:
        priority = [moment + delay * result.period_ns * (action.kind is ActionKind.W)
                    for moment, action in zip(when, jobs.compiled.actions, strict=True)]
        orders = squeeze(jobs, when, priority, int(patience * result.period_ns))
        if orders is not None:
            found.append(orders)
    return found


def moments(jobs: Jobs, result: PeriodicResult) -> list[float]:
    """When the pattern starts every action; a route with fewer microbatches is spread over the same time."""
    assert result.starts_ns is not None and result.period_ns is not None
    names = route_names(jobs.view)
    position, count = [], defaultdict(int)  # type: ignore[var-annotated]
    for name in names:
        position.append(count[name])
        count[name] += 1
    longest = max(count.values())
    return [result.starts_ns[action.stage, action.kind, names[action.microbatch]]
            + position[action.microbatch] * result.period_ns * longest / count[names[action.microbatch]]
            for action in jobs.compiled.actions]


def squeeze(jobs: Jobs, when: Sequence[float], priority: Sequence[float],
            patience: int) -> dict[int, list[int]] | None:
    """The list schedule (module docstring); None if memory blocks it, which only loads that differ can cause.

    A machine takes the smallest ``priority`` among the actions that could start within ``patience`` of its next start;
    of every (stage, kind) only the first in line.
    """
    after: list[list[tuple[int, int]]] = [[] for _ in range(jobs.count)]
    waits = [0] * jobs.count
    for first, second, lag in jobs.arcs:
        after[first].append((second, lag))
        waits[second] += 1
    memory = [_Memory.of(jobs, on_rank, when) for on_rank in _by_rank(jobs)]
    ready = [0] * jobs.count
    free_at: dict[int, int] = defaultdict(int)
    orders: dict[int, list[int]] = {machine: [] for machine in jobs.by_machine()}
    queues: dict[int, dict[tuple[int, ActionKind], list[tuple[float, int]]]] = {machine: {} for machine in orders}
    actions = jobs.compiled.actions

    def enqueue(job: int) -> None:
        line = queues[jobs.machine[job]].setdefault((actions[job].stage, actions[job].kind), [])
        heapq.heappush(line, (priority[job], job))

    for job in range(jobs.count):
        if not waits[job]:
            enqueue(job)
    heap = [(0, machine) for machine in orders]
    heapq.heapify(heap)
    done = 0
    while heap:
        at, machine = heapq.heappop(heap)
        rank = machine // 2
        heads = [line[0] for line in queues[machine].values() if line and memory[rank].admits(line[0][1])]
        if not heads:
            continue
        start = max(free_at[machine], min(ready[job] for _, job in heads))
        if start > at:
            heapq.heappush(heap, (start, machine))
            continue
        _, job = min(head for head in heads if ready[head[1]] <= start + patience)
        heapq.heappop(queues[machine][actions[job].stage, actions[job].kind])
        end = max(start, ready[job]) + jobs.durations[job]
        orders[machine].append(job)
        free_at[machine] = end
        memory[rank].run(job)
        done += 1
        heapq.heappush(heap, (end, machine))
        if jobs.free[job] and machine ^ 1 in orders:
            heapq.heappush(heap, (end, machine ^ 1))
        for second, lag in after[job]:
            ready[second] = max(ready[second], end + lag)
            waits[second] -= 1
            if not waits[second]:
                enqueue(second)
                other = jobs.machine[second]
                heapq.heappush(heap, (max(ready[second], free_at[other]), other))
    return orders if done == jobs.count else None


def _by_rank(jobs: Jobs) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in jobs.capacity]
    for job, machine in enumerate(jobs.machine):
        found[machine // 2].append(job)
    return found


AHEAD = 64
"""How many places in the pattern's order an action that takes memory may overtake."""


@dataclass(slots=True)
class _Memory:
    """A rank's memory while its list is built.

    ``place[job]`` numbers the actions that take memory in the pattern's order; ``slack[k]`` is what remains free when
    number k starts in that order, less what later numbers have already taken; ``next`` is the first not yet started.
    """

    jobs: Jobs
    place: dict[int, int]
    slack: list[int]
    started: list[bool]
    room: int
    next: int = 0

    @classmethod
    def of(cls, jobs: Jobs, on_rank: Sequence[int], when: Sequence[float]) -> _Memory:
        """The memory of a rank before its first action."""
        room = jobs.capacity[jobs.machine[on_rank[0]] // 2] if on_rank else 0
        place: dict[int, int] = {}
        slack: list[int] = []
        held = 0
        for job in sorted(on_rank, key=lambda job: (when[job], job)):
            if jobs.alloc[job] or jobs.workspace[job]:
                place[job] = len(slack)
                slack.append(room - held - jobs.alloc[job] - jobs.workspace[job])
            held += jobs.alloc[job] - jobs.free[job]
        return cls(jobs, place, slack, [False] * len(slack), room)

    def admits(self, job: int) -> bool:
        """Whether the action may start now without ever blocking one before it in the pattern."""
        place = self.place.get(job)
        if place is None:
            return True
        need = self.jobs.alloc[job]
        if need + self.jobs.workspace[job] > self.room or place > self.next + AHEAD:
            return False
        return all(self.started[k] or self.slack[k] >= need for k in range(self.next, place))

    def run(self, job: int) -> None:
        """Take and return what the action takes and returns."""
        self.room -= self.jobs.alloc[job] - self.jobs.free[job]
        place = self.place.get(job)
        if place is None:
            return
        for k in range(self.next, place):
            self.slack[k] -= self.jobs.alloc[job]
        self.started[place] = True
        while self.next < len(self.started) and self.started[self.next]:
            self.next += 1


def _evaluate(jobs: Jobs, orders: dict[int, list[int]]) -> Evaluation | None:
    evaluation = run_orders(jobs.compiled, [order for order in orders.values() if order])
    return evaluation if evaluation is not None and fits(jobs, evaluation) else None
