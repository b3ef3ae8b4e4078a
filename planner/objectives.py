"""Objectives other than the makespan, and the frontier of memory against bubble. All are solves of the same ladder.

- ``memory``: the least activation memory with which the makespan stays within ``1 + epsilon`` of the best: bisection on
  the activation limit, each step a solve with a part of the time.
- ``utilisation``: the share of device time that computes, ``sum(busy) / (devices * makespan)``. The work of a step is
  given, so on equal devices the shortest makespan is the highest utilisation; where devices differ, the placement that
  computes longest wins ties only.
- `pareto`: the makespan at each of several activation limits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mipipe.planner.candidate import peak_activations
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.race import Progress

STEPS = 5
"""Solves of the bisection on memory: the limit is then known to 1/32 of the range."""


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One point of the frontier. ``makespan_ns`` None: no plan at this limit, ``reason`` says why."""

    activation_bytes: int
    peak_bytes: int | None
    makespan_ns: int | None
    bound_ns: int | None
    bubble_ratio: float | None
    placement: str = ""
    reason: str = ""


def limited(problem: PlanningProblem, activation_bytes: int) -> PlanningProblem:
    """The problem with an activation limit per rank."""
    return problem.replace(limits=replace(problem.limits, activation_bytes=activation_bytes))


def least_memory(problem: PlanningProblem, options: PlanOptions, solve: Callable,
                 on_progress: Callable[[Progress], None] | None = None):
    """The result with the smallest peak activation memory at a makespan within ``1 + epsilon`` of the best found."""
    share = replace(options, objective="makespan", time_limit_s=options.time_limit_s / (STEPS + 1))
    best = solve(problem, share, on_progress)
    if best.plan is None or best.makespan_ns is None:
        return best
    most = int(best.makespan_ns * (1 + options.epsilon))
    low, high = 0, peak_activations(best.plan)
    for _ in range(STEPS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        found = solve(limited(problem, middle), share, on_progress)
        if found.plan is not None and found.makespan_ns is not None and found.makespan_ns <= most:
            kept = replace(found.plan, problem=problem, bound_ns=best.bound_ns)
            best = replace(found, plan=kept, bound_ns=best.bound_ns)
            high = min(middle, peak_activations(found.plan))
        else:
            low = middle
    return best


def pareto(problem: PlanningProblem, options: PlanOptions, limits: Sequence[int] | None = None, *,
           points: int = 6, on_point: Callable[[ParetoPoint], None] | None = None) -> list[ParetoPoint]:
    """The memory-bubble frontier: a solve at each activation limit, the time shared; dominated points left out.

    Without ``limits``: ``points`` limits between what one microbatch at a time needs and what the best plan uses.
    """
    from mipipe.planner.solve import plan as solve

    share = replace(options, objective="makespan", time_limit_s=options.time_limit_s / (points + 1))
    if limits is None:
        free = solve(problem, share)
        if free.plan is None:
            return [ParetoPoint(problem.limits.activation_bytes or 0, None, None, None, None, reason=free.reason)]
        most = peak_activations(free.plan)
        limits = [most * (points - step) // points for step in range(points)]
    found: list[ParetoPoint] = []
    for limit in sorted(limits, reverse=True):
        result = solve(limited(problem, limit), share)
        ratio = peak = None
        if result.plan is not None and result.makespan_ns:
            work = sum(_work(result.plan))
            ratio = 1 - work / (problem.num_ranks * result.makespan_ns)
            peak = peak_activations(result.plan)
        point = ParetoPoint(limit, peak, result.makespan_ns, result.bound_ns, ratio,
                            result.plan.placement.name if result.plan else "", result.reason)
        found.append(point)
        if on_point is not None:
            on_point(point)
    return [point for point in found if point.makespan_ns is None or not any(
        other is not point and other.makespan_ns is not None and other.makespan_ns <= point.makespan_ns
        and (other.peak_bytes or 0) < (point.peak_bytes or 0) for other in found)]


def _work(plan) -> list[int]:
    """Busy time of the compute streams of all ranks."""
    from mipipe.planner.lower import lower
    from mipipe.planner.simulate import simulate

    timeline = simulate(plan, lower(plan))
    return [timeline.busy_ns(rank) for rank in range(timeline.num_ranks)]
