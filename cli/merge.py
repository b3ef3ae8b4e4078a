"""``mipipe merge``: merge checkpoints as a recipe says, on one or several ranks, or show what it would do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mipipe.cli.output import Json, emit, progress, stdout
from mipipe.graphs.errors import InputError
from mipipe.graphs.units import format_bytes, format_ns, parse_bytes

if TYPE_CHECKING:
    from mipipe.planner.merge_plan import MergePlan

EXAMPLE = "mipipe merge recipe.yaml -o merged --ranks 2 --memory 4GB"


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: YAML in mergekit's vocabulary; or a"
                                                                  " folder of stored parts.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")],
    ranks: Annotated[int, typer.Option(help="Processes that merge side by side.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Dtype of the result, in place of the recipe's.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory per rank beyond the bare process, as 4GB.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of the result.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read headers only.")] = False,
    store: Annotated[bool, typer.Option("--store", help="Store the experts as parts (onebit, twin, rmm), to be"
                                                        " rebuilt for a route later.")] = False,
    route: Annotated[str | None, typer.Option(help="Rebuild stored parts: each expert's weight, as 0,1,0.")] = None,
    json_output: Json = False,
) -> None:
    """Merge model checkpoints as RECIPE says. An interrupted merge continues when the same command runs again."""
    from mipipe.graphs.recipe import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is none of {', '.join(DTYPES)}", param_hint="--dtype")
    cap = None if memory is None else parse_bytes(memory, "--memory")
    size = parse_bytes(shard_size, "--shard-size")
    if store or route is not None:
        _parts(recipe, output, route, json_output)
        return
    if dry_run:
        plans = _plans(recipe, output, ranks, cap, size, dtype)
        if json_output:
            emit({"recipes": [_facts(plan) for plan in plans]})
            return
        for plan in plans:
            _show(plan)
        return
    from mipipe.runtime.merge.launch import MergeOptions
    from mipipe.runtime.merge.launch import merge as run

    options = MergeOptions(ranks, device, cap, size, dtype)
    with progress("merging") as update:
        result = run(recipe, output, options, lambda done, total: update(f"{done / max(1, total):.0%}"))
    if json_output:
        emit({"output": str(result.out), "seconds": round(result.seconds, 3), "ranks": list(result.reports),
              **_facts(result.plan)})
        return
    written = sum(report["write_bytes"] for report in result.reports)
    console = stdout()
    console.print(f"{result.out}: {len(result.plan.graph.units)} tensors, {format_bytes(written)} written in"
                  f" {result.seconds:.1f} s on {ranks} rank{'s' if ranks > 1 else ''}, peak memory beyond the bare"
                  f" process {format_bytes(max(report['peak_bytes'] for report in result.reports))}")


def _parts(recipe: Path, output: Path, route: str | None, json_output: bool) -> None:
    """Store a recipe's experts, or rebuild a model from stored ones."""
    from mipipe.graphs.recipe import read_recipes
    from mipipe.runtime.merge import parts

    if route is None:
        recipes = read_recipes(recipe)
        if len(recipes) > 1:
            raise InputError(f"{recipe}: has {len(recipes)} recipes; parts are stored of one")
        made = parts.store(recipes[0], output, str(recipe))
    else:
        try:
            weights = [float(item) for item in route.split(",")]
        except ValueError:
            raise InputError(f"--route: found {route!r}, expected numbers such as 0,1,0") from None
        made = parts.rebuild(recipe, output, weights)
    if json_output:
        emit({"output": str(output), "method": made.method, "experts": list(made.experts),
              "stored_bytes": made.num_bytes})
        return
    whole = made.graph.write_bytes * len(made.experts)
    stdout().print(f"{output}: {made.method}, {len(made.experts)} experts in {format_bytes(made.num_bytes)} of parts"
                   f" ({made.num_bytes / whole:.1%} of their checkpoints)"
                   + ("" if route is None else f", rebuilt for route {route}"))


def _plans(recipe: Path, output: Path, ranks: int, cap: int | None, size: int, dtype: str | None) -> list[MergePlan]:
    """The plans of a file's recipes, or of its assembly."""
    from mipipe.graphs.moe_recipe import build_moe, dry_router, read_moe_recipe
    from mipipe.graphs.recipe import read_recipes
    from mipipe.planner.merge_plan import plan_chain, plan_graph

    assembly = read_moe_recipe(recipe)
    if assembly is not None:
        assembly = dataclasses.replace(assembly, dtype=dtype or assembly.dtype)
        return [plan_graph(build_moe(assembly, dry_router(assembly), str(recipe)), output, ranks, cap, size)]
    return plan_chain(read_recipes(recipe), str(recipe), output, ranks, cap, size, dtype)


def _facts(plan: MergePlan) -> dict[str, Any]:
    """The plan's figures for machines."""
    graph = plan.graph
    return {"tensors": len(graph.units), "read_bytes": graph.read_bytes, "bytes_written": graph.write_bytes,
            "files": len(plan.shards), "estimated_ns": plan.time_ns, "bound_ns": plan.bound_ns,
            "loads": [{"time_ns": load.time_ns, "read_bytes": load.read_bytes, "write_bytes": load.write_bytes,
                       "memory_bytes": load.memory_bytes, "tensors": load.num_units} for load in plan.loads],
            "planned_by": plan.provenance}


def _show(plan: MergePlan) -> None:
    console = stdout()
    graph = plan.graph
    console.print(f"{graph.recipe['merge_method']}: {len(graph.units)} tensors of {len(graph.models)} models,"
                  f" {format_bytes(graph.read_bytes)} to read, {format_bytes(graph.write_bytes)} to write in"
                  f" {len(plan.shards)} file{'s' if len(plan.shards) > 1 else ''}")
    for model in graph.models:
        console.print(f"  {model.label}: {format_bytes(model.num_bytes)}, licence {model.licence}")
    sheet = Table("rank", "tensors", "reads", "writes", "estimated time", "peak memory")
    for rank, load in enumerate(plan.loads):
        sheet.add_row(str(rank), str(load.num_units), format_bytes(load.read_bytes), format_bytes(load.write_bytes),
                      format_ns(load.time_ns), format_bytes(load.memory_bytes))
    console.print(sheet)
    console.print(f"estimated {format_ns(plan.time_ns)} at rates measured now (read {format_bytes(plan.rates.read)}/s,"
                  f" write {format_bytes(plan.rates.write)}/s); no rank can be faster than"
                  f" {format_ns(plan.bound_ns or 0)} when all share the work evenly", soft_wrap=True)
