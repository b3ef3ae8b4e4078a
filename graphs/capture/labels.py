"""Which block an operator of the exported graph belongs to, from the modules it was recorded in.

Operators inside a heavy module (one with a matrix product, a convolution, an embedding, attention) get its label; what
is outside any (norms, residual sums, reshapes) joins a neighbour.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import fx

from mipipe.graphs.tracing.heavy import is_heavy

Granularity = Literal["layer", "block", "module", "operator"]
Label = str
_EXPERTS = re.compile(r"^(experts)$")
_SHARED = re.compile(r"shared_experts?$|shared_mlp$")
_CONTAINERS = ("Sequential", "ModuleList", "ModuleDict")


def label_nodes(nodes: Sequence[fx.Node], granularity: Granularity) -> dict[fx.Node, Label]:
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
