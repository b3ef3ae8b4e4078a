"""What a graph is made of, as plain rows for a terminal, JSON or HTML: kinds of layers, their work and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.coarse.contract import layer_stack, saved_bytes, traffic_bytes
from mipipe.graphs.coarse.coverage import warnings_of
from mipipe.graphs.coarse.drawing import draw_graph
from mipipe.graphs.coarse.graph import CoarseGraph, OpGroup
from mipipe.graphs.coarse.graph_index import GraphIndex, index_graph
from mipipe.graphs.coarse.totals import active_parameters, count_parameters, flops_per_token, total_flops
from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.serialize import digest

SummaryRow = dict[str, Any]


def summary_rows(graph: OperatorGraph | CoarseGraph, costs: CostTable | None = None) -> list[SummaryRow]:
    """One row for each kind of layer (or of group), numbers for one of them, and a total row.

    A kind of layer is all layers with the same traces in the same order; segments outside layers are grouped by role.
    Keys: ``part``, ``count``, ``segments``, ``operators`` (operator graphs only), ``parameters``, ``F_gflop``,
    ``I_gflop``, ``W_gflop``, ``moved_mb``, ``saved_mb``; with ``costs`` (coarse graphs only) also ``F_us``, ``I_us``,
    ``W_us`` for each device kind.
    """
    if isinstance(graph, CoarseGraph):
        rows = _coarse_rows(graph, costs)
    else:
        index = index_graph(graph)
        rows = [_layer_row(index, part, alike) for part, alike in _layer_kinds(index)]
    total: SummaryRow = {"part": "total"}
    for row in rows:
        for key, value in row.items():
            if key == "count":
                total[key] = total.get(key, 0) + value
            elif key != "part":
                total[key] = total.get(key, 0) + (value or 0) * row["count"]
    return [*rows, {key: total.get(key) for key in rows[0]}] if rows else []


def graph_summary(graph: OperatorGraph | CoarseGraph, costs: CostTable | None = None) -> dict[str, Any]:
    """The summary as one JSON object: totals and the rows."""
    rows = summary_rows(graph, costs)
    if isinstance(graph, CoarseGraph):
        return {"kind": "coarse_graph", "model": graph.model, "digest": graph.graph_digest, "groups": len(graph.groups),
                "distinct_groups": len({group.structure for group in graph.groups}), "values": len(graph.values),
                "parameter_bytes": sum(group.parameter_bytes for group in graph.groups),
                "flops": {phase.value: sum(group.flops.get(phase, 0) for group in graph.groups) for phase in Phase},
                "rows": rows}
    index = index_graph(graph)
    return {"kind": "operator_graph", "model": graph.model, "digest": digest(graph), "segments": len(graph.segments),
            "distinct_segments": len(graph.traces), "operators": sum(len(trace.operators) for trace in index.traces),
            "parameters": count_parameters(graph), "active_parameters": active_parameters(graph),
            "trainable_parameters": count_parameters(graph, trainable=True),
            "flops": {phase.value: total_flops(index, phase) for phase in Phase},
            "flops_full_attention": {phase.value: total_flops(index, phase, full=True) for phase in Phase},
            "flops_per_token": flops_per_token(graph),
            "flops_per_token_full_attention": flops_per_token(graph, full=True),
            "inputs": list(graph.inputs), "outputs": list(graph.outputs), "warnings": warnings_of(graph), "rows": rows}


def coarse_svg(graph: OperatorGraph | CoarseGraph) -> str:
    """The coarse graph as an SVG drawing, branches side by side; an operator graph is coarsened for it."""
    return draw_graph(coarsen(graph) if isinstance(graph, OperatorGraph) else graph)


def _layer_kinds(index: GraphIndex) -> list[tuple[str, list[list[int]]]]:
    """(name, one list of segments for each layer of the kind), in the order of first appearance."""
    layers: dict[tuple[str | None, str, int | None, str], list[int]] = {}
    for number, segment in enumerate(index.segments):
        tags = segment.tags
        role = "" if tags.layer is not None else tags.role.value
        layers.setdefault((tags.branch, layer_stack(segment), tags.layer, role), []).append(number)
    kinds: dict[tuple[Any, ...], list[tuple[int | None, list[int]]]] = {}
    stacks: dict[str | None, set[str]] = {}
    for (branch, stack, layer, role), members in layers.items():
        structure = tuple(index.segments[member].trace for member in members) if layer is not None else ()
        kinds.setdefault((branch, stack, role, structure), []).append((layer, members))
        if layer is not None:
            stacks.setdefault(branch, set()).add(stack)
    named = []
    for (branch, stack, role, _), alike in kinds.items():
        numbers = [layer for layer, _ in alike if layer is not None]
        what = f"layers {_ranges(numbers)}" if len(numbers) > 1 else f"layer {numbers[0]}" if numbers else role
        owner = stack.split(".")[-2:-1] if numbers and len(stacks[branch]) > 1 else []  # encoder and decoder
        named.append((" ".join([*([branch] if branch else []), *owner, what]), [members for _, members in alike]))
    return named


def _ranges(numbers: Sequence[int]) -> str:
    """``0-2, 5`` for 0, 1, 2, 5."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _layer_row(index: GraphIndex, part: str, alike: list[list[int]]) -> SummaryRow:
    members = alike[0]
    fqns = {index.parameters[fqn].tied_to or fqn for member in members for fqn in index.segments[member].parameters}
    running = [(index.traces[member], phase) for member in members for phase in Phase if index.runs(member, phase)]
    return {"part": part, "count": len(alike), "segments": len(members),
            "operators": sum(len(index.traces[member].operators) for member in members),
            "parameters": sum(_count(index.parameters[fqn].spec.shape) for fqn in fqns),
            **{f"{phase}_gflop": total_flops(index, phase, members=members) / 1e9 for phase in Phase},
            "moved_mb": sum(traffic_bytes(trace, phase) for trace, phase in running) / 1e6,
            "saved_mb": sum(saved_bytes(index, members)[:2]) / 1e6}


def _coarse_rows(coarse: CoarseGraph, costs: CostTable | None) -> list[SummaryRow]:
    """One row for each structure of groups."""
    alike: dict[str, list[OpGroup]] = {}
    for group in coarse.groups:
        alike.setdefault(group.structure or group.name, []).append(group)
    rows = []
    for groups in alike.values():
        group = groups[0]
        more = f" and {len(groups) - 1} more" if len(groups) > 1 else ""
        row: SummaryRow = {"part": group.name + more, "count": len(groups), "segments": len(group.segments),
                           "parameters_mb": group.parameter_bytes / 1e6,
                           **{f"{phase}_gflop": group.flops.get(phase, 0) / 1e9 for phase in Phase},
                           "moved_mb": sum(group.bytes_moved.values()) / 1e6,
                           "saved_mb": (group.saved_fi_bytes + group.saved_fw_bytes) / 1e6}
        kinds = sorted({entry.device_kind for entry in costs.entries}) if costs else []
        for kind in kinds:
            assert costs is not None
            times = costs.find(group.name, kind).times_ns
            label = f"_{kind}" if len(kinds) > 1 else ""
            row |= {f"{phase}{label}_us": times[phase] / 1e3 if phase in times else None for phase in Phase}
        rows.append(row)
    return rows


def _count(shape: Sequence[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
