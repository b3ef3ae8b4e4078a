"""`Timeline`: who did what when. One type for simulated and measured runs, so comparing them is a subtraction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from mipipe.graphs.errors import TimelineError
from mipipe.graphs.serialize import STRICT
from mipipe.planner.actions import ActionKind, Stream


@dataclass(frozen=True, slots=True)
class Span:
    """One action's occupation of a stream: ``[start_ns, end_ns)``, counted from the first action of the step.

    ``label`` is the action's or transfer's text form; ``peer`` the other rank of a transfer.
    """

    __pydantic_config__: ClassVar = STRICT
    rank: int
    stream: Stream
    kind: ActionKind
    label: str
    start_ns: int
    end_ns: int
    stage: int = -1
    microbatch: int = -1
    peer: int | None = None

    def __post_init__(self) -> None:
        if self.end_ns < self.start_ns:
            raise TimelineError(
                f"rank {self.rank}, {self.label}: ends at {self.end_ns} ns, before its start {self.start_ns} ns")


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans of all ranks, and each rank's memory over time as ``(ns, bytes)`` steps (resident bytes included)."""

    FORMAT: ClassVar = "mipipe.timeline"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    origin: Literal["simulated", "measured"]
    num_ranks: int
    spans: tuple[Span, ...]
    memory: tuple[tuple[tuple[int, int], ...], ...] = ()
    resident_bytes: tuple[int, ...] = ()
    unit_ns: int = 1
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def makespan_ns(self) -> int:
        """From 0 to the end of the last span."""
        return max((span.end_ns for span in self.spans), default=0)

    def busy_ns(self, rank: int) -> int:
        """Time the rank's compute stream is occupied."""
        return sum(span.end_ns - span.start_ns for span in self.spans
                   if span.rank == rank and span.stream is Stream.COMPUTE)

    def bubbles_ns(self) -> tuple[int, ...]:
        """Per rank: makespan minus busy compute time."""
        busy = [0] * self.num_ranks
        for span in self.spans:
            if span.stream is Stream.COMPUTE:
                busy[span.rank] += span.end_ns - span.start_ns
        makespan = self.makespan_ns
        return tuple(makespan - time for time in busy)

    @property
    def bubble_ratio(self) -> float:
        """``1 - sum(busy) / (ranks * makespan)``."""
        makespan = self.makespan_ns
        return sum(self.bubbles_ns()) / (self.num_ranks * makespan) if makespan else 0.0

    def peak_bytes(self, rank: int) -> int:
        """Largest memory of a rank; 0 where memory was not recorded."""
        return max((size for _, size in self.memory[rank]), default=0) if self.memory else 0
