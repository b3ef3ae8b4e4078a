"""Costs without a run: an operator takes max(flops / peak, bytes / bandwidth), or the launch overhead if that is more.

The launch overhead is a floor, not a summand: an eager program starts the next kernels while one runs, so a long
operator hides its launches and a short one is bound by them. Views (no bytes, no flops) cost nothing. Attention is one
operator: its bytes are those of q, k, v and the result, never the scores; under a causal mask half its products are
skipped, as flash kernels do. Left out: how far kernels stay below the peak (say so by a kind's ``efficiency``),
caches, and wave quantisation. (Williams, Waterman and Patterson, "Roofline", CACM 2009.)
"""

from __future__ import annotations

from collections.abc import Mapping

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.coarse_graph import CoarseGraph
from mipipe.graphs.contract import LISTS_OF_VIEWS, index_graph
from mipipe.graphs.costs import CostTable, GroupCost
from mipipe.graphs.errors import GraphError, ProblemError
from mipipe.graphs.operator_graph import Operator, OperatorGraph, Phase, SegmentTrace

_CAUSAL_ARGUMENT = {"mipipe.attention.default": 5, "mipipe.attention_backward.default": 8}
"""Where our attention operators carry their causal flag."""

_FLOATS = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def roofline(coarse: CoarseGraph, graph: OperatorGraph, kinds: Mapping[str, DeviceKind], *,
             dtype: str | None = None) -> CostTable:
    """The roofline estimate of every group and phase on each of the device kinds.

    Args:
        coarse: the groups.
        graph: the operator graph they were made from.
        kinds: device kinds with peaks, by name.
        dtype: the rate of matrix products; None: that of each operator's own result.

    Raises:
        ProblemError: a kind is always profiled (``cpu``).
        InputError: a kind has no peak for a dtype in use.
        GraphError: the coarse graph is not of this graph.
    """
    for kind in kinds.values():
        if not kind.has_peaks:
            raise ProblemError(f"costs: device kind {kind.name} has no peaks, so a roofline cannot be computed; profile"
                               " the graph on the machine, or give --costs a table")
    index = index_graph(graph)
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    entries: list[GroupCost] = []
    for kind in kinds.values():
        times = {(trace.digest, phase): phase_seconds(trace, phase, kind, dtype)
                 for trace in graph.traces for phase in Phase}
        for group in coarse.groups:
            missing = [name for name in group.segments if name not in number_of]
            if missing:
                raise GraphError(f"group {group.name}: its segment {missing[0]!r} is not in the operator graph of"
                                 f" {graph.model}; coarsen this graph again")
            members = [number_of[name] for name in group.segments]
            spent = {phase: round(1e9 * sum(times[graph.segments[member].trace, phase] for member in members
                                            if index.runs(member, phase))) for phase in group.flops}
            entries.append(GroupCost(group.name, kind.name, spent, "roofline"))
    sources = {f"roofline.{kind.name}": f"{kind.source}; efficiency {kind.efficiency:g}, launch {kind.launch_ns} ns"
               for kind in kinds.values()}
    return CostTable(coarse.graph_digest, tuple(entries), ", ".join(kinds), coarse.notes | sources)


def phase_seconds(trace: SegmentTrace, phase: Phase, kind: DeviceKind, dtype: str | None = None) -> float:
    """Seconds of one phase of a segment: the sum over its operators."""
    return sum(operator_seconds(operator, kind, dtype) for operator in trace.phase_operators(phase))


def operator_seconds(operator: Operator, kind: DeviceKind, dtype: str | None = None) -> float:
    """Seconds of one operator."""
    assert kind.bytes_per_s is not None, "the kind has peaks"
    moved = operator.bytes_read + operator.bytes_written
    if (not moved and not operator.flops) or operator.kind.startswith(LISTS_OF_VIEWS):
        return 0.0
    work = 0.0
    if operator.flops:
        work = useful_flops(operator) / kind.peak(dtype or _result_dtype(operator))
    return max(work, moved / kind.bytes_per_s, kind.launch_ns * 1e-9)


def useful_flops(operator: Operator) -> float:
    """The products that are computed: of causal attention only the lower triangle."""
    position = _CAUSAL_ARGUMENT.get(operator.kind)
    if position is None or len(operator.args) <= position or operator.args[position] is not True:
        return operator.flops
    return operator.flops / 2


def _result_dtype(operator: Operator) -> str:
    """The dtype of an operator's first floating-point result."""
    return next((spec.dtype for spec in operator.outputs if spec.dtype in _FLOATS), "float32")
