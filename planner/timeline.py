"""`Timeline`: who did what when. One type for simulated and measured runs, so comparing them is a subtraction."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mipipe.graphs.errors import TimelineError
from mipipe.graphs.serialize import STRICT, Amount
from mipipe.planner.actions import ActionKind, Stream


@dataclass(frozen=True, slots=True)
class Span:
    """One action's occupation of a stream: ``[start_ns, end_ns)``, counted from the first action of the step.

    ``label`` is the action's or transfer's text form; ``peer`` the other rank of a transfer.
    """

    __pydantic_config__: ClassVar = STRICT
    rank: Amount
    stream: Stream
    kind: ActionKind
    label: str
    start_ns: Amount
    end_ns: Amount
    stage: int = -1
    microbatch: int = -1
    peer: int | None = None

    def __post_init__(self) -> None:
        if self.end_ns < self.start_ns:
            raise TimelineError(
                f"rank {self.rank}, {self.label}: ends at {self.end_ns} ns, before its start {self.start_ns} ns")


@dataclass(frozen=True)
class Timeline:
    """Spans of all ranks, and each rank's memory over time as ``(ns, bytes)`` steps (resident bytes included)."""

    FORMAT: ClassVar = "mipipe.timeline"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    origin: Literal["simulated", "measured"]
    num_ranks: Annotated[int, Field(ge=1, le=2**20)]
    spans: tuple[Span, ...]
    memory: tuple[tuple[tuple[Amount, Amount], ...], ...] = ()
    resident_bytes: tuple[Amount, ...] = ()
    unit_ns: Annotated[int, Field(ge=1, le=2**53)] = 1
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for span in self.spans:
            peer = 0 if span.peer is None else span.peer
            if not 0 <= span.rank < self.num_ranks or not 0 <= peer < self.num_ranks:
                raise TimelineError(f"timeline: {span.label} is of rank {span.rank}, with peer {span.peer}, but there"
                                    f" are {self.num_ranks} ranks")
        for name, rows in (("memory", self.memory), ("resident_bytes", self.resident_bytes)):
            if rows and len(rows) != self.num_ranks:
                raise TimelineError(f"timeline: {name} has {len(rows)} entries for {self.num_ranks} ranks")

    @cached_property
    def makespan_ns(self) -> int:
        """From 0 to the end of the last span."""
        return max((span.end_ns for span in self.spans), default=0)

    def busy_ns(self, rank: int) -> int:
        """Time the rank's compute stream is occupied."""
        return self._busy_ns[rank]

    @cached_property
    def _busy_ns(self) -> tuple[int, ...]:
        busy = [0] * self.num_ranks
        for span in self.spans:
            if span.stream is Stream.COMPUTE:
                busy[span.rank] += span.end_ns - span.start_ns
        return tuple(busy)

    def bubbles_ns(self) -> tuple[int, ...]:
        """Per rank: makespan minus busy compute time."""
        return tuple(self.makespan_ns - time for time in self._busy_ns)

    @property
    def in_device_time(self) -> bool:
        """Whether a span says when its device worked; not so where the host's clock was read around launches on a
        device that the host does not wait for."""
        return self.notes.get("device", "cpu") == "cpu" or self.notes.get("clock") == "events"

    @property
    def bubble_ratio(self) -> float:
        """``1 - sum(busy) / (ranks * makespan)``."""
        makespan = self.makespan_ns
        return sum(self.bubbles_ns()) / (self.num_ranks * makespan) if makespan else 0.0

    def peak_bytes(self, rank: int) -> int:
        """Largest memory of a rank; 0 where memory was not recorded."""
        return max((size for _, size in self.memory[rank]), default=0) if self.memory else 0
