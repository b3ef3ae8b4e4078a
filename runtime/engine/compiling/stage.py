"""One stage as code: its segments' F, I and W functions bound to the slots of a frame.

A stage runs its segments in topological order forward and in reverse backward. Everything that can be decided before
the first step is decided here: which slot each argument is in, which gradients meet in a sum, what is accumulated into
which parameter, and after which call a slot is empty. What is left for the step is a walk over calls
(`mipipe.runtime.engine.compiling.calls`).

Left out: shapes that change between microbatches, and control flow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment
from mipipe.runtime.engine.compiling.buffers import Frame
from mipipe.runtime.engine.compiling.calls import (
    ActionCode,
    Call,
    getter,
    nothing,
    split_parts,
    without_updates,
)
from mipipe.runtime.engine.compiling.flow import GradientFlow
from mipipe.runtime.engine.compiling.phases import Phases
from mipipe.runtime.engine.compiling.stage_calls import StageCalls
from mipipe.runtime.experts.group import Counters
from mipipe.runtime.weights.weights import Weights


@dataclass(frozen=True, slots=True)
class StageCode:
    """The code of one stage on one rank.

    ``template``: a fresh frame. ``inputs`` and ``outputs``: slots of values from and for elsewhere. ``incoming[(value,
    stage)]``: slot of the gradient that stage returns; ``outgoing[value]``: slot of the gradient returned for an input.
    ``parts`` by name: F, I, W, B; ``keep`` (F that keeps only inputs), ``again`` (F once more), ``only`` (F without
    gradients to follow).
    """

    template: Frame
    inputs: dict[str, int]
    outputs: dict[str, int]
    incoming: dict[tuple[str, int], int]
    outgoing: dict[str, int]
    parts: dict[str, ActionCode]
    parameters: tuple[str, ...]
    buffer_updates: bool


def build_stage(graph: OperatorGraph, flow: GradientFlow, segments: Sequence[Segment], index: int,
                stage_of: dict[str, int], weights: Weights, loss_gradient: torch.Tensor, phases: Phases,
                keep: Iterable[str] = (), counters: Counters | None = None,
                again: Sequence[Sequence[str]] = ()) -> StageCode:
    """The code of stage ``index``, whose ``segments`` are in topological order.

    ``stage_of`` gives the stage of every segment; ``keep`` names values the caller wants after F (the loss, outputs);
    ``counters`` has, for segments whose routing is counted, the value with the chosen experts and where to add them;
    ``again``: runs of segments that keep only what goes into them, and whose F is done again just before their
    gradients.
    """
    builder = StageCalls(graph, flow, weights, loss_gradient, stage_of, index, segments, phases)
    builder.specs = {value.name: value.spec for value in graph.values}
    builder.local = {segment.name for segment in segments}
    builder.counters = counters or {}
    builder.run_of = {name: number for number, run in enumerate(again) for name in run if flow.active(run[-1])}
    builder.made_by = {value: segment.name for segment in segments for value in segment.outputs}
    last = {builder.run_of[name]: name for segment in segments if (name := segment.name) in builder.run_of}
    forward: list[Call] = []
    backward: list[tuple[Call | None, Call | None]] = []
    repeated: dict[int, list[Call]] = {}
    for segment in segments:
        trace = phases.trace(segment)
        codes = {phase: phases.code(trace, phase, segment.name) for phase in Phase}
        active = flow.active(segment.name)
        later = {name for phase in (Phase.I, Phase.W) if active and trace.has(phase) for name in codes[phase].arguments}
        run = builder.run_of.get(segment.name)
        forward.append(builder.forward(segment, trace, codes[Phase.F], later if run is None else set()))
        if run is not None:
            call = builder.forward(segment, trace, codes[Phase.F], later, again=True)
            repeated.setdefault(run, []).append(without_updates(call))
        if not active:
            continue
        weight = trace.has(Phase.W)
        read = set(codes[Phase.W].arguments) if weight else set()
        pair: list[Call | None] = [None, None]
        if trace.has(Phase.I):
            call = builder.backward(segment, trace, codes[Phase.I], Phase.I, read, True)
            pair[0] = call if call.stores else None
        if weight:
            pair[1] = builder.backward(segment, trace, codes[Phase.W], Phase.W, set(), pair[0] is None)
        backward.append((pair[0], pair[1]))
        if run is not None and last[run] == segment.name:
            backward += [(call, None) for call in reversed(repeated[run])]
    if any(first is not None for first, _ in backward):
        backward = [_summed_early(first, second) for first, second in backward]
    backward.reverse()
    return _assemble(builder, forward, backward, set(keep))


def _summed_early(first: Call | None, second: Call | None) -> tuple[Call | None, Call | None]:
    """A segment's I and W; where it has no I, sums of its gradients are made in the stage's I, so that what they are
    made of does not wait for W."""
    if first is None and second is not None and second.sums:
        return Call(nothing, getter(()), (), second.sums), dataclasses.replace(second, sums=())
    return first, second


def _assemble(builder: StageCalls, forward: list[Call], backward: list[tuple[Call | None, Call | None]],
              keep: set[str]) -> StageCode:
    slots, flow = builder.slots, builder.flow
    made = {value for segment in builder.segments for value in segment.outputs}
    read_elsewhere = {value for segment in builder.graph.segments if segment.name not in builder.local
                      for value in segment.inputs}
    outputs = {value: slots.number(("value", value)) for segment in builder.segments for value in segment.outputs
               if value in read_elsewhere or value in keep}
    inputs = {value: slots.number(("value", value)) for segment in builder.segments for value in segment.inputs
              if value not in made}
    sums: list[tuple[int, tuple[int, ...]]] = []
    outgoing = {}
    for value in inputs:
        parts = tuple(slots.number(("part", value, segment, str(position)))
                      for segment, position in flow.contributions(value) if segment in builder.local)
        if len(parts) == 1:
            outgoing[value] = parts[0]
        elif parts:
            outgoing[value] = slots.number(("outgoing", value))
            sums.append((outgoing[value], parts))
    incoming = {(key[1], int(key[2])): number for key, number in slots.numbers.items() if key[0] == "incoming"}
    last = [Call(nothing, getter(()), (), tuple(sums))] if sums else []
    input_calls = [i for i, _ in backward if i is not None] + last
    weight_calls = [w for _, w in backward if w is not None]
    both = [call for pair in backward for call in pair if call is not None] + last
    sent, returned = set(outputs.values()), set(outgoing.values())
    frozen = set(inputs.values())
    f, i, w = split_parts([(forward, sent), (input_calls, returned), (weight_calls, set())], slots.static)
    _, b = split_parts([(forward, sent), (both, returned)], slots.static)
    (only,) = split_parts([(forward, sent)], slots.static)
    (kept,) = split_parts([(forward, sent)], slots.static | frozen)
    again, _ = split_parts([([without_updates(call) for call in forward], set()), (both, returned)], slots.static)
    if not input_calls:
        w = b
    named = {"F": f, "I": i, "W": w, "B": b, "only": only, "keep": kept, "again": again}
    names = tuple(dict.fromkeys(builder.weights.canonical[fqn] for segment in builder.segments
                                for fqn in segment.parameters))
    return StageCode(slots.template, inputs, outputs, incoming, outgoing, named, names,
                     any(call.updates for call in forward))


def check_segments(graph: OperatorGraph, names: Iterable[str]) -> list[Segment]:
    """The graph's segments of these names, in the graph's (topological) order.

    Raises:
        GraphError: a name the graph does not have.
    """
    wanted = list(names)
    known = {segment.name for segment in graph.segments}
    for name in wanted:
        if name not in known:
            raise GraphError(f"plan: segment {name!r} is not in the operator graph of {graph.model}")
    chosen = set(wanted)
    return [segment for segment in graph.segments if segment.name in chosen]
