"""A model's size and work in one line: parameters, those that one token uses, flops by both ways of counting attention.

Active parameters are all but the experts that a token is not sent to: of a bank of E experts, k / E, where k is how
many a router chooses. Flops count what a causal kernel computes, the pairs of a query and a key it may see; the other
convention (torch.utils.flop_counter's) counts the whole square.

A model's flops per token of a training step are what papers and benchmarks divide by a peak (Chowdhery et al., "PaLM",
JMLR 2023, appendix B): products of forward and backward once each, 3 F where everything is trained, causal attention
halved, nothing that is recomputed, the scores in the backward kernel of attention included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

from mipipe.graphs.coarse.graph_index import GraphIndex, index_graph
from mipipe.graphs.operator_graph import Operator, OperatorGraph, Phase, SegmentTrace, TensorSpec

TOKENS = ("input_ids", "decoder_input_ids")
"""Inputs of a model that are token numbers, by transformers' names."""

_BACKWARD = "mipipe.attention_backward.default"

_ATTENTION = {"mipipe.attention.default": (1, 5), _BACKWARD: (2, 8)}
"""Where an attention operator has its keys, and whether it is causal (the window follows)."""


@functools.cache
def attended_pairs(queries: int, keys: int, causal: bool, window: int) -> int:
    """How many pairs of a query and a key attention computes; query i is at key position i + keys - queries.

    A window of w lets a query see the w keys up to its own position, without causality also those after it.
    """
    if not causal and not window:
        return queries * keys
    first = keys - queries
    total = 0
    for place in range(first, first + queries):
        low = max(0, place - window + 1) if window else 0
        high = min(keys, place + 1 if causal else place + window)
        total += max(0, high - low)
    return total


def kernel_flops(trace: SegmentTrace, phase: Phase) -> int:
    """A phase's flops, of attention only the pairs that a query may see (`Operator.flops` counts all)."""
    return sum(operator_flops(trace, item) for item in trace.phase_operators(phase))


def operator_flops(trace: SegmentTrace, item: Operator) -> int:
    """An operator's flops, as in `kernel_flops`."""
    if item.kind not in _ATTENTION or not item.flops:
        return item.flops
    keys_at, causal_at = _ATTENTION[item.kind]
    queries, keys = item.outputs[0].shape[2], argument_spec(trace, _ref(item.args[keys_at])).shape[2]
    pairs = attended_pairs(queries, keys, item.args[causal_at], item.args[causal_at + 1])
    return item.flops * pairs // (queries * keys)


def total_flops(index: GraphIndex, phase: Phase, full: bool = False, members: Sequence[int] | None = None) -> int:
    """The flops of one phase of all segments (or some) that run it; ``full``: with all of attention's pairs."""
    chosen = range(len(index.traces)) if members is None else members
    return sum(index.traces[member].flops(phase) if full else kernel_flops(index.traces[member], phase)
               for member in chosen if index.runs(member, phase))


def model_flops(index: GraphIndex, member: int, full: bool = False) -> int:
    """A segment's flops in one training step without what is recomputed; ``full``: with all of attention's pairs."""
    trace, total = index.traces[member], 0
    for phase in Phase:
        if not index.runs(member, phase):
            continue
        total += trace.flops(phase) if full else kernel_flops(trace, phase)
        for item in trace.phase_operators(phase):
            if item.kind == _BACKWARD and item.flops:
                query, keys = (argument_spec(trace, _ref(item.args[at])).shape for at in (1, 2))
                pairs = query[2] * keys[2] if full else attended_pairs(query[2], keys[2], *item.args[8:10])
                total -= 2 * math.prod(query[:2]) * pairs * query[3]
    return total


def num_tokens(graph: OperatorGraph) -> int | None:
    """Tokens of one microbatch; None for a model without token numbers among its inputs."""
    shape = token_shape(graph)
    return None if shape is None else math.prod(shape)


def token_shape(graph: OperatorGraph) -> tuple[int, ...] | None:
    """The shape of a microbatch's token numbers, sequences first; None for a model without any."""
    shapes = {value.name: value.spec.shape for value in graph.values if value.name in graph.inputs}
    return next((shapes[name] for name in TOKENS if name in shapes), None)


def num_sequences(graph: OperatorGraph) -> int:
    """Sequences (samples) of one microbatch: rows of the token numbers, of which other inputs may have more, such as
    several images for each; of a model without tokens those of its labels, else of its first input that has rows."""
    shapes = {value.name: value.spec.shape for value in graph.values if value.name in graph.inputs}
    found = [token_shape(graph), shapes.get("labels"), *(shapes[name] for name in graph.inputs)]
    return max(1, next((shape[0] for shape in found if shape), 1))


def flops_per_token(graph: OperatorGraph, full: bool = False) -> float | None:
    """A training step's model flops per token; None for a model without tokens. See the module docstring."""
    tokens, index = num_tokens(graph), index_graph(graph)
    if tokens is None:
        return None
    return sum(model_flops(index, member, full) for member in range(len(index.traces))) / tokens


def count_parameters(graph: OperatorGraph, *, trainable: bool = False) -> int:
    """Numbers in all parameters, tied ones once."""
    return sum(math.prod(item.spec.shape) for item in graph.parameters
               if not item.buffer and item.tied_to is None and (item.trainable or not trainable))


def active_parameters(graph: OperatorGraph) -> int:
    """Numbers in the parameters that one token uses."""
    banks: dict[str, tuple[int, int]] = {}  # by bank (or slice of one): rows that pass, experts in it
    layers: dict[str, tuple[object, ...]] = {}
    chosen: dict[tuple[object, ...], list[TensorSpec]] = {}
    traces = {trace.digest: trace for trace in graph.traces}
    for segment in graph.segments:
        trace = traces[segment.trace]
        layer = (segment.tags.branch, segment.tags.layer)
        made = {item.name: item for item in trace.phase_operators(Phase.F)}
        fqns = dict(zip(trace.parameters, segment.parameters, strict=True))
        for item in made.values():
            if item.kind == "aten.topk.default":
                chosen.setdefault(layer, []).append(item.outputs[0])
            elif item.kind == "mipipe.grouped_mm.default":
                name = _origin(made, _ref(item.args[1]))
                if name in fqns:
                    banks[fqns[name]] = item.outputs[0].shape[0], argument_spec(trace, name).shape[0]
                    layers[fqns[name]] = layer
    experts: dict[str, int] = {}
    for fqn, (_, count) in banks.items():
        base = fqn.partition("[")[0]
        experts[base] = experts.get(base, 0) + count
    tokens = next((item.spec.shape for item in graph.values if item.source is None and len(item.spec.shape) == 2), (1,))
    total = 0
    for own in graph.parameters:
        if own.buffer or own.tied_to is not None:
            continue
        size = math.prod(own.spec.shape)
        if own.fqn in banks:
            count = experts[own.fqn.partition("[")[0]]
            rows = banks[own.fqn][0]
            tables = chosen.get(layers[own.fqn]) or [TensorSpec((*tokens, rows // math.prod(tokens) or 1), "int64")]
            size = size * min(count, _choice(tables, rows, count)) // count
        total += size
    return total


def _choice(tables: Iterable[TensorSpec], rows: int, experts: int) -> int:
    """How many experts a token is sent to: as wide as the router's last choice that makes so many rows."""
    widths = [spec.shape[-1] for spec in tables]
    fitting = [spec.shape[-1] for spec in tables if math.prod(spec.shape) == rows]
    return (fitting or widths or [experts])[-1]


def headline(graph: OperatorGraph) -> str:
    """``671.0 B parameters, 37.6 B active; 250 Gflop per token of training (...); a microbatch: F 310 Tflop (...)``."""
    index = index_graph(graph)
    size, active = count_parameters(graph), active_parameters(graph)
    works = []
    for phase in Phase:
        works.append(f"{phase} {_both(total_flops(index, phase), total_flops(index, phase, full=True))}")
    some = "" if active == size else f", {_short(active, 'B')} active"
    own, full = flops_per_token(graph), flops_per_token(graph, full=True)
    if own is None or full is None:
        return f"{_short(size, 'B')} parameters{some}; {', '.join(works)}"
    return (f"{_short(size, 'B')} parameters{some}; {_both(own, full, ' per token of training')}; a microbatch:"
            f" {', '.join(works)}")


def _both(own: float, full: float, of: str = "") -> str:
    more = f" ({_short(full)}flop with causal attention in full)" if full != own else ""
    return f"{_short(own)}flop{of}{more}"


def _short(value: float, billion: str = "G") -> str:
    """1,234,000 -> ``1.23 M``."""
    for limit, unit in ((1e12, "T"), (1e9, billion), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f} {unit}" if value >= 10 * limit else f"{value / limit:.2f} {unit}"
    return f"{value:g} " if billion == "G" else f"{value:g}"


def _ref(argument: object) -> str:
    return argument["ref"] if isinstance(argument, dict) and "ref" in argument else ""


def _origin(made: dict[str, Operator], name: str) -> str:
    """The argument that a view (a transpose, a cast) of a parameter is made of."""
    while name in made and made[name].inputs:
        name = made[name].inputs[0]
    return name


def argument_spec(trace: SegmentTrace, name: str | None) -> TensorSpec:
    """The spec of a trace's argument, or of an operator's first result."""
    assert name is not None, "an operator reads a tensor here"
    return trace.specs.get(name) or next(item.outputs[0] for item in trace.operators if item.name == name)
