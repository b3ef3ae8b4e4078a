"""Costs without a run: an operator takes max(flops / peak, bytes / bandwidth), or the launch overhead if that is more.

The launch overhead is a floor, not a summand: an eager program starts the next kernels while one runs, so a long
operator hides its launches and a short one is bound by them. Views (no bytes, no flops) cost nothing. Attention is one
operator: its bytes are those of q, k, v and the result, never the scores; under a causal mask half its products are
skipped, as flash kernels do. Attention with a softcap, for which no device has such a kernel, is charged whole scores
in float32. Left out: how far kernels stay below the peak (say so by a kind's ``efficiency``), caches, and wave
quantisation. (Williams, Waterman and Patterson, "Roofline", CACM 2009.)
"""

from __future__ import annotations

from collections.abc import Mapping

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.coarse.graph import CoarseGraph
from mipipe.graphs.coarse.graph_index import GraphIndex, index_graph
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import GraphError, ProblemError
from mipipe.graphs.exchange import exchange_note, exchange_ns
from mipipe.graphs.operator_graph import Operator, OperatorGraph, Phase, Role, SegmentTrace
from mipipe.graphs.topology import Link

_CAUSAL_ARGUMENT = {"mipipe.attention.default": 5, "mipipe.attention_backward.default": 8}
"""Where our attention operators carry their causal flag."""

_FLOATS = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def roofline(coarse: CoarseGraph, graph: OperatorGraph, kinds: Mapping[str, DeviceKind], *,
             dtype: str | None = None, link: Link | None = None) -> CostTable:
    """The roofline estimate of every group and phase on each of the device kinds.

    Args:
        coarse: the groups.
        graph: the operator graph they were made from.
        kinds: device kinds with peaks, by name.
        dtype: the rate of matrix products; None: that of each operator's own result.
        link: what all-to-alls of expert parallelism are charged to (see `mipipe.graphs.exchange`).

    Raises:
        ProblemError: a kind is always profiled (``cpu``), or all-to-alls have no link.
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
            spent = {phase: round(sum(member_ns(index, member, phase, times[graph.segments[member].trace, phase], link)
                                      for member in members if index.runs(member, phase))) for phase in group.flops}
            entries.append(GroupCost(group.name, kind.name, spent, "roofline"))
    sources = {f"roofline.{kind.name}": f"{kind.source}; efficiency {kind.efficiency:g}, launch {kind.launch_ns} ns"
               for kind in kinds.values()}
    if index.shares and link is not None:
        sources["all_to_all"] = exchange_note(index.shares, link)
    return CostTable(coarse.graph_digest, tuple(entries), ", ".join(kinds), coarse.notes | sources)


def member_ns(index: GraphIndex, member: int, phase: Phase, seconds: float, link: Link | None) -> float:
    """Nanoseconds of a segment's phase that takes ``seconds`` as captured, with its part of experts and of the link."""
    segment = index.segments[member]
    share = index.shares.get(segment.name)
    if share is None:
        return 1e9 * seconds
    work = share.work if segment.tags.role is Role.EXPERTS else 1.0
    return 1e9 * seconds * work + exchange_ns(index.traces[member], phase, share, link)


def phase_seconds(trace: SegmentTrace, phase: Phase, kind: DeviceKind, dtype: str | None = None) -> float:
    """Seconds of one phase of a segment: the sum over its operators."""
    return sum(operator_seconds(operator, kind, dtype) for operator in trace.phase_operators(phase))


def operator_seconds(operator: Operator, kind: DeviceKind, dtype: str | None = None) -> float:
    """Seconds of one operator."""
    assert kind.bytes_per_s is not None, "the kind has peaks"
    moved = operator.bytes_read + operator.bytes_written
    if not moved and not operator.flops:
        return 0.0
    work = 0.0
    if operator.flops:
        rate = "float32" if _is_dense(operator) else dtype or _result_dtype(operator)
        work = useful_flops(operator) / kind.peak(rate)
    return max(work, moved / kind.bytes_per_s, kind.launch_ns * 1e-9)


def useful_flops(operator: Operator) -> float:
    """The products that are computed: of causal attention only the lower triangle."""
    position = _CAUSAL_ARGUMENT.get(operator.kind)
    if position is None or len(operator.args) <= position or operator.args[position] is not True:
        return operator.flops
    if _is_dense(operator):
        return operator.flops
    return operator.flops / 2


def _is_dense(operator: Operator) -> bool:
    """Whether an operator is attention on whole scores: it has a softcap, three places behind its causal flag."""
    position = _CAUSAL_ARGUMENT.get(operator.kind)
    return position is not None and len(operator.args) > position + 3 and bool(operator.args[position + 3])


def _result_dtype(operator: Operator) -> str:
    """The dtype of an operator's first floating-point result."""
    return next((spec.dtype for spec in operator.outputs if spec.dtype in _FLOATS), "float32")
