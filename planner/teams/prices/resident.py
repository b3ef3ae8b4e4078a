"""What of a piece stays on a member: weights, gradients, optimizer state, and what those that hold the same of it send
each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mipipe.graphs.costs.collectives import collective_ns
from mipipe.graphs.modes import CollectiveKind, ParameterPart
from mipipe.graphs.operator_graph import DTYPE_BYTES, Phase
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.piece_cost import PhaseCost, PieceCost, phase_beside


@dataclass(frozen=True, slots=True)
class HeldLength:
    """Bytes of a member's parameters of one ``length``: of the dimension along which devices that hold the same would
    divide them (`mipipe.graphs.sharding.gathered`; 0: of what stays whole, buffers). Dense, or of experts: ``held``;
    those that train; and those whose gradients are sums over the tensor axis."""

    length: int
    experts: bool
    held: int
    trained: int
    summed: int


@dataclass(frozen=True, slots=True)
class PieceWork:
    """A piece's seconds and bytes of one microbatch on one member, and its parameters (``lengths``), as `PieceCost` has
    them; what F needs beside what stays, and where nothing but its inputs does (``ahead_again``); how many collectives
    it waits for."""

    phases: dict[Phase, PhaseCost]
    kept: int
    late: int
    until_w: int
    buffers: int
    workspace: int
    ahead: int
    ahead_again: int
    collectives: int
    lengths: tuple[HeldLength, ...]


@dataclass(frozen=True, slots=True)
class PieceStays:
    """What of a `PieceWork` is in proportion to the microbatch, or the same for all: bytes of a microbatch as captured,
    of which the share ``left`` is still to divide among members; ``alive``: the most that F has in memory beside what
    stays, and where nothing does."""

    left: float
    kept: int
    late: int
    until_w: int
    lengths: tuple[HeldLength, ...]
    alive: tuple[int, int]


@dataclass(slots=True)
class SegmentWork:
    """One segment's part of a `PieceWork`: seconds of its phases, bytes alive in each of them beside arguments and
    results, the largest tensor of a collective in each, and how many collectives it waits for."""

    phases: dict[Phase, PhaseCost] = field(default_factory=dict)
    alive: dict[Phase, int] = field(default_factory=dict)
    largest: dict[Phase, int] = field(default_factory=dict)
    collectives: int = 0


def divided_length(shape: Sequence[int], part: ParameterPart, dim: int) -> int:
    """The length of a dimension of a member's part of a parameter; 0 where there is no such dimension."""
    if dim >= len(shape):
        return 0
    return shape[dim] // part.degree if part.dim == dim else shape[dim]


def held_cost(machine: Machine, degrees: Degrees, work: PieceWork, phases: Mapping[Phase, PhaseCost],
              kept: tuple[int, int, int]) -> PieceCost:
    """The price of a piece whose phases take so long, and which keeps so much (the first bytes of `PieceCost`): with
    bytes that stay, what devices that hold the same do with them at the end of a step, and with ``zero`` 3 in every
    microbatch. What does not divide among these devices each has whole, whatever ``zero`` is."""
    found = dict(phases)
    size, summed_bytes, state_bytes = DTYPE_BYTES[machine.dtype], machine.gradient_bytes, machine.state_bytes
    classes = []
    for experts, alike, stride in ((True, degrees.alike_experts,
                                    degrees.expert if degrees.expert > 1 else degrees.tensor),
                                   (False, degrees.alike, degrees.tensor)):
        for zero in dict.fromkeys((degrees.zero, 0)):
            own = [item for item in work.lengths if item.experts is experts
                   and zero == (degrees.zero if item.length and not item.length % alike else 0)]
            held, trains, adds = (sum(sizes) for sizes in zip((0, 0, 0), *(
                (item.held, item.trained, item.summed) for item in own), strict=True))
            classes += [(held - adds, trains - adds, alike, stride, 1, zero),
                        (adds, adds, alike, stride, degrees.tensor, zero)]
    weights = gradients = state = 0
    reduce = gather = touched = 0.0
    gathered = ahead = 0
    for num_bytes, training, copies, stride, members, zero in classes:
        parameters = training // size
        shared = [copies if zero >= stage else 1 for stage in (1, 2, 3)]
        own_state = parameters * state_bytes // shared[0]
        weights += num_bytes // shared[2]
        gradients += parameters * summed_bytes // shared[1]
        state += own_state
        touched += 2 * own_state + parameters * (summed_bytes + size) / shared[0]
        kinds = CollectiveKind
        spent = [collective_ns(machine.fabric, kind, amount, copies, stride) / 1e9 for kind, amount in (
            (kinds.REDUCE_SCATTER if zero else kinds.ALL_REDUCE, parameters * summed_bytes),
            (kinds.ALL_GATHER, training if zero else 0), (kinds.ALL_GATHER, num_bytes))]
        if members > 1:
            over = members if zero > 1 else members * copies
            reduce += collective_ns(machine.fabric, kinds.ALL_REDUCE, parameters * summed_bytes // shared[1],
                                    over) / 1e9
            spent[0] = spent[0] if zero > 1 else 0.0
        if zero < 2:
            reduce += spent[0]
        elif parameters:
            last = Phase.W if Phase.W in found else Phase.I
            found[last] = phase_beside(found[last], spent[0])
            gathered += parameters * summed_bytes
        if zero < 3:
            gather += spent[1]
            continue
        gathered, ahead = gathered + 2 * num_bytes, ahead + 2 * num_bytes
        for phase in (Phase.F, Phase.I):
            if phase in found:
                found[phase] = phase_beside(found[phase], spent[2])
    bandwidth = float(machine.kind.bytes_per_s or 1) * machine.kind.achieved.memory
    return PieceCost(found[Phase.F], found.get(Phase.I), found.get(Phase.W), *kept, weights, gradients, state,
                     reduce, gather, touched / bandwidth, gathered, forward_space=ahead)
