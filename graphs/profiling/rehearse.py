"""One group on real tensors: its F, I and W run as the runtime runs them, on inputs that are as in training.

Inputs come from a rehearsal of the model: batches are made up (token ids within the vocabulary, labels within the
classes), weights are random, and every distinct group is run once, so that what later groups read (routing decisions,
offsets, masks) are real values in range. Groups of equal structure hand on equal tensors instead of running again, so a
deep model costs no more than its distinct layers. Left out: batches with structure beyond shapes and ranges.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.coarse.graph_index import GraphIndex, gives_grad
from mipipe.graphs.coarse.totals import argument_spec
from mipipe.graphs.operator_graph import Operator, Phase, SegmentTrace, TensorSpec
from mipipe.graphs.tracing.trace import build_phase, phase_signature

Slots = dict[str, Tensor]
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")


@dataclass(slots=True)
class RehearsedCall:
    """A segment's phase function, the slots it reads, where its results go, and which are summed up as gradients.

    ``sums`` (slot, parts) are done first.
    """

    function: Any
    reads: tuple[str, ...]
    stores: tuple[tuple[int, str], ...]
    sums: tuple[tuple[str, tuple[str, ...]], ...] = ()
    accumulates: tuple[tuple[int, str], ...] = ()


@dataclass(slots=True)
class GroupRun:
    """The calls of a group's phases over one dict of slots: values, gradients, weights, their totals, and saved."""

    calls: dict[Phase, list[RehearsedCall]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    gradients: dict[str, TensorSpec]
    slots: Slots = field(default_factory=dict)

    def run(self, phase: Phase) -> None:
        """Run one phase; F comes before I, I before W."""
        slots = self.slots
        for call in self.calls[phase]:
            for target, parts in call.sums:
                total = slots[parts[0]]
                for part in parts[1:]:
                    total = total + slots[part]
                slots[target] = total
            results = call.function(*[slots[name] for name in call.reads])
            for position, name in call.stores:
                slots[name] = results[position]
            for position, name in call.accumulates:
                slots[name].add_(results[position])


def build_group(index: GraphIndex, members: Sequence[int], device: torch.device) -> GroupRun:
    """The runnable form of a group; its slots are empty but for weights, gradient totals and incoming gradients."""
    inside = set(members)
    made = {value for member in members for value in index.segments[member].outputs}
    inputs = dict.fromkeys(value for member in members for value in index.segments[member].inputs if value not in made)
    calls: dict[Phase, list[RehearsedCall]] = {phase: [] for phase in Phase}
    gradients: dict[str, TensorSpec] = {}
    for member in members:
        calls[Phase.F].append(_forward(index, member, device))
    for member in reversed(members):
        if member not in index.acting:
            continue
        sums, incoming = _gradient_sums(index, member, inside)
        gradients |= incoming
        for phase in (Phase.I, Phase.W):
            if index.traces[member].has(phase):
                calls[phase].append(_backward(index, member, phase, device, sums))
                sums = ()
    run = GroupRun(calls, tuple(inputs), tuple(made), gradients)
    generator = torch.Generator().manual_seed(0)
    for member in members:
        _put_weights(index, member, run.slots, generator, device)
    for name, spec in gradients.items():
        run.slots[name] = torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype)).to(device)
    return run


def rehearse(index: GraphIndex, groups: Sequence[Sequence[int]], structures: Sequence[str], wanted: set[int],
             device: torch.device) -> Iterator[tuple[int, GroupRun]]:
    """The wanted groups in order, each with real inputs in its slots and F done; stops after the last of them."""
    values: Slots = {}
    last_reader = _last_readers(index, groups)
    made_by: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(1)
    for number in range(max(wanted, default=-1) + 1):
        members, structure = groups[number], structures[number]
        names = [value for member in members for value in index.segments[member].outputs]
        if structure not in made_by or number in wanted:
            run = build_group(index, members, device)
            for name in run.inputs:
                if name not in values:
                    values[name] = model_input(index, name, generator).to(device)
                run.slots[f"value:{name}"] = values[name]
            run.run(Phase.F)
            made_by[structure] = [run.slots[f"value:{name}"] for name in names]
            if number in wanted:
                yield number, run
            del run
        values.update(zip(names, made_by[structure], strict=True))
        for name in [name for name in values if last_reader.get(name, -1) <= number]:
            del values[name]


def _last_readers(index: GraphIndex, groups: Sequence[Sequence[int]]) -> dict[str, int]:
    """For every value, the last group that reads it."""
    found: dict[str, int] = {}
    for number, members in enumerate(groups):
        for member in members:
            found.update(dict.fromkeys(index.segments[member].inputs, number))
    return found


def _names(index: GraphIndex, member: int) -> dict[str, str]:
    """Slots of a segment's arguments and outputs; other names of its trace are saved tensors."""
    segment, trace = index.segments[member], index.traces[member]
    slots = {name: f"value:{value}" for name, value in zip(trace.outputs, segment.outputs, strict=True)}
    slots |= {name: f"value:{value}" for name, value in zip(trace.inputs, segment.inputs, strict=True)}
    names, fqns = (*trace.parameters, *trace.buffers), (*segment.parameters, *segment.buffers)
    return slots | {name: f"weight:{fqn}" for name, fqn in zip(names, fqns, strict=True)}


def _forward(index: GraphIndex, member: int, device: torch.device) -> RehearsedCall:
    segment, trace = index.segments[member], index.traces[member]
    slots = _names(index, member)
    arguments, results = phase_signature(trace, Phase.F)
    stores = [(results.index(name), f"value:{value}")
              for name, value in zip(trace.outputs, segment.outputs, strict=True) if name in results]
    stores += [(position, f"{segment.name}:{name}") for position, name in enumerate(results) if name not in slots]
    return RehearsedCall(inspect.unwrap(build_phase(trace, Phase.F, device)), tuple(slots[name] for name in arguments),
                         tuple(stores))


def _gradient_sums(index: GraphIndex, member: int,
                   inside: set[int]) -> tuple[tuple[tuple[str, tuple[str, ...]], ...], dict[str, TensorSpec]]:
    """How the output gradients of a segment come together, and those that come from other groups (slot -> spec)."""
    segment, trace = index.segments[member], index.traces[member]
    sums, incoming = [], {}
    for output, name, value in zip(trace.outputs, trace.output_grads, segment.outputs, strict=True):
        if name is None:
            continue
        parts: list[str] = []
        for reader in index.readers[value]:
            if reader in inside and gives_grad(index, reader, value):
                pairs = zip(index.segments[reader].inputs, index.traces[reader].input_grads, strict=True)
                parts += [f"part:{value}:{reader}:{at}" for at, (read, grad) in enumerate(pairs)
                          if read == value and grad is not None]
        outside = any(reader not in inside and gives_grad(index, reader, value) for reader in index.readers[value])
        if outside or not parts:
            incoming[f"incoming:{value}"] = trace.specs.get(name) or argument_spec(trace, output)
            parts.append(f"incoming:{value}")
        sums.append((f"grad:{value}", tuple(parts)))
    return tuple(sums), incoming


def _backward(index: GraphIndex, member: int, phase: Phase, device: torch.device,
              sums: tuple[tuple[str, tuple[str, ...]], ...]) -> RehearsedCall:
    segment, trace = index.segments[member], index.traces[member]
    slots = _names(index, member)
    grads = zip(trace.output_grads, segment.outputs, strict=True)
    slots |= {name: f"grad:{value}" for name, value in grads if name is not None}
    arguments, results = phase_signature(trace, phase)
    stores: list[tuple[int, str]] = []
    accumulates: list[tuple[int, str]] = []
    for position, name in enumerate(results):
        if phase is Phase.I:
            stores += [(position, f"part:{value}:{member}:{at}")
                       for at, (grad, value) in enumerate(zip(trace.input_grads, segment.inputs, strict=True))
                       if grad == name]
            if name not in slots:
                stores.append((position, f"{segment.name}:{name}"))
        else:
            pairs = zip(trace.parameter_grads, segment.parameters, strict=True)
            accumulates += [(position, f"total:{fqn}") for grad, fqn in pairs if grad == name]
    reads = tuple(slots.get(name, f"{segment.name}:{name}") for name in arguments)
    return RehearsedCall(inspect.unwrap(build_phase(trace, phase, device)), reads, tuple(stores), sums,
                         tuple(accumulates))


def _put_weights(index: GraphIndex, member: int, slots: Slots, generator: torch.Generator,
                 device: torch.device) -> None:
    """Random weights of a usual size, ones for norms; positive buffers (a running variance must be)."""
    segment, trace = index.segments[member], index.traces[member]
    for fqn in (*segment.parameters, *segment.buffers):
        parameter = index.parameters[fqn]
        spec, dtype = parameter.spec, getattr(torch, parameter.spec.dtype)
        if not dtype.is_floating_point:
            tensor = torch.zeros(spec.shape, dtype=dtype)
        elif parameter.buffer or len(spec.shape) < 2:
            tensor = torch.rand(spec.shape, generator=generator).add_(0.5).to(dtype)
        else:
            tensor = torch.empty(spec.shape).normal_(0, 0.02, generator=generator).to(dtype)
        slots[f"weight:{fqn}"] = tensor.to(device)
    if member in index.acting:
        for fqn, grad in zip(segment.parameters, trace.parameter_grads, strict=True):
            if grad is not None:
                slots[f"total:{fqn}"] = torch.zeros_like(slots[f"weight:{fqn}"])


def model_input(index: GraphIndex, name: str, generator: torch.Generator) -> Tensor:
    """A made-up batch tensor: normal floats; integers within what they index; positions count, masks are all true."""
    spec = next(value.spec for value in index.graph.values if value.name == name)
    dtype = getattr(torch, spec.dtype)
    if spec.dtype == "bool" or "mask" in name:
        return torch.ones(spec.shape, dtype=dtype)
    if spec.dtype not in INTEGERS:
        return torch.randn(spec.shape, generator=generator).to(dtype)
    bound = index_bound(index, name)
    if "position" in name and spec.shape:
        counted = torch.arange(spec.shape[-1]) % (bound or spec.shape[-1])
        return counted.expand(spec.shape).to(dtype).contiguous()
    if bound is None:
        return torch.ones(spec.shape, dtype=dtype)
    return torch.randint(0, bound, spec.shape, generator=generator).to(dtype)


def index_bound(index: GraphIndex, value: str) -> int | None:
    """The size of the smallest dimension that an integer value indexes anywhere in the model; None: it indexes none.

    Followed through every operator with an integer result, across segments.
    """
    bounds: list[int] = []
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        for reader in index.readers[current]:
            segment, trace = index.segments[reader], index.traces[reader]
            carried = {name for name, source in zip(trace.inputs, segment.inputs, strict=True) if source == current}
            for operator in trace.phase_operators(Phase.F):
                if not carried.intersection(operator.inputs):
                    continue
                bounds += _indexed_sizes(trace, operator, carried)
                if operator.outputs and operator.outputs[0].dtype in INTEGERS:
                    carried.add(operator.name)
            for name, made in zip(trace.outputs, segment.outputs, strict=True):
                if name in carried and made not in seen:
                    seen.add(made)
                    pending.append(made)
    return min(bounds, default=None)


def _indexed_sizes(trace: SegmentTrace, operator: Operator, carried: set[str]) -> list[int]:
    """Sizes of the dimensions an operator indexes with one of the carried names."""
    def ref(argument: Any) -> str | None:
        return argument["ref"] if isinstance(argument, dict) and "ref" in argument else None

    args = operator.args
    base = ".".join(operator.kind.split(".")[:2])
    if base == "aten.embedding" and ref(args[1]) in carried:
        return [argument_spec(trace, ref(args[0])).shape[0]]
    if base in ("aten.gather", "aten.index_select", "aten.scatter", "aten.scatter_add") and ref(args[2]) in carried:
        return [argument_spec(trace, ref(args[0])).shape[args[1]]]
    if base.startswith("aten.nll_loss") and ref(args[1]) in carried:
        shape = argument_spec(trace, ref(args[0])).shape
        return [shape[1] if len(shape) > 1 else shape[0]]
    if base in ("aten.index", "aten.index_put", "aten._unsafe_index") and isinstance(args[1], list):
        shape = argument_spec(trace, ref(args[0])).shape
        return [shape[at] for at, item in enumerate(args[1]) if ref(item) in carried]
    return []
