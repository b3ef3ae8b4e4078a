"""``mipipe profile``: time a graph's groups on this machine, with as many workers at once as will train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mipipe.cli.printing.output import Json, check_files, emit, progress, stdout

EXAMPLE = "mipipe profile graph.json --groups 16 --workers 4 -o costs.json"


def profile(
    graph_file: Annotated[Path, typer.Argument(metavar="GRAPH", help="An operator graph.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The cost table to write.")],
    groups: Annotated[int | None, typer.Option(help="Merge operators into about this many groups.", min=1)] = None,
    granularity: Annotated[str | None, typer.Option(help="Or merge by structure: layer, block, operator.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that compute at once, as they will in training.", min=1)] = 1,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew, without earlier results kept for this"
                                                        " machine.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    cluster: Annotated[Path | None, typer.Option(help="The cluster file whose slowest link all-to-alls of expert"
                                                      " parallelism are charged to.")] = None,
    json_output: Json = False,
) -> None:
    """Measure the forward, input-gradient and weight-gradient time of every distinct group on this machine."""
    check_files(graph_file, cluster, output=output)
    from mipipe.graphs.cluster import load_cluster
    from mipipe.graphs.coarse.coarsen import coarsen
    from mipipe.graphs.exchange import slowest_link
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.serialize import load, save

    graph = load(graph_file, OperatorGraph)
    link = None if cluster is None else slowest_link(load_cluster(cluster).topology)
    coarse = coarsen(graph, num_groups=groups, granularity=granularity)  # type: ignore[arg-type]
    with progress(f"profiling {len(coarse.groups)} groups with {workers} workers") as update:
        from mipipe.graphs.profiling.profile import DEFAULT_CACHE, profile_groups

        table = profile_groups(graph, coarse, device=device, workers=workers, cache=None if fresh else DEFAULT_CACHE,
                               link=link, progress=lambda done, total: update(f"{done} of {total} distinct groups"))
    save(table, output)
    if json_output:
        emit({"output": str(output), "hardware": table.hardware, "groups": len(table.entries),
              "total_us": sum(sum(entry.times_ns.values()) for entry in table.entries) / 1000})
        return
    from mipipe.cli.printing.tables import print_rows
    from mipipe.cli.show import cost_rows

    console = stdout()
    print_rows(console, cost_rows(table), title=f"costs on {table.hardware}")
    if "all_to_all" in table.notes:
        console.print(f"all-to-alls: {table.notes['all_to_all']}"
                      + ("; give --cluster to charge them to its slowest link" if cluster is None else ""))
    console.print(f"wrote {output}")
