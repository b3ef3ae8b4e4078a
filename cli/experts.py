"""``mipipe experts``: where every expert of a MoE model lives, from measured loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mipipe.cli.output import Json, Seed, check_folder, emit, stdout
from mipipe.graphs.errors import InputError

EXAMPLE = "mipipe experts --loads loads.json --cluster cluster.yaml --replicas 32 -o map.json"


def experts(
    loads: Annotated[Path, typer.Option("--loads", help="Tokens per layer and expert: a file written by a training"
                                        " run, or a JSON list of lists as EPLB takes it.")],
    cluster: Annotated[Path, typer.Option("--cluster", help="Cluster file: devices, hosts and links.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the expert map.")],
    replicas: Annotated[int, typer.Option("--replicas", help="Redundant experts per layer.", min=0)] = 0,
    groups: Annotated[int, typer.Option("--groups", help="Expert groups that stay on one node.", min=1)] = 1,
    total_slots: Annotated[int | None, typer.Option("--total-slots", help="Slots per device over all layers, shared"
                                                    " out by need (instead of --replicas).", min=1)] = None,
    current: Annotated[Path | None, typer.Option("--current", help="The map in use: moves count.")] = None,
    horizon: Annotated[float | None, typer.Option("--horizon", help="Steps over which a move must pay off.")] = None,
    max_moves: Annotated[int | None, typer.Option("--max-moves", help="At most so many experts move per layer.",
                                                  min=0)] = None,
    eplb: Annotated[Path | None, typer.Option("--eplb", help="Also write EPLB's three tables as JSON.")] = None,
    polish: Annotated[bool, typer.Option("--polish/--no-polish", help="Polish by MIP while time lasts.")] = True,
    time_limit: Annotated[float, typer.Option("--time-limit", help="Seconds.", min=0.1)] = 60.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Place the experts of every MoE layer, with redundant replicas, so that the busiest device has least to do."""
    from mipipe.graphs.cluster import load_cluster
    from mipipe.graphs.serialize import save, write_text
    from mipipe.planner.expert_files import eplb_tables, read_loads, read_map
    from mipipe.planner.expert_plan import ExpertOptions, plan_experts, share_slots

    for path, option in ((output, "-o"), (eplb, "--eplb")):
        check_folder(path, option)
    if (horizon is not None or max_moves is not None) and current is None:
        raise InputError("--horizon and --max-moves need --current, the map in use")
    if total_slots is not None and (replicas or current is not None):
        raise InputError("--total-slots does not go with --replicas or --current")
    table = read_loads(loads)
    topology = load_cluster(cluster).topology
    before = None if current is None else read_map(current, table.num_experts, topology.num_devices)
    options = ExpertOptions(replicas, groups, time_limit, seed, horizon, max_moves, polish=polish)
    slots = None if total_slots is None else share_slots(table, topology, total_slots, options)
    result = plan_experts(table, topology, options, current=before, slots=slots)
    save(result.map, output)
    if eplb is not None:
        write_text(eplb, json.dumps(eplb_tables(result.map)) + "\n")
    if as_json:
        emit(_summary(result))
    else:
        _print(result, output)


def _summary(result: Any) -> dict[str, Any]:
    layers = [{"layer": number, "max_over_mean": row.max_over_mean, "greedy_max_over_mean": row.greedy_max_over_mean,
               "busiest": row.busiest, "bound": row.bound, "gap": row.gap, "moved": row.moved,
               "shared_tokens": row.shared_tokens} for number, row in enumerate(result.layers)]
    return {"layers": layers, "seconds": result.seconds,
            "total": sum(row.busiest for row in result.layers), "bound": sum(row.bound for row in result.layers)}


def _print(result: Any, output: Path) -> None:
    from rich.table import Table

    console = stdout()
    table = Table(title="Load of the busiest device over the mean")
    for name in ("layer", "greedy", "planned", "gap to bound", "experts moved"):
        table.add_column(name, justify="right")
    for number, row in enumerate(result.layers):
        table.add_row(str(number), f"{row.greedy_max_over_mean:.4f}", f"{row.max_over_mean:.4f}", f"{row.gap:.2%}",
                      str(row.moved))
    console.print(table)
    total, bound = sum(row.busiest for row in result.layers), sum(row.bound for row in result.layers)
    greedy = sum(row.greedy for row in result.layers)
    console.print(f"All layers: {total / greedy:.4f} of the greedy rule's time, at most {total / bound - 1:.2%} above"
                  f" the best possible; {result.seconds:.1f} s. Written to {output}.")
