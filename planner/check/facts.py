"""What a placement demands, worked out from the problem alone: the checker's own view.

It repeats what `mipipe.planner.jobs.stages` computes for search, lowering and simulation, on purpose and by other
means: a checker that shared their code would share their mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mipipe.graphs.errors import PlanError
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.plan import Plan
from mipipe.planner.problem import Group

Part = tuple[ActionKind, int, int]
"""An elementary (kind, stage, microbatch)."""


def part_text(part: Part) -> str:
    """``2F0``."""
    return str(Action(part[1], part[0], part[2]))


@dataclass(frozen=True, slots=True)
class Flow:
    """What one stage hands to another for one microbatch. ``values`` are names, in the order of the problem's edges."""

    source: int
    target: int
    microbatch: int
    backward: bool
    num_bytes: int
    values: tuple[str, ...]
    producer: Part
    consumer: Part

    def __str__(self) -> str:
        return f"{self.source}{'⇐' if self.backward else '⇒'}{self.target}:{self.microbatch}"


@dataclass(frozen=True)
class Demands:
    """The demands of a plan whose placement has been found sound (`check_placement`)."""

    plan: Plan

    @cached_property
    def stage_of(self) -> dict[int, int]:
        """Group to stage."""
        return {group: s for s, stage in enumerate(self.plan.placement.stages) for group in stage.groups}

    def rank(self, stage: int, microbatch: int) -> int:
        return self.plan.placement.routes[stage][microbatch]

    def groups(self, stage: int) -> list[Group]:
        return self._groups[stage]

    @cached_property
    def _groups(self) -> list[list[Group]]:
        return [[self.plan.problem.groups[group] for group in stage.groups] for stage in self.plan.placement.stages]

    @cached_property
    def _durations(self) -> dict[tuple[ActionKind, int, str], int]:
        """Durations of parts without loads, by kind, stage and device kind."""
        return {}

    @cached_property
    def streams(self) -> list[Stream]:
        return [self.groups(stage)[0].stream for stage in range(len(self.plan.placement.stages))]

    @cached_property
    def phases(self) -> list[tuple[ActionKind, ...]]:
        """Per stage the elementary kinds it has, in the order in which they run for one microbatch."""
        found = []
        for s, stage in enumerate(self.plan.placement.stages):
            times = [time for group in self.groups(s) for time in group.times.values()]
            kinds = [ActionKind.F]
            kinds += [ActionKind.I] if any(time.i_ns is not None for time in times) else []
            kinds += [ActionKind.W] if any(time.w_ns is not None for time in times) else []
            if stage.recompute and len(kinds) > 1:
                kinds.insert(1, ActionKind.RECOMPUTE)
            found.append(tuple(kinds))
        return found

    def gradient_kind(self, stage: int) -> ActionKind | None:
        """The first gradient phase, which reads what successors return; None for a stage without gradients."""
        return next((kind for kind in self.phases[stage] if kind in (ActionKind.I, ActionKind.W)), None)

    def part_ns(self, part: Part) -> int:
        """Duration of an elementary part on the rank its microbatch is routed to."""
        kind, stage, microbatch = part
        device = self.plan.problem.topology.devices[self.rank(stage, microbatch)].kind
        known = self._durations.get((kind, stage, device))
        if known is not None:
            return known
        total = 0
        for group in self.groups(stage):
            times = group.times[device]
            time = {ActionKind.I: times.i_ns, ActionKind.W: times.w_ns}.get(kind, times.f_ns)
            total += scaled(time or 0, group, microbatch)
        if not any(group.loads for group in self.groups(stage)):
            self._durations[kind, stage, device] = total
        return total

    def action_ns(self, action: Action) -> int:
        """Duration of an action; an overlapped pair follows the problem's rule, where no collectives run beside it."""
        times = [self.part_ns(part) for part in action.parts()]
        if action.kind is ActionKind.OVERLAP_F_B and Stream.COLLECTIVE not in self.streams:
            return self.plan.problem.overlap.duration_ns(times[0], sum(times[1:]))
        return sum(times)

    def expected_parts(self) -> Iterator[Part]:
        for stage, kinds in enumerate(self.phases):
            for microbatch in range(self.plan.problem.num_microbatches):
                for kind in kinds:
                    yield kind, stage, microbatch

    def needs_before(self, part: Part) -> Part | None:
        """The part of the same stage and microbatch that must come just before, if any."""
        kind, stage, microbatch = part
        place = self.phases[stage].index(kind)
        return (self.phases[stage][place - 1], stage, microbatch) if place else None

    @cached_property
    def flows(self) -> list[Flow]:
        """Everything that passes between two stages, within a rank or not; by microbatch, stages, forward first."""
        between: dict[tuple[int, int], list[int]] = {}
        for number, edge in enumerate(self.plan.problem.edges):
            source = self.stage_of[edge.source]
            for target in {self.stage_of[group] for group in edge.targets} - {source}:
                between.setdefault((source, target), []).append(number)
        found = []
        for microbatch in range(self.plan.problem.num_microbatches):
            for source, target in sorted(between):
                found += self._flows_between(source, target, microbatch, between[source, target])
        return found

    def _flows_between(self, source: int, target: int, microbatch: int, numbers: list[int]) -> list[Flow]:
        groups, edges = self.plan.problem.groups, [self.plan.problem.edges[number] for number in numbers]
        size = sum(scaled(edge.num_bytes, groups[edge.source], microbatch) for edge in edges)
        found = [Flow(source, target, microbatch, False, size, tuple(edge.value for edge in edges),
                      (ActionKind.F, source, microbatch), (ActionKind.F, target, microbatch))]
        returned = [edge for edge in edges if edge.grad_bytes is not None and any(
            self.stage_of[group] == target and any(time.i_ns is not None for time in groups[group].times.values())
            for group in edge.targets)]
        reader = self.gradient_kind(source)
        if returned and reader is not None:
            size = sum(scaled(edge.grad_bytes or 0, groups[edge.source], microbatch) for edge in returned)
            found.append(Flow(target, source, microbatch, True, size, tuple(edge.value for edge in returned),
                              (ActionKind.I, target, microbatch), (reader, source, microbatch)))
        return found

    def reduced_stages(self) -> list[int]:
        """Stages whose gradients are summed over replicas at the end of the step."""
        return [s for s, stage in enumerate(self.plan.placement.stages)
                if len(stage.ranks) > 1 and ActionKind.W in self.phases[s]]

    def reduce_ns(self, stage: int) -> int:
        size = sum(group.gradient_bytes for group in self.groups(stage))
        return self.plan.problem.topology.all_reduce_ns(self.plan.placement.stages[stage].ranks, size)

    def update_ns(self, rank: int) -> int:
        return sum(group.update_ns for s, stage in enumerate(self.plan.placement.stages) if rank in stage.ranks
                   for group in self.groups(s))

    def resident_bytes(self, rank: int) -> int:
        return sum(group.resident_bytes for s, stage in enumerate(self.plan.placement.stages) if rank in stage.ranks
                   for group in self.groups(s))


def scaled(amount: int, group: Group, microbatch: int) -> int:
    """An amount of the group as traced, for the load of one microbatch."""
    return round(amount * group.loads[microbatch]) if group.loads else amount


def workspace_bytes(group: Group, forward: bool) -> int:
    """What a group needs while one of its actions runs: F and RECOMPUTE may have a number of their own."""
    own = group.forward_workspace_bytes if forward else None
    return group.workspace_bytes if own is None else own


def check_placement(plan: Plan) -> None:
    """Raise `PlanError` unless every group is in one stage, stages are in order, and routes lead to replicas."""
    problem, placement = plan.problem, plan.placement
    seen: dict[int, int] = {}
    for s, stage in enumerate(placement.stages):
        if not stage.groups:
            raise PlanError(f"stage {s}: holds no group; remove it")
        for group in stage.groups:
            if not 0 <= group < len(problem.groups):
                raise PlanError(f"stage {s}: holds group {group}, but the problem's groups are 0 to"
                                f" {len(problem.groups) - 1}")
            if group in seen:
                raise PlanError(f"stage {s}: holds group {group} ({problem.groups[group].name}), which is also in stage"
                                f" {seen[group]}; every group is in exactly one stage")
            seen[group] = s
        if len({problem.groups[group].stream for group in stage.groups}) > 1:
            raise PlanError(f"stage {s}: mixes groups of the compute and the collective stream; split it")
        if stage.recompute and any(problem.groups[group].recompute_bytes is None for group in stage.groups):
            raise PlanError(f"stage {s}: recomputes, but one of its groups offers no recompute_bytes")
        if not stage.ranks or len(set(stage.ranks)) < len(stage.ranks):
            raise PlanError(f"stage {s}: is on ranks {stage.ranks}; expected one or more different ranks")
        single = [group for group in stage.groups if problem.groups[group].single]
        if single and len(stage.ranks) > 1:
            raise PlanError(f"stage {s}: is on ranks {stage.ranks}, but its group {problem.groups[single[0]].name}"
                            " may have one replica only: it changes buffers in F, or is of an expert-parallel layer")
        outside = [rank for rank in stage.ranks if not 0 <= rank < problem.num_ranks]
        if outside:
            raise PlanError(f"stage {s}: is on rank {outside[0]}, but the topology has ranks 0 to"
                            f" {problem.num_ranks - 1}")
    missing = [group.name for number, group in enumerate(problem.groups) if number not in seen]
    if missing:
        raise PlanError(f"group {missing[0]}: is in no stage; every group is in exactly one stage")
    for edge in problem.edges:
        for target in edge.targets:
            if seen[target] < seen[edge.source]:
                raise PlanError(f"stage {seen[edge.source]}: its group {problem.groups[edge.source].name} feeds stage"
                                f" {seen[target]}, which comes before it; stages are in topological order")
    _check_routes(plan)
    for together in problem.colocate:
        first, *rest = together
        for group in rest:
            for microbatch in range(problem.num_microbatches):
                ranks = [placement.routes[seen[member]][microbatch] for member in (first, group)]
                if ranks[0] != ranks[1]:
                    raise PlanError(f"groups {problem.groups[first].name} and {problem.groups[group].name}: on ranks"
                                    f" {ranks[0]} and {ranks[1]} for microbatch {microbatch}; the problem wants them"
                                    " together")


def _check_routes(plan: Plan) -> None:
    placement, count = plan.placement, plan.problem.num_microbatches
    if len(placement.routes) != len(placement.stages):
        raise PlanError(f"placement: has routes for {len(placement.routes)} stages, expected {len(placement.stages)}")
    for s, (stage, route) in enumerate(zip(placement.stages, placement.routes, strict=True)):
        if len(route) != count:
            raise PlanError(f"stage {s}: has routes for {len(route)} microbatches, expected {count}")
        for microbatch, rank in enumerate(route):
            if rank not in stage.ranks:
                raise PlanError(f"stage {s}: microbatch {microbatch} is routed to rank {rank}, which holds no replica"
                                f" of it; its replicas are on ranks {', '.join(map(str, stage.ranks))}")
