"""Rewrites of a traced graph that leave every result as it is: what autograd's formulas write down in vain, or at once.

Powers of one, products with one, double transposes, equal views, and the two halves of a rotary embedding's gradient,
which autograd pads with zeros and adds where a concatenation says the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_VIEWS = {"aten.view.default", "aten.t.default", "aten.transpose.int", "aten.unsqueeze.default", "aten.expand.default",
          "aten.slice.Tensor", "aten.permute.default", "aten.select.int", "aten.squeeze.dim",
          "aten._unsafe_view.default"}


def simplify(graph: fx.Graph) -> None:
    """Apply all rewrites, in place, until none applies."""
    for rule in (_identity, _double_transpose, _join_slices):
        for node in list(graph.nodes):
            found = rule(graph, node) if node.op == "call_function" and node.users else None
            if found is not None:
                node.replace_all_uses_with(found)
                graph.erase_node(node)
    _merge_views(graph)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _identity(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """x ** 1 and x * 1 are x, where the dtype stays."""
    if str(node.target) not in ("aten.pow.Tensor_Scalar", "aten.mul.Tensor", "aten.mul.Scalar"):
        return None
    args: Any = node.args
    source, factor = args[:2]
    if not isinstance(source, fx.Node) or type(factor) not in (int, float) or factor != 1:
        return None
    return source if _dtype(source) == _dtype(node) else None


def _dtype(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def _double_transpose(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """t(t(x)) is x."""
    inner: Any = node.args[0] if node.args else None
    twice = node.target is aten.t.default and inner.op == "call_function" and inner.target is aten.t.default
    return inner.args[0] if twice else None


def _join_slices(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """pad(a) + pad(b), where the slices a and b together cover the tensor, is cat(a, b)."""
    parts: Any = node.args[:2]
    if node.target is not aten.add.Tensor or node.kwargs or not all(
            isinstance(part, fx.Node) and part.target is aten.slice_backward.default for part in parts):
        return None
    halves: Any = sorted((part.args for part in parts), key=lambda item: item[3])
    (low, shape, dim, start, middle, step), (high, shape_2, dim_2, start_2, end, step_2) = halves
    covers = start == 0 and middle == start_2 and end >= shape[dim]
    if not covers or (shape, dim) != (shape_2, dim_2) or step != 1 or step_2 != 1:
        return None
    with graph.inserting_before(node):
        return graph.call_function(aten.cat.default, ([low, high], dim))


def _merge_views(graph: fx.Graph) -> None:
    """Equal views of one tensor become one node."""
    seen: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if str(node.target) not in _VIEWS:
            continue
        first = seen.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def split_convolutions(graph: fx.Graph) -> None:
    """Give each convolution_backward that makes input and weight gradients at once a twin for the latter.

    Fused backwards of norms stay whole: their weight gradients are small, and splitting would keep more for W.
    """
    for node in [node for node in graph.nodes if str(node.target) == "aten.convolution_backward.default"]:
        mask = list(node.args[10])
        if not (mask[0] and (mask[1] or mask[2])):
            continue
        with graph.inserting_after(node):
            twin = graph.call_function(node.target, (*node.args[:10], [False, *mask[1:]]), node.kwargs)
        twin.meta.update(node.meta)
        node.args = (*node.args[:10], [True, False, False])
        for user in list(node.users):
            if user.args[1] != 0:
                user.args = (twin, user.args[1])
