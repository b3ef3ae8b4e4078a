"""A plan, its program and its graph compiled for one rank: every instruction with all it needs, resolved once.

The handlers of `mipipe.runtime.engine` get these values and look nothing up while a step runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import PlanError, ProgramError
from mipipe.graphs.operator_graph import OperatorGraph, Phase
from mipipe.graphs.serialize import digest
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.lower import lower
from mipipe.planner.plan import Plan
from mipipe.planner.program import Instruction, Program
from mipipe.runtime.buffers import Frame
from mipipe.runtime.flow import GradientFlow, gradient_flow
from mipipe.runtime.mesh import Mesh, build_mesh
from mipipe.runtime.phases import Phases
from mipipe.runtime.stage import Part, StageCode, build_stage, check_segments
from mipipe.runtime.weights import Source, Weights, load_weights


@dataclass(frozen=True, slots=True)
class Transport:
    """One end of a transfer: the peer, its place in the channel's group, and where the values come from or go to."""

    index: int
    text: str
    peer: int
    group: Any
    place: int
    specs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    slots: tuple[int, ...]
    frame: int
    template: Frame


@dataclass(frozen=True, slots=True)
class Piece:
    """One part of an action on one frame.

    ``batch``: (slot, input name) taken from the microbatch; ``deliveries``: (slot, frame, template, slot there) within
    the rank; ``outgoing``: (transfer, slots) to be sent; ``keeps``: (value, slot) for the caller; ``last``: the frame
    is done.
    """

    frame: int
    microbatch: int
    template: Frame
    part: Part
    evaluation: Part
    batch: tuple[tuple[int, str], ...] = ()
    deliveries: tuple[tuple[int, int, Frame, int], ...] = ()
    outgoing: tuple[tuple[int, tuple[int, ...]], ...] = ()
    keeps: tuple[tuple[str, int], ...] = ()
    last: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A compute instruction: the receives it waits for, then its pieces."""

    index: int
    waits: tuple[Transport, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Ready:
    """An instruction with its handler's argument, and the text that errors and timelines show."""

    kind: ActionKind
    argument: Any
    label: str


@dataclass(slots=True)
class Compiled:
    """All of one rank. ``holders[name]``: the ranks with a parameter; ``exclusive``: parameters of one stage only;
    ``graded``: local trainable parameters that get a gradient."""

    plan: Plan
    graph: OperatorGraph
    program: Program
    flow: GradientFlow
    mesh: Mesh
    weights: Weights
    loss_gradient: torch.Tensor
    stages: dict[int, StageCode]
    holders: dict[str, tuple[int, ...]]
    exclusive: frozenset[str]
    graded: tuple[str, ...]
    instructions: list[Ready] = field(default_factory=list)
    evaluation: list[Ready] = field(default_factory=list)


def compile_rank(plan: Plan, graph: OperatorGraph, source: Source, program: Program | None, mesh: Mesh | None,
                 device: torch.device, options: Any) -> Compiled:
    """This rank's program, ready to run.

    Raises:
        PlanError: the plan was made for another graph, or does not cover it.
        ProgramError: a transfer lacks a value its receiver needs.
    """
    check_plan_fits(plan, graph)
    program = program or lower(plan)
    flow = gradient_flow(graph)
    stage_of = _stage_of_segments(plan, graph)
    holders, stages_of = _holders(plan, graph, stage_of)
    shared = {ranks for ranks in holders.values() if len(ranks) > 1}
    if mesh is None and dist.is_initialized():
        mesh = build_mesh(program, shared, topology=plan.problem.topology, device=device, timeout_s=options.timeout_s)
    elif mesh is None:
        mesh = _alone(program, device)
    local = [index for index, stage in enumerate(plan.placement.stages) if mesh.rank in stage.ranks]
    segments = {index: [segment for segment in graph.segments if stage_of[segment.name] == index] for index in local}
    names = {fqn for members in segments.values() for segment in members for fqn in (*segment.parameters, *segment.buffers)}
    weights = load_weights(graph, names, source, device, options.master_dtype)
    loss = next(value.spec for value in graph.values if value.name == graph.loss)
    loss_gradient = torch.ones(loss.shape, dtype=getattr(torch, loss.dtype), device=device)
    phases = Phases(graph, device, options.compile)
    stages = {index: build_stage(graph, flow, segments[index], index, stage_of, weights, loss_gradient, phases,
                                 graph.outputs) for index in local}
    for index, code in stages.items():
        if code.buffer_updates and len(plan.placement.stages[index].ranks) > 1:
            raise PlanError(f"stage {index}: has buffers that F changes (batch statistics), so it cannot have replicas;"
                            " plan it on one rank")
    graded = tuple(sorted(_graded(graph, flow) & {name for name, item in weights.parameters.items() if item.requires_grad}))
    exclusive = frozenset(name for name, where in stages_of.items() if len(where) == 1)
    compiled = Compiled(plan, graph, program, flow, mesh, weights, loss_gradient, stages, holders, exclusive, graded)
    _Resolver(compiled, stage_of).resolve()
    return compiled


def check_plan_fits(plan: Plan, graph: OperatorGraph) -> None:
    """Raise `PlanError` unless the plan was made for this graph."""
    found = digest(graph)
    if plan.problem.graph_digest != found:
        made = plan.problem.graph_digest or "no graph at all"
        raise PlanError(f"plan {plan.name}: made for graph {made}, but this graph's digest is {found}; plan this graph again")


def _alone(program: Program, device: torch.device) -> Mesh:
    if len(program.ranks) > 1:
        raise PlanError(f"the plan has {len(program.ranks)} ranks, but this process was not started by torchrun")
    return Mesh(0, 1, 0, 1, device, (0,))


def _stage_of_segments(plan: Plan, graph: OperatorGraph) -> dict[str, int]:
    found: dict[str, int] = {}
    for index, stage in enumerate(plan.placement.stages):
        for group in stage.groups:
            for segment in check_segments(graph, plan.problem.groups[group].segments):
                if segment.name in found:
                    raise PlanError(f"plan: segment {segment.name} is in stage {found[segment.name]} and in stage {index}")
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
            for fqn, name in zip(segment.parameters, traces[segment.trace].parameter_grads, strict=True) if name is not None}


class _Resolver:
    """Turns instructions into `Ready` ones."""

    def __init__(self, compiled: Compiled, stage_of: dict[str, int]) -> None:
        self.compiled = compiled
        self.plan, self.graph, self.program = compiled.plan, compiled.graph, compiled.program
        self.rank = compiled.mesh.rank
        self.count = self.plan.problem.num_microbatches
        self.specs = {value.name: (value.spec.shape, getattr(torch, value.spec.dtype)) for value in self.graph.values}
        source = {value.name: value.source for value in self.graph.values}
        self.made_in = {name: stage_of[segment] for name, segment in source.items() if segment is not None}
        self.readers: dict[str, list[int]] = {}
        for segment in self.graph.segments:
            for value in segment.inputs:
                stages = self.readers.setdefault(value, [])
                if stage_of[segment.name] not in stages:
                    stages.append(stage_of[segment.name])
        self.kinds: dict[tuple[int, int], list[ActionKind]] = {}
        for instruction in self.program.ranks[self.rank]:
            for kind, stage, microbatch in instruction.action.parts() if instruction.action else ():
                self.kinds.setdefault((stage, microbatch), []).append(kind)
        self.arriving: dict[tuple[int, int, bool], list[int]] = {}
        self.leaving: dict[tuple[int, int, bool], list[int]] = {}
        for index, item in enumerate(self.program.transfers):
            if item.target_rank == self.rank:
                self.arriving.setdefault((item.target_stage, item.microbatch, item.backward), []).append(index)
            if item.source_rank == self.rank:
                self.leaving.setdefault((item.source_stage, item.microbatch, item.backward), []).append(index)

    def resolve(self) -> None:
        """Fill in the instructions of training and of evaluation."""
        for index, instruction in enumerate(self.program.ranks[self.rank]):
            ready = self.ready(index, instruction)
            self.compiled.instructions.append(ready)
            if instruction.transfer is not None:
                if not self.program.transfers[instruction.transfer].backward:
                    self.compiled.evaluation.append(ready)
            elif instruction.action is not None and instruction.action.kind in (ActionKind.F, ActionKind.OVERLAP_F_B):
                step: Step = ready.argument
                waits = tuple(item for item in step.waits if not self.program.transfers[item.index].backward)
                self.compiled.evaluation.append(Ready(ready.kind, Step(step.index, waits, step.pieces[:1]), ready.label))

    def ready(self, index: int, instruction: Instruction) -> Ready:
        """One instruction with its argument."""
        if instruction.action is not None:
            return Ready(instruction.kind, self.step(index, instruction.action), str(instruction.action))
        if instruction.transfer is not None:
            transfer = self.program.transfers[instruction.transfer]
            receiving = instruction.kind is ActionKind.RECV
            peer = transfer.source_rank if receiving else transfer.target_rank
            label = f"{instruction.kind} {transfer} {'from' if receiving else 'to'} rank {peer}"
            return Ready(instruction.kind, self.transport(instruction.transfer), label)
        if instruction.kind is ActionKind.ALL_REDUCE:
            return Ready(instruction.kind, instruction.stage, f"ALL_REDUCE of stage {instruction.stage}")
        return Ready(instruction.kind, None, str(instruction.kind))

    def values(self, index: int) -> tuple[str, ...]:
        """The values a transfer carries: what its receiver needs, in the transfer's order."""
        transfer = self.program.transfers[index]
        if transfer.backward:
            early, late = transfer.target_stage, transfer.source_stage
        else:
            early, late = transfer.source_stage, transfer.target_stage
        needed = [name for name, stage in self.made_in.items() if stage == early and late in self.readers.get(name, ())]
        if transfer.backward:
            needed = [name for name in needed if self.returns(name, late)]
        missing = sorted(set(needed) - set(transfer.values))
        if missing:
            raise ProgramError(f"transfer {transfer}: does not carry {missing[0]!r}, which its receiver needs")
        return tuple(name for name in transfer.values if name in needed)

    def returns(self, value: str, stage: int) -> bool:
        """Whether a stage returns a gradient for a value."""
        members = {name for group in self.plan.placement.stages[stage].groups
                   for name in self.plan.problem.groups[group].segments}
        return any(segment in members for segment, _ in self.compiled.flow.contributions(value))

    def transport(self, index: int) -> Transport:
        """This rank's end of a transfer."""
        transfer, mesh = self.program.transfers[index], self.compiled.mesh
        receiving = transfer.target_rank == self.rank
        peer = transfer.source_rank if receiving else transfer.target_rank
        stage = transfer.target_stage if receiving else transfer.source_stage
        code = self.compiled.stages[stage]
        values = self.values(index)
        if receiving:
            slots = tuple(code.incoming[value, transfer.source_stage] if transfer.backward else code.inputs[value]
                          for value in values)
        else:
            slots = tuple(code.outgoing[value] if transfer.backward else code.outputs[value] for value in values)
        ranks = sorted((mesh.world[mesh.copy * mesh.num_ranks + peer], mesh.world[mesh.copy * mesh.num_ranks + self.rank]))
        place = ranks.index(mesh.world[mesh.copy * mesh.num_ranks + peer])
        group = mesh.channel(transfer.source_rank, transfer.target_rank)
        return Transport(index, str(transfer), peer, group, place, tuple(self.specs[value] for value in values), slots,
                         stage * self.count + transfer.microbatch, code.template)

    def step(self, index: int, action: Action) -> Step:
        """A compute action: waits, pieces."""
        if action.kind is ActionKind.RECOMPUTE:
            pieces = [self.piece(ActionKind.RECOMPUTE, action.stage, action.microbatch)]
        elif action.partner is not None:
            pieces = [self.piece(ActionKind.F, action.stage, action.microbatch), self.piece(ActionKind.B, *action.partner)]
        else:
            pieces = [self.piece(action.kind, action.stage, action.microbatch)]
        waits: list[int] = []
        for kind, stage, microbatch in action.parts():
            if kind is ActionKind.F:
                waits += self.arriving.get((stage, microbatch, False), ())
            elif kind is ActionKind.I or (kind is ActionKind.W and ActionKind.I not in self.kinds[stage, microbatch]):
                waits += self.arriving.get((stage, microbatch, True), ())
        return Step(index, tuple(self.transport(item) for item in dict.fromkeys(waits)), tuple(pieces))

    def piece(self, kind: ActionKind, stage: int, microbatch: int) -> Piece:
        """One elementary part of an action."""
        code = self.compiled.stages[stage]
        kinds = self.kinds[stage, microbatch]
        frame = stage * self.count + microbatch
        trains = ActionKind.I in kinds or ActionKind.W in kinds
        if kind is ActionKind.F:
            name = "only" if not trains else "keep" if ActionKind.RECOMPUTE in kinds else "F"
            leaving = self.outgoing(code.outputs, stage, microbatch, False)
            batch = tuple((slot, value) for value, slot in code.inputs.items() if value not in self.made_in)
            keeps = tuple((value, slot) for value, slot in code.outputs.items() if value in self.graph.outputs)
            return Piece(frame, microbatch, code.template, code.parts[name], code.parts["only"], batch,
                         tuple(self.deliveries(code, stage, microbatch, False)), leaving, keeps, not trains)
        if kind is ActionKind.RECOMPUTE:
            return Piece(frame, microbatch, code.template, code.parts["again"], code.parts["only"])
        name = "B" if kind is ActionKind.B or (kind is ActionKind.W and ActionKind.I not in kinds) else kind.value
        ends = kind in (ActionKind.B, ActionKind.W) or ActionKind.W not in kinds
        if name == "W":
            return Piece(frame, microbatch, code.template, code.parts[name], code.parts["only"], last=ends)
        leaving = self.outgoing(code.outgoing, stage, microbatch, True)
        return Piece(frame, microbatch, code.template, code.parts[name], code.parts["only"], (),
                     tuple(self.deliveries(code, stage, microbatch, True)), leaving, (), ends)

    def outgoing(self, slots: dict[str, int], stage: int, microbatch: int,
                 backward: bool) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The transfers that leave after a part, with the slots of their values."""
        return tuple((index, tuple(slots[value] for value in self.values(index)))
                     for index in self.leaving.get((stage, microbatch, backward), ()))

    def deliveries(self, code: StageCode, stage: int, microbatch: int,
                   backward: bool) -> Iterable[tuple[int, int, Frame, int]]:
        """What goes to other stages on this rank."""
        for value, slot in (code.outgoing if backward else code.outputs).items():
            targets = [self.made_in[value]] if backward else self.readers.get(value, [])
            for target in targets:
                if target == stage or self.plan.placement.routes[target][microbatch] != self.rank:
                    continue
                other = self.compiled.stages[target]
                place = other.incoming[value, stage] if backward else other.inputs[value]
                yield slot, target * self.count + microbatch, other.template, place


__all__ = ["Compiled", "Phase", "Piece", "Ready", "Step", "Transport", "check_plan_fits", "compile_rank"]
