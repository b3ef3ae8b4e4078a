"""The graph of one member of a team: every segment's program in its mode, with values and parameters of local shapes.

It is an operator graph like any other, with collectives among its operators, so whatever runs a graph runs it. A team
with two axes is made one axis after the other: the second divides what the first has left.

A value lies as the mode of the segment that makes it says; a segment in another mode takes it so and changes it inside
its own program, and gives its gradient back so. Inputs and outputs of the model are whole on every member.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import Operator, OperatorGraph, ParameterSpec, Phase, Segment, SegmentTrace, Value
from mipipe.graphs.operators.collectives import Sections
from mipipe.graphs.serialize import digest
from mipipe.graphs.sharding.boundaries import Streams, boundary_parts, naming, segment_layouts
from mipipe.graphs.sharding.member import has_dynamic_rows
from mipipe.graphs.sharding.modes import MemberProgram, member_program, mode_recipe
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part, local_shape


@dataclass(frozen=True, slots=True)
class Division:
    """A tensor is divided among ``size`` members along ``axis``: ``dim`` and ``sections`` as of a `Part`."""

    axis: str
    size: int
    dim: int
    sections: Sections = 1


@dataclass(frozen=True)
class MemberGraph:
    """One member's graph. ``divisions``: of parameters and buffers that are not whole, by FQN, the outermost first;
    ``sums``: the axes over whose members gradients are partial sums, to be added up once per step. Tied names have what
    the first has."""

    graph: OperatorGraph
    divisions: Mapping[str, tuple[Division, ...]] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def divided(self, axis: str, size: int, modes: Mapping[str, str]) -> MemberGraph:
        """What a member along one more axis has of this graph.

        Args:
            axis: the name that collectives have.
            size: members along it.
            modes: of every segment, by name.

        Raises:
            GraphError: a segment picks rows by data, or an operator does not run on a member's sizes.
        """
        for segment in self.graph.segments:
            if has_dynamic_rows(self.graph.trace(segment)):
                raise GraphError(f"segment {segment.name}: picks rows by data, so members of a team would differ;"
                                 " capture the model with grouped experts")
        return _Division(self, axis, size, modes).made()


class _Division:
    """One axis on its way into a member's graph."""

    def __init__(self, before: MemberGraph, axis: str, size: int, modes: Mapping[str, str]) -> None:
        self.before, self.graph, self.axis, self.size, self.modes = before, before.graph, axis, size, modes
        self.streams = Streams(self.graph)
        self.values = {value.name: value for value in self.graph.values}
        self.traces = {trace.digest: trace for trace in self.graph.traces}
        self.canonical = {item.fqn: item.tied_to or item.fqn for item in self.graph.parameters}
        self.lies = boundary_parts(self.graph, modes, self.streams, size)
        self._programs: dict[object, MemberProgram] = {}
        self._recipes: dict[object, Mapping[str, Part]] = {}

    def made(self) -> MemberGraph:
        """The graph with its divisions."""
        state = self._state()
        programs = {segment.name: self._program(segment, state) for segment in self.graph.segments}
        partial, whole = set[str](), set[str]()
        for segment in self.graph.segments:
            for grad, _, fqn in self._gradients(segment, programs[segment.name]):
                (partial if programs[segment.name].ends[grad] == PARTIAL else whole).add(self.canonical[fqn])
        both = partial & whole
        segments, traces = [], dict[str, SegmentTrace]()
        for segment in self.graph.segments:
            program = programs[segment.name]
            shared = tuple(ours for grad, ours, fqn in self._gradients(segment, program)
                           if self.canonical[fqn] in both and program.ends[grad] != PARTIAL)
            trace = with_shares(program.trace, shared, self.size) if shared else program.trace
            traces[trace.digest] = trace
            segments.append(replace(segment, trace=trace.digest))
        graph = replace(self.graph, segments=tuple(segments), traces=tuple(traces.values()), modes=None,
                        values=tuple(self._local_value(value) for value in self.graph.values),
                        parameters=tuple(self._local(item, state) for item in self.graph.parameters))
        divisions = dict(self.before.divisions)
        for fqn, part in state.items():
            divisions[fqn] = (*divisions.get(fqn, ()), Division(self.axis, self.size, part.dim, part.sections))
        sums = dict(self.before.sums)
        for fqn in sorted(partial):
            sums[fqn] = (*sums.get(fqn, ()), self.axis)
        return MemberGraph(graph, divisions, sums)

    def _gradients(self, segment: Segment, program: MemberProgram) -> Iterator[tuple[str, str, str]]:
        """Gradients of parameters: names in the trace and in the program, FQN."""
        for grad, ours, fqn in zip(self.traces[segment.trace].parameter_grads, program.trace.parameter_grads,
                                   segment.parameters, strict=True):
            if grad is not None and ours is not None:
                yield grad, ours, fqn

    def _recipe(self, segment: Segment) -> Mapping[str, Part]:
        trace, mode = self.traces[segment.trace], self.modes[segment.name]
        boundary = segment_layouts(trace, segment, self.lies, mode, self.streams, self.size)
        key = segment.trace, mode, tuple(item for item in boundary.given.items() if item[1].routed)
        if key not in self._recipes:
            with naming(segment):
                self._recipes[key] = mode_recipe(trace, mode, boundary)
        return self._recipes[key]

    def _state(self) -> dict[str, Part]:
        """How divided parameters and buffers lie, by canonical FQN: as all segments that read them want it."""
        wanted: dict[str, set[Part]] = {}
        for segment in self.graph.segments:
            trace, recipe = self.traces[segment.trace], self._recipe(segment)
            for name, fqn in zip((*trace.parameters, *trace.buffers), (*segment.parameters, *segment.buffers),
                                 strict=True):
                wanted.setdefault(self.canonical[fqn], set()).add(recipe.get(name, WHOLE))
        return {fqn: next(iter(parts)) for fqn, parts in wanted.items()
                if len(parts) == 1 and next(iter(parts)).kind is Kind.DIVIDED}

    def _program(self, segment: Segment, state: Mapping[str, Part]) -> MemberProgram:
        trace = self.traces[segment.trace]
        fixed = {name: state.get(self.canonical[fqn], WHOLE) for name, fqn in zip(
            (*trace.parameters, *trace.buffers), (*segment.parameters, *segment.buffers), strict=True)}
        lies = tuple(self.lies[value] for value in (*segment.inputs, *segment.outputs))
        key = segment.trace, self.modes[segment.name], lies, tuple(fixed.items())
        if key not in self._programs:
            self._programs[key] = member_program(self.graph, trace, self.modes[segment.name], self.size, fixed,
                                                 segment=segment, lies=self.lies, axis=self.axis)
        return self._programs[key]

    def _local_value(self, value: Value) -> Value:
        shape = local_shape(value.spec.shape, self.lies[value.name], self.size)
        return replace(value, spec=replace(value.spec, shape=shape))

    def _local(self, item: ParameterSpec, state: Mapping[str, Part]) -> ParameterSpec:
        part = state.get(self.canonical[item.fqn], WHOLE)
        return replace(item, spec=replace(item.spec, shape=local_shape(item.spec.shape, part, self.size)))


def with_shares(trace: SegmentTrace, names: tuple[str, ...], size: int) -> SegmentTrace:
    """A trace in which these gradients of parameters, equal on all members, are an equal share of themselves.

    So they may be added to gradients of other segments that are partial sums.
    """
    operators, renamed = list(trace.operators), {name: f"{name}_share" for name in names}
    made = {op.name: op.outputs[0] for op in trace.operators if op.outputs} | trace.specs
    for name, share in renamed.items():
        operators.append(Operator(share, "aten.mul.Scalar", Phase.W, [{"ref": name}, 1.0 / size], {}, (made[name],)))
    specs = trace.specs | {share: made[name] for name, share in renamed.items()}
    changed = replace(trace, digest="", operators=tuple(operators), specs=specs, parameter_grads=tuple(
        None if name is None else renamed.get(name, name) for name in trace.parameter_grads))
    return replace(changed, digest=digest(changed))
