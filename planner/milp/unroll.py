"""From a periodic pattern to a schedule of all M microbatches, with warm-up and cool-down squeezed.

The pattern gives every action a moment. Taken as an order it is valid for every M, but its ends are slack: gradients
wait for forwards that no longer exist. So the moments serve as priorities of a list schedule in which a rank takes the
action that is ready and comes first. Memory can never block it: actions that take memory keep the pattern's order
on their rank and start only when they fit, all others may come early. (Of all actions not yet done the first in the
pattern's order can always run: its predecessors are done, and if it takes memory, at least the frees before it in the
pattern are done and nothing after it has taken any.)
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence

from mipipe.planner.actions import ActionKind
from mipipe.planner.evaluate import Evaluation, run
from mipipe.planner.jobs import Jobs, job_shop
from mipipe.planner.milp.order import fits, to_schedule
from mipipe.planner.milp.periodic import PeriodicResult
from mipipe.planner.plan import Schedule
from mipipe.planner.stages import StageView

PATIENCE = (0.0, 0.1, 0.3)
"""Shares of a period a rank waits for an earlier action that is on its way."""

WEIGHT_DELAYS = (0.0, 0.5, 1.0, 2.0)
"""Periods by which weight gradients stand back. Which pair of these wins differs from case to case: all are tried."""


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
    for patience, delay in tries if jobs.count <= 20_000 else tries[:1]:
        priority = [moment + delay * result.period_ns * (action.kind is ActionKind.W)
                    for moment, action in zip(when, jobs.compiled.actions, strict=True)]
        orders = squeeze(jobs, when, priority, int(patience * result.period_ns))
        if orders is not None:
            found.append(orders)
    return found


def moments(jobs: Jobs, result: PeriodicResult) -> list[float]:
    """When the pattern starts every action; a route with fewer microbatches is spread over the same time."""
    assert result.starts_ns is not None and result.period_ns is not None
    routes = [tuple(route[m] for route in jobs.view.placement.routes)
              for m in range(jobs.view.problem.num_microbatches)]
    position, count, first = [], defaultdict(int), {}  # type: ignore[var-annotated]
    for m, route in enumerate(routes):
        first.setdefault(route, m)
        position.append(count[route])
        count[route] += 1
    longest = max(count.values())
    return [result.starts_ns[action.stage, action.kind, first[routes[action.microbatch]]]
            + position[action.microbatch] * result.period_ns * longest / count[routes[action.microbatch]]
            for action in jobs.compiled.actions]


def squeeze(jobs: Jobs, when: Sequence[float], priority: Sequence[float],
            patience: int) -> dict[int, list[int]] | None:
    """The list schedule (module docstring); None if memory blocks it, which only loads that differ can cause.

    A machine takes the smallest ``priority`` among the actions that could start within ``patience`` of its next start.
    """
    after: list[list[tuple[int, int]]] = [[] for _ in range(jobs.count)]
    waits = [0] * jobs.count
    for first, second, lag in jobs.arcs:
        after[first].append((second, lag))
        waits[second] += 1
    takers = _takers(jobs, when)
    turn = {job: place for found in takers.values() for place, job in enumerate(found)}
    taken = dict.fromkeys(takers, 0)
    held = [0] * len(jobs.capacity)
    ready = [0] * jobs.count
    pool: dict[int, list[int]] = defaultdict(list)
    free_at: dict[int, int] = defaultdict(int)
    orders: dict[int, list[int]] = {machine: [] for machine in jobs.by_machine()}
    for job in range(jobs.count):
        if not waits[job]:
            pool[jobs.machine[job]].append(job)
    heap = [(0, machine) for machine in sorted(pool)]
    heapq.heapify(heap)

    def eligible(job: int) -> bool:
        rank = jobs.machine[job] // 2
        if job not in turn:
            return True
        return (turn[job] == taken[rank]
                and held[rank] + jobs.alloc[job] + jobs.workspace[job] <= jobs.capacity[rank])

    done = 0
    while heap:
        at, machine = heapq.heappop(heap)
        choices = [job for job in pool[machine] if eligible(job)]
        if not choices:
            continue
        start = max(free_at[machine], min(ready[job] for job in choices))
        if start > at:
            heapq.heappush(heap, (start, machine))
            continue
        job = min((job for job in choices if ready[job] <= start + patience), key=lambda job: (priority[job], job))
        begin = max(start, ready[job])
        end = begin + jobs.durations[job]
        pool[machine].remove(job)
        orders[machine].append(job)
        free_at[machine] = end
        rank = machine // 2
        held[rank] += jobs.alloc[job] - jobs.free[job]
        taken[rank] += job in turn
        done += 1
        heapq.heappush(heap, (end, machine))
        if jobs.free[job]:
            heapq.heappush(heap, (end, machine ^ 1))
        for second, lag in after[job]:
            ready[second] = max(ready[second], end + lag)
            waits[second] -= 1
            if not waits[second]:
                pool[jobs.machine[second]].append(second)
                heapq.heappush(heap, (max(ready[second], free_at[jobs.machine[second]]), jobs.machine[second]))
    return orders if done == jobs.count else None


def _takers(jobs: Jobs, when: Sequence[float]) -> dict[int, list[int]]:
    """Per rank the actions that take more than they return, or need workspace, in the pattern's order."""
    found: dict[int, list[int]] = {rank: [] for rank in range(len(jobs.capacity))}
    for job in sorted(range(jobs.count), key=lambda job: (when[job], job)):
        if jobs.alloc[job] or jobs.workspace[job]:
            found[jobs.machine[job] // 2].append(job)
    return found


def _evaluate(jobs: Jobs, orders: dict[int, list[int]]) -> Evaluation | None:
    evaluation = run(jobs.compiled, [order for order in orders.values() if order])
    return evaluation if evaluation is not None and fits(jobs, evaluation) else None
