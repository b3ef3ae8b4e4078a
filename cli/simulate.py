"""``mipipe simulate``: lower a plan to the program the workers would run, and run it on a clock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.printing.output import Html, Json, Trace, check_files, emit, stdout

EXAMPLE = "mipipe simulate plan.json -o timeline.json"


def simulate(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The timeline to write.")] = None,
    program_file: Annotated[Path | None, typer.Option("--program", help="Also write the lowered program here.")] = None,
    html_file: Html = None,
    trace_file: Trace = None,
    json_output: Json = False,
) -> None:
    """Simulate a plan: its timeline, bubble and memory, with the durations of its problem."""
    from mipipe.cli.printing.panels import write_files
    from mipipe.cli.printing.report import capacities, print_timeline, timeline_data
    from mipipe.graphs.serialize import load, save
    from mipipe.planner.execution.lower import lower
    from mipipe.planner.execution.simulate import simulate as run_on_a_clock
    from mipipe.planner.plan import Plan

    check_files(plan_file, output=output, program=program_file, html=html_file, trace=trace_file)
    plan = load(plan_file, Plan)
    program = lower(plan)
    timeline = run_on_a_clock(plan, program)
    if output is not None:
        save(timeline, output)
    if program_file is not None:
        save(program, program_file)
    write_files(plan, [("simulated", timeline)], html_file, trace_file)
    if json_output:
        emit({"plan": plan.name, **timeline_data(timeline, capacities(plan))})
        return
    print_timeline(stdout(), timeline, capacities(plan), plan=plan)
