"""Does a plan belong to its operator graph? Not only by the digest it carries: what the problem says of the graph is
recomputed from it.

Groups, the phases they have, what they keep, the values between them and which of them share a rank all follow from the
graph and the lists of segments. A problem that says otherwise would be planned, checked and simulated as it says, and
trained wrongly: a group without W is never updated. Durations, loads and devices are nobody's to verify.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator

from mipipe.graphs.coarse.contract import contract
from mipipe.graphs.coarse.graph import CoarseGraph, OpGroup
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.costs.latents import with_latents_again
from mipipe.graphs.costs.trace_facts import heads_of
from mipipe.graphs.errors import GraphError, PlanError
from mipipe.graphs.operator_graph import OperatorGraph, Phase, SegmentTrace
from mipipe.graphs.serialize import digest
from mipipe.planner.actions import Stream
from mipipe.planner.plan import Plan
from mipipe.planner.problem import Group, PlanningProblem
from mipipe.planner.problems.from_graph import exchange_groups
from mipipe.planner.team import Team


def check_graph(plan: Plan, graph: OperatorGraph) -> None:
    """Raise `PlanError` unless the plan was made for this graph and its problem is that of the graph."""
    problem, found = plan.problem, digest(graph)
    if problem.graph_digest != found:
        made = problem.graph_digest or "no graph at all"
        raise PlanError(f"plan {plan.name}: made for graph {made}, but this graph's digest is {found}; plan this graph"
                        " again")
    try:
        coarse = contract(index_graph(graph), _members(problem, graph), graph_digest=found)
    except GraphError as error:
        raise _unfit(plan, str(error)) from None
    faults = itertools.chain(_group_faults(problem, coarse), _edge_faults(problem, coarse),
                             _sharing_faults(problem, coarse)) if plan.team is None else \
        itertools.chain(_member_faults(problem, coarse), _team_faults(plan.team, problem, graph))
    fault = next(faults, None)
    if fault is not None:
        raise _unfit(plan, fault)


def _unfit(plan: Plan, fault: str) -> PlanError:
    return PlanError(f"plan {plan.name}: its problem is not that of its graph: {fault}; plan this graph again")


def _members(problem: PlanningProblem, graph: OperatorGraph) -> list[list[int]]:
    """The segments of every group by number, in the graph's order.

    Raises:
        GraphError: a segment is unknown, twice or in no group.
    """
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    home: dict[str, str] = {}
    for group in problem.groups:
        for name in group.segments:
            if name not in number_of:
                raise GraphError(f"group {group.name} has segment {name!r}, which the graph does not have")
            if name in home:
                raise GraphError(f"segment {name} is in group {home[name]} and again in {group.name}")
            home[name] = group.name
        if not group.segments:
            raise GraphError(f"group {group.name} has no segments")
    for name in number_of:
        if name not in home:
            raise GraphError(f"segment {name} is in no group")
    return [sorted(number_of[name] for name in group.segments) for group in problem.groups]


def _group_faults(problem: PlanningProblem, coarse: CoarseGraph) -> Iterator[str]:
    pairs = list(zip(problem.groups, coarse.groups, strict=True))
    for group, made in pairs:
        for what, found, expected in _facts(group, made):
            if found != expected:
                yield f"group {group.name}: {what} {found}, the graph gives {expected}"
        if group.recompute_bytes not in (None, made.input_bytes):
            yield (f"group {group.name}: recompute_bytes {group.recompute_bytes}, the graph gives {made.input_bytes}"
                   " (or none)")
    yield from _ratio_faults("gradient_bytes", [(group, group.gradient_bytes, made.trainable_bytes)
                                                for group, made in pairs])
    yield from _ratio_faults("the optimizer's part of resident_bytes", [
        (group, group.resident_bytes - made.parameter_bytes - group.gradient_bytes, made.trainable_bytes)
        for group, made in pairs])


def _facts(group: Group, made: OpGroup) -> Iterator[tuple[str, object, object]]:
    """What a group says and what the graph gives, by name."""
    has = {phase: phase in made.flops for phase in (Phase.I, Phase.W)}
    for kind, times in sorted(group.times.items()):
        yield f"on {kind}, an I", times.i_ns is not None, has[Phase.I]
        yield f"on {kind}, a W", times.w_ns is not None, has[Phase.W]
    yield "stream", group.stream.value, (Stream.COLLECTIVE if made.collective else Stream.COMPUTE).value
    yield "saved_fi_bytes", group.saved_fi_bytes, made.saved_fi_bytes
    yield "saved_fw_bytes", group.saved_fw_bytes, made.saved_fw_bytes
    yield "saved_iw_bytes", group.saved_iw_bytes, made.saved_iw_bytes
    if group.forward_workspace_bytes is None:
        yield "workspace_bytes", group.workspace_bytes, max(made.workspace_bytes.values(), default=0)
    else:
        yield "workspace_bytes", group.workspace_bytes, max(
            (size for phase, size in made.workspace_bytes.items() if phase is not Phase.F), default=0)
        yield "forward_workspace_bytes", group.forward_workspace_bytes, made.workspace_bytes.get(Phase.F, 0)
    yield "single", group.single, made.single


def _member_faults(problem: PlanningProblem, coarse: CoarseGraph) -> Iterator[str]:
    """Where the problem of a team's member is not that of the graph: phases and values; sizes are those of its part."""
    for group, made in zip(problem.groups, coarse.groups, strict=True):
        for what, found, expected in itertools.islice(_facts(group, made), 2 * len(group.times)):
            if found != expected:
                yield f"group {group.name}: {what} {found}, the graph gives {expected}"
    ends = {edge.value: (edge.source, tuple(sorted(edge.targets)), edge.grad_bytes is not None)
            for edge in problem.edges}
    for value in coarse.values:
        wanted = (value.source, tuple(sorted(value.targets)), value.grad_bytes is not None)
        found = ends.get(value.name)
        if found is None:
            yield f"value {value.name}, which passes from group {problem.groups[value.source].name}, has no edge"
        elif found != wanted:
            yield f"value {value.name}: (source, targets, gradient) are {found}, the graph gives {wanted}"


def _team_faults(team: Team, problem: PlanningProblem, graph: OperatorGraph) -> Iterator[str]:
    """Segments that the team names and nobody has, that have nothing to run again, or that run again together and are
    apart."""
    traces = {segment.name: graph.trace(segment) for segment in graph.segments}
    home = {name: number for number, group in enumerate(problem.groups) for name in group.segments}
    for item in team.modes:
        for name in item.segments:
            if name not in home:
                yield f"mode {item.mode} is for segment {name!r}, which the graph does not have"
    seen: set[str] = set()
    for run in team.again:
        if not run or any(name not in home for name in run) or len({home[name] for name in run}) > 1:
            yield f"segments {', '.join(run)} run again together, but are not all in one group"
        if seen & set(run):
            yield f"segment {min(seen & set(run))} runs again twice"
        seen |= set(run)
    for what, names, has in (("attention", team.attention_again, heads_of),
                             ("up-projections", team.latents_again, _has_latents)):
        for name in names:
            if name not in home:
                yield f"{what} of segment {name!r} run again, which the graph does not have"
            elif not has(traces[name]):
                yield f"{what} of segment {name!r} run again, which has none"
            if name in seen:
                yield f"segment {name} runs again twice"
            seen.add(name)


def _has_latents(trace: SegmentTrace) -> bool:
    return with_latents_again(trace) is not trace


def _ratio_faults(what: str, sizes: Iterable[tuple[Group, int, int]]) -> Iterator[str]:
    """``what`` is some number times the trainable bytes, rounded: one number for all groups."""
    low, high = 0.0, math.inf
    for group, size, trainable in sizes:
        if size < 0 or (size and not trainable):
            yield f"group {group.name}: {what} {size}, the graph has {trainable} trainable bytes there"
        elif trainable:
            low, high = max(low, (size - 0.5) / trainable), min(high, (size + 0.5) / trainable)
            if low > high:
                yield (f"group {group.name}: {what} {size} for {trainable} trainable bytes; other groups have another"
                       " ratio")


def _edge_faults(problem: PlanningProblem, coarse: CoarseGraph) -> Iterator[str]:
    made = {value.name: (value.source, value.targets, value.num_bytes, value.grad_bytes) for value in coarse.values}
    seen: set[str] = set()
    for edge in problem.edges:
        found = (edge.source, tuple(sorted(edge.targets)), edge.num_bytes, edge.grad_bytes)
        if edge.value in seen:
            yield f"value {edge.value!r} has two edges"
        elif edge.value not in made:
            yield f"an edge for value {edge.value!r}, which passes between no groups"
        elif found != made[edge.value]:
            yield (f"value {edge.value}: (source, targets, bytes, gradient bytes) are {found}, the graph gives"
                   f" {made[edge.value]}")
        seen.add(edge.value)
    for name in made:
        if name not in seen:
            yield f"value {name}, which passes from group {problem.groups[made[name][0]].name}, has no edge"


def _sharing_faults(problem: PlanningProblem, coarse: CoarseGraph) -> Iterator[str]:
    """Rows whose number changes cannot travel between ranks."""
    number_of = {group.name: number for number, group in enumerate(coarse.groups)}
    for names in exchange_groups(coarse):
        wanted = {number_of[name] for name in names}
        if not any(wanted <= set(found) for found in problem.colocate) and len(wanted) > 1:
            yield f"groups {', '.join(names)} exchange rows and must share a rank, but colocate does not say so"
