"""``mipipe train``: start torchrun with the plan's workers, and end with its outcome."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipipe.cli.printing.output import Json, emit, log, stdout
from mipipe.graphs.errors import InputError

if TYPE_CHECKING:
    from mipipe.planner.options import PlanOptions
    from mipipe.planner.plan import Plan
    from mipipe.planner.problem import PlanningProblem
    from mipipe.runtime.train.launching.launch import TrainResult

EXAMPLE = "mipipe train --plan plan.json --graph graph.json --config train.yaml"


def train(
    plan_file: Annotated[Path, typer.Option("--plan", help="The plan to run.")],
    graph_file: Annotated[Path, typer.Option("--graph", help="The operator graph it was made for.")],
    config_file: Annotated[Path, typer.Option("--config", help="The training configuration (YAML).")],
    model: Annotated[str | None, typer.Option(
        help="The model's source, where the graph was captured from package.module:factory; code that a file names is"
             " called only if you name it too.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint, which must be"
                                                          " there.")] = False,
    resume_if_any: Annotated[bool, typer.Option("--resume-if-any", help="Continue from the newest checkpoint, or start"
                                                                        " anew where there is none (for"
                                                                        " schedulers).")] = False,
    copies: Annotated[int | None, typer.Option(help="Data-parallel copies of the whole plan (default: as many as it was"
                                                    " made for).", min=1)] = None,
    max_restarts: Annotated[int, typer.Option(help="Restarts by torchrun after a worker died.", min=0)] = 0,
    timeout: Annotated[float | None, typer.Option(help="End the run after this many seconds.")] = None,
    torchrun: Annotated[str, typer.Option(help="Flags for torchrun, for several nodes, such as '--nnodes 2"
                                               " --rdzv-endpoint host:29500'.")] = "",
    processes: Annotated[int | None, typer.Option(help="Processes on this host (default: all of the plan's devices);"
                                                       " with --elastic, devices that there are, spare ones too.",
                                                  min=1)] = None,
    elastic: Annotated[bool, typer.Option("--elastic", help="When a rank is lost for good, or fewer devices are here"
                                                            " than the plan is for, plan for those that are left, teams"
                                                            " with other degrees, and resume there (one host; needs"
                                                            " checkpoints).")] = False,
    min_ranks: Annotated[int, typer.Option(help="With --elastic: end the run when fewer are left.", min=1)] = 1,
    replan_seconds: Annotated[float | None, typer.Option(help="With --elastic: time limit for planning again (default:"
                                                              " the plan's own).", min=0.1)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda (default: what the plan was made for; a plan for other"
                                                    " devices than are here is refused).")] = None,
    json_output: Json = False,
) -> None:
    """Train as the plan says, under torchrun. torchrun -m mipipe.runtime.worker does the same by hand."""
    progress = False if json_output else None
    if device not in (None, "cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    from mipipe.cli.requests.given import refuse

    if resume:
        refuse(("resume_if_any",), "starts anew where --resume ends; give one of both")
    if not elastic:
        refuse(("min_ranks", "replan_seconds"), "is of runs that plan again: give --elastic with it")
    if elastic:
        if torchrun:
            raise InputError("--elastic watches all ranks of one host: --torchrun does not go with it")
        from mipipe.graphs.serialize import load
        from mipipe.planner.options import options_of
        from mipipe.planner.plan import Plan
        from mipipe.runtime.train.launching.elastic import train_elastic

        def replan(problem: PlanningProblem) -> Plan:
            options = options_of(load(plan_file, Plan))
            if replan_seconds is not None:
                options = dataclasses.replace(options, time_limit_s=replan_seconds)
            return replan_devices(problem, options)

        result = train_elastic(plan_file, graph_file, config_file, replan, resume=resume, resume_if_any=resume_if_any,
                               max_restarts=max_restarts, copies=copies, min_ranks=min_ranks, num_processes=processes,
                               replan_s=replan_seconds, timeout_s=timeout, progress=progress, model=model,
                               device=device, say=log)
    else:
        from mipipe.runtime.averaged import train as run

        result = run(plan_file, graph_file, config_file, resume=resume, resume_if_any=resume_if_any,
                     max_restarts=max_restarts, copies=copies, timeout_s=timeout, progress=progress,
                     torchrun=shlex.split(torchrun), num_processes=processes, model=model, device=device,
                     say=log)
    _print_result(result, config_file, json_output)


def _print_result(result: TrainResult, config_file: Path, json_output: bool) -> None:
    """What the run left, as a line for people or as data."""
    losses = result.losses
    if json_output:
        emit({"steps": result.config.steps, "start": result.start, "source": result.source,
              "losses": list(losses), "records": list(result.records),
              "timeline": result.config.timeline, "metrics": result.config.metrics})
        return
    console = stdout()
    steps, done = result.config.steps, result.start
    new = [record["loss_metrics/global_avg_loss"] for record in result.records if record["step"] > done]
    which = f"{steps} steps" if not done else f"steps {done + 1} to {steps}, from {result.source}"
    if done >= steps:
        console.print(f"nothing to train: all {steps} steps are done in {result.source}")
    elif new:
        console.print(f"trained {which}: loss {new[0]:.4f} -> {new[-1]:.4f}")
    else:
        console.print(f"trained {which}; name a `metrics` file in {config_file} for their records")
    for name, path in (("metrics", result.config.metrics), ("measured timeline", result.config.timeline)):
        if path:
            console.print(f"{name}: {path}")


def replan_devices(problem: PlanningProblem, options: PlanOptions) -> Plan:
    """A plan for the same groups, under the same limits, on the devices that are left.

    ``options`` are those of the plan that lost a device; a shape that needs another number of devices gives way.

    Raises:
        InfeasibleError: the model does not fit on them.
    """
    from mipipe.cli.requests.solving import raise_reason
    from mipipe.graphs.serialize import to_data
    from mipipe.planner.solve import Termination, plan

    result = plan(problem, options)
    if result.termination is Termination.INFEASIBLE and options.placement != "free":
        log(f"no plan of shape {options.placement}: {result.reason}; planning with any placement")
        return replan_devices(problem, dataclasses.replace(options, placement="free"))
    if result.plan is None:
        raise_reason(result)
    assert result.plan is not None
    return dataclasses.replace(result.plan, provenance={**result.plan.provenance, "options": to_data(options)})
