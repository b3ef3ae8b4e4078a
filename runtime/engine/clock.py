"""What a step's spans are measured with: the host's clock, or events on a device that the host runs ahead of.

A host that launches work and goes on reads the time of launches, not of work. In a measured step on such a device every
moment is therefore an event on the current stream; their distances from one anchor, whose host time is known, are
read when the step is over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch


class Clock(Protocol):
    """``kind`` names it in timelines; `begin` before a step, `mark` at a moment of it, `moment_ns` when it is over."""

    kind: Literal["host", "events"]

    def begin(self) -> None: ...
    def mark(self) -> Any: ...
    def moment_ns(self, mark: Any) -> int: ...


class HostClock:
    """The process's monotonic clock."""

    kind: Literal["host", "events"] = "host"
    mark = staticmethod(time.perf_counter_ns)

    def begin(self) -> None:
        """Nothing: the clock always runs."""

    def moment_ns(self, mark: int) -> int:
        return mark


class EventClock:
    """Events of a device, in nanoseconds of the host's clock.

    ``new_event`` makes one with ``record()`` and ``elapsed_time(later)`` in milliseconds, as ``torch.cuda.Event``;
    ``synchronize`` waits for all that the device was given.
    """

    kind: Literal["host", "events"] = "events"

    def __init__(self, new_event: Callable[[], Any], synchronize: Callable[[], object]) -> None:
        self._new_event, self._synchronize = new_event, synchronize
        self._anchor: Any = None
        self._origin_ns, self._done = 0, False

    def begin(self) -> None:
        """Anchor the device's time in the host's, while the device has nothing else to do."""
        self._synchronize()
        self._anchor, self._done = self.mark(), False
        self._synchronize()
        self._origin_ns = time.perf_counter_ns()

    def mark(self) -> Any:
        event = self._new_event()
        event.record()
        return event

    def moment_ns(self, mark: Any) -> int:
        if not self._done:
            self._synchronize()
            self._done = True
        return self._origin_ns + round(self._anchor.elapsed_time(mark) * 1e6)


def clock_for(device: torch.device, measuring: bool) -> Clock:
    """The clock of a step: events cost launches, so only a measured step has them, and only where the host runs
    ahead."""
    if device.type != "cuda" or not measuring:
        return HostClock()
    return EventClock(lambda: torch.cuda.Event(enable_timing=True), lambda: torch.cuda.synchronize(device))
