"""A plan's timelines as panels of a page, and as the files that people ask for."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from mipipe.cli.printing import html, report
from mipipe.cli.printing.html import Panel
from mipipe.planner.how import how_lines, how_of
from mipipe.planner.plan import Plan
from mipipe.planner.problems.uniform import activation_unit_bytes
from mipipe.planner.timeline import Timeline


def panel_of(title: str, timeline: Timeline, plan: Plan | None) -> Panel:
    """The panel of a plan's timeline, simulated or measured; of a timeline alone without a plan."""
    if plan is None:
        return Panel(title, timeline)
    problem = plan.problem
    stages = tuple(report.group_names(plan, stage.groups) for stage in plan.placement.stages)
    if not report.is_abstract(problem) or not timeline.memory:
        return Panel(title, timeline, report.capacities(plan), stages=stages)
    sizes = tuple(report.memory_text(problem, timeline.resident_bytes[rank], timeline.peak_bytes(rank))
                  for rank in range(timeline.num_ranks))
    return Panel(title, timeline, (), sizes, float(activation_unit_bytes(problem)), stages)


def write_files(plan: Plan, timelines: Sequence[tuple[str, Timeline]], html_file: Path | None,
                trace_file: Path | None, extra: str = "") -> None:
    """The HTML timeline and the Perfetto trace of ``timelines``, where asked for. The trace holds all of them."""
    if html_file is not None:
        panels = [panel_of(title, timeline, plan) for title, timeline in timelines]
        how = how_of(plan)
        told = "" if how is None else "".join(f"<p>{escape(line)}</p>" for line in how_lines(how))
        html.write(html_file, plan.name, panels, report.report_tiles(plan, timelines[0][1]), told + extra)
    if trace_file is not None:
        from mipipe.graphs.serialize import write_text
        from mipipe.planner.execution.export import perfetto_text

        write_text(trace_file, perfetto_text(*(timeline for _, timeline in timelines)))
