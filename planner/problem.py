"""`PlanningProblem`: all a planner may look at, and every assumption it makes.

Groups of operators are to be placed on devices; M microbatches pass through them forward (F) and backward (I, W). The
durations, sizes and limits here are the whole model: nothing else about the hardware is known to a solver, the
simulator or the checker.

The rules a schedule must keep (design: She et al., arXiv 2503.09357, extended by split backward and memory):

- F(s, m) starts after F(p, m) has ended for every predecessor p, and the transfer in between if p is on another rank.
- I(s, m) starts after F(s, m), and after the gradient from every successor that returns one has arrived.
- W(s, m) starts after I(s, m); where a group has no I, under the conditions of I. B is I and W without a gap; its
  input gradients leave at its end.
- A rank runs one action at a time on each of its two streams (compute, collective); the streams overlap freely.
- A transfer arrives ``latency + bytes / bandwidth`` after it starts and occupies its directed channel for ``bytes /
  bandwidth``: one at a time puts bytes on the wire, and latency passes for several at once. Nothing is charged within a
  rank. All values between the same two stages for one microbatch and direction travel as one transfer.
- Memory of a rank at a moment: resident bytes of its stages, + saved tensors (``saved_fi`` from the start of F to the
  end of I, ``saved_fw`` to the end of W, ``saved_iw`` from the start of I to the end of W, as are, in a stage with I,
  the gradients of a group without one, whose W reads them), + the running action's workspace (that of forwards for F
  and RECOMPUTE; of an overlapped pair the forward's and the backward's, of one stage the larger of both), + values in
  flight (at the sender from the end of the producer to the end of the transfer, at the receiver from the posting of the
  receive to the start of the consumer, within a rank from producer's end to consumer's start).
- A group with several replicas ends the step with an all-reduce of its gradients, after the last W of every replica.
- A rank ends the step with the update of its groups (``update_ns``: the optimizer, and what gradients take on their way
  between copies of the whole plan), after its last action and reduction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.operator_graph import Tags
from mipipe.graphs.serialize import STRICT, Amount, Count, digest
from mipipe.graphs.topology import Topology
from mipipe.graphs.units import MOST, shown
from mipipe.planner.actions import Stream
from mipipe.planner.sizes import MOST_COUNT


@dataclass(frozen=True, slots=True)
class PhaseTimes:
    """Durations of one group on one device kind. ``i_ns`` or ``w_ns`` is None where the phase does not exist."""

    __pydantic_config__: ClassVar = STRICT
    f_ns: Amount
    i_ns: Amount | None
    w_ns: Amount | None

    def __post_init__(self) -> None:
        if min(self.f_ns, self.i_ns or 0, self.w_ns or 0) < 0:
            raise ProblemError(f"durations {self.f_ns}, {self.i_ns}, {self.w_ns} ns: expected none below 0")

    @property
    def total_ns(self) -> int:
        return self.f_ns + (self.i_ns or 0) + (self.w_ns or 0)


@dataclass(frozen=True, slots=True)
class Group:
    """A unit of placement: operators that stay together.

    ``times`` is keyed by device kind. Saved bytes are per microbatch (`problem` module docstring); ``recompute_bytes``
    is what stays between F and RECOMPUTE if the group's F is run again before its I (None: not offered). ``loads``
    gives the relative size of each microbatch for this group (1.0: as traced); it multiplies durations, saved bytes and
    the bytes of the values the group makes, and () means all 1.0. ``single``: one replica only, as its F changes
    buffers that the next microbatch reads (batch statistics), or as it is of an expert-parallel layer. ``update_ns``:
    what the group's parameters take at the end of a step on each of its ranks, whatever the device kind.
    ``workspace_bytes`` is held while any of the group's actions runs, but while it runs forward (F, RECOMPUTE)
    ``forward_workspace_bytes`` in its place, where that is given.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    times: dict[str, PhaseTimes]
    stream: Stream = Stream.COMPUTE
    resident_bytes: Amount = 0
    gradient_bytes: Amount = 0
    saved_fi_bytes: Amount = 0
    saved_fw_bytes: Amount = 0
    saved_iw_bytes: Amount = 0
    workspace_bytes: Amount = 0
    recompute_bytes: Amount | None = None
    loads: tuple[float, ...] = ()
    segments: tuple[str, ...] = ()
    tags: Tags = Tags()
    single: bool = False
    update_ns: Amount = 0
    forward_workspace_bytes: Amount | None = None

    @property
    def forward_workspace(self) -> int:
        """Bytes held while the group runs forward."""
        return self.workspace_bytes if self.forward_workspace_bytes is None else self.forward_workspace_bytes


@dataclass(frozen=True, slots=True)
class GroupEdge:
    """A value one group makes and others read. ``grad_bytes`` is None where no gradient flows back."""

    __pydantic_config__: ClassVar = STRICT
    source: int
    targets: tuple[int, ...]
    num_bytes: Amount = 0
    grad_bytes: Amount | None = 0
    value: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory limits beyond each device's own capacity, for comparisons at equal memory; None: no such limit.

    ``resident_bytes`` caps weights and optimizer state per rank, ``activation_bytes`` all the rest.
    """

    __pydantic_config__: ClassVar = STRICT
    resident_bytes: Amount | None = None
    activation_bytes: Amount | None = None


@dataclass(frozen=True, slots=True)
class OverlapRule:
    """Duration of an OVERLAP_F_B action: ``(F + B) * numerator / denominator``, rounded to a nanosecond.

    The gain is that of communication inside both, hidden behind the other's compute. Where a problem has groups on the
    collective stream, these are planned beside the compute by themselves, and a pair takes the sum of its parts.
    """

    __pydantic_config__: ClassVar = STRICT
    numerator: Count = 1
    denominator: Count = 1

    def duration_ns(self, forward_ns: int, backward_ns: int) -> int:
        return round(Fraction((forward_ns + backward_ns) * self.numerator, self.denominator))


MOST_AMOUNT = MOST // 2
"""Nanoseconds of a step that does one thing at a time, and bytes that all its microbatches keep: sums of two such
numbers are counted in 64 bits everywhere."""


@dataclass(frozen=True, slots=True)
class PlanningProblem:
    """Groups in a topological order, the values between them, devices, and M microbatches. Immutable.

    ``colocate`` lists sets of groups that share a rank (for every microbatch). ``unit_ns`` is the unit in which people
    gave the durations (1 for measured ones); it only scales what is printed.
    """

    FORMAT: ClassVar = "mipipe.problem"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    name: str
    groups: tuple[Group, ...]
    edges: tuple[GroupEdge, ...]
    topology: Topology
    num_microbatches: Annotated[int, Field(ge=1, le=MOST_COUNT)]
    limits: Limits = Limits()
    colocate: tuple[tuple[int, ...], ...] = ()
    overlap: OverlapRule = OverlapRule()
    graph_digest: str = ""
    unit_ns: Annotated[int, Field(ge=1, le=2**53)] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_microbatches <= MOST_COUNT:
            raise ProblemError(f"problem {self.name}: {shown(self.num_microbatches)} microbatches; expected at least 1"
                               f" and at most {MOST_COUNT}")
        if not self.groups:
            raise ProblemError(f"problem {self.name}: no groups to plan")
        seen: set[str] = set()
        for group in self.groups:
            if group.name in seen:
                raise ProblemError(f"problem {self.name}: two groups are named {shown(group.name)}; expected a name of"
                                   " its own for each, as times and sizes are given by name")
            seen.add(group.name)
            if group.stream is Stream.CHANNEL:
                raise ProblemError(f"problem {self.name}: group {shown(group.name)} is on the stream 'channel', which"
                                   " transfers have alone; expected 'compute' or 'collective'")
        for edge in self.edges:
            ends = (edge.source, *edge.targets)
            if not all(0 <= end < len(self.groups) for end in ends):
                raise ProblemError(f"problem {self.name}: edge {ends} names a group beyond the"
                                   f" {len(self.groups)} there are")
            late = [target for target in edge.targets if target <= edge.source]
            if late:
                raise ProblemError(f"problem {self.name}: an edge runs from group {edge.source}"
                                   f" ({self.groups[edge.source].name}) back to group {late[0]}"
                                   f" ({self.groups[late[0]].name}); the graph has a cycle or is not in"
                                   " topological order")
        kinds = {device.kind for device in self.topology.devices}
        for group in self.groups:
            missing = sorted(kinds - set(group.times))
            if missing:
                raise ProblemError(f"problem {self.name}: group {group.name} has no durations on device kind"
                                   f" {missing[0]!r}")
            if any(not 0 <= load < 2**31 for load in group.loads):
                raise ProblemError(f"problem {self.name}: group {group.name} has a load below 0 or beyond 2^31;"
                                   " expected relative sizes such as 1.0")
            if group.loads and len(group.loads) != self.num_microbatches:
                raise ProblemError(f"problem {self.name}: group {group.name} has {len(group.loads)} loads for"
                                   f" {self.num_microbatches} microbatches")

        strangers = [group for together in self.colocate for group in together if not 0 <= group < len(self.groups)]
        if strangers:
            raise ProblemError(f"problem {self.name}: colocate names group {strangers[0]}, but there are"
                               f" {len(self.groups)}")
        if not all(self.colocate):
            raise ProblemError(f"problem {self.name}: colocate has a set without groups; leave it out")
        _check_amounts(self)

    @property
    def num_ranks(self) -> int:
        return self.topology.num_devices

    @property
    def pairs_gain(self) -> bool:
        """Whether an OVERLAP_F_B is shorter than its parts (`OverlapRule`)."""
        return (0 <= self.overlap.numerator < self.overlap.denominator
                and not any(group.stream is Stream.COLLECTIVE for group in self.groups))

    def replace(self, **changes: Any) -> PlanningProblem:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def digest(self) -> str:
        return digest(self)


def _check_amounts(problem: PlanningProblem) -> None:
    """Raise `ProblemError` where times or sizes add up to more than `MOST_AMOUNT`."""
    topology, count = problem.topology, problem.num_microbatches
    links = [topology.within_host, topology.between_hosts, *topology.overrides.values()]
    loads = [max(group.loads, default=1.0) for group in problem.groups]
    slower = max(Fraction(1), Fraction(problem.overlap.numerator, max(1, problem.overlap.denominator)))
    work = sum(max((times.total_ns for times in group.times.values()), default=0) * load
               for group, load in zip(problem.groups, loads, strict=True)) * count * float(slower)
    work += sum(group.update_ns for group in problem.groups)
    if work >= MOST_AMOUNT:
        raise ProblemError(f"problem {problem.name}: its work adds up to {work:.3g} ns, which no clock counts;"
                           " expected durations in nanoseconds")
    sent = max(sum(len(edge.targets) * loads[edge.source] * (link.transfer_ns(edge.num_bytes)
                                                             + link.transfer_ns(edge.grad_bytes or 0))
                   for edge in problem.edges) * count
               + sum(2 * link.transfer_ns(group.gradient_bytes) for group in problem.groups)
               + 2 * problem.num_ranks * link.latency_ns for link in links) if topology.num_devices > 1 else 0
    if sent >= MOST_AMOUNT:
        raise ProblemError(f"problem {problem.name}: its transfers add up to {sent:.3g} ns, which no clock counts;"
                           " expected latencies, bandwidths and sizes of real links")
    kept = sum(sum((group.resident_bytes, group.gradient_bytes, group.saved_fi_bytes, group.saved_fw_bytes,
                    group.saved_iw_bytes, group.workspace_bytes, group.forward_workspace_bytes or 0,
                    group.recompute_bytes or 0)) * load
               for group, load in zip(problem.groups, loads, strict=True))
    kept += sum((edge.num_bytes + (edge.grad_bytes or 0)) * loads[edge.source] for edge in problem.edges)
    kept *= count
    if kept >= MOST_AMOUNT:
        raise ProblemError(f"problem {problem.name}: what its microbatches keep adds up to {kept:.3g} bytes, which no"
                           " device has; expected sizes in bytes")
