"""``mipipe place``: a workload file or a captured model on accelerators and cores, for throughput."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mipipe.cli.printing.output import Json, Seed, TimeLimit, check_files, emit, progress, stdout
from mipipe.graphs.errors import InputError

if TYPE_CHECKING:
    from mipipe.planner.devices.instances.instance import PlaceInstance

EXAMPLE = "mipipe place throughput.layer.bert24_training.json --json -o assignment.json"


def place(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A workload of the placement benchmark (nodes with times"
                                                              " and sizes, edges with transfer costs), or as for"
                                                              " `mipipe plan` an operator graph, a coarse graph or a"
                                                              " planning problem (JSON or CSV).")],
    contiguous: Annotated[bool, typer.Option("--contiguous", help="No path may leave a device and return.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The assignment to write (JSON: node id ->"
                                                                       " device).")] = None,
    cluster: Annotated[Path | None, typer.Option(help="The cluster file (YAML) of a captured model: equal devices and"
                                                      " their links.")] = None,
    costs: Annotated[Path | None, typer.Option(help="A captured model's cost table (default: roofline"
                                                    " estimates).")] = None,
    groups: Annotated[int | None, typer.Option(help="Merge a captured model's operators into about this many"
                                                    " groups.")] = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Place operators on devices: objective (of captured models in ms), bound, gap, seconds and the assignment."""
    check_files(file, cluster, costs, output=output)
    from mipipe.graphs.serialize import write_text
    from mipipe.planner.devices.place import place as solve

    instance = _instance(file, cluster, costs, groups)
    with progress(f"placing {instance.name}") as update:
        result = solve(instance, contiguous=contiguous, time_limit_s=time_limit, seed=seed,
                       on_progress=lambda value, method: update(f"largest load {value:.6g} by {method}"))
    data = {"file": str(file), "problem": "throughput", "objective": result.objective, "bound": result.bound,
            "gap": result.gap, "proven": result.gap == 0, "seconds": round(result.seconds, 3), "method": result.method,
            "assignment": result.assignment}
    if output is not None:
        write_text(output, json.dumps(data) + "\n")
    if json_output:
        emit(data)
        return
    console = stdout()
    proven = "proven optimal" if result.gap == 0 else (
        f"bound {result.bound:.8g}" + ("" if result.gap is None else f", gap {result.gap:.2%}"))
    console.print(f"{instance.name}: largest load {result.objective:.8g} ({proven}), found by {result.method} in"
                  f" {result.seconds:.1f} s")
    devices: dict[str, int] = {}
    for device in result.assignment.values():
        devices[device] = devices.get(device, 0) + 1
    console.print(", ".join(f"{device}: {count} nodes" for device, count in sorted(devices.items())))


def _instance(file: Path, cluster: Path | None, costs: Path | None, groups: int | None) -> PlaceInstance:
    """The workload of a file of either kind."""
    from mipipe.graphs.serialize import load_data
    from mipipe.planner.devices.instances.instance import read_instance

    if file.name.endswith(".csv") or str(load_data(file).get("format", "")).startswith("mipipe."):
        from mipipe.cli.requests.inputs import read_problem
        from mipipe.planner.devices.from_problem import instance_of

        problem, _ = read_problem(file, cluster, None if cluster is None else 1, groups=groups, costs=costs)
        return instance_of(problem)
    for option, value in (("--cluster", cluster), ("--costs", costs), ("--groups", groups)):
        if value is not None:
            raise InputError(f"{file} is a placement workload, which names its own devices and times: {option} does not"
                             " apply to it")
    return read_instance(file)
