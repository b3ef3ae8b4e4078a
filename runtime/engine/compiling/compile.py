"""A plan, its program and its graph compiled for one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from mipipe.graphs.errors import PlanError
from mipipe.graphs.operator_graph import OperatorGraph, Segment
from mipipe.graphs.operators.expert_kernels import RETURN, ROUTE, SEND
from mipipe.graphs.sharding.gathered import ALIKE, CONTEXT, COPIES, gathered
from mipipe.graphs.sharding.team_graph import MemberGraph
from mipipe.planner.actions import Stream
from mipipe.planner.check import check_program
from mipipe.planner.check.graph import check_graph
from mipipe.planner.execution.lower import lower
from mipipe.planner.plan import Plan
from mipipe.planner.program import Program
from mipipe.planner.team import Team
from mipipe.runtime.engine.compiling.buckets import with_copy_sums
from mipipe.runtime.engine.compiling.compiled import Compiled, LocalRank
from mipipe.runtime.engine.compiling.flow import GradientFlow, gradient_flow
from mipipe.runtime.engine.compiling.phases import Phases
from mipipe.runtime.engine.compiling.resolve import Resolver
from mipipe.runtime.engine.compiling.stage import StageCode, build_stage, check_segments
from mipipe.runtime.engine.compiling.team import member_graph, member_operators, member_pieces
from mipipe.runtime.experts.elastic import CoActivation, joined_kernels, sampled_routers
from mipipe.runtime.experts.exchange import kernels_of
from mipipe.runtime.experts.group import make_exchange, routing_counters
from mipipe.runtime.experts.layers import expert_degree, expert_layers
from mipipe.runtime.ranks.comm import Waits, start_all_reduce, wait
from mipipe.runtime.ranks.groups import ALONE
from mipipe.runtime.ranks.mesh import Mesh, build_mesh
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.ranks.processes import world
from mipipe.runtime.weights.weights import OwnPart, WeightSource, load_weights


def compile_rank(plan: Plan, graph: OperatorGraph, source: WeightSource, program: Program | None, mesh: Mesh | None,
                 device: torch.device, options: EngineOptions) -> Compiled:
    """This rank's program, ready to run.

    Raises:
        PlanError: the plan was made for another graph, or does not cover it.
        ProgramError: a given program is not the plan's or may wait for ever, or a transfer lacks a value its receiver
            needs.
    """
    check_graph(plan, graph)
    if program is None:
        program = lower(plan)
    else:
        check_program(plan, program)
    team = plan.team or ALONE
    copies = mesh.num_copies if mesh is not None else max(1, world() // (len(program.ranks) * team.members))
    sharing = expert_degree(plan.team, graph, copies) if mesh is None else mesh.sharing
    alike = team.members * copies // sharing if sharing > 1 else 1
    zero = options.zero if max(copies * team.axes.get(CONTEXT, 1), alike) > 1 else 0
    member = divided_alike(member_graph(team, graph), zero, team, copies, sharing, alike)
    whole, graph = graph, member.graph
    flow = gradient_flow(graph)
    stage_of = _stage_of_segments(plan, graph)
    holders, stages_of = _holders(plan, graph, stage_of)
    if mesh is None:
        mesh = _mesh_of(plan, program, member, holders, device, options, zero, sharing) if dist.is_initialized() \
            else _alone(program, device, team)
    waits = Waits(timedelta(seconds=options.timeout_s), device.type == "cpu")
    here = [index for index, stage in enumerate(plan.placement.stages) if mesh.rank in stage.ranks]
    segments = {index: [segment for segment in graph.segments if stage_of[segment.name] == index] for index in here}
    names = {fqn for members in segments.values() for segment in members
             for fqn in (*segment.parameters, *segment.buffers)}
    experts = make_exchange(plan, graph, stage_of, mesh, options, waits)
    weights = load_weights(graph, names, source, device, options.master_dtype,
                           None if experts is None else experts.rows(), member_pieces(member, whole, mesh),
                           _own_parts(member, mesh, zero))
    loss_gradient = _ones_of_loss(graph, device)
    sampler = None if options.elastic is None else CoActivation(*options.elastic)
    given = joined_kernels(kernels_of(experts), {} if sampler is None else sampled_routers(graph, sampler))
    phases = Phases(graph, device, options.compile, given, member_operators(mesh, waits))
    counters, watched = routing_counters(graph, whole, stage_of, here, device)
    stages = {index: build_stage(graph, flow, segments[index], index, stage_of, weights, loss_gradient, phases,
                                 graph.outputs, watched, again_in(team, segments[index])) for index in here}
    if options.compile and dist.is_initialized():
        wait_for_compilers(mesh)
    _refuse_changed_buffers(plan, stages)
    trained = {name for name, item in weights.parameters.items() if item.requires_grad}
    graded = tuple(sorted(_graded(graph, flow) & trained))
    exclusive = frozenset(name for name, where in stages_of.items() if len(where) == 1)
    local = LocalRank(plan=plan, graph=graph, program=program, flow=flow, mesh=mesh, weights=weights,
                      loss_gradient=loss_gradient, stages=stages, holders=holders, exclusive=exclusive, graded=graded,
                      experts=experts, banks=frozenset() if experts is None else frozenset(experts.rows()),
                      counters=counters, waits=waits, divisions=member.divisions, sums=member.sums,
                      zero=zero)
    instructions, evaluation = Resolver(local, stage_of).resolve(options.prepost)
    return Compiled(**{item.name: getattr(local, item.name) for item in fields(local)},
                    instructions=with_copy_sums(local, instructions), evaluation=evaluation,
                    exchanges_aside=_exchanges_aside(local, stage_of), sampler=sampler,
                    uncompiled=tuple(item.name for items in segments.values() for item in items
                                     if options.compile and not phases.compiles(phases.trace(item), item.name)))


def divided_alike(member: MemberGraph, zero: int, team: Team, copies: int, sharing: int, alike: int) -> MemberGraph:
    """The graph of a device that divides (``zero``) what it has with others: of shared experts, with the ``alike``
    devices that have the same ones, over which, not over members, their gradients are sums."""
    shared = expert_layers(member.graph) if sharing > 1 else ()
    banks = {name for layer in shared for name in layer.banks}
    sums = {name: axes for name, axes in member.sums.items() if name not in banks}
    member = replace(member, sums=sums)
    return gathered(member, copies, zero, banks, alike, team.axes.get(CONTEXT, 1)) if zero else member


def _own_parts(member: MemberGraph, mesh: Mesh, zero: int) -> dict[str, OwnPart]:
    """The parameters of which this device updates a part that is gathered before a step: with ``zero`` 3 none."""
    return {name: OwnPart(parts[-1], mesh.place[parts[-1].axis], zero == 1)
            for name, parts in member.divisions.items() if parts[-1].axis in ALIKE and zero < 3}


def _ones_of_loss(graph: OperatorGraph, device: torch.device) -> torch.Tensor:
    """The gradient of the loss by itself."""
    loss = next(value.spec for value in graph.values if value.name == graph.loss)
    return torch.ones(loss.shape, dtype=getattr(torch, loss.dtype), device=device)


def _refuse_changed_buffers(plan: Plan, stages: Mapping[int, StageCode]) -> None:
    """Raise where replicas of a stage would each change buffers of their own."""
    for index, code in stages.items():
        if code.buffer_updates and len(plan.placement.stages[index].ranks) > 1:
            raise PlanError(f"stage {index}: has buffers that F changes (batch statistics), so it cannot have replicas;"
                            " plan it on one rank")


def _mesh_of(plan: Plan, program: Program, member: MemberGraph, holders: Mapping[str, tuple[int, ...]],
             device: torch.device, options: EngineOptions, zero: int, sharing: int) -> Mesh:
    """The process groups of a program: of ranks that hold the same parameter, of teams, of experts, of copies."""
    across = {name for name, divisions in member.divisions.items() if any(item.axis == COPIES for item in divisions)}
    shared = {(ranks, member.sums.get(name, ()), zero > 1 and name in across)
              for name, ranks in holders.items() if len(ranks) > 1 or name in member.sums}
    team = plan.team or ALONE
    shared |= {((rank,), (CONTEXT,), False) for rank in range(len(program.ranks)) if zero and CONTEXT in team.axes}
    return build_mesh(program, shared, team=team, sharing=sharing, device=device,
                      topology=plan.problem.topology if plan.team is None else None,
                      timeout_s=options.timeout_s, across=zero > 0)


COMPILING = timedelta(hours=1)
"""How long ranks wait for the one that compiles longest; a step's timeout is for what takes a step's time."""


def wait_for_compilers(mesh: Mesh) -> None:
    """Return when all ranks are here.

    Raises:
        RunError: one has failed, or is not within `COMPILING`.
    """
    group = dist.new_group(timeout=COMPILING, backend="gloo")
    wait([start_all_reduce(group, torch.zeros(1))], COMPILING,
         lambda: f"{mesh.text}: waiting for other ranks to compile")
    dist.destroy_process_group(group)


def again_in(team: Team, segments: Sequence[Segment]) -> list[tuple[str, ...]]:
    """The runs of these segments that are done again in the backward."""
    names = {segment.name for segment in segments}
    return [run for run in team.again if run[0] in names]


def _alone(program: Program, device: torch.device, team: Team) -> Mesh:
    if len(program.ranks) * team.members > 1:
        teams = f" of {team.members} devices" if team.members > 1 else ""
        raise PlanError(f"the plan has {len(program.ranks)} ranks{teams}, but this process was not started by torchrun")
    return Mesh(0, 1, 0, 1, device, {(0, 0, 0): 0}, 0, team)


def _stage_of_segments(plan: Plan, graph: OperatorGraph) -> dict[str, int]:
    found: dict[str, int] = {}
    for index, stage in enumerate(plan.placement.stages):
        for group in stage.groups:
            for segment in check_segments(graph, plan.problem.groups[group].segments):
                if segment.name in found:
                    raise PlanError(f"plan: segment {segment.name} is in stages {found[segment.name]} and {index}")
                found[segment.name] = index
    for segment in graph.segments:
        if segment.name not in found:
            raise PlanError(f"plan: segment {segment.name} is in no stage")
    return found


def _holders(plan: Plan, graph: OperatorGraph,
             stage_of: dict[str, int]) -> tuple[dict[str, tuple[int, ...]], dict[str, set[int]]]:
    """The ranks and the stages that hold each parameter (canonical names)."""
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    stages: dict[str, set[int]] = {}
    for segment in graph.segments:
        for fqn in segment.parameters:
            stages.setdefault(canonical[fqn], set()).add(stage_of[segment.name])
    ranks = {name: tuple(sorted({rank for index in where for rank in plan.placement.stages[index].ranks}))
             for name, where in stages.items()}
    return ranks, stages


def _graded(graph: OperatorGraph, flow: GradientFlow) -> set[str]:
    traces = {trace.digest: trace for trace in graph.traces}
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    return {canonical[fqn] for segment in graph.segments if flow.active(segment.name)
            for fqn, name in zip(segment.parameters, traces[segment.trace].parameter_grads, strict=True)
            if name is not None}


def _exchanges_aside(local: LocalRank, stage_of: dict[str, int]) -> bool:
    """Whether ranks exchange rows, and all that do it are stages without parameters on the plan's collective stream;
    not where members of a team talk as well, whose collectives have one order."""
    if local.experts is None or local.mesh.team.members > 1:
        return False
    traces = {trace.digest: trace for trace in local.graph.traces}
    exchanging = {segment.name for segment in local.graph.segments
                  if any(item.kind in (ROUTE, SEND, RETURN) for item in traces[segment.trace].operators)}
    needed = {stage_of[name] for name in exchanging} & set(local.stages)
    aside = {instruction.action.stage for instruction in local.program.ranks[local.mesh.rank]
             if instruction.action is not None and instruction.stream is Stream.COLLECTIVE}
    return bool(needed) and needed <= aside and not any(local.stages[index].parameters for index in aside)
