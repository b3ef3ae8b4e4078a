"""A problem seen at the stages of one placement: durations, edges and memory of whole stages.

Everything that works on a placement (search, lowering, simulation) reads this view; `mipipe.planner.check` does not, it
recomputes what it needs from the problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mipipe.graphs.errors import PlanError
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, PlanningProblem


@dataclass(frozen=True, slots=True)
class StageEdge:
    """All values from one stage to another, per microbatch before ``loads``. ``grad_bytes`` None: nothing returns."""

    source: int
    target: int
    num_bytes: tuple[int, ...]
    grad_bytes: tuple[int, ...] | None
    values: tuple[str, ...]
    grad_values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageView:
    """Per stage and microbatch: durations on the rank the microbatch is routed to, sizes; and the stage edges.

    ``f_ns[s][m]``; ``i_ns[s]`` and ``w_ns[s]`` are None where the stage has no such phase. ``saved_*[s][m]`` in bytes,
    ``forward_workspace[s]`` of F and RECOMPUTE, ``workspace[s]`` of I and W.
    ``incoming[s]`` and ``outgoing[s]`` index ``edges``.
    """

    problem: PlanningProblem
    placement: Placement
    streams: tuple[Stream, ...]
    f_ns: tuple[tuple[int, ...], ...]
    i_ns: tuple[tuple[int, ...] | None, ...]
    w_ns: tuple[tuple[int, ...] | None, ...]
    saved_fi: tuple[tuple[int, ...], ...]
    saved_fw: tuple[tuple[int, ...], ...]
    saved_iw: tuple[tuple[int, ...], ...]
    kept: tuple[tuple[int, ...], ...]
    workspace: tuple[int, ...]
    forward_workspace: tuple[int, ...]
    resident_bytes: tuple[int, ...]
    edges: tuple[StageEdge, ...]
    incoming: tuple[tuple[int, ...], ...]
    outgoing: tuple[tuple[int, ...], ...]

    @property
    def num_stages(self) -> int:
        return len(self.f_ns)

    def rank(self, stage: int, microbatch: int) -> int:
        """The rank that runs ``stage`` for ``microbatch``."""
        return self.placement.routes[stage][microbatch]

    def duration_ns(self, kind: ActionKind, stage: int, microbatch: int, partner: tuple[int, int] | None = None) -> int:
        """Duration of a compute action."""
        if kind in (ActionKind.F, ActionKind.RECOMPUTE):
            return self.f_ns[stage][microbatch]
        i_ns, w_ns = self.i_ns[stage], self.w_ns[stage]
        if kind is ActionKind.I:
            return i_ns[microbatch] if i_ns else 0
        if kind is ActionKind.W:
            return w_ns[microbatch] if w_ns else 0
        if kind is ActionKind.B:
            return (i_ns[microbatch] if i_ns else 0) + (w_ns[microbatch] if w_ns else 0)
        assert kind is ActionKind.OVERLAP_F_B and partner is not None
        forward, backward = self.f_ns[stage][microbatch], self.duration_ns(ActionKind.B, *partner)
        if Stream.COLLECTIVE in self.streams:
            return forward + backward
        return self.problem.overlap.duration_ns(forward, backward)

    def workspace_of(self, kind: ActionKind, stage: int) -> int:
        """Bytes that an elementary action of a stage holds while it runs."""
        forward = kind in (ActionKind.F, ActionKind.RECOMPUTE)
        return self.forward_workspace[stage] if forward else self.workspace[stage]

    def updates_ns(self) -> list[int]:
        """Per rank the duration of its update at the end of the step (`Group.update_ns`)."""
        found = [0] * self.problem.num_ranks
        for stage in self.placement.stages:
            for rank in stage.ranks:
                found[rank] += sum(self.problem.groups[group].update_ns for group in stage.groups)
        return found

    def reduce_ns(self, stage: int) -> int:
        """Duration of the gradient all-reduce between a stage's replicas; 0 for one replica."""
        members = self.placement.stages[stage]
        size = sum(self.problem.groups[group].gradient_bytes for group in members.groups)
        return self.problem.topology.all_reduce_ns(members.ranks, size)


def view(problem: PlanningProblem, placement: Placement) -> StageView:
    """The stage view of a placement.

    Raises:
        PlanError: a group in no stage or in two, a route to a rank without the stage, stages out of topological order,
            a stage that mixes streams.
    """
    stage_of = _stage_of_groups(problem, placement)
    _check_routes(problem, placement)
    num_microbatches = problem.num_microbatches
    f_ns, i_ns, w_ns, fi, fw, iw, kept, workspace, forward_workspace, streams = ([] for _ in range(10))
    for index, stage in enumerate(placement.stages):
        groups = [problem.groups[group] for group in stage.groups]
        if len({group.stream for group in groups}) != 1:
            raise PlanError(f"stage {index}: mixes groups of the compute and the collective stream; split it")
        streams.append(groups[0].stream)
        kinds = [problem.topology.devices[rank].kind for rank in placement.routes[index]]
        even = not any(group.loads for group in groups)

        def total(name: str, groups: list[Group] = groups, kinds: list[str] = kinds, even: bool = even
                  ) -> tuple[int, ...] | None:
            if all(getattr(group.times[kinds[0]], name) is None for group in groups):
                return None
            known = {kind: [(getattr(group.times[kind], name) or 0, group.loads) for group in groups]
                     for kind in set(kinds)}
            if even:
                sums = {kind: sum(amount for amount, _ in amounts) for kind, amounts in known.items()}
                return tuple(sums[kind] for kind in kinds)
            return tuple(sum(_scaled(amount, loads, m) for amount, loads in known[kind])
                         for m, kind in enumerate(kinds))

        def size(name: str, groups: list[Group] = groups, even: bool = even) -> tuple[int, ...]:
            if even:
                return (sum(getattr(group, name) or 0 for group in groups),) * num_microbatches
            return tuple(sum(_scaled(getattr(group, name) or 0, group.loads, m) for group in groups)
                         for m in range(num_microbatches))

        forward = total("f_ns")
        assert forward is not None
        f_ns.append(forward)
        i_ns.append(total("i_ns"))
        w_ns.append(total("w_ns"))
        fi.append(size("saved_fi_bytes"))
        fw.append(size("saved_fw_bytes"))
        late, saved = _late_gradients(problem, stage), size("saved_iw_bytes")
        iw.append(tuple(held + sum(_scaled(amount, loads, m) for amount, loads in late)
                        for m, held in enumerate(saved)) if late else saved)
        kept.append(size("recompute_bytes"))
        workspace.append(max(group.workspace_bytes for group in groups))
        forward_workspace.append(max(group.forward_workspace for group in groups))
    edges = _stage_edges(problem, stage_of)
    incoming: list[list[int]] = [[] for _ in placement.stages]
    outgoing: list[list[int]] = [[] for _ in placement.stages]
    for number, edge in enumerate(edges):
        outgoing[edge.source].append(number)
        incoming[edge.target].append(number)
    return StageView(problem, placement, tuple(streams), tuple(f_ns), tuple(i_ns), tuple(w_ns), tuple(fi), tuple(fw),
                     tuple(iw), tuple(kept), tuple(workspace), tuple(forward_workspace), _resident(problem, placement),
                     edges, tuple(map(tuple, incoming)), tuple(map(tuple, outgoing)))


def groups_apart(problem: PlanningProblem) -> StageView:
    """The problem with every group a stage of its own, all on the first rank."""
    groups = range(len(problem.groups))
    return view(problem, Placement(tuple(Stage((g,), (0,)) for g in groups),
                                   tuple((0,) * problem.num_microbatches for _ in groups), "groups apart"))


def _resident(problem: PlanningProblem, placement: Placement) -> tuple[int, ...]:
    """Bytes by rank of all groups that it holds."""
    found = [0] * problem.num_ranks
    for stage in placement.stages:
        for rank in stage.ranks:
            found[rank] += sum(problem.groups[group].resident_bytes for group in stage.groups)
    return tuple(found)


def _late_gradients(problem: PlanningProblem, stage: Stage) -> list[tuple[int, Sequence[float]]]:
    """Bytes and loads of the gradients that wait from the stage's I for groups that have a W only."""
    def has(group: int, phase: str) -> bool:
        return any(getattr(times, phase) is not None for times in problem.groups[group].times.values())

    late = {group for group in stage.groups if has(group, "w_ns") and not has(group, "i_ns")}
    if not late or not any(has(group, "i_ns") for group in stage.groups):
        return []
    return [(edge.grad_bytes, problem.groups[edge.source].loads) for edge in problem.edges
            if edge.source in late and edge.grad_bytes is not None and any(has(at, "i_ns") for at in edge.targets)]


def _scaled(amount: int, loads: Sequence[float], microbatch: int) -> int:
    return round(amount * loads[microbatch]) if loads else amount


def _stage_of_groups(problem: PlanningProblem, placement: Placement) -> list[int]:
    stage_of = [-1] * len(problem.groups)
    for index, stage in enumerate(placement.stages):
        for group in stage.groups:
            if not 0 <= group < len(stage_of):
                raise PlanError(f"stage {index}: group {group} is not in the problem, which has {len(stage_of)} groups")
            if stage_of[group] >= 0:
                raise PlanError(f"group {problem.groups[group].name}: in stage {stage_of[group]} and in stage {index}")
            stage_of[group] = index
    if -1 in stage_of:
        raise PlanError(f"group {problem.groups[stage_of.index(-1)].name}: in no stage of the placement")
    return stage_of


def _check_routes(problem: PlanningProblem, placement: Placement) -> None:
    if len(placement.routes) != len(placement.stages):
        raise PlanError(f"placement: routes for {len(placement.routes)} stages, but there are {len(placement.stages)}")
    for index, (stage, route) in enumerate(zip(placement.stages, placement.routes, strict=True)):
        if len(route) != problem.num_microbatches:
            raise PlanError(f"stage {index}: routes for {len(route)} microbatches, expected {problem.num_microbatches}")
        wrong = set(route) - set(stage.ranks)
        if wrong:
            raise PlanError(f"stage {index}: a microbatch is routed to rank {min(wrong)}, which does not"
                            " hold the stage")
        if not all(0 <= rank < problem.num_ranks for rank in stage.ranks):
            raise PlanError(f"stage {index}: on ranks {stage.ranks}, but the topology has {problem.num_ranks} devices")


def _stage_edges(problem: PlanningProblem, stage_of: list[int]) -> tuple[StageEdge, ...]:
    """One edge for each pair of stages with a value between them; sizes by microbatch."""
    found: dict[tuple[int, int], tuple[list[int], list[int] | None, list[str], list[str]]] = {}
    for edge in problem.edges:
        source = stage_of[edge.source]
        for target in sorted({stage_of[group] for group in edge.targets} - {source}):
            if target < source:
                raise PlanError(f"placement: a value flows from stage {source} back to stage {target}; stages must be"
                                " convex and in topological order")
            loads = problem.groups[edge.source].loads
            forward = [_scaled(edge.num_bytes, loads, m) for m in range(problem.num_microbatches)]
            sizes, grads, values, grad_values = found.get((source, target), ([0] * len(forward), None, [], []))
            sizes = [a + b for a, b in zip(sizes, forward, strict=True)]
            values = [*values, edge.value]
            if edge.grad_bytes is not None and _pays_gradient(problem, stage_of, edge.targets, target):
                back = [_scaled(edge.grad_bytes, loads, m) for m in range(problem.num_microbatches)]
                grads = back if grads is None else [a + b for a, b in zip(grads, back, strict=True)]
                grad_values = [*grad_values, edge.value]
            found[source, target] = (sizes, grads, values, grad_values)
    return tuple(StageEdge(source, target, tuple(sizes), None if grads is None else tuple(grads), tuple(values),
                           tuple(grad_values))
                 for (source, target), (sizes, grads, values, grad_values) in sorted(found.items()))


def _pays_gradient(problem: PlanningProblem, stage_of: list[int], targets: tuple[int, ...], stage: int) -> bool:
    """Whether some reader of the value inside ``stage`` has an input gradient to return."""
    return any(stage_of[group] == stage and next(iter(problem.groups[group].times.values())).i_ns is not None
               for group in targets)
