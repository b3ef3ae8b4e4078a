"""The MoE layers of a graph, as the runtime needs them: which segments, whose banks, where the routing is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipipe.graphs.errors import InputError, PlanError
from mipipe.graphs.operator_graph import DTYPE_BYTES, OperatorGraph, Phase, Role, Segment, SegmentTrace
from mipipe.graphs.operators.expert_kernels import ROUTE
from mipipe.graphs.tracing.parameter_slices import parse_slice
from mipipe.planner.plan import Plan
from mipipe.planner.team import Team

GROUPED = ("mipipe.grouped_mm.default",)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """An expert-parallel MoE layer: its name, the segments whose numbers of rows change, the parameters by expert."""

    name: str
    num_experts: int
    segments: tuple[str, ...]
    banks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """A MoE layer whose routing can be counted: ``segment`` reads the chosen experts as ``index`` [T,k].

    ``token_bytes`` is the size of one token's hidden state, ``expert_bytes`` that of one expert's weights.
    """

    name: str
    num_experts: int
    segment: str
    index: str
    token_bytes: int
    expert_bytes: int


def expert_layers(graph: OperatorGraph) -> tuple[ExpertLayer, ...]:
    """The expert-parallel layers, in the graph's order; none where it was captured otherwise."""
    traces = {trace.digest: trace for trace in graph.traces}
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    routers = {segment.name: _routed_experts(traces[segment.trace]) for segment in graph.segments}
    source = {value.name: value.source for value in graph.values}
    members: dict[str, list[Segment]] = {}
    for segment in graph.segments:
        homes = [segment.name, *(source[value] or "" for value in segment.inputs)]
        for home in dict.fromkeys(home for home in homes if routers.get(home) is not None):
            members.setdefault(home, []).append(segment)
    found = []
    for home, segments in members.items():
        banks = [canonical[fqn] for segment in segments for fqn in _banks(segment, traces[segment.trace])]
        experts = routers[home]
        assert experts is not None
        found.append(ExpertLayer(home.removesuffix(".dispatch"), experts, tuple(item.name for item in segments),
                                 tuple(dict.fromkeys(banks))))
    return tuple(found)


def sharers(graph: OperatorGraph) -> int:
    """How many copies of a plan of single devices share the experts of a graph, which was captured, and is charged, so;
    1: all of them, or none."""
    return int(graph.source.get("expert_parallel", 1))


def expert_degree(team: Team | None, graph: OperatorGraph, copies: int) -> int:
    """How many neighbouring devices of a plan rank, members of ``copies`` of it, share the experts of a graph; 1: each
    has all of them.

    A plan of teams says it (`Team.expert`), whatever number the graph was captured with: its operators are the same for
    all. A plan of single devices follows its graph (`sharers`).

    Raises:
        InputError: the devices are no groups of so many.
    """
    if not expert_layers(graph):
        return 1
    degree = team.expert if team is not None else sharers(graph)
    degree = copies if team is None and degree < 2 else degree
    if team is not None and team.members > 1:
        devices = team.members * copies
        if devices % degree:
            raise InputError(f"expert parallelism: experts were planned to be shared by {degree} devices of a rank, but"
                             f" the run has {devices}, {copies} copies of {team.text()}; start it with as many copies"
                             f" as make a multiple of {degree}, or plan with another --degrees expert=")
    elif copies % degree:
        by = "planned" if team is not None else "captured"
        change = "plan with another --degrees expert=" if team is not None else \
            "capture with another --expert-parallel"
        raise InputError(f"expert parallelism: experts were {by} to be shared by {degree} copies of the plan, but the"
                         f" run has {copies}; start it with --copies {degree}, or a multiple of it, or {change}")
    return degree


def _routed_experts(trace: SegmentTrace) -> int | None:
    """The number of experts a segment routes to by all-to-all; None for other segments."""
    return next((int(item.args[1]) for item in trace.phase_operators(Phase.F) if item.kind == ROUTE), None)


def _banks(segment: Segment, trace: SegmentTrace) -> list[str]:
    """The parameters that grouped products read, directly or through a view."""
    makers = {item.name: item for item in trace.phase_operators(Phase.F)}
    names = []
    for item in makers.values():
        if item.kind in GROUPED:
            name = item.args[1]["ref"]
            while name in makers:
                name = makers[name].inputs[0]
            names.append(name)
    bound = dict(zip(trace.parameters, segment.parameters, strict=True))
    return [bound[name] for name in names if name in bound]


def routed_layers(graph: OperatorGraph) -> tuple[RoutedLayer, ...]:
    """All MoE layers whose chosen experts are a value of the graph, in its order, whatever form they have.

    Whole layers, layers in expert groups (any of which reads the whole routing; the first counts) and expert-parallel
    ones. A graph captured with ``granularity=layer`` shows no routing.
    """
    traces = {trace.digest: trace for trace in graph.traces}
    specs = {value.name: value.spec for value in graph.values}
    sizes = {item.fqn: item.spec for item in graph.parameters}
    exchanged = {layer.name: layer for layer in expert_layers(graph)}
    found: dict[str, RoutedLayer] = {}
    rows: dict[str, dict[str, int]] = {}
    shared: dict[str, int] = {}
    weight: dict[str, int] = {}
    for segment in graph.segments:
        match = re.fullmatch(r"(.*)\.(dispatch|experts(\.group\d+)?)", segment.name)
        if match is None or segment.tags.role not in (Role.EXPERTS, Role.DISPATCH):
            continue
        name = match[1]
        for fqn in _banks(segment, traces[segment.trace]):
            base, part = parse_slice(fqn)
            rows.setdefault(name, {}).setdefault(base, 0)
            rows[name][base] += sizes[fqn].shape[0] if part is None else part[1] - part[0]
            weight[name] = weight.get(name, 0) + sizes[fqn].num_bytes
        index = [value for value in segment.inputs if specs[value].dtype == "int64" and len(specs[value].shape) == 2]
        if index and name not in found:
            hidden = [specs[value] for value in segment.inputs if len(specs[value].shape) == 2
                      and specs[value].dtype != "int64" and specs[value].shape != specs[index[0]].shape]
            size = hidden[0].shape[1] * DTYPE_BYTES[hidden[0].dtype] if hidden else 0
            found[name] = RoutedLayer(name, 0, segment.name, index[0], size, 0)
            shared[name] = _sharing(segment, traces[segment.trace], index[0])
    layers = []
    for name, layer in found.items():
        count = exchanged[name].num_experts if name in exchanged else max(rows.get(name, {"": 0}).values())
        if count:
            layers.append(RoutedLayer(name, shared[name] or count, layer.segment, layer.index, layer.token_bytes,
                                      weight.get(name, 0) // count))
    return tuple(layers)


def _sharing(segment: Segment, trace: SegmentTrace, index: str) -> int:
    """How many experts a router chooses among, where some share weights: the chosen ones are looked up in a buffer."""
    own = trace.inputs[segment.inputs.index(index)]
    for item in trace.phase_operators(Phase.F):
        table = item.inputs[0] if item.kind == "aten.index.Tensor" else ""
        if own in item.inputs and table in trace.buffers:
            return int(trace.specs[table].shape[0])
    return 0


def check_together(plan: Plan, layers: Sequence[ExpertLayer], stage_of: Mapping[str, int]) -> None:
    """Raise `PlanError` unless each expert-parallel layer is on one plan rank: its rows vary in number."""
    for layer in layers:
        for segment in layer.segments:
            first, ranks = (plan.placement.stages[stage_of[name]].ranks for name in (layer.segments[0], segment))
            if len(ranks) > 1:
                raise PlanError(f"{segment}: planned with {len(ranks)} replicas; expert-parallel layers have their"
                                " replicas in the copies of the plan and in the expert map, so plan it on one rank")
            if ranks != first:
                raise PlanError(f"{segment}: on rank {ranks[0]}, but {layer.segments[0]} is on rank {first[0]}; what"
                                " they exchange changes its size in every step, so plan them on one rank (mipipe plan"
                                " does)")
