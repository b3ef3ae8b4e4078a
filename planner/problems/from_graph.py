"""A planning problem from a coarse graph, a cost table and a cluster: where a model's numbers meet the planner's.

Resident bytes of a group: weights and buffers, plus a gradient and the optimizer's state for what trains. Left out:
memory the framework itself takes (set ``memory`` in the cluster file below the device's size), fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from mipipe.graphs.coarse.contract import contract
from mipipe.graphs.coarse.graph import CoarseGraph, OpGroup
from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import ProblemError
from mipipe.graphs.operator_graph import DTYPE_BYTES, OperatorGraph, Phase, Role
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Stream
from mipipe.planner.problem import Group, GroupEdge, Limits, OverlapRule, PhaseTimes, PlanningProblem

OptimizerName = Literal["none", "sgd", "momentum", "adam", "adamw", "adamw_mixed"]

STATE_BYTES: dict[str, float] = {
    "none": 0.0,
    "sgd": 0.0,
    "momentum": 1.0,
    "adam": 2.0,
    "adamw": 2.0,
    "adamw_mixed": 6.0,
}
"""Optimizer state per byte of trainable parameter. ``adamw_mixed``: 16-bit weights with a float32 master copy and two
float32 moments, 12 bytes for each 2 (Rajbhandari et al., "ZeRO", SC 2020, section 3.1)."""


def usual_optimizer(dtype: str) -> OptimizerName:
    """What keeps the state of parameters of a dtype where nothing else is said: AdamW, of 16-bit ones with a float32
    copy."""
    return "adamw_mixed" if DTYPE_BYTES.get(dtype, 4) == 2 else "adamw"


def build_problem(coarse: CoarseGraph, costs: CostTable, topology: Topology, *, num_microbatches: int,
                  optimizer: OptimizerName | float = "adamw", gradient_bytes_per_parameter_byte: float = 1.0,
                  recompute: bool = False, loads: Mapping[str, Sequence[float]] | None = None,
                  limits: Limits | None = None, colocate: Sequence[Sequence[str]] = (),
                  overlap: OverlapRule | None = None, name: str | None = None) -> PlanningProblem:
    """The problem of training a model's groups on a cluster.

    Args:
        coarse: the groups.
        costs: their durations on every device kind of ``topology``.
        topology: devices and links.
        num_microbatches: microbatches of one step.
        optimizer: a name in `STATE_BYTES`, or bytes of state per byte of trainable parameter.
        gradient_bytes_per_parameter_byte: 1 where gradients have the parameters' dtype, 2 for float32 gradients of
            16-bit weights.
        recompute: offer every group to keep only its inputs and run F again before its gradients.
        loads: relative size of each microbatch, by group name or modality branch (a group's name comes first).
        limits: memory limits beyond the devices' own.
        colocate: sets of group names that share a rank.
        overlap: duration of overlapped forward and backward.
        name: of the problem; None: the model's.

    Raises:
        ProblemError: costs of another graph, a missing cost or phase, an unknown optimizer, group or branch.
    """
    if costs.graph_digest != coarse.graph_digest:
        raise ProblemError(f"costs: made for graph {costs.graph_digest or '(none)'}, but {coarse.model} is graph"
                           f" {coarse.graph_digest}; profile or estimate this graph")
    state = _state_bytes(optimizer)
    kinds = sorted({device.kind for device in topology.devices})
    table = {(entry.group, entry.device_kind): entry for entry in costs.entries}
    number_of = {group.name: number for number, group in enumerate(coarse.groups)}
    by_group = _loads(coarse, loads or {})
    groups = []
    for group in coarse.groups:
        times = {kind: times_of(group.name, group.flops, kind, table.get((group.name, kind))
                                or costs.find(group.name, kind))
                 for kind in kinds}
        gradients = round(group.trainable_bytes * gradient_bytes_per_parameter_byte)
        resident = group.parameter_bytes + gradients + round(group.trainable_bytes * state)
        groups.append(_group(group, times, resident, gradients, recompute, by_group.get(group.name, ())))
    edges = tuple(GroupEdge(value.source, value.targets, value.num_bytes, value.grad_bytes, value.name)
                  for value in coarse.values)
    together = []
    for names in (*exchange_groups(coarse), *colocate):
        unknown = [group_name for group_name in names if group_name not in number_of]
        if unknown:
            raise ProblemError(f"colocate: unknown group {unknown[0]!r}; see `mipipe show` for the groups")
        together.append(tuple(sorted(number_of[group_name] for group_name in names)))
    return PlanningProblem(name or coarse.model, tuple(groups), edges, topology, num_microbatches, limits or Limits(),
                           tuple(together), overlap or OverlapRule(), coarse.graph_digest)


def problem_of_groups(graph: OperatorGraph, groups: Sequence[Sequence[str]], topology: Topology, num_microbatches: int,
                      times: Callable[[OpGroup], Mapping[Phase, int]], **details: Any) -> PlanningProblem:
    """The problem of a graph whose groups are given as lists of segment names, with durations by group.

    ``times``: nanoseconds of each phase, of which those are taken that the group has; ``details`` as for
    `build_problem`.

    Raises:
        GraphError: the groups are not in a topological order.
        ProblemError: as `build_problem`.
    """
    number_of = {segment.name: number for number, segment in enumerate(graph.segments)}
    coarse = contract(index_graph(graph), [sorted(number_of[name] for name in members) for members in groups])
    kinds = sorted({device.kind for device in topology.devices})
    entries = []
    for group in coarse.groups:
        given = times(group)
        entries += [GroupCost(group.name, kind, {phase: given[phase] for phase in group.flops}, "given")
                    for kind in kinds]
    return build_problem(coarse, CostTable(coarse.graph_digest, tuple(entries)), topology,
                         num_microbatches=num_microbatches, **details)


def _group(group: OpGroup, times: dict[str, PhaseTimes], resident: int, gradients: int, recompute: bool,
           loads: tuple[float, ...]) -> Group:
    """The planner's group; recomputation is offered where there is a backward to do it for."""
    trains = any(phase in group.flops for phase in (Phase.I, Phase.W))
    return Group(group.name, times, Stream.COLLECTIVE if group.collective else Stream.COMPUTE, resident, gradients,
                 group.saved_fi_bytes, group.saved_fw_bytes, group.saved_iw_bytes,
                 max((size for phase, size in group.workspace_bytes.items() if phase is not Phase.F), default=0),
                 group.input_bytes if recompute and trains else None, loads, group.segments, group.tags, group.single,
                 forward_workspace_bytes=group.workspace_bytes.get(Phase.F, 0))


def exchange_groups(coarse: CoarseGraph) -> tuple[tuple[str, ...], ...]:
    """Sets of group names that share a rank because rows whose number changes pass between them.

    The groups of an expert-parallel layer: its dispatch, and all that read what it gives (experts and combine).
    """
    names = [group.name for group in coarse.groups]
    sets: dict[int, dict[str, None]] = {}
    for value in coarse.values:
        group = coarse.groups[value.source]
        if group.collective and group.tags.role is Role.DISPATCH:
            found = sets.setdefault(value.source, {group.name: None})
            found.update((names[target], None) for target in value.targets)
    return tuple(tuple(found) for found in sets.values())


def _state_bytes(optimizer: str | float) -> float:
    if isinstance(optimizer, str):
        if optimizer not in STATE_BYTES:
            raise ProblemError(f"optimizer {optimizer!r}: unknown; expected one of {', '.join(STATE_BYTES)}, or a"
                               " number of state bytes per byte of trainable parameter")
        return STATE_BYTES[optimizer]
    if optimizer < 0:
        raise ProblemError(f"optimizer: {optimizer} bytes of state per byte of parameter; expected 0 or more")
    return float(optimizer)


def times_of(name: str, phases: Collection[Phase], kind: str, cost: GroupCost) -> PhaseTimes:
    """A group's durations: exactly the phases it has.

    Raises:
        ProblemError: the cost has others.
    """
    have, want = set(cost.times_ns), set(phases)
    if have != want:
        listed = ", ".join(phase.value for phase in Phase if phase in want)
        found = ", ".join(phase.value for phase in Phase if phase in have) or "none"
        raise ProblemError(f"costs: group {name!r} on {kind!r} has phases {found}, but the graph has {listed};"
                           " make the table for this graph again")
    return PhaseTimes(cost.times_ns[Phase.F], cost.times_ns.get(Phase.I), cost.times_ns.get(Phase.W))


def _loads(coarse: CoarseGraph, loads: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """Loads by group name; a branch's loads hold for its groups that are not named themselves."""
    names = {group.name for group in coarse.groups}
    branches = {group.tags.branch for group in coarse.groups if group.tags.branch is not None}
    unknown = [key for key in loads if key not in names and key not in branches]
    if unknown:
        raise ProblemError(f"loads: {unknown[0]!r} is neither a group nor a branch; branches are"
                           f" {', '.join(sorted(branches)) or 'none'}")
    found: dict[str, tuple[float, ...]] = {}
    for group in coarse.groups:
        load = loads.get(group.name, loads.get(group.tags.branch or "", ()))
        if any(item < 0 for item in load):
            raise ProblemError(f"loads: {group.name}: found {min(load)}, expected sizes of 0 or more")
        if load:
            found[group.name] = tuple(map(float, load))
    return found
