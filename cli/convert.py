"""``mipipe convert``: another form of a model's experts, or experts of a dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.printing.output import Json, emit, log, progress, stdout
from mipipe.cli.requests.files import read_size
from mipipe.graphs.units import format_bytes

EXAMPLE = "mipipe convert recipe.yaml -o converted"


def convert(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe: YAML with method (molae, m_smoe,"
                                           " mc_smoe, ream, prune_experts, dive, moe_adaptation), model and the"
                                           " method's values; or an assembly of dense models, with experts and no"
                                           " method.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to make.")],
    loader: Annotated[list[str] | None, typer.Option(
        metavar="PACKAGE.MODULE:FUNCTION", help="A function that the recipe may call for its texts; may be"
                                                " repeated.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file of the result.")] = "5GB",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not hold the result against its config's class"
                                                                " before it is called done.")] = False,
    json_output: Json = False,
) -> None:
    """Convert a model's experts as RECIPE says: shared projections, merged, compressed or pruned experts, or a mixture
    made of a dense model. An interrupted conversion continues when the same command runs again."""
    from mipipe.graphs.merging.moe_recipe import is_moe_recipe
    from mipipe.graphs.serialize import load_data

    size = read_size(shard_size, "--shard-size")
    found = load_data(recipe)
    if "method" not in found and is_moe_recipe(found):
        from mipipe.cli.merge import merge

        merge(recipe, output, loader=loader, shard_size=shard_size, no_verify=no_verify, json_output=json_output)
        return
    from mipipe.graphs.converting.recipe import read_convert_recipe

    wanted = read_convert_recipe(recipe)
    with progress(f"converting {wanted.model}") as update:
        from mipipe.runtime.convert.launch import convert as run

        result = run(wanted, output, loaders=tuple(loader or ()), shard_bytes=size, verify=not no_verify,
                     progress=update)
    if json_output:
        emit({"output": str(output), "seconds": round(result.seconds, 3), **result.record})
        return
    before, after = result.record["source_bytes"], result.record["bytes"]
    stdout().print(f"{output}: {wanted.METHOD}, {format_bytes(before)} -> {format_bytes(after)} ({after / before:.1%})"
                   f" in {result.seconds:.1f} s. {result.told}", soft_wrap=True)
    if (output / "modeling_mipipe_moe.py").exists():
        log("mipipe: transformers loads it with trust_remote_code=True; mipipe takes it as it is")
