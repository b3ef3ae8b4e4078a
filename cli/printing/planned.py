"""The result of a solve: as plain data for ``--json``, and for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from mipipe.cli.printing.report import estimate_data, how_data, plan_data, print_plan, timeline_data
from mipipe.planner.gap import gap_of
from mipipe.planner.plan import Plan
from mipipe.planner.solve import SolveResult
from mipipe.planner.timeline import Timeline


def result_data(result: SolveResult, found: Plan, timeline: Timeline) -> dict[str, Any]:
    """A result whose plan is ``found``, with what its timeline says and how it came about; times in the problem's unit.
    """
    unit = found.problem.unit_ns
    return {**plan_data(found), **timeline_data(timeline), **estimate_data(found, timeline),
            "termination": result.termination.value, "rung": result.rung, "seconds": round(result.seconds, 3),
            "placement_gap": gap_of(found.makespan_ns, found.placement_bound_ns),
            "history": [{"seconds": round(item.seconds, 3), "makespan": item.makespan_ns / unit,
                         "rung": item.rung, "placement": item.placement} for item in result.history],
            "how": how_data(result.how)}


def print_result(console: Console, result: SolveResult, found: Plan, timeline: Timeline) -> None:
    """The plan, and what found it."""
    print_plan(console, found, timeline)
    console.print(f"found by {result.rung} in {result.seconds:.1f} s ({result.termination.value})")
    if "utilisation" in found.provenance:
        console.print(f"utilisation {found.provenance['utilisation']:.1%} of the {found.provenance['devices_in_use']}"
                      f" devices in use, of {found.problem.num_ranks}")


def print_next(console: Console, steps: Iterable[str], output: Path | None) -> None:
    """What was written, and what may come next."""
    if output is not None:
        console.print(f"wrote {output}")
    for line in steps:
        console.print(line, style="dim", soft_wrap=True, markup=False)
