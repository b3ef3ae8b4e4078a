"""From instructions to resolved ones: who sends what from which slot, what a part delivers where, when a frame ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch

from mipipe.graphs.errors import ProgramError
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.program import Instruction
from mipipe.runtime.engine.compiling.buckets import stage_buckets
from mipipe.runtime.engine.compiling.buffers import Frame
from mipipe.runtime.engine.compiling.compiled import LocalRank
from mipipe.runtime.engine.compiling.instructions import ActionPart, Ready, Step, Transport
from mipipe.runtime.engine.compiling.stage import StageCode


class Resolver:
    """Turns instructions into `Ready` ones."""

    def __init__(self, local: LocalRank, stage_of: dict[str, int]) -> None:
        self.local = local
        self.plan, self.graph, self.program = local.plan, local.graph, local.program
        self.rank = local.mesh.rank
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

    def resolve(self, prepost: int = 0) -> tuple[tuple[Ready, ...], tuple[Ready, ...]]:
        """The instructions of training and of evaluation; receives ``prepost`` compute actions earlier."""
        training, evaluation = list[Ready](), list[Ready]()
        for index, instruction in post_earlier(list(enumerate(self.program.ranks[self.rank])), prepost):
            ready = self.ready(index, instruction)
            training.append(ready)
            if instruction.transfer is not None:
                if not self.program.transfers[instruction.transfer].backward:
                    evaluation.append(ready)
            elif instruction.action is not None and instruction.action.kind in (ActionKind.F, ActionKind.OVERLAP_F_B):
                step: Step = ready.argument
                waits = tuple(item for item in step.waits if not self.program.transfers[item.index].backward)
                only = dataclasses.replace(step, waits=waits, pieces=step.pieces[:1])
                evaluation.append(Ready(ready.kind, only, ready.label))
        return tuple(training), tuple(evaluation)

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
            assert instruction.stage is not None
            return Ready(instruction.kind, stage_buckets(self.local, instruction.stage),
                         f"ALL_REDUCE of stage {instruction.stage}")
        return Ready(instruction.kind, index, str(instruction.kind))

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
        return any(segment in members for segment, _ in self.local.flow.contributions(value))

    def transport(self, index: int) -> Transport:
        """This rank's end of a transfer."""
        transfer, mesh = self.program.transfers[index], self.local.mesh
        receiving = transfer.target_rank == self.rank
        peer = transfer.source_rank if receiving else transfer.target_rank
        stage = transfer.target_stage if receiving else transfer.source_stage
        code = self.local.stages[stage]
        values = self.values(index)
        if receiving:
            slots = tuple(code.incoming[value, transfer.source_stage] if transfer.backward else code.inputs[value]
                          for value in values)
        else:
            slots = tuple(code.outgoing[value] if transfer.backward else code.outputs[value] for value in values)
        place = int(mesh.global_rank(peer) > mesh.global_rank(self.rank))
        group = mesh.channel(transfer.source_rank, transfer.target_rank)
        return Transport(index, str(transfer), peer, group, place, tuple(self.specs[value] for value in values), slots,
                         stage * self.count + transfer.microbatch, code.template)

    def step(self, index: int, action: Action) -> Step:
        """A compute action: waits, pieces."""
        if action.kind is ActionKind.RECOMPUTE:
            pieces = [self.piece(ActionKind.RECOMPUTE, action.stage, action.microbatch)]
        elif action.partner is not None:
            pieces = [self.piece(ActionKind.F, action.stage, action.microbatch),
                      self.piece(ActionKind.B, *action.partner)]
        else:
            pieces = [self.piece(action.kind, action.stage, action.microbatch)]
        waits: list[int] = []
        for kind, stage, microbatch in action.parts():
            if kind is ActionKind.F:
                waits += self.arriving.get((stage, microbatch, False), ())
            elif kind is ActionKind.I or (kind is ActionKind.W and ActionKind.I not in self.kinds[stage, microbatch]):
                waits += self.arriving.get((stage, microbatch, True), ())
        aside = self.program.ranks[self.rank][index].stream is Stream.COLLECTIVE
        return Step(index, tuple(self.transport(item) for item in dict.fromkeys(waits)), tuple(pieces), aside)

    def piece(self, kind: ActionKind, stage: int, microbatch: int) -> ActionPart:
        """One elementary part of an action."""
        code = self.local.stages[stage]
        kinds = self.kinds[stage, microbatch]
        frame = stage * self.count + microbatch
        trains = ActionKind.I in kinds or ActionKind.W in kinds
        if kind is ActionKind.F:
            name = "only" if not trains else "keep" if ActionKind.RECOMPUTE in kinds else "F"
            leaving = self.outgoing(code.outputs, stage, microbatch, False)
            batch = tuple((slot, value) for value, slot in code.inputs.items() if value not in self.made_in)
            keeps = tuple((value, slot) for value, slot in code.outputs.items() if value in self.graph.outputs)
            return ActionPart(frame, microbatch, code.template, code.parts[name], code.parts["only"], batch,
                              tuple(self.deliveries(code, stage, microbatch, False)), leaving, keeps, not trains)
        if kind is ActionKind.RECOMPUTE:
            return ActionPart(frame, microbatch, code.template, code.parts["again"], code.parts["only"])
        name = "B" if kind is ActionKind.B or (kind is ActionKind.W and ActionKind.I not in kinds) else kind.value
        ends = kind in (ActionKind.B, ActionKind.W) or ActionKind.W not in kinds
        if name == "W":
            return ActionPart(frame, microbatch, code.template, code.parts[name], code.parts["only"], last=ends)
        leaving = self.outgoing(code.outgoing, stage, microbatch, True)
        return ActionPart(frame, microbatch, code.template, code.parts[name], code.parts["only"], (),
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
                other = self.local.stages[target]
                place = other.incoming[value, stage] if backward else other.inputs[value]
                yield slot, target * self.count + microbatch, other.template, place


def post_earlier(instructions: list[tuple[int, Instruction]], actions: int) -> list[tuple[int, Instruction]]:
    """The numbered instructions with every RECV moved up by that many compute actions, in unchanged order among them.

    A receive only announces its buffer, so this is safe in any program: it can only end earlier.
    """
    if not actions:
        return instructions
    before = 0
    keyed = []
    for place, (index, instruction) in enumerate(instructions):
        receiving = instruction.kind is ActionKind.RECV
        keyed.append((max(0, before - actions) if receiving else before, not receiving, place, (index, instruction)))
        before += instruction.action is not None
    # Within one gap receives come first; a compute action closes its gap.
    return [item for *_, item in sorted(keyed, key=lambda entry: entry[:3])]
