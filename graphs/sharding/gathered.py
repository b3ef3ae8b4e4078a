"""Parameters that copies of a plan hold in parts (Rajbhandari et al., "ZeRO", SC 2020).

Every copy runs the whole of its segments on samples of its own, so a trace stays what it is but for its parameters.
With stage 3 an all-gather makes one whole before F reads it, and once more before the backward does, and a
reduce-scatter leaves of its gradient the part that the copy has. With stage 2 parameters are whole while a step runs,
and of every microbatch's gradient the part stays; with stage 1 the trace is what it is, and the sum over microbatches
is scattered. There the engine gathers what copies updated (`mipipe.runtime.engine.parts`). Of banks of experts that
groups of devices share, each of the devices that hold the same experts, members and copies, has a part of all of these,
as with stage 1, whatever the stage is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from mipipe.graphs.again import renamed, with_again
from mipipe.graphs.operator_graph import Operator, OperatorGraph, Phase, SegmentTrace, TensorSpec
from mipipe.graphs.serialize import digest
from mipipe.graphs.sharding.parts import divided, fits, local_shape
from mipipe.graphs.sharding.team_graph import Division, MemberGraph

COPIES = "copies"
"""The axis that copies of the plan are along."""
EXPERT_COPIES = "expert_copies"
"""The axis of the devices of a plan rank that hold the same experts."""


def gathered(member: MemberGraph, size: int, zero: int = 3, apart: Collection[str] = (),
             expert_copies: int = 1) -> MemberGraph:
    """The graph of a copy, of ``size``, that holds a part of every parameter whose first dimension divides; below stage
    3 (``zero``) of those that train. ``apart``: parameters (canonical FQNs) that copies hold otherwise: banks, of whose
    experts each of ``expert_copies`` devices with the same ones holds a part along the second dimension."""
    graph = member.graph
    canonical = {item.fqn: item.tied_to or item.fqn for item in graph.parameters}
    parts = {item.fqn for item in graph.parameters if not item.buffer and item.tied_to is None and item.fqn not in apart
             and item.spec.shape and fits(item.spec.shape, divided(0), size) and (item.trainable or zero == 3)
             and size > 1}
    made: dict[tuple[str, tuple[str, ...]], SegmentTrace] = {}
    segments = []
    traces = {trace.digest: trace for trace in graph.traces}
    for segment in graph.segments:
        trace = traces[segment.trace]
        names = tuple(name for name, fqn in zip(trace.parameters, segment.parameters, strict=True)
                      if canonical[fqn] in parts)
        key = segment.trace, names if zero > 1 else ()
        if key not in made:
            made[key] = _over_copies(trace, names, size, zero) if names and zero > 1 else trace
        segments.append(replace(segment, trace=made[key].digest))
    divisions = dict(member.divisions)
    for fqn in parts:
        divisions[fqn] = (*divisions.get(fqn, ()), Division(COPIES, size, 0))
    banks = {item.fqn for item in graph.parameters if item.fqn in apart and item.trainable and expert_copies > 1
             and fits(item.spec.shape, divided(1), expert_copies)}
    for fqn in banks:
        divisions[fqn] = (*divisions.get(fqn, ()), Division(EXPERT_COPIES, expert_copies, 1))
    local = tuple(replace(item, spec=_part(item.spec, size)) if canonical[item.fqn] in parts else
                  replace(item, spec=_part(item.spec, expert_copies, 1)) if canonical[item.fqn] in banks else item
                  for item in graph.parameters)
    changed: OperatorGraph = replace(graph, segments=tuple(segments), parameters=local, modes=None,
                                     traces=tuple({trace.digest: trace for trace in made.values()}.values()))
    return MemberGraph(changed, divisions, member.sums)


def _over_copies(trace: SegmentTrace, names: tuple[str, ...], size: int, zero: int) -> SegmentTrace:
    """A trace whose gradients of these parameters leave in parts; with stage 3 the parameters come in parts, too."""
    whole = {name: f"{name}_whole" if zero == 3 else name for name in names}
    gathers = [Operator(whole[name], "mipipe.all_gather.default", Phase.F, [{"ref": name}, 0, 1, size, COPIES], {},
                        (trace.specs[name],)) for name in names if zero == 3]
    operators = [replace(op, args=renamed(op.args, whole), kwargs=renamed(op.kwargs, whole))
                 for op in trace.operators]
    specs = trace.specs | {whole[name]: trace.specs[name] for name in names}
    specs |= {name: _part(trace.specs[name], size) for name in names if zero == 3}
    grads = list(trace.parameter_grads)
    for place, name in enumerate(trace.parameters):
        grad = grads[place]
        if name in whole and grad is not None:
            part = grads[place] = f"{grad}_part{place}"
            specs[part] = _part(trace.specs[name], size)
            operators.append(Operator(part, "mipipe.reduce_scatter.default", Phase.W,
                                      [{"ref": grad}, 0, 1, size, COPIES], {}, (specs[part],)))
    saved = tuple(replace(item, name=whole.get(item.name, item.name)) for item in trace.saved)
    forward = [op for op in operators if op.phase is Phase.F]
    later = [op for op in operators if op.phase is not Phase.F]
    changed = replace(trace, digest="", operators=(*gathers, *forward, *later), specs=specs, saved=saved,
                      parameter_grads=tuple(grads))
    done = replace(changed, digest=digest(changed))
    return with_again(done, set(whole.values())) if zero == 3 else done


def _part(spec: TensorSpec, size: int, dim: int = 0) -> TensorSpec:
    return replace(spec, shape=local_shape(spec.shape, divided(dim), size))
