"""An operator graph with its names resolved: who makes and reads each value, which segments act in the backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mipipe.graphs.exchange import Share, expert_shares
from mipipe.graphs.operator_graph import OperatorGraph, ParameterSpec, Phase, Segment, SegmentTrace

LISTS_OF_VIEWS = ("aten.split.", "aten.split_with_sizes.", "aten.chunk.", "aten.unbind.")


@dataclass(frozen=True)
class GraphIndex:
    """An operator graph with its names resolved once.

    ``source[v]`` is the index of the segment that makes value v (-1: an input of the model), ``readers[v]`` the
    indices of those that read it, in order. ``acting`` are the segments whose I and W run: those with a gradient from
    the loss. ``returns_grad`` are the values whose gradient some reader gives and the maker takes. (The runtime decides
    the same from the graph alone, `mipipe.runtime.engine.compiling.flow`.) ``twins[trace][name]`` is the output or
    input gradient whose storage a saved tensor of another name shares. ``shares``: see `mipipe.graphs.exchange`.
    """

    graph: OperatorGraph
    traces: tuple[SegmentTrace, ...]
    parameters: dict[str, ParameterSpec]
    num_bytes: dict[str, int]
    source: dict[str, int]
    readers: dict[str, tuple[int, ...]]
    acting: frozenset[int]
    returns_grad: frozenset[str]
    twins: dict[str, dict[str, str]]
    shares: dict[str, Share]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.graph.segments

    def runs(self, member: int, phase: Phase) -> bool:
        """Whether a segment's phase exists in a training step."""
        return phase is Phase.F or (member in self.acting and self.traces[member].has(phase))


def index_graph(graph: OperatorGraph) -> GraphIndex:
    """The index of a graph."""
    by_digest = {trace.digest: trace for trace in graph.traces}
    traces = tuple(by_digest[segment.trace] for segment in graph.segments)
    source = {value.name: -1 for value in graph.values}
    readers: dict[str, list[int]] = {value.name: [] for value in graph.values}
    for number, segment in enumerate(graph.segments):
        for name in segment.outputs:
            source[name] = number
        for name in dict.fromkeys(segment.inputs):
            readers[name].append(number)
    acting, returned = _gradient_flow(graph, traces)
    return GraphIndex(graph, traces, {parameter.fqn: parameter for parameter in graph.parameters},
                      {value.name: value.spec.num_bytes for value in graph.values}, source,
                      {name: tuple(numbers) for name, numbers in readers.items()}, acting, returned,
                      {trace.digest: _twins(trace) for trace in graph.traces}, expert_shares(graph))


def _twins(trace: SegmentTrace) -> dict[str, str]:
    """Saved tensors that share a storage with an output or an input gradient, by following views to their origin."""
    makers = {operator.name: operator for operator in trace.operators}

    def root(name: str) -> str:
        maker = makers.get(name)
        if maker is None or not maker.inputs:
            return name
        parent = makers.get(maker.inputs[0])
        if maker.kind == "getitem":  # a part of a list of views, or one of several results
            return root(parent.inputs[0]) if parent is not None and parent.kind.startswith(LISTS_OF_VIEWS) else name
        moved = maker.flops or maker.bytes_read or maker.bytes_written
        return name if moved else root(maker.inputs[0])

    results = {root(name): name for name in (*trace.input_grads, *trace.outputs) if name is not None}
    return {tensor.name: results[at] for tensor in trace.saved if (at := root(tensor.name)) in results}


def _gradient_flow(graph: OperatorGraph, traces: Sequence[SegmentTrace]) -> tuple[frozenset[int], frozenset[str]]:
    """Which segments act in the backward pass, and which values get a gradient that is used."""
    reached = {graph.loss}
    acting: set[int] = set()
    needed: set[str] = set()
    for number in reversed(range(len(traces))):
        segment, trace = graph.segments[number], traces[number]
        taken = {value for value, name in zip(segment.outputs, trace.output_grads, strict=True) if name is not None}
        if not taken & reached or not (trace.has(Phase.I) or trace.has(Phase.W)):
            continue
        acting.add(number)
        needed |= taken
        reached |= {value for value, name in zip(segment.inputs, trace.input_grads, strict=True) if name is not None}
    return frozenset(acting), frozenset(needed & reached - {graph.loss})


def gives_grad(index: GraphIndex, reader: int, value: str) -> bool:
    """Whether a segment returns a gradient for one of its inputs."""
    if reader not in index.acting:
        return False
    pairs = zip(index.segments[reader].inputs, index.traces[reader].input_grads, strict=True)
    return any(name == value and grad is not None for name, grad in pairs)
