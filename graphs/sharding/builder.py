"""Writing a member's program: operators on local tensors, and the changes from one layout to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import mipipe.graphs.operators.collectives
import mipipe.graphs.operators.owned_experts  # noqa: F401  (both register operators)
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part

aten = torch.ops.aten
team = torch.ops.mipipe
CPU = torch.device("cpu")


class Builder:
    """An fx graph that grows: every node has its (fake, local) value, phase and module path."""

    def __init__(self, size: int, axis: str) -> None:
        self.size, self.axis = size, axis
        self.graph = fx.Graph()
        self.mode = FakeTensorMode()
        self.phases: dict[fx.Node, Phase] = {}
        self.paths: dict[fx.Node, str] = {}
        self.phase, self.path = Phase.F, ""
        self._changed: dict[tuple[Any, Part, bool], fx.Node] = {}
        self._own: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def argument(self, name: str, shape: Sequence[int], dtype: str) -> fx.Node:
        """A placeholder."""
        node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=CPU)
        return node

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """An operator in the present phase."""
        node = self.graph.call_function(target, args, kwargs)
        values, options = fx.map_arg((args, kwargs), lambda item: item.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values, **options)
        self.phases[node], self.paths[node] = self.phase, self.path
        return node

    def view(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A tensor with another shape; copied where its layout in memory asks for it."""
        value: Tensor = x.meta["val"]
        if not value.is_contiguous():
            x = self.emit(aten.clone.default, x, memory_format=torch.contiguous_format)
        return self.emit(aten.view.default, x, list(shape))

    def all_reduce(self, x: fx.Node, op: str = "sum") -> fx.Node:
        return self.emit(team.all_reduce.default, x, op, self.size, self.axis)

    def first(self, step: int) -> fx.Node:
        """The number of this member times ``step``: an int64 tensor of shape [1]."""
        key = ("first", Part(Kind.WHOLE, step), False)
        if key not in self._changed:
            all_of_them = self.emit(aten.arange.start_step, 0, step * self.size, step, device=CPU)
            self._changed[key] = self.emit(team.take_part.default, all_of_them, 0, 1, self.size, self.axis)
        return self._changed[key]

    def own(self, offsets: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The offsets of this member's experts, and where the first one's rows begin ([1]), from those of all."""
        if offsets not in self._own:
            start = self.emit(aten.new_zeros.default, offsets, [1])
            before = self.emit(aten.cat.default, [start, self.emit(aten.slice.Tensor, offsets, 0, 0, -1)])
            mine = [self.emit(team.take_part.default, item, 0, 1, self.size, self.axis) for item in (offsets, before)]
            self._own[offsets] = mine[0], self.emit(aten.slice.Tensor, mine[1], 0, 0, 1)
        return self._own[offsets]

    def among_zeros(self, x: fx.Node, part: Part) -> fx.Node:
        """The whole tensor of which x is this member's part, with zeros where others have theirs."""
        shape = list(x.meta["val"].shape)
        places = self.emit(team.take_part.default,
                           self.emit(aten.arange.default, shape[part.dim] * self.size, device=CPU), 0, _listed(part),
                           self.size, self.axis)
        shape[part.dim] *= self.size
        return self.emit(aten.index_copy.default, self.emit(aten.new_zeros.default, x, shape), part.dim,
                         places, x)

    def change(self, x: fx.Node, source: Part, target: Part, offsets: fx.Node | None = None) -> fx.Node:
        """A tensor that lies as ``source``, as ``target``: made once, gathers once more in the backward."""
        if source == target or (source.kind is Kind.WHOLE and target.kind is Kind.OWNED):
            return x
        again = source.kind is Kind.DIVIDED and target == WHOLE and self.phase is not Phase.F
        key = (x, target, again)
        if key not in self._changed:
            self._changed[key] = self._changing(x, source, target, offsets)
        return self._changed[key]

    def gathered(self, x: Any) -> fx.Node | None:
        """A divided tensor as it was gathered in the backward, if it was."""
        return self._changed.get((x, WHOLE, True))

    def _changing(self, x: fx.Node, source: Part, target: Part, offsets: fx.Node | None) -> fx.Node:
        rest = (self.size, self.axis)
        if source.kind is Kind.OWNED:
            assert offsets is not None
            summand = self._own_rows(x, offsets)
            return summand if target == PARTIAL else self.change(summand, PARTIAL, target)
        if source.kind is Kind.WHOLE:
            return self.emit(team.take_part.default, x, target.dim, _listed(target), *rest)
        if source.kind is Kind.PARTIAL:
            return self.all_reduce(x) if target == WHOLE else self.emit(
                team.reduce_scatter.default, x, target.dim, _listed(target), *rest)
        if target == WHOLE:
            return self.emit(team.all_gather.default, x, source.dim, _listed(source), *rest)
        return self.emit(team.exchange_parts.default, x, [source.dim, *_listed(source)], [target.dim, *_listed(target)],
                         *rest)

    def _own_rows(self, x: fx.Node, offsets: fx.Node) -> fx.Node:
        """x with zeros in the rows of other members' experts."""
        mine, start = self.own(offsets)
        end = self.emit(aten.slice.Tensor, mine, 0, -1, 2**63 - 1)
        value: Tensor = x.meta["val"]
        rows = self.emit(aten.arange.default, value.shape[0], device=CPU)
        inside = self.emit(aten.logical_and.default, self.emit(aten.ge.Tensor, rows, start),
                           self.emit(aten.lt.Tensor, rows, end))
        inside = self.emit(aten.view.default, inside, [-1] + [1] * (value.dim() - 1))
        return self.emit(aten.where.self, inside, x, self.emit(aten.new_zeros.default, x, []))

    def run(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Node:
        """An operator as the trace has it; a view that the local layout in memory forbids is preceded by a copy."""
        if target in (aten.view.default, aten._unsafe_view.default):
            value: Tensor = args[0].meta["val"]
            try:
                with self.mode, torch.no_grad():
                    value.view(args[1])
            except (RuntimeError, ValueError):
                copy = self.emit(aten.clone.default, args[0], memory_format=torch.contiguous_format)
                return self.emit(target, copy, *args[1:], **kwargs)
        return self.emit(target, *args, **kwargs)


def _listed(part: Part) -> list[int]:
    """The sections of a part as operators take them."""
    return [part.sections] if isinstance(part.sections, int) else list(part.sections)
