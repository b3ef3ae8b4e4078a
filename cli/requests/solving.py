"""A solve as a verb runs it: with its progress shown, and with an error where it ends without a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mipipe.cli.printing.output import progress
from mipipe.graphs.errors import InfeasibleError, TimeUpError
from mipipe.planner.gap import gap_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mipipe.planner.options import PlanOptions
    from mipipe.planner.plan import Plan
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.solve import Progress, SolveResult


def solve_shown(problem: PlanningProblem, options: PlanOptions, exportable: bool) -> tuple[SolveResult, PlanOptions]:
    """The result of the solve that was asked for, and the options it was found with."""
    from mipipe.planner.exportable import plan_exportable
    from mipipe.planner.solve import plan as solve

    with progress("planning") as update:
        if exportable:
            return plan_exportable(problem, options, show_progress(update, problem.unit_ns))
        return solve(problem, options, show_progress(update, problem.unit_ns)), options


def solved(problem: PlanningProblem, options: PlanOptions) -> Plan:
    """The plan of a problem; raises as `raise_reason` where there is none."""
    result, _ = solve_shown(problem, options, False)
    if result.plan is None:
        raise_reason(result)
    assert result.plan is not None
    return result.plan


def show_progress(update: Callable[[str], None], unit_ns: int) -> Callable[[Progress], None]:
    """A progress callback that says the best makespan, its gap and who found it."""
    from mipipe.cli.printing.terminal import format_time

    def on_progress(state: Progress) -> None:
        text = f"{state.seconds:.0f} s, {state.phase}"
        if state.makespan_ns:
            text += f", makespan {format_time(state.makespan_ns, unit_ns)}"
        gap = gap_of(state.makespan_ns or None, state.bound_ns)
        if gap is not None:
            text += f" (gap {gap:.1%})"
        update(text)

    return on_progress


def raise_reason(result: SolveResult) -> None:
    """Raise the error of a solve that ended without a plan."""
    from mipipe.planner.solve import Termination

    if result.termination is Termination.INFEASIBLE:
        raise InfeasibleError(f"no plan was found: {result.reason}")
    if result.termination is Termination.INTERRUPTED:
        raise KeyboardInterrupt
    raise TimeUpError(result.reason)
