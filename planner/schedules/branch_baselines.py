"""Published schedules for models with encoders: the encoder on the first stage, or on a rank of its own.

Published pipelines know one chain. Practice has two ways to fit an encoder in: put it before the first stage's layers
(``first``), or give it a rank of its own (``apart``) and run the schedule on the rest. Apart, the encoder's rank runs
all its forwards as soon as it can and its gradients as they return, which is the best it can do for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from mipipe.graphs.errors import ProblemError
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.execution.measure import makespan_of
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.placements.branches import encoders
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import GroupEdge, PlanningProblem
from mipipe.planner.schedules import Baseline
from mipipe.planner.schedules.cut import CutRule

Where = Literal["first", "apart"]


def plan_with_encoder(problem: PlanningProblem, baseline: Baseline, where: Where, *, split: bool = True,
                      cut: CutRule = "even") -> Plan:
    """A published schedule's plan for a model with an encoder, with its makespan; memory limits are not looked at.

    Raises:
        ProblemError: no encoder, or the schedule does not exist for this size.
    """
    chosen = encoders(problem)
    if not chosen:
        raise ProblemError(f"problem {problem.name}: has no encoder beside its trunk; use the schedule as it is")
    if any(problem.groups[g].stream is not Stream.COMPUTE for g in chosen):
        raise ProblemError(f"problem {problem.name}: its encoder has collectives, which no published schedule places")
    rest = [g for g in range(len(problem.groups)) if g not in set(chosen)]
    if where == "first":
        first = next(g for g in rest if problem.groups[g].tags.layer is not None or g > chosen[-1])
        together = tuple(sorted({*chosen, *(g for g in rest if g <= first)}))
        found = baseline.plan(problem.replace(colocate=(*problem.colocate, together)), split=split, cut=cut)
        found = replace(found, problem=problem)
    else:
        trunk = _trunk(problem, rest)
        found = _beside(problem, baseline.plan(trunk, split=split, cut=cut), chosen, rest)
    return replace(found, name=f"{baseline.name}, encoder {where}",
                   makespan_ns=makespan_of(view(problem, found.placement), found.schedule))


def _trunk(problem: PlanningProblem, rest: Sequence[int]) -> PlanningProblem:
    """The model without its encoder, on all devices but the first."""
    number = {g: at for at, g in enumerate(rest)}
    edges = []
    for edge in problem.edges:
        targets = tuple(number[g] for g in edge.targets if g in number)
        if edge.source in number and targets:
            edges.append(GroupEdge(number[edge.source], targets, edge.num_bytes, edge.grad_bytes, edge.value))
    if problem.topology.overrides or problem.num_ranks < 2:
        raise ProblemError(f"problem {problem.name}: an encoder apart needs a second device, and links by host only")
    topology = replace(problem.topology, devices=problem.topology.devices[1:])
    together = tuple(tuple(number[g] for g in members) for members in problem.colocate if set(members) <= set(rest))
    return problem.replace(groups=tuple(problem.groups[g] for g in rest), edges=tuple(edges), topology=topology,
                           colocate=together)


def _beside(problem: PlanningProblem, trunk: Plan, chosen: Sequence[int], rest: Sequence[int]) -> Plan:
    """The trunk's plan with its ranks moved up by one, and the encoder on rank 0."""
    count = problem.num_microbatches
    stages = [Stage(tuple(chosen), (0,)), *(Stage(tuple(rest[g] for g in stage.groups), _up(stage.ranks))
                                            for stage in trunk.placement.stages)]
    routes = [(0,) * count, *(_up(route) for route in trunk.placement.routes)]
    phases = [problem.groups[g].times[problem.topology.devices[0].kind] for g in chosen]
    order = [Action(0, ActionKind.F, m) for m in range(count)]
    for m in _returning(trunk):
        if any(times.i_ns is not None for times in phases):
            order.append(Action(0, ActionKind.I, m))
        if any(times.w_ns is not None for times in phases):
            order.append(Action(0, ActionKind.W, m))
    ranks = [RankOrder(tuple(order)), *(RankOrder(*(tuple(_next_stage(action) for action in lane)
                                                    for lane in (known.compute, known.collective)))
                                        for known in trunk.schedule.ranks)]
    placement = Placement(tuple(stages), tuple(routes), "apart")
    return replace(trunk, problem=problem, placement=placement, schedule=Schedule(tuple(ranks)))


def _up(ranks: Sequence[int]) -> tuple[int, ...]:
    return tuple(rank + 1 for rank in ranks)


def _next_stage(action: Action) -> Action:
    partner = None if action.partner is None else (action.partner[0] + 1, action.partner[1])
    return Action(action.stage + 1, action.kind, action.microbatch, partner)


def _returning(trunk: Plan) -> list[int]:
    """Microbatches in the order in which the trunk's first stage gives their gradients back."""
    compiled, evaluation = evaluate(view(trunk.problem, trunk.placement), trunk.schedule)
    ends = {}
    for node, action in enumerate(compiled.actions):
        for kind, stage, m in action.parts():
            if stage == 0 and kind is ActionKind.I:
                ends[m] = evaluation.starts[node] + compiled.durations[node]
    return sorted(range(trunk.problem.num_microbatches), key=lambda m: (ends.get(m, 0), m))
