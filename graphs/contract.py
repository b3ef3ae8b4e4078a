"""From a grouping of segments to a `CoarseGraph`: totals, saved storages, values between groups.

Every total is the sum over the group's segments, except where segments share memory: a storage that several segments
of a group keep counts once, parameters count once in a group, and an alias of a parameter or buffer counts nothing (it
is resident anyway). Left out: two groups that keep the same storage on one rank count it twice, on the safe side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mipipe.graphs.coarse_graph import CoarseGraph, GroupValue, OpGroup
from mipipe.graphs.exchange import Share, expert_shares
from mipipe.graphs.operator_graph import OperatorGraph, Parameter, Phase, Role, SavedTensor, Segment, SegmentTrace, Tags
from mipipe.graphs.serialize import digest

PHASES = (Phase.F, Phase.I, Phase.W)
LISTS_OF_VIEWS = ("aten.split.", "aten.split_with_sizes.", "aten.chunk.", "aten.unbind.")


@dataclass(frozen=True)
class GraphIndex:
    """An operator graph with its names resolved once.

    ``source[v]`` is the index of the segment that makes value v (-1: an input of the model), ``readers[v]`` the
    indices of those that read it, in order. ``acting`` are the segments whose I and W run: those with a gradient from
    the loss. ``returns_grad`` are the values whose gradient some reader gives and the maker takes. (The runtime decides
    the same from the graph alone, `mipipe.runtime.flow`.) ``twins[trace][name]`` is the output or input gradient whose
    storage a saved tensor of another name shares. ``shares``: see `mipipe.graphs.exchange`.
    """

    graph: OperatorGraph
    traces: tuple[SegmentTrace, ...]
    parameters: dict[str, Parameter]
    num_bytes: dict[str, int]
    source: dict[str, int]
    readers: dict[str, tuple[int, ...]]
    acting: frozenset[int]
    returns_grad: frozenset[str]
    twins: dict[str, dict[str, str]]
    shares: dict[str, Share]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.graph.segments

    def runs(self, member: int, phase: Phase) -> bool:
        """Whether a segment's phase exists in a training step."""
        return phase is Phase.F or (member in self.acting and self.traces[member].has(phase))


def index_graph(graph: OperatorGraph) -> GraphIndex:
    """The index of a graph."""
    by_digest = {trace.digest: trace for trace in graph.traces}
    traces = tuple(by_digest[segment.trace] for segment in graph.segments)
    source = {value.name: -1 for value in graph.values}
    readers: dict[str, list[int]] = {value.name: [] for value in graph.values}
    for number, segment in enumerate(graph.segments):
        for name in segment.outputs:
            source[name] = number
        for name in dict.fromkeys(segment.inputs):
            readers[name].append(number)
    acting, returned = _gradient_flow(graph, traces)
    return GraphIndex(graph, traces, {parameter.fqn: parameter for parameter in graph.parameters},
                      {value.name: value.spec.num_bytes for value in graph.values}, source,
                      {name: tuple(numbers) for name, numbers in readers.items()}, acting, returned,
                      {trace.digest: _twins(trace) for trace in graph.traces}, expert_shares(graph))


def _twins(trace: SegmentTrace) -> dict[str, str]:
    """Saved tensors that share a storage with an output or an input gradient, by following views to their origin."""
    makers = {operator.name: operator for operator in trace.operators}

    def root(name: str) -> str:
        maker = makers.get(name)
        if maker is None or not maker.inputs:
            return name
        parent = makers.get(maker.inputs[0])
        if maker.kind == "getitem":  # a part of a list of views, or one of several results
            return root(parent.inputs[0]) if parent is not None and parent.kind.startswith(LISTS_OF_VIEWS) else name
        moved = maker.flops or maker.bytes_read or maker.bytes_written
        return name if moved else root(maker.inputs[0])

    results = {root(name): name for name in (*trace.input_grads, *trace.outputs) if name is not None}
    return {tensor.name: results[at] for tensor in trace.saved if (at := root(tensor.name)) in results}


def _gradient_flow(graph: OperatorGraph, traces: Sequence[SegmentTrace]) -> tuple[frozenset[int], frozenset[str]]:
    """Which segments act in the backward pass, and which values get a gradient that is used."""
    reached = {graph.loss}
    acting: set[int] = set()
    needed: set[str] = set()
    for number in reversed(range(len(traces))):
        segment, trace = graph.segments[number], traces[number]
        taken = {value for value, name in zip(segment.outputs, trace.output_grads, strict=True) if name is not None}
        if not taken & reached or not (trace.has(Phase.I) or trace.has(Phase.W)):
            continue
        acting.add(number)
        needed |= taken
        reached |= {value for value, name in zip(segment.inputs, trace.input_grads, strict=True) if name is not None}
    return frozenset(acting), frozenset(needed & reached - {graph.loss})


def contract(index: GraphIndex, groups: Sequence[Sequence[int]], notes: dict[str, str] | None = None) -> CoarseGraph:
    """The coarse graph whose g-th group holds the segments ``groups[g]`` (indices in ascending order).

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
    op_groups = tuple(_group(index, members, name) for members, name in zip(groups, names, strict=True))
    return CoarseGraph(index.graph.model, digest(index.graph), op_groups, tuple(values), notes or {})


def layer_stack(segment: Segment) -> str:
    """The module that numbers a segment's layer (``model.encoder.layers``); '' outside layers or where none does."""
    parts = segment.fqn.split(".")
    return ".".join(parts[:parts.index(str(segment.tags.layer))]) if str(segment.tags.layer) in parts else ""


def gives_grad(index: GraphIndex, reader: int, value: str) -> bool:
    """Whether a segment returns a gradient for one of its inputs."""
    if reader not in index.acting:
        return False
    pairs = zip(index.segments[reader].inputs, index.traces[reader].input_grads, strict=True)
    return any(name == value and grad is not None for name, grad in pairs)


def _group(index: GraphIndex, members: Sequence[int], name: str) -> OpGroup:
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
        {phase: sum(moved_bytes(trace, phase) for trace in running[phase]) for phase in phases},
        sum(size.values()),
        sum(size[fqn] for fqn in parameters if index.parameters[fqn].trainable and not index.parameters[fqn].buffer),
        *saved,
        sum(index.num_bytes[value] for value in outer),
        {phase: _workspace(index, members, phase) for phase in phases},
        _tags(index, members),
        _structure(index, members),
        all(is_collective(index.traces[member]) for member in members),
    )


def moved_bytes(trace: SegmentTrace, phase: Phase) -> int:
    """Bytes read and written by a phase's operators."""
    return sum(operator.bytes_read + operator.bytes_written for operator in trace.phase_operators(phase))


def is_collective(trace: SegmentTrace) -> bool:
    """Whether a segment is a collective: an all-to-all of expert parallelism, without products of its own."""
    return (any("all_to_all" in operator.kind for operator in trace.phase_operators(Phase.F))
            and not any(trace.flops(phase) for phase in Phase))


def saved_bytes(index: GraphIndex, members: Sequence[int]) -> tuple[int, int, int]:
    """Bytes kept from F to I, from F to W, and from I to W: the union of the members' storages.

    A storage that one segment reads in I and another in W is kept to W; one that exists from F on counts from F.
    """
    kept: dict[tuple[str, str], tuple[int, bool, bool]] = {}
    for member in members:
        for tensor in index.traces[member].saved if member in index.acting else ():
            storage = _storage(index, member, tensor)
            if storage is not None:
                size, from_f, to_w = kept.get(storage, (0, False, False))
                kept[storage] = (max(size, tensor.num_bytes), from_f or tensor.source is Phase.F,
                                 to_w or tensor.last is Phase.W)
    fi = sum(size for size, from_f, to_w in kept.values() if not to_w)
    fw = sum(size for size, from_f, to_w in kept.values() if to_w and from_f)
    iw = sum(size for size, from_f, to_w in kept.values() if to_w and not from_f)
    return fi, fw, iw


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

    def common(values: list) -> object:
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
