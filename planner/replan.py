"""Planning again with corrected costs: what calibration is for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from mipipe.graphs.costs.table import CostTable
from mipipe.planner.calibrate import with_costs
from mipipe.planner.execution.measure import makespan_of
from mipipe.planner.jobs.stages import view
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.solve import Progress
from mipipe.planner.solve import plan as solve


def replan(plan: Plan, costs: CostTable, options: PlanOptions | None = None,
           on_progress: Callable[[Progress], None] | None = None) -> Plan:
    """The best plan for the same problem with these costs: the solver's, or the old order where nothing beats it."""
    problem = with_costs(plan.problem, costs)
    old = makespan_of(view(problem, plan.placement), plan.schedule)
    result = solve(problem, options, on_progress)
    if result.plan is not None and result.makespan_ns is not None and result.makespan_ns < old:
        return result.plan
    return dataclasses.replace(plan, problem=problem, makespan_ns=old, bound_ns=result.bound_ns,
                               placement_bound_ns=None, provenance={"method": f"order of {plan.name}, kept"})
