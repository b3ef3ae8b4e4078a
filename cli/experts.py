"""``mipipe experts``: where every expert of every MoE layer lives, so that no device waits for a busier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.printing.output import Json, Seed, TimeLimit, check_files, emit, progress, stdout
from mipipe.graphs.errors import InputError

EXAMPLE = "mipipe experts --loads loads.json --cluster cluster.yaml --replicas 32 -o map.json"


def experts(
    loads_file: Annotated[Path, typer.Option("--loads", help="Tokens per layer and expert: from a training run, a list"
                                                             " of lists as EPLB takes it, Megatron Core's router trace"
                                                             " (JSON lines, or the folder of all ranks), vLLM's routed"
                                                             " experts (.npy, .npz) or ADRS's load history.")],
    cluster: Annotated[Path, typer.Option(help="The cluster file (YAML): devices, hosts and links.")],
    replicas: Annotated[int, typer.Option(help="Redundant experts per layer.")] = 0,
    num_experts: Annotated[int | None, typer.Option(help="Experts per layer, where recorded routing may not have"
                                                         " reached the last ones.", min=1)] = None,
    memory: Annotated[str | None, typer.Option(help="Instead of --replicas: memory of every device for the experts of"
                                                    " all layers, such as 40GB; skewed layers get more.")] = None,
    groups: Annotated[int, typer.Option(help="Groups of experts that each stay on one host (EPLB's num_groups).")] = 1,
    current: Annotated[Path | None, typer.Option(help="The map in use (mipipe's or EPLB's tables); moving from it"
                                                      " counts.")] = None,
    horizon: Annotated[float | None, typer.Option(help="Steps over which a move must pay off (default: moving is"
                                                       " free).")] = None,
    max_moves: Annotated[int | None, typer.Option(help="Experts a device may receive per layer, at most.")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="What all devices may receive in all layers, such as 20GB, at"
                                                       " most.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The expert map to write.")] = None,
    eplb_file: Annotated[Path | None, typer.Option("--eplb", help="Also write EPLB's three tables (JSON).")] = None,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    json_output: Json = False,
) -> None:
    """Place experts and their replicas by load: the busiest device's time, with its bound, layer by layer."""
    check_files(loads_file, cluster, current, output=output, eplb=eplb_file)
    from mipipe.cli.printing.tables import print_rows
    from mipipe.cli.requests.files import read_size
    from mipipe.cli.requests.given import refuse
    from mipipe.graphs.cluster import load_cluster
    from mipipe.graphs.serialize import save, to_data, write_text
    from mipipe.graphs.units import parse_bytes
    from mipipe.planner.experts.files import eplb_tables, read_loads, read_map
    from mipipe.planner.experts.plan import ExpertOptions, plan_experts, share_slots, slots_in_memory

    if current is None:
        refuse(("horizon", "max_moves", "max_bytes"), "is of moves from a map in use: give --current with it")
    options = ExpertOptions(replicas=replicas, groups=groups, time_limit_s=time_limit, seed=seed, horizon=horizon,
                            max_moves=max_moves,
                            max_bytes=None if max_bytes is None else parse_bytes(max_bytes, "--max-bytes"))
    loads, topology = read_loads(loads_file, num_experts), load_cluster(cluster).topology
    slots = None
    if memory is not None:
        if replicas:
            raise InputError("--memory says how many slots there are: --replicas does not go with it")
        slots = share_slots(loads, topology, slots_in_memory(loads, read_size(memory, "--memory")))
    before = None if current is None else read_map(current, loads.num_experts, topology.num_devices)
    with progress(f"placing {loads.num_experts} experts of {loads.num_layers} layers"):
        result = plan_experts(loads, topology, options, current=before, slots=slots)
    if output is not None:
        save(result.map, output)
    if eplb_file is not None:
        write_text(eplb_file, json.dumps(eplb_tables(result.map)) + "\n")
    rows = [{"layer": number, "max/mean": layer.max_over_mean, "greedy rule": layer.greedy_max_over_mean,
             "gap": "" if layer.gap is None else f"{layer.gap:.2%}",
             "moved": layer.moved} for number, layer in enumerate(result.layers)]
    if json_output:
        emit({"output": str(output) if output else None, "devices": topology.num_devices,
              "seconds": round(result.seconds, 3),
              "layers": [{**to_data(layer), "gap": layer.gap} for layer in result.layers]})
        return
    console = stdout()
    print_rows(console, rows)
    total, greedy = (sum(getattr(layer, name) for layer in result.layers) for name in ("busiest", "greedy"))
    bound = sum(layer.bound for layer in result.layers)
    console.print(f"all layers: busiest devices {total:.6g} (bound {bound:.6g}, greedy replicate-and-pack"
                  f" {greedy:.6g}), {result.seconds:.1f} s")
    if output is not None:
        console.print(f"wrote {output}")
