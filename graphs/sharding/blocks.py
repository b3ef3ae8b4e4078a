"""Where a trace takes a dimension apart: queries, keys and values (or a gate and an up projection) in one tensor."""

from __future__ import annotations

from typing import Any

from mipipe.graphs.operator_graph import Phase, SegmentTrace, TensorSpec
from mipipe.graphs.operators.collectives import Sections
from mipipe.graphs.sharding.case import positive
from mipipe.graphs.sharding.parts import side_by_side

_SPLITS = {"aten.split.Tensor", "aten.split_with_sizes.default"}


def blocks_of(trace: SegmentTrace) -> dict[int, tuple[Sections, ...]]:
    """The sections into which F cuts dimensions, by their length: splits, and slices that make up the whole."""
    made: dict[str, TensorSpec] = {**{op.name: op.outputs[0] for op in trace.operators if op.outputs}, **trace.specs}
    found: dict[int, dict[Sections, None]] = {}
    slices: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for op in trace.phase_operators(Phase.F):
        if op.kind in _SPLITS:
            dim = positive(op.args[2] if len(op.args) > 2 else 0, len(op.outputs[0].shape))
            lengths = [spec.shape[dim] for spec in op.outputs]
            if all(lengths):
                found.setdefault(sum(lengths), {})[side_by_side(lengths)] = None
        elif op.kind == "aten.slice.Tensor":
            name, shape = op.args[0]["ref"], made[op.args[0]["ref"]].shape
            given: list[Any] = list(op.args[1:])
            dim, start, stop, step = given + [0, None, None, 1][len(given):]
            dim = positive(dim, len(shape))
            if step == 1:
                low, high, _ = slice(start, stop).indices(shape[dim])
                slices.setdefault((name, dim), set()).add((low, high))
    for (name, dim), ranges in slices.items():
        length, ends = made[name].shape[dim], sorted(ranges)
        if len(ends) > 1 and [0, *(high for _, high in ends)] == [*(low for low, _ in ends), length]:
            found.setdefault(length, {})[side_by_side([high - low for low, high in ends])] = None
    return {length: tuple(sections) for length, sections in found.items()}
