"""How plans and timelines are told: to people on the terminal, as plain data for ``--json``, and into files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mipipe.cli import terminal
from mipipe.cli.output import number
from mipipe.planner.options import options_of
from mipipe.planner.plan import Plan
from mipipe.planner.timeline import Timeline


def capacities(plan: Plan) -> tuple[int | None, ...]:
    """Each device's memory, None where the problem sets no limit."""
    return tuple(None if device.memory_bytes >= 2**60 else device.memory_bytes
                 for device in plan.problem.topology.devices)


def timeline_data(timeline: Timeline, limits: Sequence[int | None] = ()) -> dict[str, Any]:
    """The figures of a timeline as JSON data; times in the problem's unit (``unit_ns`` nanoseconds)."""
    unit = timeline.unit_ns
    bubbles = timeline.bubbles_ns()
    return {
        "origin": timeline.origin,
        "unit_ns": unit,
        "makespan": number(timeline.makespan_ns / unit),
        "bubble": number(max(bubbles) / unit),
        "bubble_mean": number(sum(bubbles) / len(bubbles) / unit),
        "bubble_ratio": timeline.bubble_ratio,
        "ranks": [{"rank": rank, "busy": number(timeline.busy_ns(rank) / unit),
                   "bubble": number(bubbles[rank] / unit), "peak_bytes": timeline.peak_bytes(rank),
                   "resident_bytes": timeline.resident_bytes[rank] if timeline.resident_bytes else None,
                   "capacity_bytes": limits[rank] if limits else None} for rank in range(timeline.num_ranks)],
    }


def plan_data(plan: Plan) -> dict[str, Any]:
    """What a plan says about itself as JSON data."""
    unit = plan.problem.unit_ns
    return {
        "name": plan.name,
        "placement": plan.placement.name,
        "stages": [{"groups": [plan.problem.groups[group].name for group in stage.groups], "ranks": list(stage.ranks),
                    "recompute": stage.recompute} for stage in plan.placement.stages],
        "problem": plan.problem.digest(),
        "microbatches": plan.problem.num_microbatches,
        "bound": None if plan.bound_ns is None else number(plan.bound_ns / unit),
        "placement_bound": None if plan.placement_bound_ns is None else number(plan.placement_bound_ns / unit),
        "gap": gap(plan.makespan_ns, plan.bound_ns),
        "provenance": plan.provenance,
    }


def gap(makespan_ns: int | None, bound_ns: int | None) -> float | None:
    """``makespan / bound - 1``; None where either is unknown."""
    if makespan_ns is None or not bound_ns:
        return None
    return makespan_ns / bound_ns - 1


def print_timeline(console: Console, timeline: Timeline, limits: Sequence[int | None] = (),
                   until_ns: int | None = None, explained: bool = True) -> None:
    """The drawn timeline, its legend, its figures and the memory of every rank."""
    console.print(terminal.draw(timeline, console.width, until_ns), end="")
    if explained:
        console.print(terminal.legend(timeline))
    console.print(terminal.summary(timeline), soft_wrap=True)
    for line in terminal.memory_lines(timeline, limits or (None,) * timeline.num_ranks):
        console.print(line, soft_wrap=True)


def print_plan(console: Console, plan: Plan, timeline: Timeline) -> None:
    """The plan as timeline, with makespan, bound, gap, bubble ratio and memory per device against capacity."""
    print_placement(console, plan)
    print_timeline(console, timeline, capacities(plan))
    console.print(bound_line(plan), style="bold", soft_wrap=True)


def print_placement(console: Console, plan: Plan) -> None:
    """Which groups every rank holds."""
    problem = plan.problem
    console.print(f"{plan.name}: {len(problem.groups)} groups in {len(plan.placement.stages)} stages, placement"
                  f" {plan.placement.name}, {problem.num_microbatches} microbatches, {problem.num_ranks} ranks",
                  soft_wrap=True)
    for rank, device in enumerate(problem.topology.devices):
        held = [f"{index}: {_names(plan, stage.groups)}{' (recomputed)' if stage.recompute else ''}"
                for index, stage in enumerate(plan.placement.stages) if rank in stage.ranks]
        console.print(f"  rank {rank} ({device.name}): " + ("stages " + "; ".join(held) if held else "nothing"),
                      soft_wrap=True)


def _names(plan: Plan, groups: Sequence[int]) -> str:
    names = [plan.problem.groups[group].name.removeprefix("model.") for group in groups]
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]} ({len(names)})"


def bound_line(plan: Plan) -> str:
    """Makespan, bound and gap in one line, and over which placements the bound holds."""
    unit = plan.problem.unit_ns
    if plan.makespan_ns is None:
        return "no makespan recorded"
    parts = [f"makespan {terminal.format_time(plan.makespan_ns, unit)}"]
    allowed = options_of(plan).placement
    over = "bound over all placements" if allowed == "free" else f"bound over placements of shape {allowed}"
    for name, bound in ((over, plan.bound_ns),
                        ("bound at this placement", plan.placement_bound_ns)):
        if bound is not None:
            missing = gap(plan.makespan_ns, bound)
            shown = "proven optimal" if not missing else f"gap {missing:.1%}"
            parts.append(f"{name} {terminal.format_time(bound, unit)} ({shown})")
    return ", ".join(parts)


def facts(plan: Plan, timeline: Timeline) -> list[tuple[str, str]]:
    """The tiles of the HTML report."""
    unit = timeline.unit_ns
    tiles = [("makespan", terminal.format_time(timeline.makespan_ns, unit)),
             ("bubble ratio", f"{timeline.bubble_ratio:.1%}"),
             ("largest bubble", terminal.format_time(max(timeline.bubbles_ns()), unit)),
             ("placement", plan.placement.name), ("ranks", str(plan.problem.num_ranks)),
             ("microbatches", str(plan.problem.num_microbatches))]
    missing = gap(plan.makespan_ns, plan.bound_ns)
    if plan.bound_ns is not None and missing is not None:
        tiles += [("bound", terminal.format_time(plan.bound_ns, unit)), ("gap", f"{missing:.1%}")]
    return tiles


def write_files(plan: Plan, timelines: Sequence[tuple[str, Timeline]], html_file: Path | None,
                trace_file: Path | None, extra: str = "") -> None:
    """The HTML timeline and the Perfetto trace of ``timelines``, where asked for. The trace holds all of them."""
    if html_file is not None:
        from mipipe.cli import html

        panels = [html.Panel(title, timeline, capacities(plan)) for title, timeline in timelines]
        html.write(html_file, plan.name, panels, facts(plan, timelines[0][1]), extra)
    if trace_file is not None:
        from mipipe.graphs.serialize import write_text
        from mipipe.planner.execution.export import perfetto_text

        write_text(trace_file, perfetto_text(*(timeline for _, timeline in timelines)))
