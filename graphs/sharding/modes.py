"""Every mode of every distinct segment of a graph: layouts at its boundary, its recipe, its program, its profile.

What lies how between segments follows from the value alone, so that neighbours in one mode agree: in ``sequence`` and
``context`` mode activations [B,S,H] (or [B*S,H]) are divided along the sequence, in ``batch`` mode whatever has the
samples in front; all else is whole on every member.

Legend: T members, B sequences, S positions, H width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mipipe.graphs.capture.assemble import TraceProgress
from mipipe.graphs.costs.mode_profile import all_work, kept_bytes, resident_bytes
from mipipe.graphs.errors import GraphError, shown
from mipipe.graphs.modes import MODES, GraphModes, Layout, ModeProfile, ParameterPart
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment, SegmentTrace, TensorSpec, Value
from mipipe.graphs.sharding.assign import Assignment, Layouts, assign, no_scatter, refine
from mipipe.graphs.sharding.member import build_member, has_dynamic_rows
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part, divided, fits
from mipipe.graphs.sharding.recipe import banks, expert_recipe, matrices, reads_vocabulary, tensor_recipe

AXES = {"tensor": "tensor", "sequence": "tensor", "batch": "batch", "expert": "expert", "context": "context"}
"""The axis of the team that a mode's collectives name."""


@dataclass(frozen=True)
class MemberProgram:
    """The program of one member, and how what it takes and gives lies on the team.

    ``given``: arguments that are not whole, by name; ``ends``: results, by their names in the whole trace: gradients
    of parameters may be left partial, to be summed once per step. ``whole``: what runs undivided, and why.
    """

    trace: SegmentTrace
    mode: str
    axis: str
    size: int
    given: Mapping[str, Part]
    ends: Mapping[str, Part]
    whole: tuple[str, ...]


class Streams:
    """The shapes that a graph's activations have: which dimension is the sequence, which the samples."""

    def __init__(self, graph: OperatorGraph) -> None:
        self.pairs = {(value.spec.shape[0], value.spec.shape[1]) for value in graph.values
                      if value.differentiable and len(value.spec.shape) == 3}
        self.samples = {value.spec.shape[0] for value in graph.values
                        if value.source is None and len(value.spec.shape) > 1} | {pair[0] for pair in self.pairs}

    def sequence(self, shape: Sequence[int], size: int) -> Part | None:
        """The division of an activation of this shape along its sequence, if it has one that divides."""
        if len(shape) == 3 and (shape[0], shape[1]) in self.pairs:
            part = divided(1)
            return part if fits(shape, part, size) and shape[1] > 1 else None
        for batch, length in sorted(self.pairs):
            if len(shape) == 2 and shape[0] == batch * length and length > 1:
                part = divided(0, batch)
                return part if fits(shape, part, size) else None
        return None

    def scatter(self, shape: Sequence[int], size: int) -> Part | None:
        """`sequence`, also for tensors with heads, [B,S,H,D] and [B,H,S,D]."""
        for dim in (1, 2) if len(shape) == 4 else ():
            if (shape[0], shape[dim]) in self.pairs and shape[dim] > 1 and fits(shape, divided(dim), size):
                return divided(dim)
        return self.sequence(shape, size)

    def batch(self, shape: Sequence[int], size: int) -> Part | None:
        """The division of a tensor of this shape by samples, if it has samples in front that divide."""
        flat = {batch * length for batch, length in self.pairs if batch % size == 0}
        known = bool(shape) and (shape[0] in self.samples or (shape[0] in flat and len(shape) == 2))
        return divided(0) if known and fits(shape, divided(0), size) else None


def boundary_layout(value: Value, mode: str, streams: Streams, size: int) -> Layout:
    """How a value lies between two segments that both run in a mode."""
    shape = value.spec.shape
    if mode in ("sequence", "context") and value.differentiable and streams.sequence(shape, size) is not None:
        return Layout.SEQUENCE
    if mode == "batch" and streams.batch(shape, size) is not None:
        return Layout.BATCH
    return Layout.REPLICATED


def layout_part(layout: Layout, spec: TensorSpec, streams: Streams, size: int) -> Part:
    """The division of a tensor that lies in a layout."""
    found = {Layout.SEQUENCE: streams.sequence, Layout.BATCH: streams.batch}.get(layout)
    return WHOLE if found is None else found(spec.shape, size) or WHOLE


def member_program(graph: OperatorGraph, trace: SegmentTrace, mode: str, size: int,
                   fixed: Mapping[str, Part] | None = None, *, segment: Segment | None = None,
                   layouts: Mapping[str, Layout] | None = None, axis: str | None = None) -> MemberProgram:
    """The program of a member of a team of ``size`` for one of a graph's traces.

    Args:
        fixed: divisions of parameters that are settled by other segments which share them, by name in the trace.
        segment: the one whose boundary it is; None: the first with this trace.
        layouts: of the graph's values; None: all segments run in this mode.
        axis: the name that its collectives have; None: the mode's own.

    Raises:
        GraphError: an unknown mode, a size below 2, a trace whose rows are picked by data, or one with an operator that
            does not run on the member's sizes.
    """
    if mode not in MODES:
        raise GraphError(f"mode {shown(mode)}: expected one of {', '.join(MODES)}")
    if size < 2:
        raise GraphError(f"team of {size}: a mode needs at least 2 members")
    if has_dynamic_rows(trace):
        raise GraphError(f"trace {trace.digest}: picks rows by data, so members of a team would differ; capture the"
                         " model with grouped experts")
    streams, axis = Streams(graph), axis or AXES[mode]
    segment = segment or next(item for item in graph.segments if item.trace == trace.digest)
    values = {value.name: value for value in graph.values}
    lies = layouts or {name: boundary_layout(values[name], mode, streams, size)
                       for name in (*segment.inputs, *segment.outputs)}
    given = {name: part for name, part in (fixed or {}).items() if part != WHOLE}
    if not set(trace.parameters) | set(trace.buffers) <= set(fixed or {}):
        given = {name: part for name, part in {**mode_recipe(trace, mode, size), **(fixed or {})}.items()
                 if part != WHOLE}
    boundary = _boundary(trace, segment, values, lies, mode, streams, size)
    boundary = refine(trace, replace(boundary, given={**boundary.given, **given}))
    assignment = assign(trace, boundary)
    try:
        program = build_member(trace, boundary, axis, assignment)
    except GraphError:
        raise
    except Exception as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraphError(f"segment {segment.name}: mode {mode} on {size} members: an operator does not run on a"
                         f" member's sizes: {line[:300]}; leave this mode out") from error
    return MemberProgram(program, mode, axis, size, boundary.given, assignment.ends,
                         tuple(_reasons(trace, boundary, assignment, mode)))


def _boundary(trace: SegmentTrace, segment: Segment, values: Mapping[str, Value], lies: Mapping[str, Layout],
              mode: str, streams: Streams, size: int) -> Layouts:
    """The boundary of a segment in a mode, between values that lie so."""
    given: dict[str, Part] = {}
    wanted: dict[str, Part] = {}
    for names, grads, used, ours, theirs in (
            (trace.inputs, trace.input_grads, segment.inputs, given, wanted),
            (trace.outputs, trace.output_grads, segment.outputs, wanted, given)):
        for name, grad, value in zip(names, grads, used, strict=True):
            part = layout_part(lies[value], values[value].spec, streams, size)
            if part != WHOLE:
                ours[name] = part
                if grad is not None:
                    theirs[grad] = part
    scatters = mode in ("sequence", "context")
    return Layouts(size, given, wanted, (lambda shape: streams.scatter(shape, size)) if scatters else no_scatter)


def mode_recipe(trace: SegmentTrace, mode: str, size: int) -> dict[str, Part]:
    """The division of parameters: that of ``tensor`` mode wherever the mode has it, at whole boundaries."""
    plain = Layouts(size, {})
    if mode in ("tensor", "sequence") or (mode == "context" and reads_vocabulary(trace)):
        return tensor_recipe(trace, plain)
    return expert_recipe(trace, plain) if mode == "expert" else {}


def _reasons(trace: SegmentTrace, layouts: Layouts, assignment: Assignment, mode: str) -> Iterator[str]:
    """What a mode leaves undivided, and why."""
    size, heads_whole = layouts.size, False
    for op in trace.phase_operators(Phase.F):
        if op.kind == "mipipe.attention.default" and mode in ("tensor", "sequence"):
            heads = op.outputs[0].shape[1]
            spec = trace.specs.get(op.inputs[1]) or next(
                item.outputs[0] for item in trace.operators if item.name == op.inputs[1])
            heads_whole |= bool(heads % size or spec.shape[1] % size)
            if heads % size:
                yield f"attention: {heads} heads do not divide by {size} members"
            elif spec.shape[1] % size:
                yield f"keys and values: {spec.shape[1]} heads do not divide by {size} members"
    if mode in ("tensor", "sequence") and not heads_whole:
        for name in matrices(trace):
            shape = trace.specs[name].shape
            if name not in layouts.given:
                odd = not any(length % size == 0 for length in shape)
                yield f"{name}: " + (f"no size of {list(shape)} divides by {size}" if odd else
                                     "dividing it would send more than it saves")
    elif mode in ("batch", "context"):
        if not any(part.kind is Kind.DIVIDED for part in (*layouts.given.values(), *layouts.wanted.values())):
            yield f"no tensor of its boundary divides by {size} members"
    elif mode == "expert":
        for name in banks(trace):
            if name not in layouts.given:
                yield f"{name}: {trace.specs[name].shape[0]} experts do not divide by {size} members"
    if assignment.gathered and mode == "batch":
        yield "some operators look at all samples, so these are gathered"


def profile(graph: OperatorGraph, trace: SegmentTrace, program: MemberProgram) -> ModeProfile:
    """The profile of a member's program of one of the graph's traces."""
    streams = Streams(graph)
    segment = next(item for item in graph.segments if item.trace == trace.digest)
    values = {value.name: value for value in graph.values}
    grads = dict(zip(trace.parameters, trace.parameter_grads, strict=True))
    parts = []
    for name in (*trace.parameters, *trace.buffers):
        part, grad = program.given.get(name, WHOLE), grads.get(name)
        summed = (program.axis,) if grad is not None and program.ends[grad] == PARTIAL else ()
        parts.append(ParameterPart(program.size, part.dim, program.axis, part.sections, summed)
                     if part.kind is Kind.DIVIDED else ParameterPart(sum_gradient=summed))

    def layouts(names: Sequence[str]) -> tuple[Layout, ...]:
        return tuple(boundary_layout(values[name], program.mode, streams, program.size) for name in names)

    return ModeProfile(trace.digest, program.mode, {program.axis: program.size}, layouts(segment.inputs),
                       layouts(segment.outputs), tuple(parts),
                       resident_bytes(program.trace, parts, banks(trace)), kept_bytes(program.trace),
                       all_work(program.trace), program.whole)


def with_modes(graph: OperatorGraph, modes: Sequence[str], teams: Sequence[int],
               progress: TraceProgress | None = None) -> OperatorGraph:
    """The graph with the profiles of its segments in these modes on teams of these sizes.

    Raises:
        GraphError: an unknown mode, or a team of fewer than 2.
    """
    say = progress or (lambda text: None)
    found: list[ModeProfile] = []
    for mode in modes:
        for size in teams:
            settled = settle_shared(graph, mode, size)
            for trace in graph.traces:
                if not has_dynamic_rows(trace):
                    say(f"mode {mode} on {size} members: {len(found) + 1} programs")
                    program = member_program(graph, trace, mode, size, settled.get(trace.digest))
                    found.append(profile(graph, trace, program))
    return replace(graph, modes=GraphModes(tuple(found)))


def settle_shared(graph: OperatorGraph, mode: str, size: int) -> dict[str, dict[str, Part]]:
    """Divisions of parameters that segments with different recipes share, by trace and name.

    A tensor lies in one way on a member, so what two traces would divide differently (a tied embedding in a head that
    keeps it whole) stays whole in both.
    """
    users: dict[str, dict[tuple[str, str], None]] = {}
    for segment in graph.segments:
        trace = graph.trace(segment)
        for name, fqn in zip((*trace.parameters, *trace.buffers), (*segment.parameters, *segment.buffers), strict=True):
            users.setdefault(fqn, {})[trace.digest, name] = None
    shared = {fqn: list(places) for fqn, places in users.items() if len({digest for digest, _ in places}) > 1}
    traces = {trace.digest: trace for trace in graph.traces}
    recipes: dict[str, dict[str, Part]] = {}
    settled: dict[str, dict[str, Part]] = {}
    for places in shared.values():
        for digest, _ in places:
            if digest not in recipes and not has_dynamic_rows(traces[digest]):
                recipes[digest] = mode_recipe(traces[digest], mode, size)
        if len({recipes.get(digest, {}).get(name, WHOLE) for digest, name in places}) > 1:
            for digest, name in places:
                settled.setdefault(digest, {})[name] = WHOLE
    return settled
