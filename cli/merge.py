"""``mipipe merge``: checkpoints become one, as a recipe in mergekit's words says, on one rank or several."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.output import Json, emit, progress, stdout

EXAMPLE = "mipipe merge recipe.yaml -o merged --ranks 2 --memory 8GB"


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe (YAML, mergekit's vocabulary).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.")],
    ranks: Annotated[int, typer.Option(help="Processes; more than one run under torchrun.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Type of the merged tensors, instead of the recipe's"
                                                   " out_dtype.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of each rank at most, such as 8GB.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest output file.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan (bytes, time, memory), merge"
                                                            " nothing.")] = False,
    store: Annotated[bool, typer.Option("--store", help="Store the experts as parts (onebit, twin, rmm), to be"
                                                        " rebuilt for a route later.")] = False,
    route: Annotated[str | None, typer.Option(help="Rebuild stored parts: each expert's weight, as 0,1,0.")] = None,
    json_output: Json = False,
) -> None:
    """Merge checkpoints by a recipe. An interrupted merge continues when the same command is given again."""
    from mipipe.graphs.errors import InputError
from mipipe.graphs.units import format_bytes, parse_bytes

    cap = None if memory is None else parse_bytes(memory, "--memory")
    shard_bytes = parse_bytes(shard_size, "--shard-size")
    if dry_run:
        _show_plan(recipe, output, ranks, cap, shard_bytes, dtype, json_output)
        return
    with progress(f"merging into {output}") as update:
        from mipipe.runtime.merge.launch import MergeOptions
        from mipipe.runtime.merge.launch import merge as run

        options = MergeOptions(num_ranks=ranks, device=device, memory_cap=cap, shard_bytes=shard_bytes, dtype=dtype)
        result = run(recipe, output, options, lambda done, total: update(f"{format_bytes(done)} of"
                                                                         f" {format_bytes(total)}"))
    graph = result.plan.graph
    if json_output:
        emit({"output": str(result.out), "tensors": len(graph.units), "bytes": graph.write_bytes,
              "seconds": round(result.seconds, 3), "estimated_seconds": result.plan.time_ns / 1e9,
              "ranks": list(result.reports)})
        return
    stdout().print(f"merged {format_bytes(graph.write_bytes)} into {result.out} in {result.seconds:.1f} s on {ranks}"
                   f" rank{'s' if ranks > 1 else ''}")


def _show_plan(recipe: Path, output: Path, ranks: int, cap: int | None, shard_bytes: int, dtype: str | None,
               json_output: bool) -> None:
    from mipipe.cli.tables import print_rows
    from mipipe.graphs.recipe import read_recipes
    from mipipe.graphs.serialize import to_data
    from mipipe.graphs.errors import InputError
from mipipe.graphs.units import format_bytes, format_ns
    from mipipe.planner.merge_plan import plan_chain

    plans = plan_chain(read_recipes(recipe), str(recipe), output, ranks, cap, shard_bytes, dtype)
    if json_output:
        emit({"steps": [{"bound_seconds": None if plan.bound_ns is None else plan.bound_ns / 1e9,
                         "seconds": plan.time_ns / 1e9, "files": len(plan.shards),
                         "ranks": [to_data(load) for load in plan.loads]} for plan in plans]})
        return
    console = stdout()
    for number, plan in enumerate(plans):
        print_rows(console, [{"rank": rank, "tensors": load.num_units, "reads": format_bytes(load.read_bytes),
                              "writes": format_bytes(load.write_bytes), "time": format_ns(load.time_ns),
                              "peak memory": format_bytes(load.memory_bytes)} for rank, load in enumerate(plan.loads)],
                   title=f"step {number + 1} of {len(plans)}: {len(plan.shards)} files")
