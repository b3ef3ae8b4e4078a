"""Parameters of which the devices that hold the same have a part each (Rajbhandari et al., "ZeRO", SC 2020).

These are the copies of a plan, and with a context axis its members in all copies. Each runs its segments on samples or
positions of its own, so a trace stays what it is but for its parameters.
With stage 3 an all-gather makes one whole before F reads it, and once more before the backward does, and a
reduce-scatter leaves of its gradient the part that the device has. With stage 2 parameters are whole while a step
runs, and of every microbatch's gradient the part stays; with stage 1 the trace is what it is, and the sum over
microbatches is scattered. There the engine gathers what devices updated (`mipipe.runtime.engine.parts`). Banks of
experts that groups of devices share are divided alike by the devices that hold the same experts, members and copies:
each has a part of every expert.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from mipipe.graphs.again import renamed, with_again
from mipipe.graphs.operator_graph import Operator, OperatorGraph, Phase, SegmentTrace, TensorSpec
from mipipe.graphs.serialize import digest
from mipipe.graphs.sharding.parts import divided, fits, local_shape
from mipipe.graphs.sharding.team_graph import Division, MemberGraph, with_shares

CONTEXT = "context"
"""The axis of a team whose members hold the same parameters."""
COPIES = "copies"
"""The axis of the devices that hold the same: copies of the plan, with a context axis its members in all of them, those
of one copy neighbours."""
EXPERT_COPIES = "expert_copies"
"""The axis of the devices of a plan rank that hold the same experts."""
ALIKE = frozenset({COPIES, EXPERT_COPIES})
"""The axes along which devices hold the same and have a part each."""


def gathered(member: MemberGraph, copies: int, zero: int = 3, apart: Collection[str] = (), expert_copies: int = 1,
             context: int = 1) -> MemberGraph:
    """The graph of a device that holds a part of every parameter whose first dimension divides; below stage 3
    (``zero``) of those that train. ``copies``: of the plan, with ``context`` members along that axis each. ``apart``:
    parameters (canonical FQNs) that others hold as well: banks, of whose experts each of ``expert_copies`` devices with
    the same ones holds a part along the second dimension."""
    parts = _parts(member, copies * context, zero, apart, expert_copies)
    alike = {fqn for fqn, part in parts.items() if part.axis == COPIES}
    member = _summed_alike(member, alike, context) if context > 1 else member
    graph, sums = member.graph, dict(member.sums)
    for fqn in alike & set(sums) if zero > 1 else ():  # a reduce-scatter sums over the context axis
        sums[fqn] = tuple(axis for axis in sums[fqn] if axis != CONTEXT)
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    made: dict[object, SegmentTrace] = {}
    segments = []
    traces = {trace.digest: trace for trace in graph.traces}
    for segment in graph.segments:
        trace = traces[segment.trace]
        names = {name: parts[canonical[fqn]] for name, fqn in zip(trace.parameters, segment.parameters, strict=True)
                 if canonical[fqn] in parts and zero > 1}
        key = segment.trace, tuple(names.items())
        if key not in made:
            made[key] = _in_parts(trace, names, zero) if names else trace
        segments.append(replace(segment, trace=made[key].digest))
    divisions = {**member.divisions, **{fqn: (*member.divisions.get(fqn, ()), part) for fqn, part in parts.items()}}
    local = tuple(replace(item, spec=_part(item.spec, parts[canonical[item.fqn]])) if canonical[item.fqn] in parts
                  else item for item in graph.parameters)
    changed: OperatorGraph = replace(graph, segments=tuple(segments), parameters=local, modes=None,
                                     traces=tuple({trace.digest: trace for trace in made.values()}.values()))
    return MemberGraph(changed, divisions, {fqn: axes for fqn, axes in sums.items() if axes})


def _parts(member: MemberGraph, copies: int, zero: int, apart: Collection[str],
           expert_copies: int) -> dict[str, Division]:
    """How the devices that hold the same of a parameter, ``copies`` or of a bank ``expert_copies``, divide it, by
    canonical FQN."""
    found = {}
    for item in member.graph.parameters:
        part = Division(EXPERT_COPIES, expert_copies, 1) if item.fqn in apart else Division(COPIES, copies, 0)
        if not item.buffer and item.tied_to is None and (item.trainable or zero == 3) \
                and part.size > 1 and item.spec.shape and fits(item.spec.shape, divided(part.dim), part.size):
            found[item.fqn] = part
    return found


def _summed_alike(member: MemberGraph, names: Collection[str], context: int) -> MemberGraph:
    """The graph in which gradients of these parameters are partial sums over the context axis, also where all its
    members have the same."""
    graph = member.graph
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    traces, segments, summed = {trace.digest: trace for trace in graph.traces}, [], dict(member.sums)
    for segment in graph.segments:
        trace = traces[segment.trace]
        equal = tuple(grad for grad, fqn in zip(trace.parameter_grads, segment.parameters, strict=True)
                      if grad is not None and canonical[fqn] in names
                      and CONTEXT not in member.sums.get(canonical[fqn], ()))
        for grad, fqn in zip(trace.parameter_grads, segment.parameters, strict=True):
            if grad in equal:
                summed[canonical[fqn]] = (CONTEXT, *member.sums.get(canonical[fqn], ()))
        shared = with_shares(trace, equal, context) if equal else trace
        traces[shared.digest] = shared
        segments.append(replace(segment, trace=shared.digest))
    used = {segment.trace for segment in segments}
    return replace(member, sums=summed, graph=replace(graph, segments=tuple(segments), traces=tuple(
        trace for digest, trace in traces.items() if digest in used)))


def _in_parts(trace: SegmentTrace, parts: Mapping[str, Division], zero: int) -> SegmentTrace:
    """A trace whose gradients of these parameters leave in parts; with stage 3 the parameters come in parts, too."""
    whole = {name: f"{name}_whole" if zero == 3 else name for name in parts}
    gathers = [Operator(whole[name], "mipipe.all_gather.default", Phase.F,
                        [{"ref": name}, part.dim, 1, part.size, part.axis], {}, (trace.specs[name],))
               for name, part in parts.items() if zero == 3]
    operators = [replace(op, args=renamed(op.args, whole), kwargs=renamed(op.kwargs, whole))
                 for op in trace.operators]
    specs = trace.specs | {whole[name]: trace.specs[name] for name in parts}
    specs |= {name: _part(trace.specs[name], part) for name, part in parts.items() if zero == 3}
    grads = list(trace.parameter_grads)
    for place, name in enumerate(trace.parameters):
        grad = grads[place]
        if name in whole and grad is not None:
            own, part = f"{grad}_part{place}", parts[name]
            grads[place], specs[own] = own, _part(trace.specs[name], part)
            operators.append(Operator(own, "mipipe.reduce_scatter.default", Phase.W,
                                      [{"ref": grad}, part.dim, 1, part.size, part.axis], {}, (specs[own],)))
    saved = tuple(replace(item, name=whole.get(item.name, item.name)) for item in trace.saved)
    forward = [op for op in operators if op.phase is Phase.F]
    later = [op for op in operators if op.phase is not Phase.F]
    changed = replace(trace, digest="", operators=(*gathers, *forward, *later), specs=specs, saved=saved,
                      parameter_grads=tuple(grads))
    done = replace(changed, digest=digest(changed))
    return with_again(done, set(whole.values())) if zero == 3 else done


def _part(spec: TensorSpec, part: Division) -> TensorSpec:
    return replace(spec, shape=local_shape(spec.shape, divided(part.dim), part.size))
