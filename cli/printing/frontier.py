"""The memory-bubble frontier: solved, and shown as a table, JSON and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipipe.cli.printing.output import emit, progress, stdout
from mipipe.planner.gap import gap_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mipipe.planner.options import PlanOptions
    from mipipe.planner.pareto import ParetoPoint
    from mipipe.planner.problem import PlanningProblem


def print_frontier(problem: PlanningProblem, options: PlanOptions, html_file: Path | None, json_output: bool) -> None:
    """Plan at several activation limits and show how the bubble falls as memory grows."""
    from mipipe.cli.printing import html
    from mipipe.cli.printing.report import size_text
    from mipipe.cli.printing.tables import print_rows
    from mipipe.planner.clock import noting_ctrl_c
    from mipipe.planner.pareto import pareto

    stopped: list[bool] = []
    with progress("planning the frontier") as update, noting_ctrl_c(lambda: stopped.append(True)):
        points = pareto(problem, options, on_point=lambda point: update(f"{point.activation_bytes:,} bytes done"))
    unit = problem.unit_ns
    rows: list[dict[str, Any]] = [{
        "activation_bytes": point.activation_bytes, "peak_bytes": point.peak_bytes,
        "makespan": None if point.makespan_ns is None else point.makespan_ns / unit,
        "bound": None if point.bound_ns is None else point.bound_ns / unit, "bubble_ratio": point.bubble_ratio,
        "gap": gap_of(point.makespan_ns, point.bound_ns), "placement": point.placement, "reason": point.reason}
        for point in points]
    told = [frontier_cells(point, problem) for point in points]
    if html_file is not None:
        picture = html.frontier([(row["peak_bytes"], row["bubble_ratio"], least_bubble(row), row["placement"])
                                 for row in rows if row["bubble_ratio"] is not None],
                                lambda size: size_text(problem, size))
        unbroken = [[value.replace(" ", "\u00a0") for value in row.values()] for row in told]
        table = html.html_table([*told[0], "reason"], [[*row, point.reason]
                                                       for row, point in zip(unbroken, points, strict=True)])
        html.write(html_file, f"{problem.name}: memory against bubble", [], extra=picture + table)
    if json_output:
        emit({"problem": problem.digest(), "unit_ns": unit, "interrupted": bool(stopped), "points": rows})
    else:
        console = stdout()
        print_rows(console, told, title=f"{problem.name}: memory against bubble")
        for row in rows:
            if row["reason"]:
                console.print(f"at {row['activation_bytes']:,} bytes: {row['reason']}", style="dim")
        if stopped:
            console.print("interrupted: smaller limits were not planned", style="dim")


def frontier_cells(point: ParetoPoint, problem: PlanningProblem) -> dict[str, str]:
    """A point of the frontier as a person reads it."""
    from mipipe.cli.printing.report import size_text
    from mipipe.cli.printing.terminal import format_time

    unit_ns = problem.unit_ns
    share = gap_of(point.makespan_ns, point.bound_ns)
    return {"activation limit": size_text(problem, point.activation_bytes),
            "peak": "" if point.peak_bytes is None else size_text(problem, point.peak_bytes),
            "makespan": "" if point.makespan_ns is None else format_time(point.makespan_ns, unit_ns),
            "bound": "" if point.bound_ns is None else format_time(point.bound_ns, unit_ns),
            "gap": "" if share is None else f"{share:.1%}",
            "bubble": "" if point.bubble_ratio is None else f"{point.bubble_ratio:.1%}", "placement": point.placement}


def least_bubble(row: Mapping[str, Any]) -> float:
    """The bubble ratio that no plan at this limit can be below: that of a makespan equal to the bound."""
    if not row["bound"]:
        return 0.0
    return max(0.0, 1 - (1 - row["bubble_ratio"]) * row["makespan"] / row["bound"])
