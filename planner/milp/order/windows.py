"""Fix-and-optimise: the order MIP on a window of a schedule, everything outside keeping its order.

A window holds the actions that start in an interval of time. What ran before gives release times and memory in use;
what comes after gives tails, longest paths to the end of the step under the fixed order. Every critical path crosses
every interval, so a window can shorten the makespan wherever it lies. Windows slide over the step, first both ends
(where the slack of warm-up and cool-down is), then the middle.

Each solve looks only for strictly better orders, so most end by infeasibility, often in `tighten` before any model is
built. An order is adopted when its evaluation is shorter and within memory: never worse, valid at any moment.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise

from mipipe.planner.jobs.job_shop import Jobs, job_shop, relabel
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.jobs.times import Evaluation, orders_of, run_orders
from mipipe.planner.milp.highs import SolverStatus
from mipipe.planner.milp.order import disjunctive
from mipipe.planner.milp.order.job_shop import fits, to_schedule
from mipipe.planner.milp.order.shop import Shop, add_transfers, time_unit
from mipipe.planner.plan import Schedule


def improve_by_windows(view: StageView, schedule: Schedule, *, window: int, time_limit_s: float, seed: int,
                       target_ns: int = 0, solve_limit_s: float = 3.0, accept: Callable[[Schedule], bool] | None = None,
                       ) -> tuple[Schedule, int, int]:
    """(schedule, makespan, number of improvements) after sliding windows over the schedule until none helps.

    Args:
        schedule: a valid schedule within memory.
        window: most actions whose order is free at once.
        time_limit_s, seed: of all solves together; see `highs.solve`.
        target_ns: stop when the makespan is down to this (a lower bound).
        solve_limit_s: limit of one window.
        accept: a further condition on adopted schedules (memory of values in flight).
    """
    deadline = time.monotonic() + time_limit_s
    schedule = relabel(view, schedule)
    jobs = job_shop(view, schedule.actions())
    orders = orders_of(jobs.compiled, schedule)
    evaluation = run_orders(jobs.compiled, orders)
    assert evaluation is not None, "the given schedule deadlocks"
    improvements, stale, turn = 0, 0, 0
    intervals = _intervals(evaluation, window)
    while stale < len(intervals) and evaluation.makespan_ns > target_ns:
        left = deadline - time.monotonic()
        if left <= 0:
            break
        begin, end = intervals[turn % len(intervals)]
        turn += 1
        found, interrupted = _solve_window(jobs, orders, evaluation, begin, end, min(left, solve_limit_s), seed + turn)
        if found is not None:
            better = run_orders(jobs.compiled, found)
            if better is not None and better.makespan_ns < evaluation.makespan_ns and fits(jobs, better) and (
                    accept is None or accept(_schedule(jobs, found))):
                orders, evaluation = found, better
                improvements += 1
                stale = -1
                intervals = _intervals(evaluation, window)
        if interrupted:
            break
        stale += 1
    return (_schedule(jobs, orders) if improvements else schedule), evaluation.makespan_ns, improvements


def _schedule(jobs: Jobs, orders: list[list[int]]) -> Schedule:
    return to_schedule(jobs, {jobs.machine[order[0]]: order for order in orders})


def _intervals(evaluation: Evaluation, window: int) -> list[tuple[int, int]]:
    """Half-overlapping intervals of at most ``window`` starts, the two ends of the step first, then inwards."""
    starts = sorted(evaluation.starts)
    count = len(starts)
    step = max(1, window // 2)
    lows = [*range(0, max(1, count - window), step), max(0, count - window)]
    found = []
    for low in lows:
        begin = starts[low]
        end = starts[low + window] if low + window < count else starts[-1] + 1
        if end > begin:
            found.append((begin, end))
    found = list(dict.fromkeys(found))
    inward = []
    while found:
        inward.append(found.pop())
        if found:
            inward.append(found.pop(0))
    return inward


def _solve_window(jobs: Jobs, orders: list[list[int]], evaluation: Evaluation, begin: int, end: int,
                  limit_s: float, seed: int) -> tuple[list[list[int]] | None, bool]:
    """New orders if the window has better ones; and whether Ctrl-C stopped the solve."""
    shop, slices, floor = cut_window(jobs, orders, evaluation, begin, end)
    horizon = evaluation.makespan_ns - time_unit(shop, evaluation.makespan_ns)
    if floor > horizon:
        return None, False  # some critical path avoids the window's jobs
    result = disjunctive.solve_shop(shop, horizon, time_limit_s=limit_s, seed=seed, lower_ns=floor,
                                    name="windows MIP")
    interrupted = result.outcome.termination is SolverStatus.INTERRUPTED
    if result.orders is None:
        return None, interrupted
    new = []
    for order, (low, high) in zip(orders, slices, strict=True):
        inside = result.orders.get(jobs.machine[order[0]], [])
        new.append([*order[:low], *(shop.name[job] for job in inside), *order[high:]])
    return new, interrupted


def cut_window(jobs: Jobs, orders: list[list[int]], evaluation: Evaluation, begin: int,
               end: int) -> tuple[Shop, list[tuple[int, int]], int]:
    """The shop of the jobs that start in ``[begin, end)``; their slice of each order; the longest path around them."""
    starts = evaluation.starts
    slices = []
    for order in orders:
        low = next((k for k, job in enumerate(order) if starts[job] >= begin), len(order))
        slices.append((low, next((k for k in range(low, len(order)) if starts[order[k]] >= end), len(order))))
    members = [job for order, (low, high) in zip(orders, slices, strict=True) for job in order[low:high]]
    number = {job: k for k, job in enumerate(members)}
    before = {job for order, (low, _) in zip(orders, slices, strict=True) for job in order[:low]}
    tails = fixed_tails(jobs, orders)
    release = [0] * len(members)
    tail = [0] * len(members)
    for order, (low, high) in zip(orders, slices, strict=True):
        ready = starts[order[low - 1]] + jobs.durations[order[low - 1]] if low else 0
        rest = tails[order[high]] if high < len(order) else 0
        for job in order[low:high]:
            release[number[job]], tail[number[job]] = ready, rest
    floor = 0
    arrival = {(moved.producer, moved.consumer): moved.end_ns for moved in evaluation.transfers}
    for first, second, lag in jobs.arcs:
        if first in before:
            ready = arrival.get((first, second), starts[first] + jobs.durations[first] + lag)
            if second in number:
                release[number[second]] = max(release[number[second]], ready)
            elif second not in before:
                floor = max(floor, ready + tails[second])
        elif first in number and second not in number:
            tail[number[first]] = max(tail[number[first]], lag + tails[second])
    for _, last, duration in jobs.compiled.reductions:
        for job in last:
            if job in number:
                tail[number[job]] = max(tail[number[job]], duration)
    base = [0] * len(jobs.capacity)
    for job in before:
        base[jobs.machine[job] // 2] += jobs.alloc[job] - jobs.free[job]
    shop = Shop([jobs.durations[j] for j in members], [jobs.machine[j] for j in members],
                [jobs.machine[j] // 2 for j in members], release, tail, [], [jobs.alloc[j] for j in members],
                [jobs.free[j] for j in members], [jobs.workspace[j] for j in members], base, list(jobs.capacity),
                list(members))
    add_transfers(shop, jobs, number)
    return shop, slices, floor


def fixed_tails(jobs: Jobs, orders: list[list[int]]) -> list[int]:
    """Longest path from the start of every job to the end of the step, along arcs and the given orders."""
    after: list[list[tuple[int, int]]] = [[] for _ in range(jobs.count)]
    waits: dict[int, int] = defaultdict(int)
    for first, second, lag in jobs.arcs:
        after[second].append((first, lag))
        waits[first] += 1
    for order in orders:
        for first, second in pairwise(order):
            after[second].append((first, 0))
            waits[first] += 1
    tails = list(jobs.durations)
    for _, last, duration in jobs.compiled.reductions:
        for job in last:
            tails[job] = jobs.durations[job] + duration
    ready = [job for job in range(jobs.count) if not waits[job]]
    for job in ready:
        for first, lag in after[job]:
            tails[first] = max(tails[first], jobs.durations[first] + lag + tails[job])
            waits[first] -= 1
            if not waits[first]:
                ready.append(first)
    return tails
