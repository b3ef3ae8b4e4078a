"""Which parameters a mode divides, and how: found out on the trace itself.

In ``tensor`` mode a matrix is divided where that pays: the products that become smaller are weighed against what is
sent more, forward and backward. One step at a time: a first projection by its columns (what follows it, up to the
product that contracts it, is computed in parts, and one sum over the members is left), then whatever else goes along
with it at no cost: the second projection by its rows, biases, weights per head. That gives the known layouts (Shoeybi
et al., "Megatron-LM", 2019): queries, keys and values by heads, gate and up by columns, down and output by rows, tables
and heads by vocabulary; and keeps routers and low-rank bottlenecks whole, which are cheaper so. Matrices side by side
in one tensor (gate and up, or q, k and v) are divided one by one (`Part.sections`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mipipe.graphs.operator_graph import DTYPE_BYTES, SegmentTrace
from mipipe.graphs.operators.expert_kernels import ROUTE
from mipipe.graphs.sharding.assign import Assignment, Layouts, assign
from mipipe.graphs.sharding.blocks import blocks_of
from mipipe.graphs.sharding.parts import Part, divided, fits, units
from mipipe.graphs.sharding.refine import refine
from mipipe.graphs.sharding.steps import specs_of

_LEAST_INTENSITY = 0.25
"""Flops saved for each element sent, over the width of the activations, from which on dividing pays. The layouts above
have 0.4 or more (an MLP 1.5 times inner over outer width, T = 2), routers and bottlenecks far less than 0.25."""
_LEAST_SHARE = 1 / 32
"""The part of a segment's flops that a division must save: a collective has a latency too, whatever its size."""
_MOST_SECTIONS = 3
_WORK = 150_000
"""Operators that the search for a recipe looks at, over all of its trials: a second or two."""


def tensor_recipe(trace: SegmentTrace, layouts: Layouts) -> dict[str, Part]:
    """The division of parameters and buffers in ``tensor`` mode; those left out stay whole.

    ``layouts``: of inputs and outputs; parameters whole.
    """
    search = _Search(trace, layouts)
    while search.free() or search.best():
        pass
    return search.parts


class _Search:
    """Divisions of a trace's parameters, one after another: whatever is free, else what pays best."""

    def __init__(self, trace: SegmentTrace, layouts: Layouts) -> None:
        self.trace, self.layouts, self.specs = trace, layouts, specs_of(trace)
        self.parts = {name: divided(0) for name in _tables(trace)
                      if fits(self.specs[name].shape, divided(0), layouts.size)}
        self.shrinks, self.blocks = bool(banks(trace)), blocks_of(trace)
        self.trials = max(200, _WORK // max(1, len(trace.operators)))
        self.now = self.trial({})
        self.least = _LEAST_SHARE * self.now.flops
        self.width = max((self.specs[name].shape[-1] for name in (*trace.inputs, *trace.outputs)
                          if len(self.specs[name].shape) > 1
                          and self.specs[name].dtype.startswith(("float", "bfloat"))), default=1)
        used = list(_by_use(trace))
        self.matrices = [name for name in used if len(self.specs[name].shape) > 1 and name in trace.parameters]
        self.vectors = [name for name in used if name not in self.matrices]

    def trial(self, more: Mapping[str, Part]) -> Assignment:
        """The assignment with these divisions beside those settled."""
        self.trials -= 1
        made = replace(self.layouts, given={**self.layouts.given, **self.parts, **more})
        return refine(self.trace, made)[1] if self.shrinks else assign(self.trace, made)

    def options(self, name: str) -> Iterator[tuple[Part, Assignment]]:
        """The divisions of a parameter that gather nothing more, with what they lead to, while there is time."""
        if name not in self.parts:
            for part in self.divisions(name):
                if self.trials > 0 and (trial := self.trial({name: part})).gathered <= self.now.gathered:
                    yield part, trial

    def divisions(self, name: str) -> Iterator[Part]:
        """Along each dimension in 1 to `_MOST_SECTIONS` equal sections, or in those into which the trace cuts it."""
        shape, size = self.specs[name].shape, self.layouts.size
        for dim, length in enumerate(shape):
            equal = range(1, _MOST_SECTIONS + 1)
            for sections in (*equal, *(item for item in self.blocks.get(length, ()) if item not in equal)):
                if fits(shape, divided(dim, sections), size):
                    yield divided(dim, sections)

    def free(self) -> bool:
        """Settle, in the order of use, what sends nothing more and makes nothing larger; whether there was any."""
        found = False
        for name in (*self.matrices, *self.vectors):
            best = min(((trial.flops, trial.sent, units(part.sections), part.dim, part, trial)
                        for part, trial in self.options(name)
                        if trial.sent <= self.now.sent and trial.flops <= self.now.flops),
                       key=lambda option: option[:4], default=None)
            if best is not None:
                *_, self.parts[name], self.now = best
                found = True
        return found

    def best(self) -> bool:
        """Settle the matrix that saves most flops for each byte of sums that it sends more, if that is enough."""
        paying: list[tuple[float, str, Part, Assignment]] = []
        for name in self.matrices:
            least = _LEAST_INTENSITY * self.width / DTYPE_BYTES[self.specs[name].dtype]
            for part, trial in self.options(name):
                more, less = trial.sent - self.now.sent, self.now.flops - trial.flops
                if more > 0 and less >= max(least * more, self.least):
                    paying.append((less / more, name, part, trial))
        if paying:
            _, name, self.parts[name], self.now = max(paying, key=lambda option: option[0])
        return bool(paying)


def expert_recipe(trace: SegmentTrace, layouts: Layouts) -> dict[str, Part]:
    """Banks of experts [E,..] by expert; none where tokens travel to experts, which devices share already."""
    if any(part.routed for part in layouts.given.values()) or any(op.kind == ROUTE for op in trace.operators):
        return {}
    return {name: divided(0) for name in banks(trace) if fits(trace.specs[name].shape, divided(0), layouts.size)}


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
    makers = {op.name: op for op in trace.operators}
    found: dict[str, None] = {}
    for op in trace.operators:
        if op.kind in kinds and len(op.args) > place and isinstance(op.args[place], dict):
            name = op.args[place].get("ref", "")
            while name in makers and len(sources := makers[name].inputs) == 1:
                name, = sources
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
