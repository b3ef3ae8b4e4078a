"""An exported graph without what only concerns the exporter: mipipe's operators, no aliases, no changes in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

import mipipe.graphs.operators.kernels  # noqa: F401  (registers mipipe's operators)
from mipipe.graphs.operators.recurrent import LAYERS
from mipipe.graphs.tracing.joint import attention_call
from mipipe.graphs.tracing.storages import argument, mutates, origin, storage_of

_DROPPED = ("aten._assert", "aten.sym_constrain", "aten._functional_assert")
_SAME = {"aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default"}
_CASTS = {"aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten.contiguous.default",
          "aten.type_as.default"}
_GROUPED = {"transformers.grouped_mm_fallback.default", "aten._grouped_mm.default"}


def clean(graph: fx.Graph, outputs: Mapping[str, fx.Node]) -> dict[str, fx.Node]:
    """Drop assertions, aliases and casts to the same dtype, write mutations as functions; where the outputs now are."""
    moved: dict[fx.Node, fx.Node] = {}
    placeholders = set(graph.find_nodes(op="placeholder"))
    for node in list(graph.nodes):
        kind = str(node.target)
        if node.op != "call_function":
            continue
        if kind.startswith(_DROPPED):
            graph.erase_node(node)
        elif kind in _SAME or (kind in _CASTS and _is_noop(node)):
            moved[node] = argument(node, 0)
            node.replace_all_uses_with(argument(node, 0))
            graph.erase_node(node)
        else:
            _replace_kernel(node)
            _functional(graph, node, placeholders)

    def final(node: fx.Node) -> fx.Node:
        return final(moved[node]) if node in moved else node

    return {name: final(node) for name, node in outputs.items()}


def _is_noop(node: fx.Node) -> bool:
    before, after = argument(node, 0).meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor) or node.kwargs.get("copy"):
        return False
    return before.dtype == after.dtype and before.stride() == after.stride()


def _replace_kernel(node: fx.Node) -> None:
    """Use mipipe's operators for attention, recurrent layers, grouped products and histograms of integers."""
    kind = str(node.target)
    if kind == "aten.detach_.default":  # what follows reads its result
        node.target = torch.ops.aten.detach.default
    elif kind == "aten.scaled_dot_product_attention.default":
        node.target = attention_call
    elif kind in LAYERS:
        node.target = LAYERS[kind]
    elif kind in _GROUPED and len(node.args) == 3 and argument(node, 1).meta["val"].dim() == 3:
        node.target = torch.ops.mipipe.grouped_mm.default
    elif kind == "aten.histc.default" and not argument(node, 0).meta["val"].is_floating_point():
        node.target, node.kwargs = torch.ops.mipipe.histogram.default, {}


def _functional(graph: fx.Graph, node: fx.Node, placeholders: set[fx.Node]) -> None:
    """Turn ``add_(a, b)`` into ``add(a, b)`` where only ``a`` itself sees the change; other mutations stay.

    What stays is made functional inside its segment, which therefore holds all views of the tensor (see `segment`).
    """
    target: Any = node.target
    if not mutates(node) or str(target) == "aten.copy_.default":  # a copy as a function has no derivative
        return
    changed = argument(node, 0)
    name = target._schema.name.split("::")[1]
    if not name.endswith("_") or not isinstance(changed, fx.Node) or origin(changed) in placeholders:
        return
    storage = storage_of(changed)
    before = [other for other in graph.nodes if other < node and storage_of(other) == storage]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None)
    if packet is None or target._overloadname not in packet.overloads() or before != [changed]:
        return
    for user in list(changed.users):
        if user is not node and node < user:
            user.replace_input_with(changed, node)
    node.target = getattr(packet, target._overloadname)
