"""Expert groups that take as long as their tokens: measured routing in the costs of form (a), for `mipipe plan`.

A layer captured with ``--expert-groups G`` is G branches, group g with the g-th G-th of the experts. Its duration grows
with the tokens its experts get: a group with a share s of a layer's tokens takes ``s * G`` times what it takes at an
even share. Profiled tables were measured at an even share (random routers); a roofline charges every group all rows, so
it is multiplied by s. So a skewed bank changes which rank has room for what, and the stages are cut elsewhere. Left
out: the part of a group's work that passes over all rows whoever they belong to (elementwise operators, the gather).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mipipe.graphs.coarse.graph import CoarseGraph, OpGroup
from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import InputError, ProblemError
from mipipe.graphs.operator_graph import Role
from mipipe.planner.experts.balance.maps import ExpertLoads


def with_expert_loads(costs: CostTable, coarse: CoarseGraph, loads: ExpertLoads) -> CostTable:
    """The table with the durations of expert groups scaled to their tokens.

    Args:
        costs: estimated or profiled.
        coarse: groups of a graph captured with expert groups.
        loads: tokens per MoE layer (in the graph's order) and expert.

    Raises:
        InputError: the loads are of another model.
        ProblemError: there are no expert groups, or the table was measured under a run's own routing.
    """
    shares = group_shares(coarse, loads)
    entries = []
    for entry in costs.entries:
        if entry.group not in shares:
            entries.append(entry)
            continue
        share, count = shares[entry.group]
        if entry.origin == "calibrated":
            raise ProblemError(f"costs: group {entry.group} was calibrated from a run, under the routing of that run;"
                               " give a profiled table, or leave --experts out")
        entries.append(_scaled(entry, share if entry.origin == "roofline" else share * count))
    spread = max(share * count for share, count in shares.values())
    note = f"tokens of {loads.model or 'the given loads'}; the busiest group has {spread:.2f} times an even share"
    return replace(costs, entries=tuple(entries), notes={**costs.notes, "expert_loads": note})


def group_shares(coarse: CoarseGraph, loads: ExpertLoads) -> dict[str, tuple[float, int]]:
    """For each expert group by name: its share of its layer's tokens, and the number of groups in the layer."""
    layers = expert_group_layers(coarse)
    if not layers:
        raise ProblemError(f"plan: --experts needs expert groups to weigh, but {coarse.model} has none; capture it with"
                           " --expert-groups")
    if len(layers) != loads.num_layers:
        raise InputError(f"loads: have {loads.num_layers} layers, but {coarse.model} has {len(layers)} MoE layers; give"
                         " loads of this model")
    shares = {}
    for number, groups in enumerate(layers.values()):
        row, count = loads.loads[number], len(groups)
        if loads.num_experts % count or sorted(groups) != list(range(count)):
            raise InputError(f"loads: {loads.num_experts} experts do not divide into the {count} expert groups of"
                             f" {coarse.model}; give loads of this model")
        size, total = loads.num_experts // count, sum(row)
        for index, group in groups.items():
            part = sum(row[index * size:(index + 1) * size])
            shares[group.name] = part / total if total else 1 / count, count
    return shares


def expert_group_layers(coarse: CoarseGraph) -> Mapping[str, dict[int, OpGroup]]:
    """The expert groups of each MoE layer, in the graph's order."""
    layers: dict[str, dict[int, OpGroup]] = {}
    for group in coarse.groups:
        number = group.tags.expert_group
        if number is not None and group.tags.role is Role.EXPERTS:
            layers.setdefault(group.segments[0].rpartition(".group")[0], {})[number] = group
    return layers


def _scaled(entry: GroupCost, factor: float) -> GroupCost:
    return replace(entry, times_ns={phase: max(1, round(time * factor)) for phase, time in entry.times_ns.items()})
