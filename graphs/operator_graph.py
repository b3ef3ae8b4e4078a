"""The operator graph of one training step: what is computed, what flows, what is kept.

A model is a directed acyclic graph of *segments* (the smallest pieces the planner may place). Segments of the same
structure and shapes share one `SegmentTrace`: the operators of its F (forward), I (input gradient) and W (weight
gradient) phases, which are at once what the costs are computed from and what the runtime executes. So the file grows
with the number of distinct layers, not of layers.

Left out: control flow that depends on data, and shapes that change between microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

from mipipe.graphs.errors import GraphError
from mipipe.graphs.modes import GraphModes
from mipipe.graphs.phases import Phase as Phase
from mipipe.graphs.serialize import STRICT, Amount
from mipipe.graphs.trace_rules import check_graph, check_trace

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
               "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1, "float8_e5m2": 1,
               "uint16": 2, "uint32": 4, "uint64": 8, "complex32": 4, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
               "float8_e8m0fnu": 1}


class Role(StrEnum):
    """What a segment does in its model."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    ROUTER = "router"
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    COMBINE = "combine"
    NORM = "norm"
    HEAD = "head"
    LOSS = "loss"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor (dtype by torch's name, without ``torch.``)."""

    __pydantic_config__: ClassVar = STRICT
    shape: tuple[Amount, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Operator:
    """One node of a trace: an ATen call, executable as it stands.

    ``args`` and ``kwargs`` are JSON trees in which ``{"ref": name}`` is another operator's result or one of the
    trace's inputs; `mipipe.graphs.tracing.trace` gives the encoding of dtypes, devices and the like. ``fqn`` is the
    module path relative to the segment. ``outputs`` has one entry for each tensor returned.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    kind: str
    phase: Phase
    args: list[Any]
    kwargs: dict[str, Any]
    outputs: tuple[TensorSpec, ...]
    flops: Amount = 0
    bytes_read: Amount = 0
    bytes_written: Amount = 0
    fqn: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names this operator reads, in order of first use."""
        found: dict[str, None] = {}
        pending: list[Any] = [self.args, self.kwargs]
        while pending:
            item = pending.pop(0)
            if isinstance(item, dict) and set(item) == {"ref"}:
                found[item["ref"]] = None
            elif isinstance(item, dict):
                pending[:0] = item.values()
            elif isinstance(item, list):
                pending[:0] = item
        return tuple(found)


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor that crosses from one phase to a later one and stays in memory in between.

    ``source`` is where it is made (F or I), ``last`` the last phase that reads it. ``alias`` names the trace input
    whose storage it shares, if any. Views count once, at the size of their storage.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    num_bytes: Amount
    source: Phase
    last: Phase
    alias: str | None = None


@dataclass(frozen=True, slots=True)
class SegmentTrace:
    """The F, I and W functions of one distinct segment, as operators over explicit tensors.

    Names of the functions' arguments: ``inputs``, ``parameters``, ``buffers`` in this order feed F (and, where saved,
    I and W); ``output_grads[i]`` is the gradient argument of output i, or None where the output is not
    differentiable. Results: ``outputs[i]`` and ``buffer_updates`` of F; ``input_grads[i]`` of I and
    ``parameter_grads[j]`` of W, None where no gradient exists. All are names of operators, arguments, or None.
    """

    __pydantic_config__: ClassVar = STRICT
    digest: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    output_grads: tuple[str | None, ...]
    specs: dict[str, TensorSpec]
    operators: tuple[Operator, ...]
    outputs: tuple[str, ...]
    buffer_updates: dict[str, str]
    input_grads: tuple[str | None, ...]
    parameter_grads: tuple[str | None, ...]
    saved: tuple[SavedTensor, ...]
    workspace_bytes: dict[Phase, Amount] = field(default_factory=dict)

    def phase_operators(self, phase: Phase) -> Iterator[Operator]:
        """The operators of one phase, in an order in which they can run."""
        return (operator for operator in self.operators if operator.phase is phase)

    def flops(self, phase: Phase) -> int:
        return sum(operator.flops for operator in self.phase_operators(phase))

    def has(self, phase: Phase) -> bool:
        """Whether the phase exists: I only where an input gradient is wanted, W only where a parameter trains."""
        if phase is Phase.F:
            return True
        return any(name is not None for name in (self.input_grads if phase is Phase.I else self.parameter_grads))


@dataclass(frozen=True, slots=True)
class Tags:
    """What annotation found out about a segment: its layer, modality branch, role and expert group."""

    __pydantic_config__: ClassVar = STRICT
    layer: int | None = None
    branch: str | None = None
    role: Role = Role.OTHER
    expert_group: int | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """One use of a trace in the model: which values and parameters (by FQN) its arguments are bound to."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    fqn: str
    trace: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    tags: Tags = Tags()


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor that crosses segments. ``source`` is None for an input of the model (each rank loads those itself)."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    spec: TensorSpec
    source: str | None
    differentiable: bool


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter or buffer by its FQN; ``tied_to`` names the first FQN of the same tensor."""

    __pydantic_config__: ClassVar = STRICT
    fqn: str
    spec: TensorSpec
    trainable: bool = True
    tied_to: str | None = None
    buffer: bool = False
    persistent: bool = True


@dataclass(frozen=True, slots=True)
class OperatorGraph:
    """All segments of a model in a topological order, with values, parameters and shared traces.

    ``inputs`` are the model's batch tensors by the name of the forward argument; ``outputs`` its results, of which
    ``loss`` is the scalar to minimise. ``source`` records how to make it again (model, shapes, versions). ``modes``
    tell what its segments cost on teams; they are derived from the rest, so the graph's digest leaves them out.
    """

    FORMAT: ClassVar = "mipipe.operator_graph"
    VERSION: ClassVar = 1
    DERIVED: ClassVar = ("modes",)
    __pydantic_config__: ClassVar = STRICT
    model: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    loss: str
    segments: tuple[Segment, ...]
    values: tuple[Value, ...]
    parameters: tuple[ParameterSpec, ...]
    traces: tuple[SegmentTrace, ...]
    source: dict[str, Any] = field(default_factory=dict)
    modes: GraphModes | None = None

    def __post_init__(self) -> None:
        made = {value.name for value in self.values if value.source is None}
        traces = {trace.digest for trace in self.traces}
        seen: set[str] = set()
        for segment in self.segments:
            if segment.name in seen:
                raise GraphError(f"operator graph of {self.model}: two segments are named {segment.name!r}")
            seen.add(segment.name)
            if segment.trace not in traces:
                raise GraphError(f"segment {segment.name}: its trace {segment.trace} is not in the file")
            missing = [name for name in segment.inputs if name not in made]
            if missing:
                raise GraphError(f"segment {segment.name}: reads {missing[0]!r}, which no earlier segment makes;"
                                 " the graph has a cycle, or its segments are not in topological order")
            made.update(segment.outputs)

    def check_read(self) -> None:
        """Raise `GraphError` unless all names and arguments are what code may be made of; called for every file."""
        for trace in self.traces:
            check_trace(trace, DTYPE_BYTES)
        check_graph(self, DTYPE_BYTES)
        if self.modes is not None:
            self.modes.check({trace.digest: (len(trace.inputs), len(trace.outputs),
                                             len(trace.parameters) + len(trace.buffers)) for trace in self.traces})

    def trace(self, segment: Segment) -> SegmentTrace:
        """The trace of a segment."""
        return next(trace for trace in self.traces if trace.digest == segment.trace)
