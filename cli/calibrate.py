"""``mipipe calibrate``: a measured run corrects the costs, shows how far the simulation was off, and plans again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mipipe.cli.printing.output import Json, check_files, emit, progress, stdout
from mipipe.graphs.errors import InputError

if TYPE_CHECKING:
    from mipipe.graphs.costs.table import CostTable
    from mipipe.planner.plan import Plan

EXAMPLE = "mipipe calibrate measured.json --plan plan.json --costs costs.json --replan better_plan.json"


def calibrate(
    timeline_file: Annotated[Path, typer.Argument(
        metavar="TIMELINE", help="The measured timeline of a run; or the word links, to measure latency and bandwidth"
                                 " between the devices of --cluster instead.")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="The plan that ran.")] = None,
    costs_file: Annotated[Path | None, typer.Option("--costs", help="The cost table the plan was made with.")] = None,
    cluster: Annotated[Path | None, typer.Option(help="With links: the cluster file whose links are measured.")] = None,
    torchrun: Annotated[str, typer.Option(help="With links, on several hosts: flags for torchrun, such as '--nnodes 2"
                                               " --nproc-per-node 8 --rdzv-endpoint host:29500'.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The corrected cost table to write.")] = None,
    replan_file: Annotated[Path | None, typer.Option("--replan", help="Plan again with the corrected costs, and write"
                                                                       " the plan here.")] = None,
    time_limit: Annotated[float | None, typer.Option("--time-limit", help="Seconds for planning again (default: as the"
                                                                         " plan was made).", min=0.1)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed for planning again (default: as the plan was"
                                                            " made).")] = None,
    json_output: Json = False,
) -> None:
    """Correct a cost table by a measured run, say how far the simulation was off, stage by stage, and plan again."""
    check_files(timeline_file, plan_file, costs_file, cluster, output=output, replan=replan_file)
    from mipipe.cli.requests.given import refuse

    if str(timeline_file) == "links":
        refuse(("plan_file", "costs_file", "replan_file", "time_limit", "seed"), "is of a timeline, not of links")
        _links(cluster, output, torchrun, json_output)
        return
    refuse(("cluster", "torchrun"), "is of `mipipe calibrate links`; a timeline needs --plan and --costs")
    if replan_file is None:
        refuse(("time_limit", "seed"), "is for planning again: give --replan with it")
    if plan_file is None or costs_file is None:
        raise InputError("calibrate: a timeline needs --plan and --costs, the plan that ran and its cost table")
    from mipipe.cli.printing.tables import print_rows
    from mipipe.graphs.costs.table import CostTable
    from mipipe.graphs.serialize import load, save, to_data
    from mipipe.graphs.units import format_ns
    from mipipe.planner.calibrate import calibrate as correct
    from mipipe.planner.plan import Plan
    from mipipe.planner.timeline import Timeline

    plan = load(plan_file, Plan)
    table, drift = correct(plan, load(timeline_file, Timeline), load(costs_file, CostTable))
    if output is not None:
        save(table, output)
    replanned = _replan(plan, table, replan_file, time_limit, seed) if replan_file else None
    if json_output:
        emit({"output": str(output) if output else None, "ratio": drift.ratio, "ratio_after": drift.ratio_after,
              **to_data(drift), **({"replanned": replanned} if replanned else {})})
        return
    console = stdout()
    print_rows(console, [{"what": row.what, "samples": row.samples, "planned": format_ns(row.planned_ns),
                          "measured": format_ns(row.measured_ns), "ratio": row.ratio, "spread": row.spread}
                         for row in drift.rows])
    console.print(f"between two actions a rank takes {format_ns(drift.launch_ns)}")
    console.print(f"the step took {format_ns(drift.measured_ns)}, simulated {format_ns(drift.simulated_ns)}: measured /"
                  f" simulated {drift.ratio:.3f}, {drift.ratio_after:.3f} with the corrected costs")
    if output is not None:
        console.print(f"wrote {output}")
    if replanned is not None:
        console.print(f"planned again: {format_ns(replanned['makespan_ns'])} with the corrected costs, the old plan"
                      f" {format_ns(drift.recalibrated_ns)} ({replanned['method']})")
        console.print(f"wrote {replan_file}")


def _links(cluster: Path | None, output: Path | None, torchrun: str, json_output: bool) -> None:
    """Measure the links of a cluster: one process for each device, started here unless ``torchrun`` says where."""
    import subprocess
    import sys
    import tempfile

    from mipipe.graphs.children import running
    from mipipe.graphs.cluster import load_cluster
    from mipipe.graphs.errors import RunError
    from mipipe.graphs.serialize import to_data

    if cluster is None or output is None:
        raise InputError("calibrate links: expected --cluster CLUSTER.yaml, whose devices take part, and --output, the"
                         " cluster file to write")
    count = load_cluster(cluster).topology.num_devices
    flags = shlex.split(torchrun) or ["--standalone", "--nproc-per-node", str(count)]
    with tempfile.TemporaryDirectory(prefix="mipipe-links-", ignore_cleanup_errors=True) as logs:
        command = [sys.executable, "-m", "torch.distributed.run", "--log-dir", logs, *flags, "-m",
                   "mipipe.runtime.train.links", str(cluster), "-o", str(output)]
        with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            out, errors = process.communicate()
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.startswith("mipipe: error: ")] or ["mipipe: error:"
                 " calibrate links: " + " / ".join(errors.strip().splitlines()[-2:])]
        raise RunError(lines[0].removeprefix("mipipe: error: "))
    if json_output:
        topology = load_cluster(output).topology
        emit({"output": str(output), "within_host": to_data(topology.within_host),
              "between_hosts": to_data(topology.between_hosts)})
    else:
        stdout().print(out.strip(), f"wrote {output}", sep="\n")


def _replan(plan: Plan, table: CostTable, path: Path, time_limit: float | None, seed: int | None) -> dict[str, Any]:
    """The new plan's figures; written to ``path``. What is not given is as the plan was made."""
    import dataclasses

    from mipipe.cli.requests.solving import show_progress
    from mipipe.graphs.serialize import save, to_data
    from mipipe.planner.options import options_of
    from mipipe.planner.replan import replan

    options = options_of(plan)
    options = dataclasses.replace(options, time_limit_s=time_limit or options.time_limit_s,
                                  seed=options.seed if seed is None else seed)
    with progress("planning again") as update:
        found = replan(plan, table, options, show_progress(update, plan.problem.unit_ns))
    found = dataclasses.replace(found, provenance={**found.provenance, "options": to_data(options)})
    save(found, path)
    return {"plan": str(path), "makespan_ns": found.makespan_ns, "bound_ns": found.bound_ns,
            "method": str(found.provenance.get("method", ""))}
