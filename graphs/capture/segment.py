"""Cutting the exported forward graph into segments: blocks of the module tree, made acyclic.

Each operator is labelled with a block by the modules it was recorded in (`mipipe.graphs.capture.labels`: embedding; for
each layer attention and MLP, or router, expert groups, shared experts and combine; head with the loss). Parameter-free
results of integer inputs (masks, position embeddings) belong to no block: each segment that reads them computes its own
copy. Labels on a cycle are merged.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import networkx as nx
import torch
from torch import Tensor, fx

from mipipe.graphs.capture.export import Exported, needed
from mipipe.graphs.capture.labels import Granularity, Label, label_nodes
from mipipe.graphs.errors import GraphError
from mipipe.graphs.tracing import dynamic_rows
from mipipe.graphs.tracing.storages import argument, origin, storage_of, written


@dataclass(frozen=True)
class SegmentCut:
    """One segment: its name and its nodes in an order in which they can run (copies of shared ones included)."""

    name: str
    nodes: tuple[fx.Node, ...]


def cut_segments(exported: Exported, granularity: Granularity = "block") -> list[SegmentCut]:
    """The segments of a graph in a topological order, covering all operators that its outputs or buffers need.

    Raises:
        GraphError: there is no such granularity.
    """
    if granularity not in get_args(Granularity):
        raise GraphError(f"capture granularity: found {granularity!r}, expected one of"
                         f" {', '.join(get_args(Granularity))}")
    nodes = _live_nodes(exported)
    cloned = clonable(exported, nodes)
    own = [node for node in nodes if node not in cloned]
    labels = label_nodes(own, granularity)
    dynamic_rows.keep_together(own, labels)
    _keep_together(own, labels)
    labels = _acyclic(own, labels)
    members: dict[Label, list[fx.Node]] = {}
    for node in own:
        members.setdefault(labels[node], []).append(node)
    stray = [node for node in exported.outputs.values() if node in cloned]
    for node in stray:  # an output that depends on integer inputs alone
        members.setdefault("outputs", []).append(node)
    position = {node: index for index, node in enumerate(exported.graph.nodes)}
    cuts = []
    for name, group in members.items():
        needed = _needed_copies(group, cloned)
        cuts.append(SegmentCut(name, tuple(sorted({*group, *needed}, key=position.__getitem__))))
    return _in_order(cuts, cloned)


def _live_nodes(exported: Exported) -> list[fx.Node]:
    """Operators that an output or a buffer's new value depends on, in graph order."""
    live = needed(exported.graph, exported.outputs.values())
    return [node for node in exported.graph.nodes if node in live and node.op == "call_function"]


def _mutated(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors an operator changes in place: the model's own ones where they are changed by a view."""
    return [origin(item) if origin(item).op == "placeholder" else item for item in written(node)]


def clonable(exported: Exported, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Operators that depend on no parameter, no floating-point input and no random number: masks, positions.

    A tensor that is changed in place is one of them only if all its changes are; they are copied with it.
    """
    given = {node for node in exported.inputs.values() if not node.meta["val"].is_floating_point()}
    batch_norms = {item for node in nodes if "batch_norm" in str(node.target) for item in node.all_input_nodes}
    given |= {node for node in exported.buffers.values() if node not in batch_norms}
    placed = [*exported.inputs.values(), *exported.buffers.values(), *exported.parameters.values()]
    barred = {storage_of(item) for node in nodes for item in _mutated(node)}
    barred &= {storage_of(node) for node in placed}
    while True:
        free = {node for node in given if storage_of(node) not in barred}
        for node in nodes:
            seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            storage = storage_of(node)
            if not seeded and (storage is None or storage not in barred) and free.issuperset(node.all_input_nodes):
                free.add(node)
        changed = {storage_of(item) for node in nodes if node not in free for item in _mutated(node)}
        if changed <= barred:
            return {node for node in free if node.op == "call_function"}
        barred |= changed


def _needed_copies(group: Iterable[fx.Node], cloned: set[fx.Node]) -> set[fx.Node]:
    """The clonable nodes that a group reads, directly or not, with the changes in place of their tensors."""
    changes: dict[int | None, list[fx.Node]] = {}
    for node in cloned:
        for item in _mutated(node):
            changes.setdefault(storage_of(item), []).append(node)
    found: set[fx.Node] = set()
    pending = [item for node in group for item in (node, *node.all_input_nodes)]
    while pending:
        node = pending.pop()
        if node in cloned and node not in found:
            found.add(node)
            pending.extend((*node.all_input_nodes, *changes.get(storage_of(node), ())))
    return found


def _keep_together(nodes: Sequence[fx.Node], labels: dict[fx.Node, Label]) -> None:
    """Results of one operator share its label, and so do all views of a tensor that is changed in place.

    Where that is a parameter or buffer of the model, its readers do: there only their order says which value they read.
    """
    changed = {storage_of(found): labels[node] for node in nodes for found in _mutated(node)
               if found.op == "call_function"}
    for node in nodes:
        if node.target is operator.getitem:
            labels[node] = labels[argument(node, 0)]
        elif isinstance(node.meta.get("val"), Tensor) and storage_of(node) in changed:
            labels[node] = changed[storage_of(node)]
    whole = {(node, found) for node in nodes for found in _mutated(node) if found.op == "placeholder"
             and "batch_norm" not in str(node.target)}
    for source in dict.fromkeys(found for node in nodes for found in _mutated(node) if (node, found) in whole):
        readers = [node for node in nodes if any(origin(item) is source for item in (node, *node.all_input_nodes))]
        first = next((node for node in readers if (node, source) not in whole and origin(node) is not source),
                     readers[0])
        labels.update(dict.fromkeys(readers, labels[first]))


def _acyclic(nodes: Sequence[fx.Node], labels: Mapping[fx.Node, Label]) -> dict[fx.Node, Label]:
    """Labels of which those on a common cycle are merged, under the name of the first."""
    quotient = nx.DiGraph()
    for node in nodes:
        quotient.add_node(labels[node])
        quotient.add_edges_from((labels[item], labels[node]) for item in node.all_input_nodes if item in labels)
    order = {label: index for index, label in enumerate(dict.fromkeys(labels[node] for node in nodes))}
    merged = {label: min(part, key=order.__getitem__)
              for part in nx.strongly_connected_components(quotient) for label in part}
    return {node: merged[labels[node]] for node in nodes}


def _in_order(cuts: Sequence[SegmentCut], cloned: set[fx.Node]) -> list[SegmentCut]:
    """Cuts in the topological order that is nearest to the order of the program."""
    home = {node: cut.name for cut in cuts for node in cut.nodes if node not in cloned}
    quotient = nx.DiGraph()
    for cut in cuts:
        quotient.add_node(cut.name)
        quotient.add_edges_from((home[item], cut.name) for node in cut.nodes for item in node.all_input_nodes
                                if item in home and home[item] != cut.name)
    index = {cut.name: place for place, cut in enumerate(cuts)}
    named = {cut.name: cut for cut in cuts}
    return [named[name] for name in nx.lexicographical_topological_sort(quotient, key=index.__getitem__)]
