"""``mipipe calibrate``: a measured run corrects the cost table, and shows how far the simulation was off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.output import Json, check_folder, emit, stdout

EXAMPLE = "mipipe calibrate measured.json --plan plan.json --costs costs.json -o calibrated.json"


def calibrate(
    timeline_file: Annotated[Path, typer.Argument(metavar="TIMELINE", help="The measured timeline of a run.")],
    plan_file: Annotated[Path, typer.Option("--plan", help="The plan that ran.")],
    costs_file: Annotated[Path, typer.Option("--costs", help="The cost table the plan was made with.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The corrected cost table to write.")] = None,
    json_output: Json = False,
) -> None:
    """Correct a cost table by a measured run, and say how far the simulation was off, stage by stage."""
    check_folder(output, "--output")
    from mipipe.cli.tables import print_rows
    from mipipe.graphs.costs import CostTable
    from mipipe.graphs.serialize import load, save, to_data
    from mipipe.graphs.units import format_ns
    from mipipe.planner.calibrate import calibrate as correct
    from mipipe.planner.plan import Plan
    from mipipe.planner.timeline import Timeline

    table, drift = correct(load(plan_file, Plan), load(timeline_file, Timeline), load(costs_file, CostTable))
    if output is not None:
        save(table, output)
    if json_output:
        emit({"output": str(output) if output else None, "ratio": drift.ratio, "ratio_after": drift.ratio_after,
              **to_data(drift)})
        return
    console = stdout()
    print_rows(console, [{"what": row.what, "samples": row.samples, "planned": format_ns(row.planned_ns),
                          "measured": format_ns(row.measured_ns), "ratio": row.ratio, "spread": row.spread}
                         for row in drift.rows])
    console.print(f"the step took {format_ns(drift.measured_ns)}, simulated {format_ns(drift.simulated_ns)}: measured /"
                  f" simulated {drift.ratio:.3f}, {drift.ratio_after:.3f} with the corrected costs")
    if output is not None:
        console.print(f"wrote {output}")
