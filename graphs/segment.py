"""Cutting the exported forward graph into segments: blocks of the module tree, made acyclic.

Each operator is labelled with a block by the modules it was recorded in (embedding; for each layer attention and MLP,
or router, expert groups, shared experts and combine; head with the loss). Operators outside any heavy module (norms,
residual sums, reshapes) join a neighbour. Parameter-free results of integer inputs (masks, position embeddings) belong
to no block: each segment that reads them computes its own copy. Labels on a cycle are merged.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import networkx as nx
import torch
from torch import Tensor, fx

from mipipe.graphs.errors import GraphError
from mipipe.graphs.export import Exported
from mipipe.graphs.joint import argument, attention_call, storage_of

Granularity = Literal["layer", "block", "module", "operator"]
Label = str

_HEAVY = re.compile(r"linear|mm\b|matmul|conv|embedding|attention|einsum|bilinear|grouped_mm")
_EXPERTS = re.compile(r"^(experts)$")
_SHARED = re.compile(r"shared_experts?$|shared_mlp$")
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


@dataclass(frozen=True)
class Cut:
    """One segment: its name and its nodes in an order in which they can run (copies of shared ones included)."""

    name: str
    nodes: tuple[fx.Node, ...]


def cut_segments(exported: Exported, granularity: Granularity = "block") -> list[Cut]:
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
    labels = _label(own, granularity)
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
        cuts.append(Cut(name, tuple(sorted({*group, *needed}, key=position.__getitem__))))
    return _in_order(cuts, cloned)


def _live_nodes(exported: Exported) -> list[fx.Node]:
    """Operators that an output or a buffer's new value depends on, in graph order."""
    mutating = [node for node in exported.graph.nodes if _mutated(node) is not None]
    live: set[fx.Node] = set()
    pending = [*exported.outputs.values(), *mutating]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)
    return [node for node in exported.graph.nodes if node in live and node.op == "call_function"]


def _mutated(node: fx.Node) -> fx.Node | None:
    """The node whose tensor an operator changes in place, if any."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    return next((item for item in node.all_input_nodes), None)


def clonable(exported: Exported, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Operators that depend on no parameter, no floating-point input and no random number: masks, positions.

    A tensor that is changed in place is one of them only if all its changes are; they are copied with it.
    """
    given = {node for node in exported.inputs.values() if not node.meta["val"].is_floating_point()}
    batch_norms = {item for node in nodes if "batch_norm" in str(node.target) for item in node.all_input_nodes}
    given |= {node for node in exported.buffers.values() if node not in batch_norms}
    placed = [*exported.inputs.values(), *exported.buffers.values(), *exported.parameters.values()]
    barred = {storage_of(item) for node in nodes if (item := _mutated(node)) is not None}
    barred &= {storage_of(node) for node in placed}
    while True:
        free = {node for node in given if storage_of(node) not in barred}
        for node in nodes:
            seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
            storage = storage_of(node)
            if not seeded and (storage is None or storage not in barred) and free.issuperset(node.all_input_nodes):
                free.add(node)
        changed = {storage_of(item) for node in nodes if (item := _mutated(node)) is not None and node not in free}
        if changed <= barred:
            return {node for node in free if node.op == "call_function"}
        barred |= changed


def _needed_copies(group: Iterable[fx.Node], cloned: set[fx.Node]) -> set[fx.Node]:
    """The clonable nodes that a group reads, directly or not, with the changes in place of their tensors."""
    changes: dict[int | None, list[fx.Node]] = {}
    for node in cloned:
        if (item := _mutated(node)) is not None:
            changes.setdefault(storage_of(item), []).append(node)
    found: set[fx.Node] = set()
    pending = [item for node in group for item in (node, *node.all_input_nodes)]
    while pending:
        node = pending.pop()
        if node in cloned and node not in found:
            found.add(node)
            pending.extend((*node.all_input_nodes, *changes.get(storage_of(node), ())))
    return found


# Labelling: hard labels from heavy modules, soft operators to a neighbour.


@dataclass(frozen=True)
class _Place:
    """Where an operator was recorded: its layer (or outermost block), and the path below it."""

    unit: str
    below: tuple[str, ...]
    leaf: bool
    heavy: bool


def _label(nodes: Sequence[fx.Node], granularity: Granularity) -> dict[fx.Node, Label]:
    """A label for every operator."""
    trunk = {""} | {path.rpartition(".")[0] for node in nodes for path in _layers(node)}
    trunk |= {".".join(path.split(".")[:depth]) for path in trunk for depth in range(len(path.split(".")))}
    units = {node: _unit(node, trunk) for node in nodes}
    labels: dict[fx.Node, Label | None] = dict.fromkeys(nodes)
    members: dict[str, list[fx.Node]] = {}
    for node, unit in units.items():
        members.setdefault(unit, []).append(node)
    for unit, group in members.items():
        if unit:
            labels.update(_label_unit(unit, group, granularity))
    _attach(nodes, labels, units)
    return {node: label or "model" for node, label in labels.items()}


def _layers(node: fx.Node) -> list[str]:
    """The path of the layer a node belongs to: the outermost numbered module that is no mere container."""
    stack = node.meta.get("stack", ())
    return [path for path, kind, _ in stack if path.rpartition(".")[2].isdigit() and kind not in _CONTAINERS][:1]


def _unit(node: fx.Node, trunk: set[str]) -> str:
    """The layer, or outside of layers the outermost module that holds none; with the number of its call."""
    layers = _layers(node)
    for path, _, call in node.meta.get("stack", ()):
        if path in layers or (not layers and path not in trunk):
            return f"{path}#{call}" if call else path
    return ""


def _below(node: fx.Node, unit: str) -> list[tuple[str, str]]:
    """The modules between a unit and the operator: (name relative to the unit, class)."""
    base = unit.partition("#")[0]
    return [(path[len(base) + 1:], kind) for path, kind, _ in node.meta["stack"] if path.startswith(f"{base}.")]


def _label_unit(unit: str, nodes: Sequence[fx.Node], granularity: Granularity) -> dict[fx.Node, Label | None]:
    """Labels within one layer or block; None for all if nothing in it is heavy."""
    if not any(is_heavy(node) for node in nodes):
        return dict.fromkeys(nodes)
    whole = granularity == "layer" or not any(_layers(node) for node in nodes)
    if whole or not any(_below(node, unit) for node in nodes):  # the last: one linear of a Sequential
        return dict.fromkeys(nodes, unit)
    hard = _hard_labels(unit, nodes, granularity)
    labels: dict[fx.Node, Label | None] = {}
    current, run = None, []
    for node in nodes:
        label = hard[node]
        if label is None:
            run.append(node)
            continue
        direct = [index for index, item in enumerate(run) if not _below(item, unit)]
        split = direct[-1] + 1 if direct and current is not None and current != label else 0
        labels.update(dict.fromkeys(run[:split], current))
        labels.update(dict.fromkeys(run[split:], label))
        labels[node], current, run = label, label, []
    labels.update(dict.fromkeys(run, current))
    return labels


def _hard_labels(unit: str, nodes: Sequence[fx.Node], granularity: Granularity) -> dict[fx.Node, Label | None]:
    """The label of each operator inside a heavy child of a unit; None for norms and the unit's own arithmetic."""
    below = {node: _below(node, unit) for node in nodes}
    if granularity == "operator":
        return _operator_labels(unit, below)
    if granularity == "module":
        heavy = {paths[-1][0] for node, paths in below.items() if paths and is_heavy(node)}
        inner = {node: paths[-1][0] if paths else "" for node, paths in below.items()}
        return {node: f"{unit}.{path}" if path in heavy else None for node, path in inner.items()}
    moe = _moe_paths(below)
    heavy = {paths[0][0] for node, paths in below.items() if paths and is_heavy(node)}
    leaves = {paths[0][0] for paths in below.values() if paths and paths[0][0] in heavy}
    leaves -= {paths[0][0] for paths in below.values() if len(paths) > 1}
    leaves -= {paths[0][0] for node, paths in below.items() if paths and not is_heavy(node) and len(paths) == 1}
    labels: dict[fx.Node, Label | None] = {}
    seen: dict[str, str] = {}
    for node, paths in below.items():
        top = paths[0][0] if paths else ""
        block = next((path for path, _ in paths if path in moe), None)
        if block is not None:
            child = paths[-1][0].removeprefix(block).lstrip(".").split(".")[0]
            part = _moe_part(node, child, seen.get(block, "router"))
            if part.startswith(("experts", "dispatch")):
                seen.setdefault(block, "sum" if part == "dispatch" else "combine")
            labels[node] = f"{unit}.{block}.{part}"
        elif top not in heavy:
            labels[node] = None
        elif top in leaves:  # fc1, fc2 directly in the layer
            labels[node] = f"{unit}.mlp" if heavy - leaves else unit
        else:
            labels[node] = f"{unit}.{top}"
    return labels


def _operator_labels(unit: str, below: Mapping[fx.Node, Sequence[tuple[str, str]]]) -> dict[fx.Node, Label | None]:
    """A label for each heavy operator: its module, with the operator's name where the module has several."""
    labels: dict[fx.Node, Label | None] = dict.fromkeys(below)
    heavy = [node for node in below if is_heavy(node)]
    places = [below[node][-1][0] if below[node] else "" for node in heavy]
    taken: set[str] = set()
    for node, place in zip(heavy, places, strict=True):
        own = "" if place and places.count(place) == 1 else re.sub(r"(_default)?(_\d+)?$", "", node.name)
        text, count = ".".join(part for part in (unit, place, own) if part), 1
        label = text
        while label in taken:
            label, count = f"{text}_{count}", count + 1
        taken.add(label)
        labels[node] = label
    return labels


def _moe_paths(below: Mapping[fx.Node, Sequence[tuple[str, str]]]) -> set[str]:
    """The modules, relative to a unit, that have a child named ``experts``: MoE blocks."""
    paths = {path for item in below.values() for path, _ in item}
    return {path.rpartition(".")[0] for path in paths if _EXPERTS.match(path.rpartition(".")[2]) and "." in path}


def _moe_part(node: fx.Node, inner: str, rest: str) -> str:
    """experts, experts.groupN and the like (see `expert_groups`), shared_experts; the block's own operators are
    ``rest``: router before the experts, then combine, or sum where combine is an all-to-all."""
    if _EXPERTS.match(inner):
        return str(node.meta.get("part", "experts"))
    if _SHARED.search(inner):
        return "shared_experts"
    return rest


def is_heavy(node: fx.Node) -> bool:
    """Whether an operator is a matrix product, a convolution, an embedding or attention."""
    return node.target is attention_call or _HEAVY.search(str(node.target)) is not None


def _attach(nodes: Sequence[fx.Node], labels: dict[fx.Node, Label | None], units: Mapping[fx.Node, str]) -> None:
    """Label what is left: norms go to their first consumer, arithmetic to its latest labelled producer.

    Between a layer and what follows outside, arithmetic goes to the follower, so that layers stay alike.
    """
    rank = {label: index for index, node in enumerate(nodes) if (label := labels[node]) is not None}

    def follow(node: fx.Node, *, enter_layers: bool = True, shared: bool = True) -> None:
        found = {label for user in node.users if (label := labels.get(user)) is not None
                 and (enter_layers or not _layers(user))}
        if labels[node] is None and found and (shared or len(found) == 1):
            labels[node] = min(found, key=rank.__getitem__)

    def join(node: fx.Node, *, leave_layers: bool) -> None:
        sources = {label: item for item in node.all_input_nodes if (label := labels.get(item)) is not None}
        latest = max(sources, key=rank.__getitem__, default=None)
        if labels[node] is None and latest is not None and not (leave_layers and _layers(sources[latest])):
            labels[node] = latest

    for node in reversed(nodes):
        if units[node]:
            follow(node, enter_layers=bool(_layers(node)))
    for node in nodes:
        join(node, leave_layers=not _layers(node))
    for node in reversed(nodes):  # what several read, as decoder layers do an encoder's last norm, stays with its maker
        follow(node, shared=False)
    for node in nodes:
        join(node, leave_layers=False)
    for node in reversed(nodes):
        follow(node)


def _keep_together(nodes: Sequence[fx.Node], labels: dict[fx.Node, Label]) -> None:
    """Results of one operator share its label, and so do all views of a tensor that is changed in place."""
    changed = {storage_of(found): labels[node] for node in nodes if (found := _mutated(node)) is not None
               and found.op == "call_function"}
    for node in nodes:
        if node.target is operator.getitem:
            labels[node] = labels[argument(node, 0)]
        elif isinstance(node.meta.get("val"), Tensor) and storage_of(node) in changed:
            labels[node] = changed[storage_of(node)]


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


def _in_order(cuts: Sequence[Cut], cloned: set[fx.Node]) -> list[Cut]:
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
