"""The memory-bubble frontier of a problem: the makespan at each of several activation limits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from mipipe.planner.clock import noting_ctrl_c
from mipipe.planner.ladder.candidate import peak_activations
from mipipe.planner.ladder.objectives import busy_ns, interrupted, limited
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.solve import SolveResult
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
    Ctrl-C ends it with the points so far, that of the solve it stopped among them.

    Raises:
        KeyboardInterrupt: Ctrl-C came before the first point.
    """
    share = replace(options, objective="makespan", time_limit_s=options.time_limit_s / (points + 1))
    found: list[ParetoPoint] = []
    stopped: list[bool] = []
    with noting_ctrl_c(lambda: stopped.append(True)), suppress(KeyboardInterrupt):  # a solve raises none, between two
        for point in _points(problem, share, limits, points, lambda: bool(stopped)):  # of them it comes through
            found.append(point)
            if on_point is not None:
                on_point(point)
    if not found:
        raise KeyboardInterrupt
    return [point for point in found if point.makespan_ns is None or not any(
        other is not point and other.makespan_ns is not None and other.makespan_ns <= point.makespan_ns
        and (other.peak_bytes or 0) < (point.peak_bytes or 0) for other in found)]


def _points(problem: PlanningProblem, share: PlanOptions, limits: Sequence[int] | None, points: int,
            stopped: Callable[[], bool]) -> Iterator[ParetoPoint]:
    """The points from the largest limit on, until the solves are ``stopped``; without ``limits`` the first solve says
    which."""
    if limits is None:
        free = solve(problem, share)
        if free.plan is None:
            if not interrupted(free):
                yield _point(problem.limits.activation_bytes or 0, problem, free)
            return
        most = peak_activations(free.plan)
        if stopped() or interrupted(free):
            yield _point(most, problem, free)
            return
        limits = [most * (points - step) // points for step in range(points)]
    for limit in sorted(limits, reverse=True):
        result = solve(limited(problem, limit), share)
        if result.plan is not None or not interrupted(result):
            yield _point(limit, problem, result)
        if stopped() or interrupted(result):
            return


def _point(limit: int, problem: PlanningProblem, result: SolveResult) -> ParetoPoint:
    """What a solve found at a limit."""
    ratio = peak = None
    if result.plan is not None and result.makespan_ns:
        ratio = 1 - sum(busy_ns(result.plan)) / (problem.num_ranks * result.makespan_ns)
        peak = peak_activations(result.plan)
    return ParetoPoint(limit, peak, result.makespan_ns, result.bound_ns, ratio,
                       result.plan.placement.name if result.plan else "", result.reason)
