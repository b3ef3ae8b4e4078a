"""Queries, keys and values that are made of latents, and traces that make them again in the backward.

Multi-head latent attention (DeepSeek-AI, "DeepSeek-V2", arXiv 2405.04434, section 2.1) projects what comes into narrow
latents, and these up to all heads: what attention keeps for its backward is many times larger than the latents that it
is made of, and cheap to make again. Megatron Core calls this the recomputation of ``mla_up_proj``.

The rule looks at the trace alone. An up-projection is a product with a parameter whose input was made by another such
product without attention in between (the latent), whose result is at least `LARGER` times as large, and reaches
attention as a query, key or value through elementwise operators (norms, rotations, moves), which run again with it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from mipipe.graphs.again import with_again
from mipipe.graphs.costs.fusion import heavy, kept
from mipipe.graphs.costs.products import ATTENTION, weight_of
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import Operator, OperatorGraph, Phase, SegmentTrace

LARGER = 2
"""What is less than twice as large as its input is no latent spread over heads."""
_RANDOM = re.compile(r"\.(\w*dropout|\w*rand|bernoulli|(log_)?normal|uniform|multinomial|exponential|poisson|geometric"
                     r"|cauchy)")
"""Operators that draw, and so run once."""


def up_projections(trace: SegmentTrace) -> tuple[str, ...]:
    """The parameters of a trace's up-projections; none where less would not stay for the backward without them."""
    parameters = _candidates(trace)
    if not parameters:
        return ()
    before, after = (sum(item.num_bytes for item in kept(each)) for each in (trace, _again(trace, parameters)))
    return parameters if after < before else ()


def with_latents_again(trace: SegmentTrace) -> SegmentTrace:
    """The trace with its up-projections run again in the backward; itself where it has none."""
    parameters = up_projections(trace)
    return _again(trace, parameters) if parameters else trace


def graph_with_latents_again(graph: OperatorGraph, whole: OperatorGraph, names: Collection[str]) -> OperatorGraph:
    """A graph with the up-projections of these segments run again in the backward.

    Args:
        graph: what a member of a team has of ``whole``.
        whole: in which the up-projections are found, whatever the team.
        names: of segments.

    Raises:
        GraphError: a segment has none.
    """
    traces, first = ({trace.digest: trace for trace in each.traces} for each in (graph, whole))
    projections: dict[str, set[str]] = {}
    for segment in whole.segments:
        if segment.name in names:
            trace = first[segment.trace]
            own = up_projections(trace)
            projections[segment.name] = {fqn for name, fqn in zip(trace.parameters, segment.parameters, strict=True)
                                         if name in own}
    segments = []
    for segment in graph.segments:
        if segment.name in names:
            trace, wanted = traces[segment.trace], projections[segment.name]
            if not wanted:
                raise GraphError(f"segment {segment.name}: has no up-projections of latents that could run again")
            made = _again(trace, [name for name, fqn in zip(trace.parameters, segment.parameters, strict=True)
                                  if fqn in wanted])
            traces[made.digest] = made
            segments.append(replace(segment, trace=made.digest))
        else:
            segments.append(segment)
    return replace(graph, segments=tuple(segments), traces=tuple(traces.values()))


def _again(trace: SegmentTrace, parameters: Collection[str]) -> SegmentTrace:
    """The trace with these parameters' products, and what is made of them for attention, again in the backward."""
    products = _products(trace)
    return with_again(trace, {name for name, parameter in products.items() if parameter in parameters},
                      {op.name for op in trace.phase_operators(Phase.F) if _light(op)})


def _products(trace: SegmentTrace) -> dict[str, str]:
    """The products of F with a matrix of parameters by name, and that parameter."""
    makers = {op.name: op for op in trace.phase_operators(Phase.F)}
    found = {}
    for op in makers.values():
        if op.flops and not op.kind.startswith(ATTENTION):
            for name in op.inputs:
                weight = weight_of(name, trace, makers)
                if weight is not None and len(trace.specs[weight].shape) == 2:
                    found[op.name] = weight
    return found


def _candidates(trace: SegmentTrace) -> tuple[str, ...]:
    makers = {op.name: op for op in trace.phase_operators(Phase.F)}
    products = _products(trace)
    projected: dict[str, bool] = {}  # whether a product with a parameter comes before, without attention in between
    for op in makers.values():
        projected[op.name] = op.name in products or (
            not op.kind.startswith(ATTENTION) and any(projected.get(name, False) for name in op.inputs))
    found: dict[str, None] = {}
    pending = [name for op in makers.values() if op.kind.startswith(f"{ATTENTION}.") for name in op.inputs[:3]]
    seen = set(pending)
    while pending:
        name = pending.pop()
        if name not in makers:
            continue
        op = makers[name]
        if name in products:
            latents = [source for source in op.inputs if weight_of(source, trace, makers) is None]
            if all(projected.get(source, False) for source in latents) and op.outputs[0].num_bytes >= LARGER * sum(
                    _num_bytes(source, trace, makers) for source in latents):
                found[products[name]] = None
        elif _light(op):
            pending += [source for source in op.inputs if source not in seen]
            seen.update(op.inputs)
    return tuple(name for name in trace.parameters if name in found)


def _num_bytes(name: str, trace: SegmentTrace, makers: dict[str, Operator]) -> int:
    return makers[name].outputs[0].num_bytes if name in makers else trace.specs[name].num_bytes


def _light(op: Operator) -> bool:
    return not heavy(op) and _RANDOM.search(op.kind) is None
