"""``mipipe plan``: an operator graph and a cluster become a plan, with a bound on how good any plan could be."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mipipe.cli.output import Html, Json, Seed, TimeLimit, Trace, check_folder, emit, log, progress, stdout
from mipipe.graphs.errors import InfeasibleError, TimeUpError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mipipe.planner.ladder.objectives import ParetoPoint
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.problem import PlanningProblem
    from mipipe.planner.solve import Progress, SolveResult

EXAMPLE = "mipipe plan graph.json --cluster cluster.yaml --microbatches 8 --costs costs.json -o plan.json"


def plan(
    graph: Annotated[Path, typer.Argument(metavar="GRAPH", help="An operator graph, a coarse graph, or a whole"
                                                               " planning problem.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The plan to write.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="The cluster file (YAML): devices and links.")] = None,
    microbatches: Annotated[int | None, typer.Option(help="Microbatches of one training step.")] = None,
    groups: Annotated[int | None, typer.Option(
        help="Merge operators into about this many groups (default: as in --costs).")] = None,
    granularity: Annotated[str | None, typer.Option(help="Or merge by structure: layer, block, operator.")] = None,
    costs: Annotated[Path | None, typer.Option(
        help="Cost table from `mipipe profile` or `calibrate` (default: roofline estimates of the device"
             " kinds).")] = None,
    experts: Annotated[Path | None, typer.Option(help="Tokens per layer and expert (as for `mipipe experts --loads`):"
                                                      " expert groups take time by their tokens.")] = None,
    sizes: Annotated[Path | None, typer.Option(
        help="Relative sizes of the microbatches by modality branch (YAML, such as 'vision: [0, 3, 1, 4]' for the"
             " images in each).")] = None,
    activations: Annotated[str | None, typer.Option(help="Limit on every device's activations, such as 20GB.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of every device, such as 80GB, instead of the"
                                                    " cluster's.")] = None,
    optimizer: Annotated[str, typer.Option(help="What the optimizer keeps: none, sgd, momentum, adam, adamw,"
                                                " adamw_mixed.")] = "adamw",
    placement: Annotated[str, typer.Option(help="free, or a fixed shape: chain, v, interleaved, wave, two-way,"
                                                " two-way-v, two-way-interleaved, twin-chain, twin-v, twin-wave (two"
                                                " copies side by side on half of the ranks), ring, ring-v; for models"
                                                " with encoders also apart (on ranks of their own) and colocated."
                                                )] = "free",
    objective: Annotated[str, typer.Option(help="makespan; memory (the least activations within 5 % of the best"
                                                " makespan); or utilisation (the busiest devices within 5 %: those that"
                                                " hardly help are given back).")] = "makespan",
    recompute: Annotated[bool, typer.Option(help="Let groups run their forward twice to save memory.")] = False,
    pareto: Annotated[bool, typer.Option("--pareto", help="Instead of one plan, the frontier of memory against"
                                                          " bubble: one solve for each activation limit.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Say what binds, and what each rung found.")] = False,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    html_file: Html = None,
    trace_file: Trace = None,
    json_output: Json = False,
) -> None:
    """Plan a training step: placement, order of work, and a bound. Ctrl-C keeps the best plan so far."""
    for path, option in ((output, "--output"), (html_file, "--html"), (trace_file, "--trace")):
        check_folder(path, option)
    from mipipe.cli.inputs import read_problem
    from mipipe.cli.report import gap, plan_data, print_plan, timeline_data, write_files
    from mipipe.graphs.serialize import save, to_data
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.quick_timeline import timeline_of
    from mipipe.planner.solve import plan as solve

    options = PlanOptions(time_limit_s=time_limit, seed=seed, placement=placement,  # type: ignore[arg-type]
                          objective=objective, recompute=recompute)  # type: ignore[arg-type]
    problem = read_problem(graph, cluster, microbatches, groups=groups, granularity=granularity, costs=costs,
                           memory=memory, experts=experts, sizes=sizes, activations=activations,
                           optimizer=optimizer, recompute=recompute)
    if pareto:
        _print_frontier(problem, options, html_file, json_output)
        return
    with progress("planning") as update:
        result = solve(problem, options, show_progress(update, problem.unit_ns))
    if result.plan is None:
        raise_reason(result)
    assert result.plan is not None
    found = dataclasses.replace(result.plan, provenance={**result.plan.provenance, "options": to_data(options)})
    timeline = timeline_of(found)
    if output is not None:
        save(found, output)
    write_files(found, [(f"simulated, placement {found.placement.name}", timeline)], html_file, trace_file)
    if json_output:
        data = {**plan_data(found), **timeline_data(timeline), "termination": result.termination.value,
                "rung": result.rung, "seconds": round(result.seconds, 3),
                "placement_gap": gap(found.makespan_ns, found.placement_bound_ns),
                "history": [{"seconds": round(item.seconds, 3), "makespan": item.makespan_ns / problem.unit_ns,
                             "rung": item.rung, "placement": item.placement} for item in result.history]}
        if explain:
            data |= {"explanation": list(result.explanation), "ablation": list(result.ablation)}
        emit(data)
        return
    console = stdout()
    print_plan(console, found, timeline)
    console.print(f"found by {result.rung} in {result.seconds:.1f} s ({result.termination.value})")
    if "utilisation" in found.provenance:
        console.print(f"utilisation {found.provenance['utilisation']:.1%} of the {found.provenance['devices_in_use']}"
                      f" devices in use, of {problem.num_ranks}")
    if explain:
        _print_explanation(result, problem.unit_ns)
    if output is not None:
        console.print(f"wrote {output}")


def _print_frontier(problem: PlanningProblem, options: PlanOptions, html_file: Path | None, json_output: bool) -> None:
    """The memory-bubble frontier as a table, JSON and a picture."""
    from mipipe.cli import html
    from mipipe.cli.report import gap
    from mipipe.cli.tables import print_rows
    from mipipe.planner.ladder.objectives import pareto

    with progress("planning the frontier") as update:
        points = pareto(problem, options, on_point=lambda point: update(f"{point.activation_bytes:,} bytes done"))
    unit = problem.unit_ns
    rows: list[dict[str, Any]] = [{
        "activation_bytes": point.activation_bytes, "peak_bytes": point.peak_bytes,
        "makespan": None if point.makespan_ns is None else point.makespan_ns / unit,
        "bound": None if point.bound_ns is None else point.bound_ns / unit, "bubble_ratio": point.bubble_ratio,
        "gap": gap(point.makespan_ns, point.bound_ns), "placement": point.placement, "reason": point.reason}
        for point in points]
    told = [frontier_cells(point, unit) for point in points]
    if html_file is not None:
        picture = html.frontier([(row["peak_bytes"], row["bubble_ratio"], least_bubble(row), row["placement"])
                                 for row in rows if row["bubble_ratio"] is not None])
        unbroken = [[value.replace(" ", "\u00a0") for value in row.values()] for row in told]
        table = html.table([*told[0], "reason"], [[*row, point.reason]
                                                  for row, point in zip(unbroken, points, strict=True)])
        html.write(html_file, f"{problem.name}: memory against bubble", [], extra=picture + table)
    if json_output:
        emit({"problem": problem.digest(), "unit_ns": unit, "points": rows})
    else:
        console = stdout()
        print_rows(console, told, title=f"{problem.name}: memory against bubble")
        for row in rows:
            if row["reason"]:
                console.print(f"at {row['activation_bytes']:,} bytes: {row['reason']}", style="dim")


def frontier_cells(point: ParetoPoint, unit_ns: int) -> dict[str, str]:
    """A point of the frontier as a person reads it."""
    from mipipe.cli.report import gap
    from mipipe.cli.terminal import format_time
    from mipipe.graphs.units import format_bytes

    share = gap(point.makespan_ns, point.bound_ns)
    return {"activation limit": format_bytes(point.activation_bytes),
            "peak": "" if point.peak_bytes is None else format_bytes(point.peak_bytes),
            "makespan": "" if point.makespan_ns is None else format_time(point.makespan_ns, unit_ns),
            "bound": "" if point.bound_ns is None else format_time(point.bound_ns, unit_ns),
            "gap": "" if share is None else f"{share:.1%}",
            "bubble": "" if point.bubble_ratio is None else f"{point.bubble_ratio:.1%}", "placement": point.placement}


def least_bubble(row: Mapping[str, Any]) -> float:
    """The bubble ratio that no plan at this limit can be below: that of a makespan equal to the bound."""
    if not row["bound"]:
        return 0.0
    return max(0.0, 1 - (1 - row["bubble_ratio"]) * row["makespan"] / row["bound"])


def show_progress(update: Callable[[str], None], unit_ns: int) -> Callable[[Progress], None]:
    """A progress callback that says the best makespan, its gap and who found it."""
    from mipipe.cli.terminal import format_time

    def on_progress(state: Progress) -> None:
        text = f"{state.seconds:.0f} s, {state.phase}"
        if state.makespan_ns:
            text += f", makespan {format_time(state.makespan_ns, unit_ns)}"
        if state.makespan_ns and state.bound_ns:
            text += f" (gap {state.makespan_ns / state.bound_ns - 1:.1%})"
        update(text)

    return on_progress


def raise_reason(result: SolveResult) -> None:
    """Raise the error of a solve that ended without a plan."""
    from mipipe.planner.solve import Termination

    if result.termination is Termination.INFEASIBLE:
        raise InfeasibleError(f"no plan exists: {result.reason}")
    if result.termination is Termination.INTERRUPTED:
        raise KeyboardInterrupt
    raise TimeUpError(result.reason)


def rung_cells(row: Mapping[str, Any], unit_ns: int) -> dict[str, Any]:
    """A row of the ablation as a person reads it: times with units where the problem's are nanoseconds."""
    from mipipe.cli.terminal import format_time

    times = {name: None if row.get(name) is None else format_time(row[name] * unit_ns, unit_ns)
             for name in ("before", "makespan")}
    return {"rung": row["rung"], "placement": row["placement"], **times, "variables": row["variables"],
            "constraints": row["constraints"], "seconds": row["seconds"]}


def _print_explanation(result: SolveResult, unit_ns: int) -> None:
    from mipipe.cli.tables import print_rows

    console = stdout()
    for line in result.explanation:
        console.print(line)
    print_rows(console, [rung_cells(row, unit_ns) for row in result.ablation], title="what each rung found")
    if not sys.stdout.isatty():
        log(f"{len(result.history)} improvements")
