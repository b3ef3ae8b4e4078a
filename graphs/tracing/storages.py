"""The storages behind the nodes of a traced graph: whose tensor a node views, and which storage leaves a segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten


def origin(node: fx.Node) -> fx.Node:
    """The node whose tensor ``node`` views, through any number of views; itself where it is no view."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        returns = node.target._schema.returns
        if len(returns) != 1 or returns[0].alias_info is None:
            break
        sets = returns[0].alias_info.before_set
        source = next((item for given, item in _aliased(node) if given.before_set & sets), None)
        if source is None:
            break
        node = source
    return node


def mutates(node: fx.Node) -> bool:
    """Whether a node's operator changes a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def written(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors an operator changes in place, as its schema says: the first argument of ``add_``, but
    ``out=`` of others, and several of some."""
    return list(dict.fromkeys(item for given, item in _aliased(node) if given.is_write)) if mutates(node) else []


def _aliased(node: fx.Node) -> list[tuple[Any, fx.Node]]:
    """A node's arguments that its operator's schema has notes on (views, changes in place), with these notes."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: list[tuple[Any, fx.Node]] = []
    for place, one in enumerate(node.target._schema.arguments):
        value = node.args[place] if place < len(node.args) and not one.kwarg_only else node.kwargs.get(one.name)
        if one.alias_info is not None:
            items = value if isinstance(value, (list, tuple)) else [value]
            found += [(one.alias_info, item) for item in items if isinstance(item, fx.Node)]
    return found


def argument(node: fx.Node, index: int) -> Any:
    """A positional argument of a node, as it is (a node, a number, a list)."""
    return node.args[index]


def storage_of(node: fx.Node) -> int | None:
    """An identity of the storage behind a node's tensor; None for tuples and numbers."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def storage_bytes(node: fx.Node) -> int:
    """Size of the storage behind a node's tensor."""
    return int(node.meta["val"].untyped_storage().nbytes())


def own_storages(graph: fx.Graph, result: fx.Node, leaving: Sequence[fx.Node | None],
                 mode: FakeTensorMode) -> list[fx.Node | None]:
    """The leaving nodes, each contiguous, covering its storage, and sharing it with no argument or other result."""
    taken = {storage_of(node) for node in graph.nodes if node.op == "placeholder"}
    owned: list[fx.Node | None] = []
    for node in leaving:
        if node is not None:
            value = node.meta["val"]
            whole = value.is_contiguous() and storage_bytes(node) == value.numel() * value.element_size()
            if not whole or storage_of(node) in taken:
                with graph.inserting_before(result):
                    node = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
                with mode:
                    node.meta["val"] = value.clone(memory_format=torch.contiguous_format)
            taken.add(storage_of(node))
        owned.append(node)
    return owned
