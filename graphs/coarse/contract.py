"""From a grouping of segments to a `CoarseGraph`: totals, saved storages, values between groups.

Every total is the sum over the group's segments, except where segments share memory: a storage that several segments
of a group keep counts once, parameters count once in a group, and an alias of a parameter or buffer counts nothing (it
is resident anyway). Left out: two groups that keep the same storage on one rank count it twice, on the safe side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from mipipe.graphs.coarse.graph import CoarseGraph, GroupValue, OpGroup
from mipipe.graphs.coarse.graph_index import GraphIndex, gives_grad
from mipipe.graphs.operator_graph import Phase, Role, SavedTensor, Segment, SegmentTrace, Tags
from mipipe.graphs.serialize import digest

PHASES = (Phase.F, Phase.I, Phase.W)


def contract(index: GraphIndex, groups: Sequence[Sequence[int]], notes: dict[str, str] | None = None,
             graph_digest: str | None = None) -> CoarseGraph:
    """The coarse graph whose g-th group holds the segments ``groups[g]`` (indices in ascending order).

    ``graph_digest``: the graph's, where it is known already.

    Raises:
        GraphError: the groups are not in a topological order, or not convex.
    """
    group_of = {member: number for number, members in enumerate(groups) for member in members}
    assert len(group_of) == len(index.segments) == sum(map(len, groups)), "every segment is in exactly one group"
    names = _names(index, groups)
    values = []
    for value in index.graph.values:
        source = index.source[value.name]
        if source < 0:
            continue
        home = group_of[source]
        targets = sorted({group_of[reader] for reader in index.readers[value.name]} - {home})
        if targets:
            size = index.num_bytes[value.name]
            outside = any(group_of[reader] != home and gives_grad(index, reader, value.name)
                          for reader in index.readers[value.name])
            grad = size if outside and value.name in index.returns_grad else None
            values.append(GroupValue(value.name, home, tuple(targets), size, grad))
    single = exchanging(index) | {member for member, trace in enumerate(index.traces) if trace.buffer_updates}
    op_groups = tuple(_group(index, members, name, not single.isdisjoint(members))
                      for members, name in zip(groups, names, strict=True))
    return CoarseGraph(index.graph.model, graph_digest or digest(index.graph), op_groups, tuple(values), notes or {})


def layer_stack(segment: Segment) -> str:
    """The module that numbers a segment's layer (``model.encoder.layers``); '' outside layers or where none does."""
    parts = segment.fqn.split(".")
    return ".".join(parts[:parts.index(str(segment.tags.layer))]) if str(segment.tags.layer) in parts else ""


def exchanging(index: GraphIndex) -> set[int]:
    """The segments of expert-parallel layers: each dispatch, and all that read what it gives (experts and combine)."""
    dispatches = {member for member, segment in enumerate(index.segments)
                  if segment.tags.role is Role.DISPATCH and is_collective(index.traces[member])}
    return dispatches | {reader for member in dispatches for value in index.segments[member].outputs
                         for reader in index.readers[value]}


def _group(index: GraphIndex, members: Sequence[int], name: str, single: bool) -> OpGroup:
    """The totals of one group."""
    phases = [phase for phase in PHASES if any(index.runs(member, phase) for member in members)]
    running = {phase: [index.traces[member] for member in members if index.runs(member, phase)] for phase in phases}
    inside = set(members)
    outer = {value for member in members for value in index.segments[member].inputs
             if index.source[value] not in inside}
    parameters = {_owner(index, fqn) for member in members
                  for fqn in (*index.segments[member].parameters, *index.segments[member].buffers)}
    size = {fqn: index.parameters[fqn].spec.num_bytes for fqn in parameters}
    for member in members:  # of a bank whose experts are shared, a rank holds its part
        share = index.shares.get(index.segments[member].name)
        if share is not None and index.segments[member].tags.role is Role.EXPERTS:
            banks = {_owner(index, fqn) for fqn in index.segments[member].parameters}
            size.update({fqn: index.parameters[fqn].spec.num_bytes // share.ranks for fqn in banks})
    saved = saved_bytes(index, members)
    return OpGroup(
        name,
        tuple(index.segments[member].name for member in members),
        {phase: sum(trace.flops(phase) for trace in running[phase]) for phase in phases},
        {phase: sum(traffic_bytes(trace, phase) for trace in running[phase]) for phase in phases},
        sum(size.values()),
        sum(size[fqn] for fqn in parameters if index.parameters[fqn].trainable and not index.parameters[fqn].buffer),
        *saved,
        sum(index.num_bytes[value] for value in outer),
        {phase: _workspace(index, members, phase) for phase in phases},
        _tags(index, members),
        _structure(index, members),
        all(is_collective(index.traces[member]) for member in members),
        single,
    )


def traffic_bytes(trace: SegmentTrace, phase: Phase) -> int:
    """Bytes read and written by a phase's operators."""
    return sum(operator.bytes_read + operator.bytes_written for operator in trace.phase_operators(phase))


def is_collective(trace: SegmentTrace) -> bool:
    """Whether a segment is a collective: an all-to-all of expert parallelism, without products of its own."""
    return (any("all_to_all" in operator.kind for operator in trace.phase_operators(Phase.F))
            and not any(trace.flops(phase) for phase in Phase))


def saved_bytes(index: GraphIndex, members: Sequence[int]) -> tuple[int, int, int]:
    """Bytes kept from F to I, from F to W, and from I to W: the union of the members' storages.

    A storage that one segment reads in I and another in W is kept to W; one that exists from F on counts from F. A
    member without I, such as an embedding, gets its gradients in the group's I and reads them in W.
    """
    kept: dict[tuple[str, str], tuple[int, bool, bool]] = {}
    for member in members:
        for tensor in index.traces[member].saved if member in index.acting else ():
            storage = _storage(index, member, tensor)
            if storage is not None:
                size, from_f, to_w = kept.get(storage, (0, False, False))
                kept[storage] = (max(size, tensor.num_bytes), from_f or tensor.source is Phase.F,
                                 to_w or tensor.last is Phase.W)
    for storage, size in _late_gradients(index, members):
        kept.setdefault(storage, (size, False, True))
    fi = sum(size for size, from_f, to_w in kept.values() if not to_w)
    fw = sum(size for size, from_f, to_w in kept.values() if to_w and from_f)
    iw = sum(size for size, from_f, to_w in kept.values() if to_w and not from_f)
    return fi, fw, iw


def _late_gradients(index: GraphIndex, members: Sequence[int]) -> Iterator[tuple[tuple[str, str], int]]:
    """Gradients that arrive by the group's I for members whose W alone reads them: storage, bytes."""
    acting = [member for member in members if member in index.acting]
    late = [member for member in acting if not index.traces[member].has(Phase.I)]
    for member in late if len(late) < len(acting) else ():
        trace = index.traces[member]
        read = {name for operator in trace.phase_operators(Phase.W) for name in operator.inputs}
        for name, value in zip(trace.output_grads, index.segments[member].outputs, strict=True):
            if name in read:
                yield ("gradient", value), trace.specs[name].num_bytes


def _storage(index: GraphIndex, member: int, tensor: SavedTensor) -> tuple[str, str] | None:
    """What identifies a kept storage within a group; None for parameters and buffers.

    A gradient is one storage for maker and reader only where there is one reader: more are summed into a new one.
    """
    segment, trace = index.segments[member], index.traces[member]
    name = tensor.alias or index.twins[trace.digest].get(tensor.name, tensor.name)
    if name in trace.parameters or name in trace.buffers:
        return None
    if name in trace.inputs:
        return "value", segment.inputs[trace.inputs.index(name)]
    if name in trace.outputs:
        return "value", segment.outputs[trace.outputs.index(name)]
    if name in trace.output_grads:
        return "gradient", segment.outputs[trace.output_grads.index(name)]
    if name in trace.input_grads:
        value = segment.inputs[trace.input_grads.index(name)]
        if len(index.readers[value]) == 1:
            return "gradient", value
    return segment.name, name


def _workspace(index: GraphIndex, members: Sequence[int], phase: Phase) -> int:
    """Largest transient memory while the group's phase runs.

    A member's own intermediates, and, from the member that makes them (or from the start) to the last that reads them
    (or to the end): values in F, gradients in I, weight gradients in W until they are added up. Kept storages are
    counted elsewhere.
    """
    order = list(members) if phase is Phase.F else list(reversed(members))
    change = [0] * (len(order) + 1)
    for first, last, size in _waiting(index, order, phase):
        change[first] += size
        change[last + 1] -= size
    peak = waiting = 0
    for member, difference in zip(order, change, strict=False):
        waiting += difference
        own = index.traces[member].workspace_bytes.get(phase, 0) if index.runs(member, phase) else 0
        peak = max(peak, waiting + own)
    return peak


def _waiting(index: GraphIndex, order: Sequence[int], phase: Phase) -> Iterator[tuple[int, int, int]]:
    """Tensors that wait while members run in ``order``: (first step, last step, bytes)."""
    step = {member: position for position, member in enumerate(order)}
    end = len(order) - 1
    kept = {storage for member in order for tensor in index.traces[member].saved
            if (storage := _storage(index, member, tensor)) is not None}
    if phase is Phase.W:
        for member in filter(index.acting.__contains__, order):
            trace = index.traces[member]
            pairs = zip(trace.parameters, trace.parameter_grads, strict=True)
            made = [name for name, grad in pairs if grad is not None]
            yield step[member], step[member], sum(trace.specs[name].num_bytes for name in made)
    touched = dict.fromkeys(value for member in order
                            for value in (*index.segments[member].inputs, *index.segments[member].outputs))
    for value in touched:
        maker = step.get(index.source[value])
        readers = [step[reader] for reader in index.readers[value] if reader in step]
        leaves = len(readers) < len(index.readers[value])
        size = index.num_bytes[value]
        if phase is Phase.F and index.source[value] >= 0 and ("value", value) not in kept:
            last = end if leaves and maker is not None else max(readers, default=maker or 0)
            yield 0 if maker is None else maker, last, size
        elif phase is Phase.I and value in index.returns_grad and ("gradient", value) not in kept:
            first = 0 if maker is not None and leaves else min(readers, default=0)
            yield first, end if maker is None else maker, size


def _owner(index: GraphIndex, fqn: str) -> str:
    return index.parameters[fqn].tied_to or fqn


def _tags(index: GraphIndex, members: Sequence[int]) -> Tags:
    """Tags the members agree on; the role is that of the most expensive member."""
    tags = [index.segments[member].tags for member in members]

    def common(values: list[Any]) -> object:
        known = {value for value in values if value is not None}
        return known.pop() if len(known) == 1 else None

    costs: dict[Role, int] = {}
    for member, tag in zip(members, tags, strict=True):
        trace = index.traces[member]
        work = sum(trace.flops(phase) for phase in PHASES)
        costs[tag.role] = costs.get(tag.role, 0) + max(work, 1)
    role = max(costs, key=lambda role: (costs[role], role.value))
    return Tags(common([tag.layer for tag in tags]), common([tag.branch for tag in tags]), role,  # type: ignore[arg-type]
                common([tag.expert_group for tag in tags]))  # type: ignore[arg-type]


def _structure(index: GraphIndex, members: Sequence[int]) -> str:
    """A digest of the members' traces in order and of how they are wired among each other."""
    position = {member: number for number, member in enumerate(members)}
    outside: dict[str, int] = {}
    wiring = []
    for member in members:
        segment = index.segments[member]
        inputs: list[object] = []
        for value in segment.inputs:
            source = index.source[value]
            if source in position:
                inputs.append([position[source], index.segments[source].outputs.index(value)])
            else:
                inputs.append(outside.setdefault(value, len(outside)))
        wiring.append([segment.trace, inputs])
    return hashlib.sha256(json.dumps(wiring).encode()).hexdigest()[:16]


def _names(index: GraphIndex, groups: Sequence[Sequence[int]]) -> list[str]:
    """A readable, unique name for each group: the module that holds just its segments, or first..last segment."""
    paths = [segment.fqn.split(".") for segment in index.segments]
    names = []
    for members in groups:
        first, last = index.segments[members[0]].name, index.segments[members[-1]].name
        prefix = _common_prefix([paths[member] for member in members])
        if len(members) == 1:
            names.append(first)
        elif prefix and sum(path[:len(prefix)] == prefix for path in paths) == len(members):
            names.append(".".join(prefix))
        else:
            names.append(f"{first}..{last}")
    if len(set(names)) < len(names):  # a module path may equal another group's segment name
        names = [f"{index.segments[members[0]].name}..{index.segments[members[-1]].name}" if len(members) > 1 else name
                 for members, name in zip(groups, names, strict=True)]
    return names


def _common_prefix(paths: Sequence[Sequence[str]]) -> list[str]:
    prefix: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        prefix.append(parts[0])
    return prefix
