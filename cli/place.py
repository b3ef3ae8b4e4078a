"""``mipipe place``: operators of a workload file on accelerators and cores, for throughput or for latency."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.output import Json, Seed, TimeLimit, check_folder, emit, progress, stdout
from mipipe.graphs.errors import InputError

EXAMPLE = "mipipe place throughput.layer.bert24_training.json --json -o assignment.json"


def place(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A workload of the placement benchmark (nodes with"
                                                              " times and sizes, edges with transfer costs).")],
    objective: Annotated[str | None, typer.Option(
        help="throughput (largest load) or latency (one sample). Default: latency for files named latency.*, else"
             " throughput.")] = None,
    contiguous: Annotated[bool, typer.Option("--contiguous", help="Throughput: no path may leave a device and"
                                                                  " return.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The assignment to write (JSON: node id ->"
                                                                       " device).")] = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Solve a device-placement workload: objective, bound, gap, seconds and the assignment."""
    objective = objective or ("latency" if file.name.startswith("latency.") else "throughput")
    if objective not in ("throughput", "latency"):
        raise InputError(f"--objective {objective}: expected throughput or latency")
    if contiguous and objective == "latency":
        raise InputError("--contiguous is for throughput; under latency every subgraph is contiguous anyway")
    check_folder(output, "--output")
    from mipipe.graphs.serialize import write_text
    from mipipe.planner.place import place as solve
    from mipipe.planner.place_instance import read_instance

    instance = read_instance(file)
    with progress(f"placing {instance.name}") as update:
        result = solve(instance, objective=objective, contiguous=contiguous,  # type: ignore[arg-type]
                       time_limit_s=time_limit, seed=seed,
                       on_progress=lambda value, method: update(f"{objective} {value:.6g} by {method}"))
    data = {"file": str(file), "problem": objective, "objective": result.objective, "bound": result.bound,
            "gap": result.gap, "seconds": round(result.seconds, 3), "method": result.method,
            "assignment": result.assignment}
    if output is not None:
        write_text(output, json.dumps(data) + "\n")
    if json_output:
        emit(data)
        return
    console = stdout()
    proven = "proven optimal" if result.gap == 0 else f"bound {result.bound:.8g}, gap {result.gap:.2%}"
    console.print(f"{instance.name}: {objective} {result.objective:.8g} ({proven}), found by {result.method} in"
                  f" {result.seconds:.1f} s")
    devices: dict[str, int] = {}
    for device in result.assignment.values():
        devices[device] = devices.get(device, 0) + 1
    console.print(", ".join(f"{device}: {count} nodes" for device, count in sorted(devices.items())))
