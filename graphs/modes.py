"""Modes: how a segment runs on a team of devices, as the planner sees it (no torch).

A plan rank is a *team*: members that run one program in step, each on its part of the tensors. A *mode* says which
part. A `ModeProfile` is what one member of one distinct segment (a trace, shared by all segments of its structure)
computes, sends and keeps in one mode; a graph file holds them under its key ``modes`` (`GraphModes`). The program
itself is not in the file: `mipipe.graphs.sharding` makes it again from the segment's trace. How long a profile takes
on a device is the planner's to say.

Legend: T members. All bytes and flops are those of one member for one microbatch unless a field says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal

from mipipe.graphs.errors import GraphError, shown
from mipipe.graphs.phases import Phase
from mipipe.graphs.serialize import STRICT, Amount, Count

MODES = ("tensor", "sequence", "batch", "expert", "context")
"""The modes there are. ``tensor``: products by columns, then rows; attention by heads; tables and heads by vocabulary.
``sequence``: the same, with activations divided along the sequence between blocks. ``batch``: parameters whole, samples
divided. ``expert``: banks of experts divided by expert, all else whole. ``context``: parameters whole, queries divided
along the sequence, keys and values gathered."""


class CollectiveKind(StrEnum):
    """What the members of a team do together."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"


class Layout(StrEnum):
    """How a tensor between two segments lies on a team: all of it on every member, or divided along a dimension."""

    REPLICATED = "replicated"
    SEQUENCE = "sequence"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Collective:
    """``count`` equal collectives along an axis of the team.

    ``num_bytes``: of the whole tensor of one of them, whatever the number of members: what is reduced, what is
    gathered in the end, what is reduced and then scattered, the rows that one member holds before an all-to-all.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: CollectiveKind
    axis: str
    num_bytes: Amount
    count: Count = 1


@dataclass(frozen=True, slots=True)
class Product:
    """``count`` equal operators that have flops: matrix products, convolutions, attention.

    ``kind`` is the operator's without its overload (``aten.mm``, ``mipipe.attention``); flops and bytes are those of
    one. ``narrow`` is the smallest of a product's sizes m, n and k, by which its efficiency is known.
    """

    __pydantic_config__: ClassVar = STRICT
    kind: str
    flops: Amount
    bytes_moved: Amount
    narrow: Amount
    count: Count = 1


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """One phase on one member.

    ``flops`` and ``bytes_moved`` (read and written) are sums over all operators without collectives, ``kernels`` their
    number without views; ``products`` are those among them that have flops. ``workspace_bytes``: the most alive at
    once beside arguments and results.
    """

    __pydantic_config__: ClassVar = STRICT
    flops: Amount
    bytes_moved: Amount
    kernels: Amount
    workspace_bytes: Amount
    products: tuple[Product, ...] = ()
    collectives: tuple[Collective, ...] = ()


@dataclass(frozen=True, slots=True)
class ParameterPart:
    """What a member holds of one parameter (or buffer) of the trace.

    ``degree``: into how many equal parts it is divided (1: every member holds all of it), along ``dim`` and ``axis``.
    ``sections``: how many equal matrices lie side by side along ``dim`` (a gate and an up projection in one tensor: 2),
    or the relative widths of unequal ones, each of which is divided. ``sum_gradient``: members hold partial sums of its
    gradient, which are added up along the axes named, once per step.
    """

    __pydantic_config__: ClassVar = STRICT
    degree: Count = 1
    dim: Amount = 0
    axis: str = ""
    sections: Count | tuple[Count, ...] = 1
    sum_gradient: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of parameters and buffers on one member, by what divides them further over copies of the plan.

    ``experts``: banks of experts; ``dense``: all others, buffers included. ``trainable_...``: the part of them that
    trains (gradients and optimizer state come in proportion to it). ``summed``: of trainable parameters,
    those whose gradients are summed over the team once per step. Tensors that several segments share are in the profile
    of each.
    """

    __pydantic_config__: ClassVar = STRICT
    dense: Amount = 0
    experts: Amount = 0
    trainable_dense: Amount = 0
    trainable_experts: Amount = 0
    summed: Amount = 0


@dataclass(frozen=True, slots=True)
class KeptBytes:
    """Bytes that one member keeps between phases: made in the first and read last in the second."""

    __pydantic_config__: ClassVar = STRICT
    fi: Amount = 0
    fw: Amount = 0
    iw: Amount = 0


@dataclass(frozen=True, slots=True)
class ModeProfile:
    """What one member computes, sends and keeps of a distinct segment in one mode.

    ``trace`` is the digest of the segment's trace, ``axes`` the team: sizes by the name of the axis, slowest first.
    ``inputs`` and ``outputs`` are the layouts of the trace's inputs and outputs (and of their gradients). ``parts`` has
    an entry for each of the trace's parameters, then buffers. A phase that the trace does not have is not in
    ``phases``. ``whole``: what runs undivided though the mode divides it, each with the reason.
    """

    __pydantic_config__: ClassVar = STRICT
    trace: str
    mode: str
    axes: dict[str, Count]
    inputs: tuple[Layout, ...]
    outputs: tuple[Layout, ...]
    parts: tuple[ParameterPart, ...]
    resident: Resident
    kept: KeptBytes
    phases: dict[Phase, PhaseWork]
    whole: tuple[str, ...] = ()

    @property
    def members(self) -> int:
        """T, the devices of the team."""
        return math.prod(self.axes.values())


@dataclass(frozen=True, slots=True)
class GraphModes:
    """All profiles of a graph; a trace without a profile in a mode and team has none to offer."""

    __pydantic_config__: ClassVar = STRICT
    profiles: tuple[ModeProfile, ...] = ()
    version: Literal[1] = 1

    def find(self, trace: str, mode: str, members: int) -> ModeProfile | None:
        """The profile of a trace in a mode on a team of so many members, if there is one."""
        return next((item for item in self.profiles
                     if (item.trace, item.mode, item.members) == (trace, mode, members)), None)

    def check(self, traces: Mapping[str, tuple[int, int, int]]) -> None:
        """Raise `GraphError` unless every profile fits its trace.

        ``traces``: how many inputs, outputs, and parameters with buffers each has, by digest.
        """
        for item in self.profiles:
            where = f"modes: {shown(item.mode, quoted=False)} of trace {shown(item.trace, quoted=False)}"
            if item.mode not in MODES:
                raise GraphError(f"{where}: expected one of the modes {', '.join(MODES)}")
            if item.trace not in traces:
                raise GraphError(f"{where}: the graph has no such trace")
            found = len(item.inputs), len(item.outputs), len(item.parts)
            if found != traces[item.trace]:
                raise GraphError(f"{where}: has {found[0]} inputs, {found[1]} outputs and {found[2]} parameters,"
                                 " expected {}, {} and {}".format(*traces[item.trace]))

    @property
    def teams(self) -> tuple[tuple[str, int], ...]:
        """The modes and numbers of members that there are profiles of."""
        return tuple(dict.fromkeys((item.mode, item.members) for item in self.profiles))
