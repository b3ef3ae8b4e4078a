"""An exported model that has been cut becomes an operator graph: boundaries, one trace for each distinct segment."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from mipipe.graphs.capture.export import Exported
from mipipe.graphs.capture.segment import SegmentCut
from mipipe.graphs.capture.unsayable import NUMBERS
from mipipe.graphs.capture.user_calls import line_of_error
from mipipe.graphs.errors import GraphError
from mipipe.graphs.models.silence import silence
from mipipe.graphs.operator_graph import OperatorGraph, ParameterSpec, Segment, SegmentTrace, TensorSpec, Value
from mipipe.graphs.tracing.dynamic_rows import stand_ins
from mipipe.graphs.tracing.joint import output_mask
from mipipe.graphs.tracing.module_paths import inside
from mipipe.graphs.tracing.partition import trace_segment
from mipipe.graphs.tracing.trace import dtype_name, encode, identifier

TraceProgress = Callable[[str], None]


@dataclass(frozen=True)
class BoundedCut:
    """A cut with its boundary: the nodes its function takes and gives, in canonical order."""

    cut: SegmentCut
    inputs: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]
    buffers: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    structure: str

    @property
    def arguments(self) -> tuple[fx.Node, ...]:
        return (*self.inputs, *self.parameters, *self.buffers)

    def path_of(self, node: fx.Node) -> str:
        """The module that a node was recorded in, relative to the segment."""
        stack, base = node.meta.get("stack", ()), self.cut.name.partition("#")[0].split(".")
        path = stack[-1][0].split(".") if stack else base
        return ".".join(path[_shared(path, base):])

    def function(self, *tensors: Tensor) -> list[Tensor]:
        """Run the nodes on tensors: what is traced (never what is executed in training)."""
        values: dict[fx.Node, Any] = dict(zip(self.arguments, tensors, strict=True))
        device = tensors[0].device if tensors else torch.device("cpu")
        counts = stand_ins(self.cut.nodes)

        def value(item: Any) -> Any:
            return values[item] if isinstance(item, fx.Node) else device if isinstance(item, torch.device) else item

        for node in self.cut.nodes:
            args, kwargs = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), value)
            if node in counts:
                kwargs = {**kwargs, "stand_ins": counts[node]}
            with inside(self.path_of(node)):
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return [values[node] for node in self.outputs]


def assemble(name: str, exported: Exported, cuts: Sequence[SegmentCut], parameters: Sequence[ParameterSpec],
             say: TraceProgress) -> OperatorGraph:
    """The operator graph of an exported model that has been cut."""
    pieces = _pieces(exported, cuts)
    loss = _find_loss(exported)
    tied = {item.fqn: item.tied_to or item.fqn for item in parameters}
    fqns = {node: tied[fqn] for table in (exported.buffers, exported.parameters) for fqn, node in table.items()}
    trainable = {item.fqn for item in parameters if item.trainable}
    if not trainable:
        raise GraphError(f"model {name}: nothing in it trains (all {len(parameters)} tensors are frozen);"
                         " leave some with requires_grad, or freeze less")
    asks = _asks_gradients(pieces, {node for node, fqn in fqns.items() if fqn in trainable})
    traces, kept, wanted = _trace_all(pieces, fqns, asks, exported.outputs[loss], say)
    if not any(any(trace.parameter_grads) for trace in traces.values()):
        raise GraphError(f"model {name}: its loss {loss!r} has no gradient for any of the {len(trainable)} parameters"
                         " that train; it is detached, computed under no_grad, or does not depend on them")
    names = _value_names(exported, pieces)
    values = [Value(key, _spec(node), None, node in wanted) for key, node in exported.inputs.items()]
    segments = []
    for piece, digest in zip(pieces, kept, strict=True):
        segments.append(Segment(
            piece.cut.name, piece.cut.name.partition("#")[0], digest, tuple(names[node] for node in piece.inputs),
            tuple(names[node] for node in piece.outputs), tuple(fqns[node] for node in piece.parameters),
            tuple(fqns[node] for node in piece.buffers)))
        values += [Value(names[node], _spec(node), piece.cut.name, node in wanted) for node in piece.outputs]
    outputs = tuple(dict.fromkeys(names[node] for node in exported.outputs.values()))
    return OperatorGraph(name, tuple(exported.inputs), outputs, names[exported.outputs[loss]], tuple(segments),
                         tuple(values), tuple(parameters), tuple(traces.values()))


def _spec(node: fx.Node) -> TensorSpec:
    """The spec of a node; an error if a size depends on data."""
    value = node.meta["val"]
    if not isinstance(value, Tensor) or any(not isinstance(size, int) for size in value.shape):
        raise GraphError(f"value {node.name} ({node.target}): found {value!r}, expected a tensor of fixed shape; make"
                         " sizes that depend on data arguments of the model")
    return TensorSpec(tuple(value.shape), dtype_name(value.dtype))


def _find_loss(exported: Exported) -> str:
    scalars = [name for name, node in exported.outputs.items() if node.meta["val"].dim() == 0
               and node.meta["val"].is_floating_point()]
    chosen = "loss" if "loss" in scalars else scalars[0] if len(scalars) == 1 else None
    if chosen is None:
        found = ", ".join(f"{name} {list(node.meta['val'].shape)}" for name, node in exported.outputs.items())
        raise GraphError(f"the model returns {found or 'nothing'}: expected one scalar loss, or one named 'loss';"
                         " give a loss function")
    return chosen


def _pieces(exported: Exported, cuts: Sequence[SegmentCut]) -> list[BoundedCut]:
    """Each cut with its boundary."""
    shared = _repeated([node for cut in cuts for node in cut.nodes])
    home = {node: cut.name for cut in cuts for node in cut.nodes if node not in shared}
    read = {item for cut in cuts for node in cut.nodes for item in node.all_input_nodes
            if item in home and home[item] != cut.name}
    given = set(exported.outputs.values())
    states = (set(exported.parameters.values()), set(exported.buffers.values()))
    pieces = []
    for index, cut in enumerate(cuts):
        inside = set(cut.nodes)
        outside = dict.fromkeys(item for node in cut.nodes for item in node.all_input_nodes if item not in inside)
        parameters, buffers = (tuple(node for node in outside if node in state) for state in states)
        inputs = tuple(node for node in outside if node not in states[0] and node not in states[1])
        first = {node for later in cuts[:index] for node in later.nodes} if given & shared else set()
        outputs = tuple(node for node in cut.nodes if node in read or (node in given and node not in first))
        piece = BoundedCut(cut, inputs, parameters, buffers, outputs, "")
        pieces.append(replace(piece, structure=_structure(piece)))
    return pieces


def _repeated(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    return {node for node in nodes if node in seen or seen.add(node)}  # type: ignore[func-returns-value]


def _structure(piece: BoundedCut) -> str:
    """A hash that two cuts share exactly if one function computes both: operators, constants, shapes, wiring."""
    number = {node: index for index, node in enumerate((*piece.arguments, *piece.cut.nodes))}

    def local(item: Any) -> Any:
        return f"%{number[item]}" if isinstance(item, fx.Node) else item

    lines: list[Any] = [[list(_spec(node).shape), _spec(node).dtype] for node in piece.arguments]
    lines.append([len(piece.inputs), len(piece.parameters), [number[node] for node in piece.outputs]])
    for node in piece.cut.nodes:
        args, kwargs = torch.fx.node.map_aggregate((node.args, dict(node.kwargs)), local)
        lines.append([str(getattr(node.target, "__qualname__", node.target)), str(node.target), encode(args),
                      {key: encode(item) for key, item in kwargs.items()}])
    return hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()


def _asks_gradients(pieces: Sequence[BoundedCut], trainable: set[fx.Node]) -> dict[str, tuple[bool, ...]]:
    """For each cut, which of its inputs and parameters require gradients (downstream of something that trains)."""
    requiring, cache = set(trainable), {}
    asks: dict[str, tuple[bool, ...]] = {}
    for piece in pieces:
        flags = tuple(node in requiring for node in piece.arguments)
        asks[piece.cut.name] = flags
        key = (piece.structure, flags)
        if key not in cache:
            with _naming(piece):
                cache[key] = output_mask(piece.function, [_spec(node) for node in piece.arguments], flags)
        requiring |= {node for node, flag in zip(piece.outputs, cache[key], strict=True) if flag}
    return asks


def _trace_all(pieces: Sequence[BoundedCut], fqns: Mapping[fx.Node, str], asks: Mapping[str, tuple[bool, ...]],
               loss: fx.Node, say: TraceProgress) -> tuple[dict[str, SegmentTrace], list[str], set[fx.Node]]:
    """Traces by digest, each piece's digest, and the values whose gradient some segment computes.

    From the last segment to the first: a segment's outputs get a gradient where a later segment computes one.
    """
    wanted = {loss}
    cache: dict[Any, SegmentTrace] = {}
    kept: list[str] = []
    for piece in reversed(pieces):
        flags, ends = asks[piece.cut.name], tuple(node in wanted for node in piece.outputs)
        key = (piece.structure, flags, ends)
        if key not in cache:
            say(f"tracing {piece.cut.name} ({len(cache) + 1} distinct so far)")
            with _naming(piece):
                cache[key] = _trace(piece, fqns, flags, ends)
        trace = cache[key]
        wanted |= {node for node, grad in zip(piece.inputs, trace.input_grads, strict=True) if grad is not None}
        kept.append(trace.digest)
    return {trace.digest: trace for trace in reversed(cache.values())}, kept[::-1], wanted


def _trace(piece: BoundedCut, fqns: Mapping[fx.Node, str], flags: Sequence[bool], ends: Sequence[bool]) -> SegmentTrace:
    base = piece.cut.name.partition("#")[0]
    taken: set[str] = set()

    def unique(text: str) -> str:
        name, count = identifier(text), 0
        while name in taken:
            name, count = f"{identifier(text)}_{count}", count + 1
        taken.add(name)
        return name

    inputs = {unique(f"in_{index}"): _spec(node) for index, node in enumerate(piece.inputs)}
    states = [{unique("p_" + _relative(fqns[node], base)): _spec(node) for node in nodes}
              for nodes in (piece.parameters, piece.buffers)]
    split = len(inputs), len(inputs) + len(states[0])
    return trace_segment(piece.function, inputs, *states, differentiable=flags[:split[0]],
                         trainable=flags[split[0]:split[1]], wanted=ends)


def _relative(fqn: str, base: str) -> str:
    """The part of an FQN below the deepest module it shares with ``base``."""
    path = fqn.split(".")
    return ".".join(part for part in path[_shared(path, base.split(".")):] if not part.isdigit()) or path[-1]


def _shared(path: Sequence[str], other: Sequence[str]) -> int:
    """How many parts two module paths have in common from the start."""
    pairs = enumerate(zip(path, other, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(path), len(other)))


@contextlib.contextmanager
def _naming(piece: BoundedCut) -> Iterator[None]:
    """Inside: an error of torch names the segment and the model's line, and becomes a `GraphError`."""
    try:
        with silence():
            yield
    except GraphError as error:
        text = str(error)
        raise GraphError(text if text.startswith(("model ", "segment ")) else f"segment {piece.cut.name}: {text}"
                         ) from error
    except Exception as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        advice = f"; {NUMBERS}" if "DataDependent" in type(error).__name__ else ""
        if stand_ins(piece.cut.nodes):
            advice += ("; masks may pick any number of rows, also all masks together: put rows back by their places"
                       " (index_add_, x[mask] = rows), not by sorting")
        raise GraphError(f"segment {piece.cut.name}: its backward cannot be traced{line_of_error([error])}:"
                         f" {type(error).__name__}: {line[:300]}{advice}") from error


def _value_names(exported: Exported, pieces: Sequence[BoundedCut]) -> dict[fx.Node, str]:
    """Names of values: model inputs and outputs by theirs, the rest by their node's."""
    names: dict[fx.Node, str] = {node: key for key, node in exported.inputs.items()}
    taken = set(names.values())
    for key, node in exported.outputs.items():
        if node not in names:
            names[node] = key
            taken.add(key)
    for piece in pieces:
        for node in piece.outputs:
            if node not in names:
                name, count = node.name, 0
                while name in taken:
                    name, count = f"{node.name}_{count}", count + 1
                names[node] = name
                taken.add(name)
    return names
