"""Where gradients flow: which segments act in the backward pass and which values need a gradient.

Static, from the graph alone, so that a sender and its receiver agree without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

from mipipe.graphs.operator_graph import OperatorGraph, Phase


@dataclass(frozen=True, slots=True)
class GradientFlow:
    """``parts[value]``: the (segment, input position) pairs that return a gradient for it, in the graph's order.

    ``acting``: segments that have an I or W and whose outputs reach the loss. ``needing``: values whose producer uses
    their gradient.
    """

    parts: dict[str, tuple[tuple[str, int], ...]]
    acting: frozenset[str]
    needing: frozenset[str]

    def contributions(self, value: str) -> tuple[tuple[str, int], ...]:
        return self.parts.get(value, ())

    def active(self, segment: str) -> bool:
        return segment in self.acting

    def wanted(self, value: str) -> bool:
        """Whether somebody uses the gradient of this value."""
        return value in self.needing


def gradient_flow(graph: OperatorGraph) -> GradientFlow:
    """The gradient flow of a graph, from the loss backwards."""
    traces = {trace.digest: trace for trace in graph.traces}
    reached = {graph.loss}
    found: dict[str, list[tuple[str, int]]] = {}
    acting: set[str] = set()
    needing: set[str] = set()
    for segment in reversed(graph.segments):
        trace = traces[segment.trace]
        hot = any(value in reached and name is not None
                  for value, name in zip(segment.outputs, trace.output_grads, strict=True))
        if not hot or not (trace.has(Phase.I) or trace.has(Phase.W)):
            continue
        acting.add(segment.name)
        needing.update(value for value, name in zip(segment.outputs, trace.output_grads, strict=True)
                       if name is not None)
        for position in reversed(range(len(segment.inputs))):
            if trace.input_grads[position] is not None:
                reached.add(segment.inputs[position])
                found.setdefault(segment.inputs[position], []).append((segment.name, position))
    parts = {value: tuple(reversed(items)) for value, items in found.items() if value in needing}
    return GradientFlow(parts, frozenset(acting), frozenset(needing))
