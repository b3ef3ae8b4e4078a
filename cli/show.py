"""``mipipe show``: any file of mipipe's for people: graphs as a table, plans and timelines drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mipipe.cli.printing.modes import show_modes
from mipipe.cli.printing.output import Html, Json, Trace, check_files, emit, log, stdout
from mipipe.graphs.errors import InputError

if TYPE_CHECKING:
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.planner.plan import Plan
    from mipipe.planner.timeline import Timeline

EXAMPLE = "mipipe show plan.json measured.json --html timeline.html"


def show(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="A graph and its cost table, or one of them; a"
                                                                      " planning problem (JSON or CSV); or"
                                                                      " plans and timelines, drawn under one"
                                                                      " another.")],
    html_file: Html = None,
    trace_file: Trace = None,
    modes: Annotated[int | None, typer.Option(
        metavar="MEMBERS", help="Of a graph captured with --modes: what each block computes, sends and keeps in each"
                                " mode on teams of so many devices.", min=2)] = None,
    json_output: Json = False,
) -> None:
    """Show a graph's summary, a planning problem, or plans and timelines on one time scale with their ratios."""
    check_files(*files, html=html_file, trace=trace_file)
    from mipipe.cli.requests.files import open_any
    from mipipe.graphs.coarse.graph import CoarseGraph
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.planner.plan import Plan
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.timeline import Timeline

    found = [open_any(path, OperatorGraph, CoarseGraph, CostTable, Plan, Timeline, PlanningProblem) for path in files]
    graphs = [item for item in found if isinstance(item, (OperatorGraph, CoarseGraph))]
    tables = [item for item in found if isinstance(item, CostTable)]
    if modes is not None:
        if len(found) != 1 or not isinstance(found[0], OperatorGraph) or html_file or trace_file:
            raise InputError("show: --modes is for one graph (mipipe capture), without --html and --trace")
        show_modes(found[0], modes, json_output)
    elif any(isinstance(item, PlanningProblem) for item in found):
        if len(found) > 1 or html_file or trace_file:
            raise InputError("show: give one planning problem, without --html and --trace")
        from mipipe.cli.printing.problem import show_problem

        show_problem(found[0], json_output)
    elif not graphs and not tables:
        _show_timelines(list(zip(files, found, strict=True)), html_file, trace_file, json_output)
    elif trace_file is not None:
        raise InputError("show: --trace is for plans and timelines")
    elif len(graphs) + len(tables) < len(found) or len(graphs) > 1 or len(tables) > 1:
        raise InputError("show: give one graph (with or without a cost table of it), or plans and timelines")
    elif graphs:
        _show_graph(graphs[0], tables[0] if tables else None, html_file, json_output)
    elif html_file is not None:
        raise InputError("show: --html draws graphs, plans and timelines; give the graph with its cost table")
    else:
        _show_costs(tables[0], json_output)


def _show_costs(table: CostTable, json_output: bool) -> None:
    from mipipe.cli.printing.tables import print_rows

    rows = cost_rows(table)
    if json_output:
        emit({"hardware": table.hardware, "notes": table.notes, "rows": rows})
    else:
        print_rows(stdout(), rows, title=f"costs on {table.hardware or 'unnamed hardware'}")


def _show_graph(graph: OperatorGraph | CoarseGraph, table: CostTable | None, html_file: Path | None,
                json_output: bool) -> None:
    from mipipe.cli.printing.tables import cell, print_rows
    from mipipe.graphs.coarse.coverage import warnings_of
    from mipipe.graphs.coarse.totals import headline
    from mipipe.graphs.costs.summary import coarse_svg, graph_summary, summary_rows
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.planner.problems.on_cluster import coarse_for

    if table is not None and isinstance(graph, OperatorGraph):
        graph = coarse_for(graph, table)
    whole = graph if isinstance(graph, OperatorGraph) else None
    rows = summary_rows(graph, table)
    if html_file is not None:
        from mipipe.cli.printing import html

        header = [name.replace("_", " ") for name in rows[0]]
        cells = [[cell(row.get(name)) for name in rows[0]] for row in rows]
        drawing = f"<figure>{coarse_svg(graph)}</figure>"
        html.write(html_file, graph.model, [], extra=html.html_table(header, cells) + drawing)
    if json_output:
        emit(graph_summary(graph, table))
    else:
        print_rows(stdout(), rows, title=graph.model)
        if whole is not None:
            stdout().print(headline(whole))
    for text in warnings_of(whole) if whole is not None else ():
        log(f"warning: {text}")


def _without_optimizer(timeline: Timeline, first: Timeline) -> str:
    """The ratio without the optimizer's step, where only one of the two has it (the simulator leaves it out)."""
    from mipipe.planner.actions import ActionKind

    both = [{span.kind for span in item.spans} for item in (timeline, first)]
    if ActionKind.OPTIMIZER_STEP not in both[0] or ActionKind.OPTIMIZER_STEP in both[1]:
        return ""
    end = max((span.end_ns for span in timeline.spans if span.kind is not ActionKind.OPTIMIZER_STEP), default=0)
    return f"; {end / max(first.makespan_ns, 1):.3f} without the optimizer's step, which is not simulated"


def cost_rows(table: CostTable) -> list[dict[str, Any]]:
    """A cost table as rows, times in microseconds; groups with equal entries (the same structure) share a row."""
    from mipipe.graphs.operator_graph import Phase

    rows: dict[Any, dict[str, Any]] = {}
    for entry in table.entries:
        key = (entry.device_kind, tuple(entry.times_ns.items()), entry.origin, entry.spread)
        row = rows.setdefault(key, {
            "group": entry.group, "alike": 0, "device_kind": entry.device_kind,
            **{f"{phase}_us": entry.times_ns[phase] / 1000 if phase in entry.times_ns else None for phase in Phase},
            "origin": entry.origin, "spread": entry.spread})
        row["alike"] += 1
    return list(rows.values())


def _show_timelines(files: list[tuple[Path, Plan | Timeline]], html_file: Path | None, trace_file: Path | None,
                    json_output: bool) -> None:
    from mipipe.cli.printing import html, panels
    from mipipe.cli.printing.report import (
        capacities,
        estimate_lines,
        print_outcome,
        print_placement,
        print_timeline,
        report_tiles,
        timeline_data,
    )
    from mipipe.planner.execution.quick_timeline import timeline_of
    from mipipe.planner.plan import Plan

    drawn: list[tuple[str, Timeline, Plan | None]] = []
    plans = [item for _, item in files if isinstance(item, Plan)]
    for path, item in files:
        if isinstance(item, Plan):
            drawn.append((f"{path.name} simulated", timeline_of(item), item))
        else:
            same = plans[0] if plans and plans[0].problem.num_ranks == item.num_ranks else None
            drawn.append((f"{path.name} {item.origin}", item, same))
    first = drawn[0][1]
    ratios = [timeline.makespan_ns / max(first.makespan_ns, 1) for _, timeline, _ in drawn]
    if html_file is not None:
        tiles = report_tiles(plans[0], first) if plans else []
        tiles += [(f"{name} / first", f"{ratio:.3f}") for (name, _, _), ratio in
                  zip(drawn[1:], ratios[1:], strict=True)]
        html.write(html_file, drawn[0][0], [panels.panel_of(*panel) for panel in drawn], tiles)
    if trace_file is not None:
        from mipipe.graphs.serialize import write_text
        from mipipe.planner.execution.export import perfetto_text

        write_text(trace_file, perfetto_text(*(timeline for _, timeline, _ in drawn)))
    if json_output:
        emit({"timelines": [{"name": name, **timeline_data(timeline, capacities(plan) if plan else ()), "ratio": ratio}
                            for (name, timeline, plan), ratio in zip(drawn, ratios, strict=True)]})
        return
    console = stdout()
    for plan in plans:
        print_placement(console, plan)
        print_outcome(console, plan)
    until = max(timeline.makespan_ns for _, timeline, _ in drawn)
    for number, (name, timeline, of) in enumerate(drawn):
        console.print(f"\n{name}", style="bold")
        print_timeline(console, timeline, capacities(of) if of else (), until, number == len(drawn) - 1, of)
        for line in estimate_lines(of, timeline) if of is not None and timeline.origin == "simulated" else ():
            console.print(line, soft_wrap=True)
        if number:
            console.print(f"{name} / {drawn[0][0]}: {ratios[number]:.3f}{_without_optimizer(timeline, first)}",
                          style="bold")
        for key, note in timeline.notes.items():
            if number:
                console.print(f"  {key}: {note}", style="dim")
