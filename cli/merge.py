"""``mipipe merge``: merge checkpoints as a recipe says, on one or several ranks, or show what it would do."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mipipe.cli.printing.merge_methods import list_methods
from mipipe.cli.printing.output import Json, check_files, emit, log, progress, stdout
from mipipe.cli.requests.files import read_size
from mipipe.graphs.errors import InputError
from mipipe.graphs.units import format_bytes, format_ns

if TYPE_CHECKING:
    from mipipe.planner.merging.plan import MergePlan
    from mipipe.planner.timeline import Timeline
    from mipipe.runtime.merge.launching.launch import MergeOptions, MergeResult

EXAMPLE = "mipipe merge recipe.yaml -o merged --ranks 2 --memory 4GB"


def merge(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="The recipe: YAML in mergekit's vocabulary; or"
                                                                         " a folder of stored parts.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder to make.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes that merge side by side.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Dtype of the result, in place of the recipe's.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory per rank beyond the bare process, as 4GB.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of the result.")] = "5GB",
    loader: Annotated[list[str] | None, typer.Option("--loader", metavar="PACKAGE.MODULE:FUNCTION", help="A function"
                                                     " that the recipe's calibration may call for samples. May be"
                                                     " repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read headers only.")] = False,
    store: Annotated[bool, typer.Option("--store", help="Store the experts as parts (onebit, twin, rmm), to be"
                                                        " rebuilt for a route later.")] = False,
    route: Annotated[str | None, typer.Option(help="Rebuild stored parts: each expert's weight, as 0,1,0.")] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not open the result as transformers would before it"
                                                                " is called done.")] = False,
    timeline: Annotated[Path | None, typer.Option(help="Write the timeline here, for mipipe show: measured, or"
                                                       " simulated with --dry-run.")] = None,
    methods: Annotated[bool, typer.Option("--methods", help="List the merge methods and their parameters, or the one"
                                                            " named in place of the recipe.")] = False,
    json_output: Json = False,
) -> None:
    """Merge model checkpoints as RECIPE says. An interrupted merge continues when the same command runs again."""
    from mipipe.cli.requests.given import refuse
    from mipipe.graphs.merging.recipes.recipe import DTYPES

    if methods:
        refuse(("output", "ranks", "device", "dtype", "memory", "shard_size", "loader", "dry_run", "store", "route",
                "no_verify", "timeline"), "does not go with --methods, which merges nothing")
        list_methods(None if recipe is None else str(recipe), json_output)
        return
    if recipe is None:
        raise typer.BadParameter("missing; give a recipe", param_hint="RECIPE")
    if output is None:
        raise typer.BadParameter("missing; give the folder to make", param_hint="-o")
    check_files(recipe, timeline=timeline)
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    cap = None if memory is None else read_size(memory, "--memory")
    size = read_size(shard_size, "--shard-size")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    if store and route is not None:
        raise typer.BadParameter("rebuilds what --store made before; give one of them", param_hint="--route")
    record = None if timeline is None else str(timeline)
    if store or route is not None:
        from mipipe.runtime.merge.launching.launch import MergeOptions

        refuse(("loader", "no_verify"), "does not go with --store and --route")
        if dtype is not None:
            raise typer.BadParameter("parts and what is rebuilt from them have the models' dtypes; leave it out",
                                     param_hint="--dtype")
        _parts(recipe, output, route, MergeOptions(ranks, device, cap, size, timeline=record), dry_run, json_output)
        return
    if dry_run:
        began = time.perf_counter()
        plans = _plans(recipe, output, ranks, cap, size, dtype)
        _dry_run(plans, record, json_output, not no_verify, round((time.perf_counter() - began) * 1e9))
        return
    from mipipe.runtime.merge.launching.launch import MergeOptions
    from mipipe.runtime.merge.launching.launch import merge as run
    from mipipe.runtime.weights.writer import partial_folder

    options = MergeOptions(ranks, device, cap, size, dtype, record, verify=not no_verify,
                           loaders=tuple(loader or ()))
    try:
        with progress("merging") as update:
            result = run(recipe, output, options, lambda done, total: update(f"{done / max(1, total):.0%}"), _note)
    except KeyboardInterrupt:
        if partial_folder(output).exists():
            log(f"mipipe: {partial_folder(output)} keeps what is done; the same command continues from it")
        raise
    _tell(result, json_output)


def _note(text: str) -> None:
    """A line about what a merge leaves out or cannot tell."""
    log(f"mipipe: {text}")


def _tell(result: MergeResult, json_output: bool) -> None:
    """What a finished merge did."""
    if result.plan is None:
        _tell_adapter(result, json_output)
        return
    if json_output:
        emit({"output": str(result.out), "seconds": round(result.seconds, 3), "ranks": list(result.reports),
              "tensors": len(result.plan.graph.units), "read_bytes": result.plan.graph.read_bytes,
              "bytes_written": result.plan.graph.write_bytes, "files": len(result.plan.shards),
              "planned_bytes": result.plan.memory_bytes, "planned_by": result.plan.provenance})
        return
    written = sum(report["write_bytes"] for report in result.reports)
    console = stdout()
    resumed = sum(report["resumed"] for report in result.reports)
    console.print(f"{result.out}: {len(result.plan.graph.units)} tensors"
                  f"{f' ({resumed} by an earlier run)' if resumed else ''}, {format_bytes(written)} written in"
                  f" {result.seconds:.1f} s on {_count(len(result.reports), 'rank')}, peak memory beyond the bare"
                  f" process {format_bytes(max(report['peak_bytes'] for report in result.reports))}")


def _tell_adapter(result: MergeResult, json_output: bool) -> None:
    """What became of adapters merged into one."""
    made = result.adapter
    assert made is not None
    if json_output:
        emit({"output": str(result.out), "seconds": round(result.seconds, 3), "ranks_of_modules": made.ranks,
              "bytes_written": made.num_bytes, "kept": made.kept})
        return
    low, high = min(made.ranks.values()), max(made.ranks.values())
    stdout().print(f"{result.out}: a LoRA adapter of {len(made.ranks)} weights, rank {low}"
                   + (f" to {high}" if high > low else "") + f", {format_bytes(made.num_bytes)}; it has {made.kept:.2%}"
                   " of the squared norm of the merged task vectors", soft_wrap=True)


def _parts(recipe: Path, output: Path, route: str | None, options: MergeOptions, dry_run: bool,
           json_output: bool) -> None:
    """Store a recipe's experts, or rebuild a model from stored ones."""
    from mipipe.graphs.merging.recipes.read import read_recipes
    from mipipe.runtime.merge.launching import store

    if route is None:
        recipes = read_recipes(recipe)
        if len(recipes) > 1:
            raise InputError(f"{recipe}: has {len(recipes)} recipes; parts are stored of one")
        if dry_run:
            _dry_run(store.plan_store(recipes[0], output, str(recipe), options), options.timeline, json_output)
            return
        made = store.store(recipes[0], output, str(recipe), options)
    else:
        try:
            weights = [float(item) for item in route.split(",")]
        except ValueError:
            raise InputError(f"--route: found {route!r}, expected numbers such as 0,1,0") from None
        if dry_run:
            _dry_run([store.plan_rebuild(recipe, output, weights, options)], options.timeline, json_output)
            return
        made = store.rebuild(recipe, output, weights, options)
    if json_output:
        emit({"output": str(output), "method": made.method, "experts": list(made.experts),
              "stored_bytes": made.num_bytes})
        return
    whole = made.graph.write_bytes * len(made.experts)
    stdout().print(f"{output}: {made.method}, {len(made.experts)} experts in {format_bytes(made.num_bytes)} of parts"
                   f" ({made.num_bytes / whole:.1%} of their checkpoints)"
                   + ("" if route is None else f", rebuilt for route {route}"), soft_wrap=True)


def _plans(recipe: Path, output: Path, ranks: int, cap: int | None, size: int, dtype: str | None) -> list[MergePlan]:
    """The plans of a file's recipes, or of its assembly."""
    from mipipe.graphs.merging.moe_recipe import build_moe, dry_router, read_moe_recipe
    from mipipe.graphs.merging.recipes.read import read_recipes
    from mipipe.planner.merging.plan import plan_chain, plan_graph

    assembly = read_moe_recipe(recipe)
    if assembly is not None:
        assembly = dataclasses.replace(assembly, dtype=dtype or assembly.dtype)
        return [plan_graph(build_moe(assembly, dry_router(assembly), str(recipe)), output, ranks, cap, size)]
    recipes = read_recipes(recipe)
    if recipes[-1].adapter is not None:
        raise InputError(f"{recipe}: adapters merged into an adapter take no plan and no time to speak of; leave out"
                         " --dry-run")
    return plan_chain(recipes, str(recipe), output, ranks, cap, size, dtype)


def _dry_run(plans: list[MergePlan], timeline: str | None, json_output: bool, verify: bool = False,
             planning_ns: int = 0) -> None:
    """Show what merges would do, by simulating their programs."""
    from mipipe.graphs.serialize import save
    from mipipe.planner.merging.costs import start_ns, verify_ns
    from mipipe.planner.merging.lower import lower_merge
    from mipipe.planner.merging.simulate import simulate_merge
    from mipipe.runtime.merge.output.opened import key_of_graph, was_opened

    simulated = [(plan, simulate_merge(plan, lower_merge(plan))) for plan in plans]
    if timeline is not None:
        save(simulated[-1][1], timeline)
    for note in dict.fromkeys(note for plan in plans for note in plan.graph.notes):
        _note(note)
    rates, ranks = plans[-1].rates, len(plans[-1].loads)
    merging = sum(shown.makespan_ns for _, shown in simulated)
    start = start_ns(rates, ranks) + planning_ns
    if verify and not all(was_opened(key_of_graph(plan.graph)) for plan in plans):
        start += verify_ns(rates, merging, ranks)
    total = start + merging
    if json_output:
        emit({"recipes": [_facts(*item) for item in simulated], "start_ns": start, "total_ns": total})
        return
    for item in simulated:
        _show(*item)
    stdout().print(f"estimated time {format_ns(total)}, {format_ns(start)} of it to start{' and verify' * verify}, by"
                   f" simulation at rates measured now (read {format_bytes(round(rates.read))}/s, write"
                   f" {format_bytes(round(rates.write))}/s)", soft_wrap=True)
    if ranks > 1:
        _say_whether_ranks_pay(plans, merging)


def _say_whether_ranks_pay(plans: list[MergePlan], merging_ns: int) -> None:
    """A line where one rank would be about as fast as several."""
    from mipipe.planner.merging.costs import start_ns
    from mipipe.planner.merging.lower import lower_merge
    from mipipe.planner.merging.plan import plan_merge
    from mipipe.planner.merging.simulate import simulate_merge

    ranks, alone = len(plans[-1].loads), 0
    for plan in plans:
        single = plan_merge(plan.graph, 1, plan.rates)
        alone += simulate_merge(single, lower_merge(single)).makespan_ns
    several = merging_ns + start_ns(plans[-1].rates, ranks) - start_ns(plans[-1].rates)
    if several > 0.9 * alone:
        stdout().print(f"{ranks} ranks do not pay: one would merge in {format_ns(alone)}, they in {format_ns(several)}",
                       soft_wrap=True)


def _facts(plan: MergePlan, timeline: Timeline) -> dict[str, Any]:
    """The figures of a plan and its simulated timeline, for machines."""
    graph = plan.graph
    return {"tensors": len(graph.units), "read_bytes": graph.read_bytes, "bytes_written": graph.write_bytes,
            "files": len(plan.shards), "estimated_ns": timeline.makespan_ns,
            "peak_bytes": max(map(timeline.peak_bytes, range(timeline.num_ranks))), "work_ns": plan.time_ns,
            "bound_ns": plan.bound_ns, "portion_entries": plan.portion_entries, "ahead": plan.ahead,
            "loads": [{"work_ns": load.time_ns, "compute_ns": load.compute_ns, "read_bytes": load.read_bytes,
                       "write_bytes": load.write_bytes, "peak_bytes": timeline.peak_bytes(rank),
                       "tensors": load.num_units} for rank, load in enumerate(plan.loads)],
            "planned_by": plan.provenance}


def _show(plan: MergePlan, timeline: Timeline) -> None:
    """A plan and its simulated timeline, for people."""
    console, facts, graph = stdout(), _facts(plan, timeline), plan.graph
    name = f"{graph.recipe['name']}, " if graph.recipe.get("name") else ""
    console.print(f"{name}{graph.recipe.get('merge_method', 'experts of dense models')}: {len(graph.units)} tensors of"
                  f" {_count(len(graph.models), 'model')} ({format_bytes(graph.read_bytes)}) into"
                  f" {_count(len(plan.shards), 'file')} ({format_bytes(graph.write_bytes)})", soft_wrap=True)
    for model in graph.models:
        licence = f"licence {model.licence}" if model.licence else "made here"
        console.print(f"  {model.label}: {format_bytes(model.num_bytes)}, {licence}", soft_wrap=True)
    sheet = Table("rank", "tensors", "reads", "computes", "writes", "work", "peak memory")
    for rank, load in enumerate(facts["loads"]):
        sheet.add_row(str(rank), str(load["tensors"]), format_bytes(load["read_bytes"]), format_ns(load["compute_ns"]),
                      format_bytes(load["write_bytes"]), format_ns(load["work_ns"]), format_bytes(load["peak_bytes"]))
    console.print(sheet)
    read = sum(load.read_bytes for load in plan.loads)
    console.print(f"merging takes {format_ns(facts['estimated_ns'])}", soft_wrap=True)
    if graph.calibration is not None:
        streams = _count(len(graph.calibration.streams), "stream")
        console.print(f"running the models takes {format_ns(_running_ns(timeline))} of it: {streams} of up to"
                      f" {graph.calibration.samples} samples of {graph.calibration.length} tokens", soft_wrap=True)
    if read > graph.read_bytes:
        console.print(f"the inputs are read {read / graph.read_bytes:.2g} times: to measure, then to merge")
    if len(plan.loads) > 1:
        console.print(f"the busiest rank has {format_ns(plan.time_ns)} of work; an even share would be"
                      f" {format_ns(plan.bound_ns or 0)}")


def _running_ns(timeline: Timeline) -> int:
    """How long the models are run, until the last rank is done with it."""
    from mipipe.planner.actions import ActionKind

    return max((span.end_ns for span in timeline.spans if span.kind is ActionKind.CALIBRATE), default=0)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
