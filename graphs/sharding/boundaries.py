"""How values lie between the segments of a graph on a team, and what a segment thus has at its boundary.

It follows from the value alone, so that neighbours in one mode agree: in ``sequence`` and ``context`` mode activations
[B,S,H] (or [B*S,H]) are divided along the sequence, in ``batch`` mode whatever has the samples in front; all else is
whole on every member. Where tokens travel to experts on other devices, whatever the mode, each member sends its part of
them, and what is made of these is its own until they are back (`Part.routed`).

Legend: T members, B sequences, S positions, H width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from mipipe.graphs.errors import GraphError
from mipipe.graphs.modes import Layout
from mipipe.graphs.operator_graph import OperatorGraph, Segment, SegmentTrace, TensorSpec, Value
from mipipe.graphs.operators.expert_kernels import RETURN, ROUTE, SEND
from mipipe.graphs.sharding.assign import Layouts, forward_parts, no_scatter
from mipipe.graphs.sharding.parts import WHOLE, Part, divided, fits


class Streams:
    """The shapes that a graph's activations have: which dimension is the sequence, which the samples. ``specs``: of
    values that have gradients; those of frozen parts with an equal one are activations, too."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.pairs = {(value.spec.shape[0], value.spec.shape[1]) for value in graph.values
                      if value.differentiable and len(value.spec.shape) == 3}
        self.samples = {value.spec.shape[0] for value in graph.values
                        if value.source is None and len(value.spec.shape) > 1} | {pair[0] for pair in self.pairs}
        self.specs = {value.spec for value in graph.values if value.differentiable}

    def sequence(self, shape: Sequence[int], size: int) -> Part | None:
        """The division of an activation of this shape along its sequence, if it has one that divides."""
        if len(shape) == 3 and (shape[0], shape[1]) in self.pairs:
            part = divided(1)
            return part if fits(shape, part, size) and shape[1] > 1 else None
        for batch, length in sorted(self.pairs):
            if len(shape) == 2 and shape[0] == batch * length and length > 1:
                part = divided(0, batch)
                return part if fits(shape, part, size) else None
        return None

    def scatter(self, shape: Sequence[int], size: int) -> Part | None:
        """`sequence`, also for tensors with heads, [B,S,H,D] and [B,H,S,D]; not for a number of each row [..,1]."""
        if shape[-1:] == (1,):
            return None
        for dim in (1, 2) if len(shape) == 4 else ():
            if (shape[0], shape[dim]) in self.pairs and shape[dim] > 1 and fits(shape, divided(dim), size):
                return divided(dim)
        return self.sequence(shape, size)

    def tokens(self, shape: Sequence[int], size: int) -> Part | None:
        """The division of tokens [B*S,..] that members send to experts: along their sequences, else in equal runs."""
        return self.sequence(shape, size) or (divided(0) if fits(shape, divided(0), size) else None)

    def batch(self, shape: Sequence[int], size: int) -> Part | None:
        """The division of a tensor of this shape by samples, if it has samples in front that divide."""
        flat = {batch * length for batch, length in self.pairs if batch % size == 0}
        known = bool(shape) and (shape[0] in self.samples or (shape[0] in flat and len(shape) == 2))
        return divided(0) if known and fits(shape, divided(0), size) else None


def boundary_layout(value: Value, mode: str, streams: Streams, size: int) -> Layout:
    """How a value lies between two segments that both run in a mode."""
    shape = value.spec.shape
    if mode in ("sequence", "context") and value.spec in streams.specs and streams.sequence(shape, size) is not None:
        return Layout.SEQUENCE
    if mode == "batch" and streams.batch(shape, size) is not None:
        return Layout.BATCH
    return Layout.REPLICATED


def layout_part(layout: Layout, spec: TensorSpec, streams: Streams, size: int) -> Part:
    """The division of a tensor that lies in a layout."""
    found = {Layout.SEQUENCE: streams.sequence, Layout.BATCH: streams.batch}.get(layout)
    return WHOLE if found is None else found(spec.shape, size) or WHOLE


def boundary_parts(graph: OperatorGraph, modes: Mapping[str, str], streams: Streams, size: int) -> dict[str, Part]:
    """How every value of a graph lies between segments in these modes, by name: as the mode of its producer says;
    inputs and outputs of the model whole; on the way to experts and back as its producer makes it.

    Raises:
        GraphError: tokens that travel to experts cannot be divided.
    """
    def part(value: Value) -> Part:
        if value.source is None or value.name in graph.outputs:
            return WHOLE
        return layout_part(boundary_layout(value, modes[value.source], streams, size), value.spec, streams, size)

    parts = {value.name: part(value) for value in graph.values}
    traces = {trace.digest: trace for trace in graph.traces}
    for segment in graph.segments:
        trace = traces[segment.trace]
        if any(op.kind in (ROUTE, SEND, RETURN) for op in trace.operators) or any(
                parts[value].routed for value in segment.inputs):
            given = {name: parts[value] for name, value in zip(trace.inputs, segment.inputs, strict=True)
                     if parts[value] != WHOLE}
            returned = {op.name for op in trace.operators if op.kind == RETURN}
            with naming(segment):
                made = forward_parts(trace, Layouts(size, given, tokens=lambda shape: streams.tokens(shape, size)))
            parts.update((value, made[name]) for name, value in zip(trace.outputs, segment.outputs, strict=True)
                         if made[name].routed or name in returned)
    return parts


@contextlib.contextmanager
def naming(segment: Segment) -> Iterator[None]:
    """What goes wrong inside is told of a segment."""
    try:
        yield
    except GraphError as error:
        raise GraphError(f"segment {segment.name}: {error}") from None


def segment_layouts(trace: SegmentTrace, segment: Segment, lies: Mapping[str, Part], mode: str, streams: Streams,
                    size: int) -> Layouts:
    """The boundary of a segment in a mode, between values that lie so."""
    given: dict[str, Part] = {}
    wanted: dict[str, Part] = {}
    for names, grads, used, ours, theirs in (
            (trace.inputs, trace.input_grads, segment.inputs, given, wanted),
            (trace.outputs, trace.output_grads, segment.outputs, wanted, given)):
        for name, grad, value in zip(names, grads, used, strict=True):
            part = lies[value]
            if part != WHOLE:
                ours[name] = part
                if grad is not None:
                    theirs[grad] = part
    scatters = mode in ("sequence", "context")
    return Layouts(size, given, wanted, (lambda shape: streams.scatter(shape, size)) if scatters else no_scatter,
                   lambda shape: streams.tokens(shape, size))
