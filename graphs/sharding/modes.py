"""Every mode of every distinct segment of a graph: layouts at its boundary, its recipe, its program, its profile.

How values lie between segments: `mipipe.graphs.sharding.boundaries`.

Legend: T members.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mipipe.graphs.capture.assemble import TraceProgress
from mipipe.graphs.costs.mode_profile import all_work, kept_bytes, resident_bytes
from mipipe.graphs.errors import GraphError, shown
from mipipe.graphs.modes import MODES, GraphModes, Layout, ModeProfile, ParameterPart
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment, SegmentTrace
from mipipe.graphs.sharding.assign import Assignment, Layouts
from mipipe.graphs.sharding.boundaries import Streams, boundary_parts, naming, segment_layouts
from mipipe.graphs.sharding.member import build_member, has_dynamic_rows
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part
from mipipe.graphs.sharding.recipe import banks, expert_recipe, matrices, tensor_recipe
from mipipe.graphs.sharding.refine import refine
from mipipe.graphs.sharding.steps import specs_of

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


def member_program(graph: OperatorGraph, trace: SegmentTrace, mode: str, size: int,
                   fixed: Mapping[str, Part] | None = None, *, segment: Segment | None = None,
                   lies: Mapping[str, Part] | None = None, axis: str | None = None) -> MemberProgram:
    """The program of a member of a team of ``size`` for one of a graph's traces.

    Args:
        fixed: divisions of parameters that are settled by other segments which share them, by name in the trace.
        segment: the one whose boundary it is; None: the first with this trace.
        lies: how the graph's values lie; None: all segments run in this mode.
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
    axis = axis or AXES[mode]
    segment = segment or next(item for item in graph.segments if item.trace == trace.digest)
    boundary, assignment = assigned(graph, trace, mode, size, fixed or {}, segment=segment, lies=lies)
    try:
        program = build_member(trace, boundary, axis, assignment)
    except GraphError:
        raise
    except Exception as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise GraphError(f"segment {segment.name}: mode {mode} on {size} members: an operator does not run on a"
                         f" member's sizes: {line[:300]}; leave this mode out") from error
    return MemberProgram(program, mode, axis, size, boundary.given, assignment.ends,
                         tuple(reasons(trace, boundary, assignment, mode)))


def assigned(graph: OperatorGraph, trace: SegmentTrace, mode: str, size: int, fixed: Mapping[str, Part], *,
             segment: Segment | None = None, lies: Mapping[str, Part] | None = None,
             recipes: dict[object, Mapping[str, Part]] | None = None) -> tuple[Layouts, Assignment]:
    """How one of a graph's traces is divided: arguments as for `member_program`; ``recipes``: those known already."""
    streams = Streams(graph)
    segment = segment or next(item for item in graph.segments if item.trace == trace.digest)
    lies = lies or boundary_parts(graph, {item.name: mode for item in graph.segments}, streams, size)
    given = {name: part for name, part in fixed.items() if part != WHOLE}
    boundary = segment_layouts(trace, segment, lies, mode, streams, size)
    with naming(segment):
        if not set(trace.parameters) | set(trace.buffers) <= set(fixed):
            own = recipe_of(trace, mode, boundary, {} if recipes is None else recipes)
            given = {name: part for name, part in {**own, **fixed}.items() if part != WHOLE}
        return refine(trace, replace(boundary, given={**boundary.given, **given}))


def recipe_of(trace: SegmentTrace, mode: str, boundary: Layouts,
              known: dict[object, Mapping[str, Part]]) -> Mapping[str, Part]:
    """`mode_recipe`, found once for all boundaries with the same tokens on their way to experts (``known``)."""
    key = (trace.digest, "tensor" if mode == "sequence" else mode, boundary.size,
           tuple(item for item in boundary.given.items() if item[1].routed))
    if key not in known:
        known[key] = mode_recipe(trace, mode, boundary)
    return known[key]


def mode_recipe(trace: SegmentTrace, mode: str, boundary: Layouts) -> dict[str, Part]:
    """The division of parameters: that of ``tensor`` mode wherever the mode has it, at a boundary that is whole but for
    what is on its way to experts."""
    given, wanted = ({name: part for name, part in parts.items() if part.routed}
                     for parts in (boundary.given, boundary.wanted))
    plain = Layouts(boundary.size, given, wanted, tokens=boundary.tokens)
    if mode in ("tensor", "sequence"):
        return tensor_recipe(trace, plain)
    return expert_recipe(trace, plain) if mode == "expert" else {}


def reasons(trace: SegmentTrace, layouts: Layouts, assignment: Assignment, mode: str) -> Iterator[str]:
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
            elif spec.shape[1] % size and assignment.choices[op.name].share == 1:
                yield (f"attention: its {spec.shape[1]} key heads do not divide by {size} members, and what makes its"
                       " queries does not divide without them")
            elif spec.shape[1] % size:
                yield f"keys and values: {spec.shape[1]} heads do not divide by {size} members"
            elif assignment.choices[op.name].share == 1:
                heads_whole = True
                yield "attention: what makes its queries, keys and values does not divide by heads"
    if mode in ("tensor", "sequence") and not heads_whole:
        for name in matrices(trace):
            shape = trace.specs[name].shape
            if name not in layouts.given:
                odd = [length for length in shape if length % size]
                yield f"{name}: " + (f"no size of {list(shape)} divides by {size}" if len(odd) == len(shape) else
                                     f"{odd[0]} of {list(shape)} does not divide by {size} members" if odd else
                                     "dividing it would send more than it saves")
    elif mode in ("batch", "context"):
        if not any(part.kind is Kind.DIVIDED for part in (*layouts.given.values(), *layouts.wanted.values())):
            yield ("what has no gradient is not divided along the sequence"
                   if mode == "context" and not (trace.has(Phase.I) or trace.has(Phase.W))
                   else f"no tensor of its boundary divides by {size} members")
        elif mode == "context":
            specs = specs_of(trace)
            for op in trace.phase_operators(Phase.F):
                name = op.inputs[0] if op.kind == "aten.slice.Tensor" else ""
                part = assignment.born.get(name, WHOLE)
                if part.kind is Kind.DIVIDED and assignment.choices[op.name].needs.get(name) == WHOLE:
                    dim = part.dim
                    yield (f"{op.outputs[0].shape[dim]} of {specs[name].shape[dim]} positions do not divide by {size}"
                           " members, so all are gathered; a loss that shifts labels, and cuts no rows off, needs none"
                           " of it (mipipe.graphs.models.loss.shifted)")
    elif mode == "expert":
        for name in banks(trace):
            if name not in layouts.given:
                yield f"{name}: {trace.specs[name].shape[0]} experts do not divide by {size} members"
    if assignment.gathered and mode == "batch":
        yield "some operators look at all samples, so these are gathered"


def profile(graph: OperatorGraph, trace: SegmentTrace, program: MemberProgram, lies: Mapping[str, Part]) -> ModeProfile:
    """The profile of a member's program of one of the graph's traces, whose values lie so."""
    segment = next(item for item in graph.segments if item.trace == trace.digest)
    grads = dict(zip(trace.parameters, trace.parameter_grads, strict=True))
    parts = []
    for name in (*trace.parameters, *trace.buffers):
        part, grad = program.given.get(name, WHOLE), grads.get(name)
        summed = (program.axis,) if grad is not None and program.ends[grad] == PARTIAL else ()
        parts.append(ParameterPart(program.size, part.dim, program.axis, part.sections, summed)
                     if part.kind is Kind.DIVIDED else ParameterPart(sum_gradient=summed))

    def layouts(names: Sequence[str]) -> tuple[Layout, ...]:
        divided_so = Layout.BATCH if program.mode == "batch" else Layout.SEQUENCE
        return tuple(Layout.REPLICATED if lies[name] == WHOLE else divided_so for name in names)

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
            lies = boundary_parts(graph, {item.name: mode for item in graph.segments}, Streams(graph), size)
            for trace in graph.traces:
                if not has_dynamic_rows(trace):
                    say(f"mode {mode} on {size} members: {len(found) + 1} programs")
                    program = member_program(graph, trace, mode, size, settled.get(trace.digest), lies=lies)
                    found.append(profile(graph, trace, program, lies))
    return replace(graph, modes=GraphModes(tuple(found)))


def settle_shared(graph: OperatorGraph, mode: str, size: int,
                  recipes: dict[object, Mapping[str, Part]] | None = None) -> dict[str, dict[str, Part]]:
    """Divisions of parameters that segments with different recipes share, by trace and name; ``recipes``: as for
    `assigned`.

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
    streams, first = Streams(graph), {segment.trace: segment for segment in reversed(graph.segments)}
    lies = boundary_parts(graph, {item.name: mode for item in graph.segments}, streams, size) if shared else {}
    found: dict[str, Mapping[str, Part]] = {}
    settled: dict[str, dict[str, Part]] = {}
    for places in shared.values():
        for digest, _ in places:
            if digest not in found and not has_dynamic_rows(traces[digest]):
                boundary = segment_layouts(traces[digest], first[digest], lies, mode, streams, size)
                found[digest] = recipe_of(traces[digest], mode, boundary, {} if recipes is None else recipes)
        if len({found.get(digest, {}).get(name, WHOLE) for digest, name in places}) > 1:
            for digest, name in places:
                settled.setdefault(digest, {})[name] = WHOLE
    return settled
