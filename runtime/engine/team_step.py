"""One training step of an operator graph on a team: every segment's F, then I and W, by all members in step.

The counterpart of `mipipe.graphs.tracing.compose` for a team: what planned runs on teams are compared with, and the
shortest description of what a member does. All segments run in one mode, so that values lie between them as both sides
expect. Gradients that are sums over members are added up at the step's end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment, SegmentTrace
from mipipe.graphs.operators.collectives import part_of
from mipipe.graphs.sharding.modes import MemberProgram, member_program, settle_shared
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part
from mipipe.graphs.tracing.trace import build_phase, phase_signature
from mipipe.runtime.engine.team import Axis, team_operators


@dataclass(frozen=True)
class _Built:
    """A trace, its member's program, and the program's phases as functions."""

    trace: SegmentTrace
    program: MemberProgram
    phases: dict[Phase, Callable[..., tuple[Tensor, ...]]]

    def run(self, phase: Phase, given: dict[str, Tensor]) -> None:
        """Add a phase's results to the tensors by name."""
        names, results = phase_signature(self.program.trace, phase)
        given.update(zip(results, self.phases[phase](*[given[name] for name in names]), strict=True))


class TeamStep:
    """A graph's segments in one mode on the team of an axis."""

    def __init__(self, graph: OperatorGraph, mode: str, axis: Axis, device: str | torch.device = "cpu") -> None:
        self.graph, self.axis = graph, axis
        settled = settle_shared(graph, mode, axis.size)
        self._built: dict[str, _Built] = {}
        for trace in graph.traces:
            program = member_program(graph, trace, mode, axis.size, settled.get(trace.digest))
            operators: Mapping[str, Callable[..., Any]] = team_operators({program.axis: axis})
            self._built[trace.digest] = _Built(trace, program, {
                phase: build_phase(program.trace, phase, device, operators)
                for phase in Phase if program.trace.has(phase)})
        self.parts = self._parts_of_state()

    def _parts_of_state(self) -> dict[str, Part]:
        """How each parameter and buffer lies, by FQN."""
        found: dict[str, Part] = {}
        for segment in self.graph.segments:
            built = self._built[segment.trace]
            names = (*built.trace.parameters, *built.trace.buffers)
            for name, fqn in zip(names, (*segment.parameters, *segment.buffers), strict=True):
                found[fqn] = built.program.given.get(name, WHOLE)
        return found

    def mine(self, tensor: Tensor, part: Part) -> Tensor:
        """This member's part of a tensor."""
        if part.kind is not Kind.DIVIDED:
            return tensor
        return part_of(tensor, self.axis.member, self.axis.size, part.dim, part.sections).contiguous()

    def local_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This member's parts of parameters and buffers, by FQN."""
        return {fqn: self.mine(state[fqn], part) for fqn, part in self.parts.items()}

    def run(self, state: Mapping[str, Tensor], batch: Mapping[str, Tensor],
            scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and this member's parts of the gradients of ``scale * loss`` by FQN.

        Args:
            state: of `local_state`.
            batch: the model's inputs by name, whole.
        """
        values: dict[str, Tensor] = {}
        kept: dict[str, dict[str, Tensor]] = {}
        for segment in self.graph.segments:
            built = self._built[segment.trace]
            kept[segment.name] = given = self._bind(segment, values, state, batch)
            built.run(Phase.F, given)
            outputs = [given[name] for name in built.program.trace.outputs]
            values.update(zip(segment.outputs, outputs, strict=True))
        loss = values[self.graph.loss]
        grads = {self.graph.loss: torch.full_like(loss, scale)}
        gradients: dict[str, Tensor] = {}
        partial: dict[str, Tensor] = {}
        for segment in reversed(self.graph.segments):
            self._backward(segment, kept.pop(segment.name), grads, gradients, partial)
        for fqn in sorted(partial):
            _add(gradients, fqn, self.axis.all_reduce(partial[fqn], "sum"))
        return loss, gradients

    def _bind(self, segment: Segment, values: Mapping[str, Tensor], state: Mapping[str, Tensor],
              batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The arguments of a segment's F, by their names in the trace."""
        built = self._built[segment.trace]
        given = {}
        for name, value in zip(built.trace.inputs, segment.inputs, strict=True):
            part = built.program.given.get(name, WHOLE)
            given[name] = values[value] if value in values else self.mine(batch[value], part)
        names = (*built.trace.parameters, *built.trace.buffers)
        return given | {name: state[fqn] for name, fqn in
                        zip(names, (*segment.parameters, *segment.buffers), strict=True)}

    def _backward(self, segment: Segment, given: dict[str, Tensor], grads: dict[str, Tensor],
                  gradients: dict[str, Tensor], partial: dict[str, Tensor]) -> None:
        """I and W of a segment; gradients of what several segments read are added up, sums over members apart."""
        built = self._built[segment.trace]
        trace, program = built.trace, built.program.trace
        for name, value in zip(trace.output_grads, segment.outputs, strict=True):
            if name is not None:
                given[name] = grads.pop(value)
        for phase in (Phase.I, Phase.W):
            if phase in built.phases:
                built.run(phase, given)
        for name, value in zip(program.input_grads, segment.inputs, strict=True):
            if name is not None:
                _add(grads, value, given[name])
        for name, ours, fqn in zip(trace.parameter_grads, program.parameter_grads, segment.parameters, strict=True):
            if name is not None and ours is not None:
                _add(partial if built.program.ends[name] == PARTIAL else gradients, fqn, given[ours])


def _add(table: dict[str, Tensor], key: str, tensor: Tensor) -> None:
    table[key] = table[key] + tensor if key in table else tensor
