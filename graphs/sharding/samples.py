"""Can members of a team have samples each? Not where an operator looks at several samples at once."""

from __future__ import annotations

from collections.abc import Collection

from mipipe.graphs.coarse.totals import num_sequences
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.sharding.assign import assign
from mipipe.graphs.sharding.boundaries import Streams, boundary_parts, segment_layouts
from mipipe.graphs.sharding.parts import WHOLE


def samples_together(graph: OperatorGraph, branches: Collection[str]) -> str | None:
    """The first segment of these branches (by name) that looks at several samples at once, or whose results do not have
    the samples in front; None where members can have samples each: told by as many members as there are samples."""
    streams, seen, rows = Streams(graph), set[str](), num_sequences(graph)
    lies = boundary_parts(graph, {segment.name: "batch" for segment in graph.segments}, streams, rows)
    inside = {value.name for value in graph.values if value.differentiable and value.name not in graph.outputs}
    for segment in graph.segments:
        if segment.tags.branch not in branches or segment.trace in seen:
            continue
        seen.add(segment.trace)
        trace = graph.trace(segment)
        if any(lies[name] == WHOLE for name in segment.outputs if name in inside) or assign(
                trace, segment_layouts(trace, segment, lies, "batch", streams, rows)).gathered:
            return segment.name
    return None
