"""The calls of a stage's segments, their arguments and results bound to the slots of a frame.

Which slot each argument is in, which gradients meet in a sum and what is accumulated into which parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment, SegmentTrace, TensorSpec
from mipipe.runtime.engine.compiling.buffers import Frame
from mipipe.runtime.engine.compiling.calls import (
    Call,
    accumulator,
    getter,
)
from mipipe.runtime.engine.compiling.flow import GradientFlow
from mipipe.runtime.engine.compiling.phases import PhaseCode, Phases
from mipipe.runtime.experts.group import Counters
from mipipe.runtime.weights.weights import Weights

BlockKey = tuple[str, ...]


@dataclass(slots=True)
class _Slots:
    """Numbers for keys, and the template they index."""

    template: Frame = field(default_factory=list)
    numbers: dict[BlockKey, int] = field(default_factory=dict)
    static: set[int] = field(default_factory=set)

    def number(self, key: BlockKey) -> int:
        found = self.numbers.get(key)
        if found is None:
            found = self.numbers[key] = len(self.template)
            self.template.append(None)
        return found

    def constant(self, key: BlockKey, value: Any) -> int:
        number = self.number(key)
        self.template[number] = value
        self.static.add(number)
        return number


@dataclass(slots=True)
class StageCalls:
    """The state of building one stage."""

    graph: OperatorGraph
    flow: GradientFlow
    weights: Weights
    loss_gradient: torch.Tensor
    stage_of: dict[str, int]
    index: int
    segments: Sequence[Segment]
    phases: Phases
    slots: _Slots = field(default_factory=_Slots)
    specs: dict[str, TensorSpec] = field(default_factory=dict)
    local: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    counters: Counters = field(default_factory=dict)
    run_of: dict[str, int] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)

    def value(self, name: str, segment: Segment, again: bool) -> int:
        """The slot of a value that a segment reads or makes; ``again``: as it is when the segment's run is done again
        for the backward, where what the run makes itself does not stay from F."""
        run = self.run_of.get(segment.name, -1)
        own = again and run >= 0 and self.run_of.get(self.made_by.get(name, ""), -2) == run
        return self.slots.number(("again" if own else "value", name))

    def gradient(self, value: str) -> tuple[int, tuple[int, tuple[int, ...]] | None]:
        """The slot of a value's whole gradient, and the sum that makes it (None for a single contribution)."""
        parts = []
        seen: set[int] = set()
        for segment, position in self.flow.contributions(value):
            if segment in self.local:
                parts.append(self.slots.number(("part", value, segment, str(position))))
            elif self.stage_of[segment] not in seen:
                seen.add(self.stage_of[segment])
                parts.append(self.slots.number(("incoming", value, str(self.stage_of[segment]))))
        if value == self.graph.loss:
            parts.append(self.slots.constant(("loss gradient",), self.loss_gradient))
        if not parts:
            spec = self.specs[value]
            zeros = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self.phases.device)
            return self.slots.constant(("zeros", str(spec.shape), spec.dtype), zeros), None
        if len(parts) == 1:
            return parts[0], None
        whole = self.slots.number(("gradient", value))
        return whole, (whole, tuple(parts))

    def keys(self, segment: Segment, trace: SegmentTrace, again: bool) -> dict[str, int]:
        """Slots of the trace's arguments and outputs; names absent here are saved tensors. ``again`` as of `value`."""
        slots: dict[str, int] = {}
        for name, value in (*zip(trace.outputs, segment.outputs, strict=True),
                            *zip(trace.inputs, segment.inputs, strict=True)):
            slots[name] = self.value(value, segment, again)
        for names, fqns in ((trace.parameters, segment.parameters), (trace.buffers, segment.buffers)):
            for name, fqn in zip(names, fqns, strict=True):
                tensor = self.weights.tensor(fqn)
                if self.phases.compiles(trace, segment.name):  # which was compiled for plain tensors
                    tensor = tensor.detach()
                slots[name] = self.slots.constant(("weight", fqn), tensor)
        return slots

    def forward(self, segment: Segment, trace: SegmentTrace, code: PhaseCode, needed: set[str],
                again: bool = False) -> Call:
        """The F call: outputs and what I and W will read are stored."""
        slots = self.keys(segment, trace, again)
        outputs = list(zip(trace.outputs, segment.outputs, strict=True))
        stores, updates = [], []
        replaced = dict(zip((*trace.parameters, *trace.buffers), (*segment.parameters, *segment.buffers), strict=True))
        targets = [(result, self.weights.state(replaced[name])) for name, result in trace.buffer_updates.items()]
        for position, name in enumerate(code.results):
            stores += [(position, self.value(value, segment, again)) for output, value in outputs if output == name]
            if name in needed and name not in slots:
                stores.append((position, self.slots.number(("saved", segment.name, name))))
            updates += [(position, target) for result, target in targets if result == name]
        reads = tuple(slots[name] for name in code.arguments)
        number = self.graph.segments.index(segment) if code.random else -1
        counted = None
        if segment.name in self.counters:
            value, counter = self.counters[segment.name]
            counted = self.value(value, segment, again), counter
        return Call(code.function, getter(reads), reads, (), tuple(stores), (), tuple(updates), number,
                    counted=counted)

    def backward(self, segment: Segment, trace: SegmentTrace, code: PhaseCode, phase: Phase, needed: set[str],
                 first: bool) -> Call:
        """The I or W call; ``first`` sums the output gradients, ``needed`` are I's results that W reads."""
        slots = self.keys(segment, trace, True)
        sums = []
        for name, value in zip(trace.output_grads, segment.outputs, strict=True):
            if name is not None:
                slots[name], total = self.gradient(value)
                if total is not None and first:
                    sums.append(total)
        stores: list[tuple[int, int]] = []
        gradients = []
        for position, name in enumerate(code.results):
            if phase is Phase.I:
                stores += [(position, self.slots.number(("part", value, segment.name, str(number))))
                           for number, (result, value) in enumerate(zip(trace.input_grads, segment.inputs, strict=True))
                           if result == name and self.flow.wanted(value)]
                if name in needed and name not in slots:
                    stores.append((position, self.slots.number(("saved", segment.name, name))))
            else:
                gradients += [(position, self.weights.summed(self.weights.canonical[fqn]), code.owned[position])
                              for result, fqn in zip(trace.parameter_grads, segment.parameters, strict=True)
                              if result == name]
        saved = self.slots.number
        reads = tuple(slots[name] if name in slots else saved(("saved", segment.name, name)) for name in code.arguments)
        function = code.function
        if phase is Phase.W:
            function = partial(code.function, accumulator(gradients, self.weights.homes))
        return Call(function, getter(reads), reads, tuple(sums), tuple(stores), tuple(gradients))
