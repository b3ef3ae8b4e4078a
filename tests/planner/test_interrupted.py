"""Ctrl-C in verbs of several solves: no other solve begins, and what was found is kept."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from mipipe.planner import clock, exportable, pareto, solve
from mipipe.planner.check import check_plan
from mipipe.planner.explain.what_if import what_if
from mipipe.planner.options import PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import SolveResult, Termination, plan

SMALL = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, activations=4, copies=1)
QUICK = PlanOptions(time_limit_s=60, use_milp=False, gap=10.0)


def pressing(at: int, asked: list[PlanningProblem]) -> Callable[..., SolveResult]:
    """A solve that ends at its first plan, or as Ctrl-C ends it where it is the one of that number."""
    def solve_one(problem: PlanningProblem, options: PlanOptions, *more: Any) -> SolveResult:
        asked.append(problem)

        def stop(state: object) -> None:
            if len(asked) == at:
                signal.raise_signal(signal.SIGINT)

        return plan(problem, options, stop)

    return solve_one


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_frontier_ends_with_the_points_so_far(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PlanningProblem] = []
    monkeypatch.setattr(pareto, "solve", pressing(at, asked))
    seen: list[pareto.ParetoPoint] = []
    points = pareto.pareto(SMALL, QUICK, points=5, on_point=seen.append)
    assert len(asked) == at and len(seen) == max(1, at - 1) and points
    assert all(point.makespan_ns for point in seen)


def test_a_frontier_keeps_its_points_where_ctrl_c_comes_between_two_solves() -> None:
    points = pareto.pareto(SMALL, QUICK, points=5, on_point=lambda point: signal.raise_signal(signal.SIGINT))
    assert len(points) == 1


def test_a_frontier_without_a_point_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(problem: PlanningProblem, options: PlanOptions) -> SolveResult:
        return SolveResult(None, None, None, None, Termination.INTERRUPTED, 0.1)

    monkeypatch.setattr(pareto, "solve", ended)
    with pytest.raises(KeyboardInterrupt):
        pareto.pareto(SMALL, QUICK)


def test_no_other_solve_begins_for_what_a_little_more_would_give() -> None:
    asked: list[PlanningProblem] = []
    more = what_if(SMALL, QUICK, 10**9, pressing(2, asked), seconds=30)
    assert len(asked) == 2 and len(more) == 1


def test_no_other_solve_begins_for_a_plan_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first shape had the better plan, not proven."""
    asked: list[PlanningProblem] = []
    uneven = uniform_problem(ranks=3, microbatches=5, f=10, i=13, w=8, comm=2, activations=4)
    monkeypatch.setattr(exportable, "plan", pressing(2, asked))
    result, _ = exportable.plan_exportable(uneven, QUICK)
    assert len(asked) == 2 and result.termination is Termination.FEASIBLE


@pytest.mark.parametrize("objective", ["makespan", "memory", "utilisation", "period"])
def test_every_objective_keeps_its_plan(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the first plans of the first solve."""
    monkeypatch.setattr(solve, "loop", lambda *given: signal.raise_signal(signal.SIGINT))
    found = plan(SMALL, PlanOptions(time_limit_s=60, use_milp=False, objective=objective))  # type: ignore[arg-type]
    assert found.plan is not None and found.termination in (Termination.INTERRUPTED, Termination.OPTIMAL)
    assert found.seconds < 30 and (objective != "period" or found.period_ns)
    check_plan(found.plan)


def test_a_solve_in_another_notes_ctrl_c_as_well() -> None:
    """Whatever swallows the exception on its way."""
    noted: list[str] = []
    with clock.noting_ctrl_c(lambda: noted.append("outer")):
        with clock.noting_ctrl_c(lambda: noted.append("inner")), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert noted == ["inner", "outer", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
