"""`Timeline`: who did what when. One type for simulated and measured runs, so comparing them is a subtraction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, overload

import numpy as np
from pydantic import AfterValidator, Field

from mipipe.graphs.errors import TimelineError
from mipipe.graphs.serialize import STRICT, Amount
from mipipe.graphs.units import MOST
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


@dataclass(frozen=True, slots=True)
class AxisSpan:
    """How long a rank waited for a collective of its team along ``axis`` (``tensor``, ``context``, ``copies``), within
    an action."""

    __pydantic_config__: ClassVar = STRICT
    rank: Amount
    axis: str
    label: str
    start_ns: Amount
    end_ns: Amount

    def __post_init__(self) -> None:
        if self.end_ns < self.start_ns:
            raise TimelineError(f"rank {self.rank}, {self.label} along {self.axis}: ends at {self.end_ns} ns, before"
                                f" its start {self.start_ns} ns")


ALL_STREAMS, ALL_KINDS = tuple(Stream), tuple(ActionKind)
"""What ``Columns.stream`` and ``Columns.kind`` count in."""


class Columns(NamedTuple):
    """Spans as arrays, one entry for each; -1 for a stage or peer that there is none of."""

    rank: np.ndarray
    stream: np.ndarray
    kind: np.ndarray
    start_ns: np.ndarray
    end_ns: np.ndarray
    stage: np.ndarray
    peer: np.ndarray


class LazySpans(Sequence[Span]):
    """Spans that are made when they are looked at: a plan of 200,000 actions has half a million, and whoever sums or
    draws them needs few.

    Args:
        columns: the spans as arrays, sorted by start, rank, stream and end.
        make: the span of each of some places, in their order.
    """

    def __init__(self, columns: Columns, make: Callable[[Sequence[int]], Iterable[Span]]) -> None:
        self.columns, self._make = columns, make

    def __len__(self) -> int:
        return len(self.columns.rank)

    def __iter__(self) -> Iterator[Span]:
        return iter(self._all)

    @cached_property
    def _all(self) -> tuple[Span, ...]:
        return tuple(self._make(range(len(self))))

    @overload
    def __getitem__(self, place: int) -> Span: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Span, ...]: ...
    def __getitem__(self, place: int | slice) -> Span | tuple[Span, ...]:
        if isinstance(place, slice):
            return self._all[place]
        return next(iter(self._make([range(len(self))[place]])))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._all == tuple(other)

    def __hash__(self) -> int:
        return hash(self._all)


def _number(given: int) -> int:
    """A number of a file in 64 bits, what is none kept apart from -1."""
    return min(given, 2**31) if given >= -1 else -2


@dataclass(frozen=True)
class Timeline:
    """Spans of all ranks, and each rank's memory over time as ``(ns, bytes)`` steps (resident bytes included).

    ``axes``: of measured runs on teams, collectives within the spans, of the first member of every team."""

    FORMAT: ClassVar = "mipipe.timeline"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    origin: Literal["simulated", "measured"]
    num_ranks: Annotated[int, Field(ge=1, le=2**20)]
    spans: Annotated[Sequence[Span], AfterValidator(tuple)]
    memory: tuple[tuple[tuple[Amount, Amount], ...], ...] = ()
    resident_bytes: tuple[Amount, ...] = ()
    unit_ns: Annotated[int, Field(ge=1, le=2**53)] = 1
    notes: dict[str, Any] = field(default_factory=dict)
    axes: tuple[AxisSpan, ...] = ()

    def __post_init__(self) -> None:
        at = self.columns
        for item in self.axes:
            if item.rank >= self.num_ranks:
                raise TimelineError(f"timeline: {item.label} along {item.axis} is of rank {item.rank}, but there are"
                                    f" {self.num_ranks} ranks")
        if (at.end_ns - at.start_ns).sum(dtype=float) > MOST:  # sums are counted in 64 bits
            raise TimelineError(f"timeline: its spans last more than {MOST} ns together")
        for number in np.flatnonzero((at.rank < 0) | (at.rank >= self.num_ranks) | (at.peer < -1)
                                     | (at.peer >= self.num_ranks))[:1].tolist():
            span = self.spans[number]
            raise TimelineError(f"timeline: {span.label} is of rank {span.rank}, with peer {span.peer}, but there"
                                f" are {self.num_ranks} ranks")
        for name, rows in (("memory", self.memory), ("resident_bytes", self.resident_bytes)):
            if rows and len(rows) != self.num_ranks:
                raise TimelineError(f"timeline: {name} has {len(rows)} entries for {self.num_ranks} ranks")

    @cached_property
    def columns(self) -> Columns:
        """The spans as arrays."""
        if isinstance(self.spans, LazySpans):
            return self.spans.columns
        rows = [(span.rank, ALL_STREAMS.index(span.stream), ALL_KINDS.index(span.kind), span.start_ns, span.end_ns,
                 _number(span.stage), -1 if span.peer is None else _number(span.peer - (span.peer < 0)))
                for span in self.spans]
        return Columns(*np.array(rows, dtype=np.int64).reshape(-1, 7).T)

    @cached_property
    def makespan_ns(self) -> int:
        """From 0 to the end of the last span."""
        return int(self.columns.end_ns.max(initial=0))

    def busy_ns(self, rank: int) -> int:
        """Time the rank's compute stream is occupied."""
        return self._busy_ns[rank]

    @cached_property
    def _busy_ns(self) -> tuple[int, ...]:
        at, busy = self.columns, np.zeros(self.num_ranks, dtype=np.int64)
        np.add.at(busy, at.rank, np.where(at.stream == ALL_STREAMS.index(Stream.COMPUTE), at.end_ns - at.start_ns, 0))
        return tuple(busy.tolist())

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
