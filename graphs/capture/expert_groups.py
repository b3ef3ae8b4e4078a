"""Expert banks cut into groups: slices of one parameter become parameters of their own, for segments of their own.

A slice is named by its bank and rows, ``layers.0.mlp.experts.down_proj[0:16]``: rows 0 to 16 of that parameter. Each
group's segment reads the tokens and the routing, computes its own experts, and returns a partial sum.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import fx

from mipipe.graphs.capture.export import Exported
from mipipe.graphs.operator_graph import ParameterSpec, TensorSpec
from mipipe.graphs.operators.expert_kernels import RETURN, ROUTE, SEND
from mipipe.graphs.tracing.parameter_slices import RowRange
from mipipe.graphs.tracing.storages import argument


def split_banks(exported: Exported) -> tuple[Exported, dict[str, list[RowRange]]]:
    """The graph with each sliced expert bank replaced by its slices, and the rows by bank.

    Operators of an expert module get ``meta["part"]``: ``router`` (shared by the groups), ``experts.groupN`` or
    ``combine``; in expert parallelism ``dispatch``, ``experts``, ``combine`` (the two all-to-alls and what is between)
    and ``sum``.
    """
    rows: dict[str, list[RowRange]] = {}
    parameters: dict[str, fx.Node] = {}
    groups: dict[fx.Node, frozenset[int]] = {}
    for fqn, node in exported.parameters.items():
        slices = {user: (int(argument(user, 2)), int(argument(user, 3))) for user in node.users if _is_bank_slice(user)}
        if not slices or len(slices) != len(node.users):
            parameters[fqn] = node
            continue
        rows[fqn] = sorted(set(slices.values()))
        for group, (low, high) in enumerate(rows[fqn]):
            with exported.graph.inserting_before(node):
                part = exported.graph.placeholder(f"{node.name}_{low}_{high}")
            parameters[f"{fqn}[{low}:{high}]"] = part
            groups[part] = frozenset({group})
            for user in [user for user, found in slices.items() if found == (low, high)]:
                part.meta.update(user.meta, stack=())
                user.replace_all_uses_with(part)
                exported.graph.erase_node(user)
        exported.graph.erase_node(node)
    if rows:
        _mark(exported.graph, groups)
    _mark_exchange(exported.graph)
    return replace(exported, parameters=parameters), rows


def _is_bank_slice(node: fx.Node) -> bool:
    return (str(node.target) == "aten.slice.Tensor" and argument(node, 1) == 0 and _in_experts(node)
            and argument(node, 0).op == "placeholder")


def _in_experts(node: fx.Node) -> bool:
    return any(path.rpartition(".")[2] == "experts" for path, *_ in node.meta.get("stack", ()))


def _mark(graph: fx.Graph, groups: dict[fx.Node, frozenset[int]]) -> None:
    """Find each expert operator's group: from its bank slice, else from the only group that reads it."""
    inside = [node for node in graph.nodes if node.op == "call_function" and _in_experts(node)]
    for node in inside:
        found: frozenset[int] = frozenset().union(*(groups.get(item, frozenset()) for item in node.all_input_nodes))
        if found:
            groups[node] = found
            node.meta["part"] = f"experts.group{min(found)}" if len(found) == 1 else "combine"
    for node in reversed(inside):
        if node not in groups:
            readers = {user.meta.get("part") for user in node.users}
            only = next(iter(readers)) if len(readers) == 1 else None
            node.meta["part"] = only if only and only.startswith("experts.group") else "router"


def _mark_exchange(graph: fx.Graph) -> None:
    """Mark the parts of expert-parallel layers: what follows an all-to-all, and what comes before the first."""
    parts: dict[fx.Node, str] = {}
    for node in graph.nodes:
        if node.op != "call_function" or not _in_experts(node):
            continue
        before = {parts[item] for item in node.all_input_nodes if item in parts}
        kind = str(node.target)
        if kind == RETURN:
            parts[node] = "combine"
        elif before & {"combine", "sum"}:
            parts[node] = "sum"
        elif kind in (ROUTE, SEND):
            parts[node] = "dispatch"
        elif "experts" in before or any(str(item.target) == SEND for item in node.all_input_nodes):
            parts[node] = "experts"
        elif "dispatch" in before:
            parts[node] = "dispatch" if node.target is operator.getitem else "experts"
    for node in reversed(graph.nodes):  # what prepares another's inputs goes with it: the rows, the weights
        if node.op == "call_function" and node not in parts and _in_experts(node):
            found = [parts[user] for user in node.users if user in parts]
            if found:
                parts[node] = found[0]
    for node, part in parts.items():
        node.meta["part"] = part


def routed_experts(exported: Exported) -> list[int]:
    """The number of experts of each expert-parallel layer, in graph order."""
    return [int(argument(node, 1)) for node in exported.graph.nodes if str(node.target) == ROUTE]


def slice_parameters(parameters: Sequence[ParameterSpec],
                     rows: Mapping[str, Sequence[RowRange]]) -> tuple[ParameterSpec,
                                                                      ...]:
    """The parameter table with sliced banks replaced by their slices."""
    made: list[ParameterSpec] = []
    for item in parameters:
        made += [replace(item, fqn=f"{item.fqn}[{low}:{high}]",
                         spec=TensorSpec((high - low, *item.spec.shape[1:]), item.spec.dtype))
                 for low, high in rows.get(item.fqn, ())] or [item]
    return tuple(made)
