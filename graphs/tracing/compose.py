"""One training step of an operator graph in one process: every segment's F, then I and W, in graph order.

The reference that planned runs are compared with; also the shortest description of what a run computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment
from mipipe.graphs.tracing.parameter_slices import parse_slice, slice_tensor
from mipipe.graphs.tracing.trace import build_phase, phase_signature


@dataclass(frozen=True)
class StepResult:
    """The model's outputs by value name, gradients by parameter FQN, new buffers (and changed parameters) by FQN."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


def run_step(graph: OperatorGraph, state: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, scale: float = 1.0,
             device: str | torch.device = "cpu") -> StepResult:
    """Outputs and gradients of ``scale * loss`` for one microbatch.

    Args:
        graph: with traces.
        state: parameters and buffers by FQN (`parameter_tensors`); tied ones under their first FQN.
        batch: the model's inputs by name.
        scale: the gradient that starts the backward at the loss.
        device: where everything lives.
    """
    values: dict[str, Tensor] = {name: batch[name] for name in graph.inputs}
    kept: dict[str, dict[str, Tensor]] = {}
    buffers: dict[str, Tensor] = {}
    for segment in graph.segments:
        trace = graph.trace(segment)
        given = _bind(graph, segment, values, {**state, **buffers})
        made = _run(graph, segment, Phase.F, given, device)
        values.update(zip(segment.outputs, (made[name] for name in trace.outputs), strict=True))
        fqns = dict(zip((*trace.parameters, *trace.buffers), (*segment.parameters, *segment.buffers), strict=True))
        buffers.update({fqns[name]: made[result] for name, result in trace.buffer_updates.items()})
        kept[segment.name] = {**given, **{item.name: made[item.name] for item in trace.saved if item.name in made}}
    loss = values[graph.loss]
    grads = {graph.loss: torch.full_like(loss, scale)}
    gradients: dict[str, Tensor] = {}
    for segment in reversed(graph.segments):
        trace, given = graph.trace(segment), kept.pop(segment.name)
        for name, value in zip(trace.output_grads, segment.outputs, strict=True):
            if name is not None:
                given[name] = grads.pop(value)
        for phase in filter(trace.has, (Phase.I, Phase.W)):
            given.update(_run(graph, segment, phase, given, device))
        for table, names, targets in ((grads, trace.input_grads, segment.inputs),
                                      (gradients, trace.parameter_grads, segment.parameters)):
            for name, target in zip(names, targets, strict=True):
                if name is not None:
                    table[target] = table[target] + given[name] if target in table else given[name]
    return StepResult({name: values[name] for name in graph.outputs}, gradients, buffers)


def _bind(graph: OperatorGraph, segment: Segment, values: Mapping[str, Tensor],
          state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arguments of a segment's F by their names in the trace."""
    trace = graph.trace(segment)
    names = (*trace.inputs, *trace.parameters, *trace.buffers)
    tensors = [values[name] for name in segment.inputs]
    tensors += [state[name] for name in (*segment.parameters, *segment.buffers)]
    return dict(zip(names, tensors, strict=True))


def _run(graph: OperatorGraph, segment: Segment, phase: Phase, given: Mapping[str, Tensor],
         device: str | torch.device) -> dict[str, Tensor]:
    """The results of one phase by their names in the trace."""
    trace = graph.trace(segment)
    arguments, results = phase_signature(trace, phase)
    values = build_phase(trace, phase, device)(*[given[name] for name in arguments])
    return dict(zip(results, values, strict=True))


def parameter_tensors(graph: OperatorGraph, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the graph's segments read, by FQN, from a model's named parameters and buffers (or its state dict).

    A tied tensor may stand in ``named`` under any of its names.
    """
    names: dict[str, list[str]] = {}
    for item in graph.parameters:
        names.setdefault(item.tied_to or item.fqn, []).append(item.fqn)
    found = {first: [name for name in group if parse_slice(name)[0] in named or name in named]
             for first, group in names.items()}
    return {first: slice_tensor(named, group[0]).detach() for first, group in found.items() if group}
