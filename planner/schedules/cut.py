"""Cutting a model into the stages of a published schedule: consecutive runs of its groups in topological order.

Runs of a topological order are convex, so branches are simply serialised: a stage may receive from any earlier stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mipipe.graphs.errors import ProblemError
from mipipe.planner.actions import Stream
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem

CutRule = Literal["even", "balanced"]


def cut_stages(problem: PlanningProblem, stage_ranks: Sequence[Sequence[int]], cut: CutRule,
               name: str) -> list[list[int]]:
    """The groups of every stage.

    ``even`` gives every stage the same number of layers (embedding before them and head after them stay with the first
    and the last), as the papers do; ``balanced`` makes the largest stage as small as consecutive runs allow.

    Raises:
        ProblemError: the model has fewer layers (``even``) or groups (``balanced``) than the schedule has stages.
    """
    pieces = _layers(problem) if cut == "even" else _units(problem)
    count = len(stage_ranks)
    if len(pieces) < count:
        what = "layers" if cut == "even" else "groups that can be apart"
        raise ProblemError(f"{name}: has {count} stages, but the model has {len(pieces)} {what}; use fewer ranks, or"
                           " coarsen into more groups")
    if cut == "even":
        ends = [len(pieces) * (stage + 1) // count for stage in range(count)]
    else:
        ends = _balanced_ends([[max(_load(problem, piece, rank) for rank in ranks) for ranks in stage_ranks]
                               for piece in pieces])
    return [[group for piece in pieces[first:last] for group in piece]
            for first, last in zip([0, *ends], ends, strict=False)]


def _units(problem: PlanningProblem) -> list[list[int]]:
    """Runs of groups that must not be cut: what lies between the first and the last of a colocated set."""
    joined = [False] * len(problem.groups)
    for together in problem.colocate:
        for group in range(min(together) + 1, max(together) + 1):
            joined[group] = True
    pieces: list[list[int]] = []
    for group, join in enumerate(joined):
        if join:
            pieces[-1].append(group)
        else:
            pieces.append([group])
    return pieces


def _layers(problem: PlanningProblem) -> list[list[int]]:
    """Units joined to layers; what belongs to no layer joins the layer after it, at the end the one before it."""
    pieces: list[list[int]] = []
    last_key: tuple[Any, ...] | None = None
    loose: list[int] = []
    units = _units(problem)
    if all(group.tags.layer is None for group in problem.groups):
        return units
    for unit in units:
        tags = next((tags for tags in (problem.groups[group].tags for group in unit) if tags.layer is not None), None)
        if tags is None:
            loose += unit
        elif pieces and (tags.branch, tags.layer) == last_key:
            pieces[-1] += loose + unit
            loose = []
        else:
            pieces.append(loose + unit)
            last_key, loose = (tags.branch, tags.layer), []
    pieces[-1] += loose
    return pieces


def _load(problem: PlanningProblem, groups: Sequence[int], rank: int) -> int:
    """Time of one step's microbatches on the compute stream of a rank."""
    kind = problem.topology.devices[rank].kind
    total = 0.0
    for number in groups:
        group = problem.groups[number]
        if group.stream is Stream.COMPUTE:
            total += group.times[kind].total_ns * (sum(group.loads) if group.loads else problem.num_microbatches)
    return round(total)


def _balanced_ends(loads: Sequence[Sequence[int]]) -> list[int]:
    """Ends of the runs with the least largest load, by bisection over a cap; ``loads[piece][stage]``."""
    pieces, stages = len(loads), len(loads[0])

    def ends_under(cap: int) -> list[int] | None:
        ends, place = [], 0
        for stage in range(stages):
            first, total = place, 0
            while place < pieces - (stages - stage - 1) and total + loads[place][stage] <= cap:
                total += loads[place][stage]
                place += 1
            if place == first:
                return None
            ends.append(place)
        return ends if place == pieces else None

    low, high = 0, sum(max(row) for row in loads)
    while low < high:
        middle = (low + high) // 2
        if ends_under(middle) is None:
            low = middle + 1
        else:
            high = middle
    ends = ends_under(high)
    assert ends is not None
    return ends


def merge_streams(problem: PlanningProblem) -> PlanningProblem:
    """The problem with every unit as one group on the compute stream: collectives count as compute time.

    This is how schedules count that know nothing of a second stream; a problem without collectives stays as it is.
    """
    if all(group.stream is Stream.COMPUTE for group in problem.groups):
        return problem
    units = _units(problem)
    unit_of = {group: number for number, unit in enumerate(units) for group in unit}
    edges = []
    for edge in problem.edges:
        source = unit_of[edge.source]
        targets = tuple(sorted({unit_of[target] for target in edge.targets} - {source}))
        if targets:
            edges.append(GroupEdge(source, targets, edge.num_bytes, edge.grad_bytes, edge.value))
    return problem.replace(name=f"{problem.name}, one stream", edges=tuple(edges), colocate=(),
                           groups=tuple(_merged([problem.groups[group] for group in unit]) for unit in units))


def _merged(groups: Sequence[Group]) -> Group:
    def total(kind: str, name: str) -> int | None:
        times = [getattr(group.times[kind], name) for group in groups]
        return None if all(time is None for time in times) else sum(time or 0 for time in times)

    times = {kind: PhaseTimes(total(kind, "f_ns") or 0, total(kind, "i_ns"), total(kind, "w_ns"))
             for kind in groups[0].times}
    sizes = {name: sum(getattr(group, name) for group in groups)
             for name in ("resident_bytes", "gradient_bytes", "saved_fi_bytes", "saved_fw_bytes", "saved_iw_bytes",
                          "update_ns")}
    return Group("+".join(group.name for group in groups), times, loads=groups[0].loads, tags=groups[0].tags,
                 workspace_bytes=max(group.workspace_bytes for group in groups),
                 forward_workspace_bytes=max(group.forward_workspace for group in groups),
                 segments=tuple(segment for group in groups for segment in group.segments), **sizes)
