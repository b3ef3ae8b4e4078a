"""Plans that other schedule runtimes can run: torch's CSV grammar knows chains of stages, each on one rank.

The planner's free placements may be branched, replicated or recomputed. Here only shapes that stay chains are tried:
each for a share of the time, then the best one for the rest. The bound of the result is that of its own shape.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from mipipe.graphs.errors import PlanError
from mipipe.planner.execution.export import REMEDY, torch_csv
from mipipe.planner.milp.calls import counting
from mipipe.planner.options import PlacementName, PlanOptions
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.sizes import NEVER_NS
from mipipe.planner.solve import Progress, SolveResult, Termination, plan, with_calls
from mipipe.planner.time_shares import SHARES

SHAPES: tuple[PlacementName, ...] = ("v", "chain", "interleaved", "wave")
LARGER = "; groups so large that each feeds the next alone make a chain: fewer --groups"
"""What to do where the shapes that are chains of stages are none for these groups: a value crosses some of them."""


def plan_exportable(problem: PlanningProblem, options: PlanOptions,
                    on_progress: Callable[[Progress], None] | None = None) -> tuple[SolveResult, PlanOptions]:
    """The best plan found that `torch_csv` can say, and the options it was found with.

    ``plan=None`` where there is none, with the reason.
    """
    with counting() as ledger:
        result, chosen = _best_of_shapes(problem, options, on_progress)
    return with_calls(result, ledger), chosen


def _best_of_shapes(problem: PlanningProblem, options: PlanOptions,
                    on_progress: Callable[[Progress], None] | None) -> tuple[SolveResult, PlanOptions]:
    """The result of the best of `SHAPES`, with the calls of HiGHS in its own solve alone."""
    began = time.monotonic()
    tried: list[tuple[SolveResult, PlanOptions]] = []
    refused = ""
    for shape in SHAPES:
        chosen = dataclasses.replace(options, placement=shape, recompute=False,
                                     time_limit_s=options.time_limit_s * SHARES.told_apart / len(SHAPES))
        result, refusal = _checked(plan(problem, chosen, on_progress))
        tried.append((result, chosen))
        refused = refused or refusal
        if result.termination is Termination.INTERRUPTED:
            break
    best = min(tried, key=_rank)
    if best[0].plan is None:
        return dataclasses.replace(best[0], reason=refused or best[0].reason), best[1]
    left = options.time_limit_s - (time.monotonic() - began)
    stopped = any(result.termination is Termination.INTERRUPTED for result, _ in tried)
    if left > 0.1 and best[0].termination is Termination.FEASIBLE and not stopped:
        chosen = dataclasses.replace(best[1], time_limit_s=left)
        best = min(best, (_checked(plan(problem, chosen, on_progress))[0], chosen), key=_rank)
    result = dataclasses.replace(best[0], seconds=time.monotonic() - began)
    return result, dataclasses.replace(best[1], time_limit_s=options.time_limit_s)


def _rank(tried: tuple[SolveResult, PlanOptions]) -> int:
    return tried[0].makespan_ns or NEVER_NS


def _checked(result: SolveResult) -> tuple[SolveResult, str]:
    """The result without its plan where that cannot be exported, and why."""
    if result.plan is None:
        return result, ""
    try:
        torch_csv(result.plan)
    except PlanError as error:
        reason = str(error).removesuffix(REMEDY) + LARGER
        return dataclasses.replace(result, plan=None, makespan_ns=None, termination=Termination.INFEASIBLE,
                                   reason=reason), reason
    return result, ""
