"""Rows picked by data: ``torch.where(mask)``, ``nonzero``, ``x[mask]``, as loops over experts write them.

How many rows there are differs in every call, so a trace has none of their sizes in it. A segment is traced twice,
with two stand-ins for each count; what differs between the traces depends on counts, and becomes an operator that asks
the picked rows for them (`mipipe.graphs.operators.row_sizes`). Nothing is dropped or padded, whatever the mask. Memory
and flops of the graph are those of the first stand-in: an equal share among the masks that are made of one tensor (the
experts of a layer), else half of the rows.

Left out: counts that cross segments (`segment` keeps what depends on them together), and other operators whose result's
size depends on data.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mipipe.graphs.tracing.heavy import is_heavy
from mipipe.graphs.tracing.storages import storage_of, written

Pair = tuple[int, int]
_which = 0
"""Which of its two stand-ins a count has at the moment."""


def nonzero(mask: Tensor, first: int, second: int) -> Tensor:
    """Where ``mask`` is true, [N, dims]; ``first`` and ``second`` stand for N in the two traces."""
    return torch.nonzero(mask)


def row_count(rows: Sequence[Tensor], factor: int, more: int) -> int:
    """``factor`` times the number of rows of all together, and ``more``."""
    return sum(item.shape[0] for item in rows) * factor + more


def _define() -> None:
    made = torch.library.custom_op("mipipe::nonzero", nonzero, mutates_args=())
    made.register_fake(lambda mask, first, second: mask.new_empty((first, second)[_which], mask.dim(),
                                                                  dtype=torch.int64))
    torch.library.define("mipipe::row_count", "(Tensor[] rows, int factor, int more) -> SymInt")
    torch.library.impl("mipipe::row_count", "CompositeImplicitAutograd", row_count)


_define()

DIRECT: dict[str, Callable[..., object]] = {"mipipe.nonzero.default": nonzero, "mipipe.row_count.default": row_count}
"""What a built phase calls for each operator, without the dispatcher's detour."""


@contextlib.contextmanager
def second_stand_ins() -> Iterator[None]:
    """Inside, counts have their second stand-ins."""
    global _which
    _which = 1
    try:
        yield
    finally:
        _which = 0


def places(mask: Tensor, share: int, stand_ins: Pair) -> tuple[Tensor, ...]:
    """``torch.where(mask)``: one index for each dimension."""
    return torch.ops.mipipe.nonzero(mask, *stand_ins).unbind(1)


def coordinates(mask: Tensor, share: int, stand_ins: Pair) -> Tensor:
    """``torch.nonzero(mask)``."""
    return torch.ops.mipipe.nonzero(mask, *stand_ins)


def picked(x: Tensor, indices: Sequence[Tensor | None], share: int, stand_ins: Pair) -> Tensor:
    """``x[..., mask, ...]`` for the one boolean mask among the indices."""
    found: list[Tensor | None] = []
    for index in indices:
        masked = index is not None and index.dtype in (torch.bool, torch.uint8)
        found += places(index, share, stand_ins) if masked else [index]  # type: ignore[arg-type]
    return torch.ops.aten.index.Tensor(x, found)


def selected(x: Tensor, mask: Tensor, share: int, stand_ins: Pair) -> Tensor:
    """``torch.masked_select(x, mask)``."""
    x, mask = torch.broadcast_tensors(x, mask)
    return torch.ops.aten.index.Tensor(x, list(places(mask, share, stand_ins)))


FORMS: dict[str, Callable[..., Any]] = {"aten.where.default": places, "aten.nonzero_numpy.default": places,
                                        "aten.nonzero.default": coordinates, "aten.index.Tensor": picked,
                                        "aten.masked_select.default": selected}


def is_dynamic(node: fx.Node) -> bool:
    """Whether a node's value, or a size of it, depends on data."""
    value = node.meta.get("val")
    items = value if isinstance(value, (tuple, list)) else [value]
    return any(isinstance(item, torch.SymInt) or (isinstance(item, Tensor) and any(
        isinstance(size, torch.SymInt) for size in item.shape)) for item in items)


def pick_rows(graph: fx.Graph) -> list[fx.Node]:
    """Give operators that pick rows by a mask the `FORMS`; those whose sizes depend on data otherwise are returned."""
    for node in list(graph.nodes):
        if str(node.target) in ("aten.index_put.default", "aten.index_put_.default"):
            _spell_out(graph, node)
    makers = [node for node in graph.nodes if node.op == "call_function" and is_dynamic(node)
              and not any(is_dynamic(item) for item in node.all_input_nodes)]
    masks = {node: _mask(node) for node in makers if str(node.target) in FORMS}
    alike = Counter(_source(mask) for mask in masks.values() if mask is not None)
    other = [node for node in makers if masks.get(node) is None]
    for node, mask in masks.items():
        if mask is not None:
            count = alike[_source(mask)]
            node.target = FORMS[str(node.target)]
            node.args = (*node.args, count if count > 1 else 2)
    return other


def _spell_out(graph: fx.Graph, node: fx.Node) -> None:
    """Write ``x[mask] = values`` with the places where the mask is true: the gradient of the values picks them too."""
    indices, values = list(node.args[1]), node.args[2]  # type: ignore[arg-type]
    masks = [item for item in indices if item is not None and item.meta["val"].dtype in (torch.bool, torch.uint8)]
    if len(masks) != 1 or values.meta["val"].dim() == 0:  # type: ignore[union-attr]
        return
    mask, value = masks[0], masks[0].meta["val"]
    with value.fake_mode:
        parts = torch.nonzero(value).unbind(1)
    with graph.inserting_before(node):
        found = graph.call_function(torch.ops.aten.nonzero_numpy.default, (mask,))
        found.meta.update(val=list(parts), stack=node.meta.get("stack", ()))
        items = []
        for place, part in enumerate(parts):
            items.append(graph.call_function(operator.getitem, (found, place)))
            items[-1].meta.update(val=part, stack=node.meta.get("stack", ()))
    at = indices.index(mask)
    node.args = (node.args[0], [*indices[:at], *items, *indices[at + 1:]], *node.args[2:])


def _mask(node: fx.Node) -> fx.Node | None:
    """The one mask that says which rows a node picks (before or after `pick_rows`); None where it has another form."""
    args: Any = (*node.args, None)
    if node.kwargs:
        return None
    if node.target in (torch.ops.aten.masked_select.default, selected):
        return args[1]
    if node.target not in (torch.ops.aten.index.Tensor, picked):
        return args[0]
    found = [item for item in args[1] if item is not None and item.meta["val"].dtype in (torch.bool, torch.uint8)]
    return found[0] if len(found) == 1 else None


def _source(mask: fx.Node) -> fx.Node:
    """What a mask compares: masks of one tensor (``index == 0``, ``index == 1``, ...) share its entries."""
    return mask.all_input_nodes[0] if len(mask.all_input_nodes) == 1 else mask


def keep_together(nodes: Sequence[fx.Node], labels: dict[fx.Node, str]) -> None:
    """One label for all that depends on a count, up to and with the operators whose results have fixed sizes again.

    Rows that are summed up into one tensor, one mask after another, are one group: the experts of a layer.
    """
    own = set(nodes)
    group: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while group.setdefault(node, node) is not node:
            node = group[node]
        return node

    dynamic = [node for node in nodes if is_dynamic(node)]
    for node in dynamic:
        for user in node.users:
            if user in own:
                group[root(user)] = root(node)
        for source in node.all_input_nodes:
            if source in own and is_dynamic(source):
                group[root(source)] = root(node)
    for node in nodes:
        if node in group and not is_dynamic(node):
            for source in node.all_input_nodes:
                if source in group:
                    group[root(source)] = root(node)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in nodes:
        if node in group:
            members.setdefault(root(node), []).append(node)
    for found in members.values():
        labels.update(dict.fromkeys(found, _common([labels[node] for node in found if is_heavy(node)])
                                    or labels[found[0]]))


def _common(labels: Sequence[str]) -> str:
    """The module that segments have in common; the first of them where there is none."""
    paths = [label.split(".") for label in labels]
    shared = list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    return ".".join(parts[0] for parts in shared) or (labels[0] if labels else "")


def stand_ins(nodes: Sequence[fx.Node]) -> dict[fx.Node, Pair]:
    """Two stand-ins for the count of each node of a segment that picks rows: primes, so that no other size is one.

    Nodes whose masks are computed alike pick as many rows, and share theirs.
    """
    found: dict[fx.Node, Pair] = {}
    pairs: dict[Any, Pair] = {}
    taken: set[int] = set()
    if not any(node.target in FORMS.values() for node in nodes):
        return found
    keys = _keys(nodes)
    for node in nodes:
        if node.target not in FORMS.values():
            continue
        mask = _mask(node)
        assert mask is not None
        if keys.get(mask, mask) not in pairs:
            size, share = mask.meta["val"].numel(), int(node.args[-1])  # type: ignore[arg-type]
            low = max(3, size // share if isinstance(size, int) else 3)
            first = _free_prime(low, taken)
            taken_gaps = {two - one for one, two in pairs.values()}  # a sum and a constant are told apart by it
            second = _free_prime(low, taken)
            while second - first in taken_gaps:
                second = _free_prime(low, taken)
            pairs[keys.get(mask, mask)] = first, second
        found[node] = pairs[keys.get(mask, mask)]
    return found


def _free_prime(low: int, taken: set[int]) -> int:
    """The least prime from ``low`` on that is not taken; takes it."""
    number = low
    while number in taken or any(number % factor == 0 for factor in range(2, int(number**0.5) + 1)):
        number += 1
    taken.add(number)
    return number


def _keys(nodes: Sequence[fx.Node]) -> dict[fx.Node, Any]:
    """A key for each node that nodes with the same value share: operator and arguments, all the way up.

    What is changed in place anywhere has no other key than itself.
    """
    keys: dict[fx.Node, Any] = {}
    changed = {storage_of(item) for node in nodes for item in written(node)}
    numbers: dict[Any, int] = {}
    for node in nodes:
        steady = storage_of(node) not in changed or storage_of(node) is None
        args = fx.node.map_aggregate((node.args, dict(node.kwargs)),
                                     lambda item: ("key", keys.get(item, item)) if isinstance(item, fx.Node) else item)
        keys[node] = numbers.setdefault(f"{node.target} {args}", len(numbers)) if steady else node
    return keys


def picks_rows(graph: fx.Graph) -> bool:
    """Whether a traced graph has rows picked by data."""
    return any(node.target is torch.ops.mipipe.nonzero.default for node in graph.nodes)
