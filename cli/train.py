"""``mipipe train``: start torchrun with the plan's workers, and end with its outcome."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.output import Json, emit, stdout

EXAMPLE = "mipipe train --plan plan.json --graph graph.json --config train.yaml"


def train(
    plan_file: Annotated[Path, typer.Option("--plan", help="The plan to run.")],
    graph_file: Annotated[Path, typer.Option("--graph", help="The operator graph it was made for.")],
    config_file: Annotated[Path, typer.Option("--config", help="The training configuration (YAML).")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    copies: Annotated[int, typer.Option(help="Data-parallel copies of the whole plan.", min=1)] = 1,
    max_restarts: Annotated[int, typer.Option(help="Restarts by torchrun after a worker died.", min=0)] = 0,
    timeout: Annotated[float | None, typer.Option(help="End the run after this many seconds.")] = None,
    torchrun: Annotated[str, typer.Option(help="Flags for torchrun, for several nodes, such as '--nnodes 2"
                                               " --rdzv-endpoint host:29500'.")] = "",
    processes: Annotated[int | None, typer.Option(help="Processes on this host (default: all of the plan's ranks).",
                                                  min=1)] = None,
    json_output: Json = False,
) -> None:
    """Train as the plan says, under torchrun. torchrun -m mipipe.runtime.worker does the same by hand."""
    from mipipe.runtime.launch import train as run

    result = run(plan_file, graph_file, config_file, resume=resume, max_restarts=max_restarts, copies=copies,
                 timeout_s=timeout, progress=False if json_output else None, torchrun=shlex.split(torchrun),
                 num_processes=processes)
    losses = result.losses
    if json_output:
        emit({"steps": result.config.steps, "losses": list(losses), "records": list(result.records),
              "timeline": result.config.timeline, "metrics": result.config.metrics})
        return
    console = stdout()
    if losses:
        console.print(f"trained {len(losses)} steps: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    else:
        console.print(f"trained {result.config.steps} steps; name a `metrics` file in {config_file} for their records")
    for name, path in (("metrics", result.config.metrics), ("measured timeline", result.config.timeline)):
        if path:
            console.print(f"{name}: {path}")
