"""What fused kernels move and keep: the trace of an eager step seen as a compiler or a hand-written kernel runs it.

A trace lists one kernel per operator, and what autograd would keep. Published runs use fused kernels: runs of
elementwise operators and reductions read their inputs once, write their results once, and are run again in the backward
where that is smaller than keeping their results. Kept is a minimum cut between what cannot be made again (products,
attention, gathers, the segment's inputs) and what the backward reads, by bytes (the partitioner of torch.compile;
He and Yu, "Transcending runtime-memory tradeoffs in checkpointing by being fusion aware", MLSys 2023). Left out: the
time of running elementwise operators again, which such kernels do on values they read anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx

from mipipe.graphs.operator_graph import DTYPE_BYTES, Operator, Phase, SegmentTrace

_HEAVY = ("aten.embedding", "aten.index", "aten.scatter", "aten.sort", "aten.topk", "aten.convolution", "aten.gather",
          "aten.histc", "mipipe.")
"""Operators without products that no elementwise kernel takes in."""
_LOSS = "aten._log_softmax."
"""A loss's log-probabilities are kept, in float32: losses are kernels of their own, and do not run again."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of a phase: a product, attention or gather alone, or a run of elementwise operators (``operator``
    None). ``tensors``: the names it reads and writes, each with its bytes."""

    phase: Phase
    operator: Operator | None
    tensors: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.tensors.values())


@dataclass(frozen=True, slots=True)
class LiveTensor:
    """A tensor that stays until ``last``: its name (of the operator or input that makes it) and bytes."""

    name: str
    num_bytes: int
    last: Phase


def kernels(trace: SegmentTrace) -> list[Kernel]:
    """The kernels of a trace, runs of elementwise operators joined where one reads another's result in its phase."""
    origin = origins(trace)
    members = [operator for operator in trace.operators if moves(operator)]
    group = {operator.name: operator.name for operator in members}

    def leader(name: str) -> str:
        while group[name] != name:
            group[name] = group[group[name]]
            name = group[name]
        return name

    light = {operator.name: operator for operator in members if not heavy(operator)}
    for name, operator in light.items():
        for source in operator.inputs:
            maker = light.get(origin.get(source, source))
            if maker is not None and maker.phase is operator.phase:
                group[leader(name)] = leader(maker.name)
    runs: dict[str, list[Operator]] = {}
    for operator in members:
        runs.setdefault(leader(operator.name), []).append(operator)
    readers = _readers(trace, origin)
    return [_kernel(run, trace, origin, readers) for run in runs.values()]


def kept(trace: SegmentTrace, again: tuple[str, ...] = ()) -> list[LiveTensor]:
    """What stays after F for the backward, and after I for W, with fused kernels.

    ``again``: beginnings of the kinds of other operators that may be run again in the backward (attention).
    """
    origin = origins(trace)
    makers = {operator.name: operator for operator in trace.operators}
    wanted: dict[str, Phase] = {}
    for saved in trace.saved:
        if saved.source is Phase.F and saved.name not in (*trace.parameters, *trace.buffers):
            name = origin.get(saved.name, saved.name)
            wanted[name] = Phase.W if Phase.W in (saved.last, wanted.get(name)) else saved.last
    chosen = _cut(trace, makers, origin, wanted, again)
    after_f = [LiveTensor(name, size_of(name, trace, makers), last) for name, last in chosen.items()]
    late = {origin.get(saved.name, saved.name) for saved in trace.saved if saved.source is Phase.I}
    return after_f + [LiveTensor(name, size_of(name, trace, makers), Phase.I) for name in sorted(late)]


def made_in_backward(trace: SegmentTrace) -> frozenset[str]:
    """The names among `kept` that I makes and W reads."""
    origin = origins(trace)
    return frozenset(origin.get(saved.name, saved.name) for saved in trace.saved if saved.source is Phase.I)


def _cut(trace: SegmentTrace, makers: dict[str, Operator], origin: dict[str, str],
         wanted: dict[str, Phase], again: tuple[str, ...]) -> dict[str, Phase]:
    """The cheapest values to keep, each with the last phase that reads it or what is made of it."""
    graph = nx.DiGraph()
    free = {*trace.parameters, *trace.buffers}
    pending, seen = list(wanted), set(wanted)
    for name in wanted:
        graph.add_edge((name, 1), "sink")
    while pending:
        name = pending.pop()
        graph.add_edge((name, 0), (name, 1), capacity=max(1, size_of(name, trace, makers)))
        maker = makers.get(name)
        if maker is None or maker.phase is not Phase.F or maker.kind.startswith(_LOSS) or (
                heavy(maker) and not maker.kind.startswith(again or "-")):
            graph.add_edge("source", (name, 0))
            continue
        for source in maker.inputs:
            above = origin.get(source, source)
            if above in free:
                continue
            graph.add_edge((above, 1), (name, 0))
            if above not in seen:
                seen.add(above)
                pending.append(above)
    if "source" not in graph or "sink" not in graph:
        return {}
    _, (near, _) = nx.minimum_cut(graph, "source", "sink")
    chosen = [node[0] for node in near if node != "source" and node[1] == 0 and (node[0], 1) not in near]
    found = {}
    for name in sorted(chosen):
        below = nx.descendants(graph, (name, 0))
        last = [phase for target, phase in wanted.items() if target == name or (target, 1) in below]
        found[name] = Phase.W if Phase.W in last else Phase.I
    return found


def _kernel(run: list[Operator], trace: SegmentTrace, origin: dict[str, str], readers: dict[str, set[str]]) -> Kernel:
    names = {operator.name for operator in run}
    if len(run) == 1 and heavy(run[0]):
        operator = run[0]
        return Kernel(operator.phase, operator, {operator.name: operator.bytes_read + operator.bytes_written})
    tensors: dict[str, int] = {}
    makers = {operator.name: operator for operator in trace.operators}
    for operator in run:
        for source in operator.inputs:
            above = origin.get(source, source)
            if above not in names:
                tensors[above] = size_of(above, trace, makers)
        if readers.get(operator.name, {""}) - names:
            tensors[operator.name] = size_of(operator.name, trace, makers)
    return Kernel(run[0].phase, None, tensors)


def _readers(trace: SegmentTrace, origin: dict[str, str]) -> dict[str, set[str]]:
    """Who reads each value; results of the segment and saved tensors have the reader ``""``."""
    found: dict[str, set[str]] = {}
    for operator in trace.operators:
        if moves(operator):
            for source in operator.inputs:
                found.setdefault(origin.get(source, source), set()).add(operator.name)
    for name in (*trace.outputs, *trace.input_grads, *trace.parameter_grads, *(item.name for item in kept(trace))):
        if name is not None:
            found.setdefault(origin.get(name, name), set()).add("")
    return found


def origins(trace: SegmentTrace) -> dict[str, str]:
    """For every view the name of what it looks at (an operator that moves bytes, or an argument of the trace)."""
    found: dict[str, str] = {}
    for operator in trace.operators:
        if not moves(operator) and operator.inputs:
            found[operator.name] = found.get(operator.inputs[0], operator.inputs[0])
    return found


def moves(operator: Operator) -> bool:
    return bool(operator.flops or operator.bytes_read or operator.bytes_written)


def heavy(operator: Operator) -> bool:
    """Whether an operator is a kernel of its own, in no run of elementwise ones."""
    return bool(operator.flops) or operator.kind.startswith(_HEAVY)


def size_of(name: str, trace: SegmentTrace, makers: dict[str, Operator]) -> int:
    """Bytes of a value; of several results all but integers that only say how to go on."""
    if name in makers:
        return sum(spec.num_bytes for spec in makers[name].outputs if spec.dtype in DTYPE_BYTES)
    return trace.specs[name].num_bytes if name in trace.specs else 0
