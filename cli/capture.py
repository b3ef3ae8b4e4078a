"""``mipipe capture``: a model becomes an operator graph, on the meta device, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.printing.output import Json, check_files, emit, log, progress, stdout
from mipipe.cli.requests.given import refuse
from mipipe.cli.requests.modes import captured_graph, parse_modes
from mipipe.cli.requests.settings import parse_settings
from mipipe.graphs.errors import InputError

EXAMPLE = "mipipe capture examples/qwen3_moe_tiny --seq 64 --batch 2 -o graph.json"

OF_MODELS = ("seq", "batch", "dtype", "settings", "expert_groups", "expert_parallel", "loads", "router_loss", "images",
             "image", "frames", "freeze", "inputs", "config", "granularity", "tags", "verify")
"""What a graph that is captured already has."""


def capture(
    source: Annotated[str, typer.Argument(
        metavar="SOURCE", help="A folder with a transformers config.json (or the file), a transformers class name,"
                               " package.module:factory, or an exported .pt2 program; with --modes also a graph"
                               " captured before.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The operator graph to write.")],
    seq: Annotated[int, typer.Option(help="Tokens per sequence.", min=1)] = 128,
    batch: Annotated[int, typer.Option(help="Sequences per microbatch.", min=1)] = 1,
    dtype: Annotated[str | None, typer.Option(
        help="Parameters' type: float32, bfloat16, float64, ... (default: float32; what a factory's module has"
             " already).", show_default=False)] = None,
    settings: Annotated[list[str] | None, typer.Option(
        "--set", help="Override of the model's configuration, such as num_hidden_layers=8 (or max_source_positions=500,"
                      " the length of Whisper's audio); a factory gets them as arguments. May be repeated.")] = None,
    expert_groups: Annotated[int, typer.Option(help="Split every bank of experts into this many branches.",
                                               min=1)] = 1,
    expert_parallel: Annotated[int, typer.Option(
        help="Share every bank of experts among this many ranks, by all-to-all on the communication stream. A plan of"
             " teams says itself among how many devices, members and copies (--degrees expert=N).",
        min=1)] = 1,
    loads: Annotated[Path | None, typer.Option(
        help="With --expert-parallel: tokens per layer and expert, measured, as `mipipe experts` takes them (default:"
             " all equal).")] = None,
    router_loss: Annotated[float, typer.Option(
        help="Coefficient of a loss that sharpens the routers of a MoE model, as Elastic MoE adds it.", min=0)] = 0.0,
    images: Annotated[int, typer.Option(help="Images per sequence, where the model takes them.", min=0)] = 1,
    image: Annotated[int, typer.Option(help="Height and width of an image (default: the model's own).", min=0)] = 0,
    frames: Annotated[int, typer.Option(help="Videos of this many frames in place of images, where the model takes them"
                                             " (one second per temporal patch).", min=0)] = 0,
    freeze: Annotated[list[str] | None, typer.Option(
        help="Parameters that do not train: a regular expression on their names, such as 'vision_tower'; may be"
             " repeated.")] = None,
    inputs: Annotated[str | None, typer.Option(
        metavar="PACKAGE.MODULE:FUNCTION", help="A function of yours that returns the example inputs of one"
        " microbatch, a dict of tensors by forward argument, in place of mipipe's; it is called with the configuration"
        " if it takes an argument.")] = None,
    config: Annotated[Path | None, typer.Option(
        help="A train.yaml whose `loss`, `reference`, `adapters`, `router` and `expand` become part of the graph.",
        show_default=False)] = None,
    granularity: Annotated[str, typer.Option(help="The smallest pieces: layer, block, module or operator.")] = "block",
    tags: Annotated[Path | None, typer.Option(help="Corrections of the annotation (YAML: layers, branches, roles by"
                                                   " patterns).")] = None,
    verify: Annotated[bool | None, typer.Option(
        "--verify/--no-verify", help="Compare loss and every gradient with eager autograd on one microbatch (default:"
                                     " where that takes seconds).", show_default=False)] = None,
    modes: Annotated[str | None, typer.Option(
        metavar="MODE,...", help="Find out what members of a team compute, send and keep in these modes: tensor,"
                                 " sequence, batch, expert, context. With --team.", show_default=False)] = None,
    team: Annotated[str | None, typer.Option(
        metavar="SIZE,...", help="With --modes: devices of a team, such as 4, or 2,4,8.", show_default=False)] = None,
    json_output: Json = False,
) -> None:
    """Capture a model's training step as an operator graph: forward, input and weight gradients."""
    check_files(source, loads, config, tags, output=output)
    overrides = parse_settings(settings or [])
    names, sizes = parse_modes(modes, team)
    if captured_graph(source, bool(names)) is not None:
        refuse(OF_MODELS, f"is for models; {source} is captured already, and --modes only adds modes to it")
    if ":" in source or source.endswith(".pt2"):
        refuse(("seq", "batch", "images", "image", "frames"), f"does not apply to {source}, which has its own example"
                                                              " inputs")
    if loads is not None and expert_parallel < 2:
        raise InputError("--loads weighs the costs of expert parallelism: give --expert-parallel RANKS with it")
    with progress(f"capturing {source}") as update:
        from mipipe.graphs.capture.annotate import load_patterns
        from mipipe.graphs.capture.model import capture as capture_model
        from mipipe.graphs.coarse.coverage import warnings_of
        from mipipe.graphs.coarse.totals import headline
        from mipipe.graphs.costs.summary import graph_summary, summary_rows
        from mipipe.graphs.serialize import save
        from mipipe.planner.experts.files import read_loads

        measured = None if loads is None else read_loads(loads).loads
        recipe = None
        if config is not None:
            from mipipe.runtime.train.config import read_train_config

            recipe = read_train_config(config).recipe
            if not recipe:
                raise InputError(f"--config {config}: names no loss, reference, adapters, router or expand, so there is"
                                 " nothing that capture could add; leave it out")
        graph = captured_graph(source, bool(names)) or capture_model(
            source, seq=seq, batch=batch, dtype=dtype, overrides=overrides, images=images, image=image, frames=frames,
            expert_groups=expert_groups, expert_parallel=expert_parallel, expert_loads=measured, freeze=freeze or (),
            router_loss=router_loss, inputs=inputs, granularity=granularity,  # type: ignore[arg-type]
            patterns=None if tags is None else load_patterns(tags), verify=verify, recipe=recipe,
            progress=update)
        if names:
            from mipipe.graphs.sharding.modes import with_modes

            graph = with_modes(graph, names, sizes, update)
        save(graph, output)
    for text in warnings_of(graph):
        log(f"warning: {text}")
    if json_output:
        emit({"output": str(output), **graph_summary(graph)})
        return
    from mipipe.cli.printing.tables import print_rows

    console = stdout()
    print_rows(console, summary_rows(graph))
    console.print(headline(graph))
    if graph.modes is not None:
        found = ", ".join(f"{mode} on {size}" for mode, size in graph.modes.teams)
        console.print(f"modes: {found} (mipipe show {output} --modes {graph.modes.teams[0][1]})", soft_wrap=True)
    console.print(f"wrote {output}")
