"""`plan`: from a problem to a plan, with a bound and a history. The driver of the ladder in design.md section 4.

1. Placements are proposed (`mipipe.planner.proposals`) and each gets a list schedule: the first plan.
2. The race (`mipipe.planner.race`): placements whose bound is below the incumbent are searched in turn, longer and longer.
3. The MIP rungs run where they can still help.

Everything stops when the incumbent meets the bound, time is up, or at Ctrl-C; the best plan so far is checked and
returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from mipipe.graphs.errors import InfeasibleError, PlanError
from mipipe.planner.candidate import candidate
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.proposals import propose
from mipipe.planner.race import Incumbent, Progress, Run, race, seed_search

__all__ = ["Incumbent", "Progress", "SolveResult", "Termination", "plan"]


class Termination(StrEnum):
    """How a solve ended."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INTERRUPTED = "interrupted"
    INFEASIBLE = "infeasible"
    TIME_UP = "time up without a plan"


@dataclass(frozen=True, slots=True)
class SolveResult:
    """What a solve found. ``bound_ns`` holds over all placements the options allow, ``placement_bound_ns`` at the plan's
    own; ``reason`` says why there is no plan. ``ablation`` has one row per rung: what it found, its size, its seconds.
    """

    plan: Plan | None
    makespan_ns: int | None
    bound_ns: int | None
    placement_bound_ns: int | None
    termination: Termination
    seconds: float
    history: tuple[Incumbent, ...] = ()
    rung: str = ""
    ablation: tuple[dict[str, Any], ...] = ()
    explanation: tuple[str, ...] = ()
    reason: str = ""

    @property
    def gap(self) -> float | None:
        """``makespan / bound - 1``; None without a plan or a bound."""
        if not self.makespan_ns or not self.bound_ns:
            return None
        return self.makespan_ns / self.bound_ns - 1


def plan(problem: PlanningProblem, options: PlanOptions | None = None,
         on_progress: Callable[[Progress], None] | None = None) -> SolveResult:
    """The best plan found within the options' time, with its bounds.

    Outcomes are data: an infeasible problem and a time limit passed without a plan are results with ``plan=None``.
    """
    run = Run(problem, options or PlanOptions(), on_progress)
    interrupted = False
    try:
        _ladder(run)
    except InfeasibleError as error:
        return SolveResult(None, None, None, None, Termination.INFEASIBLE, run.seconds, reason=str(error))
    except KeyboardInterrupt:
        interrupted = True
    return _finish(run, interrupted)


def _ladder(run: Run) -> None:
    reasons = []
    for placement in propose(run.problem, run.options.placement):
        if run.best is not None and run.left < 0.5 * run.options.time_limit_s:
            break
        try:
            found = candidate(run.problem, placement)
        except PlanError as error:
            reasons.append(str(error))
            continue
        first = run.best is None
        if seed_search(run, found, compiled=not first):
            run.candidates.append(found)
        else:
            reasons.append(f"placement {placement.name}: not enough memory for one microbatch at a time")
    if not run.candidates:
        raise InfeasibleError(reasons[0] if reasons else "no placement of the allowed shapes fits the weights")
    race(run, run.candidates, lambda: run.left)


def _finish(run: Run, interrupted: bool) -> SolveResult:
    """Check the best plan and write the result."""
    best = run.best
    if best is None or best.best is None:
        ended = Termination.INTERRUPTED if interrupted else Termination.TIME_UP
        return SolveResult(None, None, run.bound_ns, None, ended, run.seconds,
                           reason=f"no plan within {run.options.time_limit_s:g} s; try a longer time limit")
    bound = run.bound_ns
    if run.options.placement != "free":
        bound = min(found.bound.ns for found in run.candidates)
    bound = min(bound, best.makespan_ns) if bound is not None else None
    placement_bound = min(best.bound.ns, best.makespan_ns)
    found = Plan(f"{run.problem.name}/{best.placement.name}", run.problem, best.placement, best.best.schedule,
                 best.makespan_ns, bound, placement_bound,
                 {"method": best.rung, "seconds": round(run.seconds, 3), "seed": run.options.seed})
    proven = bound is not None and best.makespan_ns <= bound
    ended = Termination.OPTIMAL if proven else Termination.INTERRUPTED if interrupted else Termination.FEASIBLE
    return SolveResult(replace(found), best.makespan_ns, bound, placement_bound, ended, run.seconds,
                       tuple(run.history), best.rung, tuple(run.ablation))
