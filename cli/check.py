"""``mipipe check``: is this plan (or lowered program) executable and within memory? Says the first rule it breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.printing.output import Json, emit, stdout

EXAMPLE = "mipipe check plan.json"


def check(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.")],
    program_file: Annotated[Path | None, typer.Option(
        "--program", help="A lowered program of this plan (from `mipipe simulate --program`) to check instead of"
                          " lowering the plan anew.")] = None,
    graph_file: Annotated[Path | None, typer.Option("--graph",
        help="The operator graph that the plan must be for; groups, values and sizes are recomputed from it.")] = None,
    json_output: Json = False,
) -> None:
    """Check a plan with code that shares nothing with the planner: order, deadlock, memory, recorded makespan."""
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.serialize import load
    from mipipe.planner.check import check_plan, check_program
    from mipipe.planner.check.graph import check_graph
    from mipipe.planner.execution.lower import lower
    from mipipe.planner.plan import Plan
    from mipipe.planner.program import Program

    plan = load(plan_file, Plan)
    if graph_file is not None:
        check_graph(plan, load(graph_file, OperatorGraph))
    check_plan(plan)
    program = load(program_file, Program) if program_file is not None else lower(plan)
    check_program(plan, program)
    count = sum(len(order.compute) + len(order.collective) for order in plan.schedule.ranks)
    if json_output:
        emit({"plan": str(plan_file), "ok": True, "actions": count, "transfers": len(program.transfers)})
    else:
        stdout().print(f"{plan_file}: ok; {count} actions on {plan.problem.num_ranks} ranks, {len(program.transfers)}"
                       " transfers, no deadlock, memory within capacity")
