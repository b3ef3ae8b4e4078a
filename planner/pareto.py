"""The memory-bubble frontier of a problem: the makespan at each of several activation limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mipipe.planner.ladder.candidate import peak_activations
from mipipe.planner.ladder.objectives import busy_ns, limited
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.solve import plan as solve


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


def pareto(problem: PlanningProblem, options: PlanOptions, limits: Sequence[int] | None = None, *,
           points: int = 6, on_point: Callable[[ParetoPoint], None] | None = None) -> list[ParetoPoint]:
    """The memory-bubble frontier: a solve at each activation limit, the time shared; dominated points left out.

    Without ``limits``: ``points`` limits between what one microbatch at a time needs and what the best plan uses.
    """
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
            work = sum(busy_ns(result.plan))
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
