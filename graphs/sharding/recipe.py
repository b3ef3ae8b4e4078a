"""Which parameters a mode divides, and how: found out on the trace itself.

In ``tensor`` mode a matrix is divided where that pays: the products that become smaller are weighed against what is
sent more, forward and backward. One step at a time, in the order of use: a first projection by its columns (what
follows it, up to the product that contracts it, is computed in parts, and one sum over the members is left), then
whatever else goes along with it at no cost: the second projection by its rows, biases, weights per head. That gives the
known layouts (Shoeybi et al., "Megatron-LM", 2019): queries, keys and values by heads, gate and up by columns, down and
output by rows, tables and heads by vocabulary; and keeps routers and low-rank bottlenecks whole, which are cheaper
so. Matrices side by side in one tensor (gate and up, or q, k and v) are divided one by one (`Part.sections`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from mipipe.graphs.operator_graph import DTYPE_BYTES, SegmentTrace
from mipipe.graphs.sharding.assign import Assignment, Layouts, assign, specs_of
from mipipe.graphs.sharding.parts import Part, divided, fits

_LEAST_INTENSITY = 0.25
"""Flops saved for each element sent, over the width of the activations, from which on dividing pays. The layouts above
have 0.4 or more (an MLP 1.5 times inner over outer width, T = 2), routers and bottlenecks far less than 0.25."""
_MOST_SECTIONS = 3


def tensor_recipe(trace: SegmentTrace, layouts: Layouts) -> dict[str, Part]:
    """The division of parameters and buffers in ``tensor`` mode; those left out stay whole.

    ``layouts``: of inputs and outputs; parameters whole.
    """
    specs = specs_of(trace)
    parts: dict[str, Part] = {}
    for table in _tables(trace):
        if fits(specs[table].shape, divided(0), layouts.size):
            parts[table] = divided(0)
    width = max((specs[name].shape[-1] for name in (*trace.inputs, *trace.outputs) if len(specs[name].shape) > 1
                 and specs[name].dtype.startswith(("float", "bfloat"))), default=1)
    now = _with(trace, layouts, parts)
    used = list(_by_use(trace))
    matrices = [name for name in used if len(specs[name].shape) > 1 and name in trace.parameters]
    for name in (*matrices, *(item for item in used if item not in matrices)):
        if name in parts:
            continue
        best: tuple[tuple[float, float], Part, Assignment] | None = None
        for part in _divisions(specs[name].shape, layouts.size):
            trial = _with(trace, layouts, {**parts, name: part})
            if _pays(now, trial, width if name in matrices else math.inf, DTYPE_BYTES[specs[name].dtype]):
                rank = trial.flops, trial.sent
                if best is None or rank < best[0]:
                    best = rank, part, trial
        if best is not None:
            parts[name], now = best[1], best[2]
    return parts


def expert_recipe(trace: SegmentTrace, layouts: Layouts) -> dict[str, Part]:
    """Banks of experts [E,..] by expert."""
    return {name: divided(0) for name in banks(trace) if fits(trace.specs[name].shape, divided(0), layouts.size)}


def reads_vocabulary(trace: SegmentTrace) -> bool:
    """Whether a segment looks up a table or ends in a loss over classes."""
    return bool(_tables(trace)) or any(op.kind == "aten.nll_loss_forward.default" for op in trace.operators)


def banks(trace: SegmentTrace) -> list[str]:
    """The parameters that grouped products read, directly or as views."""
    return _read_by(trace, ("mipipe.grouped_mm.default",), 1)


def matrices(trace: SegmentTrace) -> list[str]:
    """The parameters that products read, directly or as views."""
    kinds = tuple({op.kind for op in trace.operators if op.flops})
    return list(dict.fromkeys(name for place in range(3) for name in _read_by(trace, kinds, place)))


def _tables(trace: SegmentTrace) -> list[str]:
    return _read_by(trace, ("aten.embedding.default",), 0)


def _read_by(trace: SegmentTrace, kinds: tuple[str, ...], place: int) -> list[str]:
    """Parameters that operators of some kinds have at an argument, through operators of one argument."""
    sources = {op.name: op.inputs[0] for op in trace.operators if len(op.inputs) == 1}
    found: dict[str, None] = {}
    for op in trace.operators:
        if op.kind in kinds and len(op.args) > place and isinstance(op.args[place], dict):
            name = op.args[place].get("ref", "")
            while name in sources:
                name = sources[name]
            if name in trace.parameters:
                found[name] = None
    return list(found)


def _by_use(trace: SegmentTrace) -> Iterator[str]:
    """Parameters and buffers in the order in which operators read them."""
    left = dict.fromkeys((*trace.parameters, *trace.buffers))
    for op in trace.operators:
        for name in op.inputs:
            if name in left:
                del left[name]
                yield name


def _divisions(shape: tuple[int, ...], size: int) -> Iterator[Part]:
    for sections in range(1, _MOST_SECTIONS + 1):
        for dim in range(len(shape)):
            if fits(shape, divided(dim, sections), size):
                yield divided(dim, sections)


def _with(trace: SegmentTrace, layouts: Layouts, parts: Mapping[str, Part]) -> Assignment:
    return assign(trace, replace(layouts, given={**layouts.given, **parts}))


def _pays(now: Assignment, trial: Assignment, width: float, element_bytes: int) -> bool:
    """Whether a division costs nothing, or saves enough flops for the sums that it sends more; none gathers more."""
    if trial.gathered > now.gathered:
        return False
    more, less = trial.sent - now.sent, now.flops - trial.flops
    if more <= 0:
        return less >= 0
    return less * element_bytes >= _LEAST_INTENSITY * width * more
