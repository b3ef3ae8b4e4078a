"""The two streams of a device that a rank computes and exchanges rows on, as `SideStream` orders them.

Work of a CUDA stream is done in the order of its launches; two streams know nothing of each other but what events say.
So work of the second stream follows a mark of the first that was made when it was handed over, and whoever wants its
results follows the mark behind it. Memory has an owner as well: the allocator gives a tensor's memory to later work of
the stream that made it, so a tensor that another stream reads is kept for that one first. On a CPU a call is done when
it returns, and nothing of this is needed.
"""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch


class DeviceStreams(Protocol):
    """``mark`` is a moment behind all that the current stream was given; ``follow`` makes the current stream go on
    after one; within ``beside`` the second stream is the current one; ``keep`` a tensor for what a stream (``aside``:
    the second) still does with it."""

    def mark(self) -> Any: ...
    def follow(self, mark: Any) -> None: ...
    def beside(self) -> contextlib.AbstractContextManager[Any]: ...
    def keep(self, tensor: torch.Tensor, aside: bool) -> None: ...


class HostStreams:
    """A CPU's: threads, whose calls are done when they return."""

    def mark(self) -> None:
        return None

    def follow(self, mark: None) -> None:
        return None

    def beside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def keep(self, tensor: torch.Tensor, aside: bool) -> None:
        return None


class CudaStreams:
    """The calling thread's current stream, and one beside it that goes first where both have work."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._second = torch.cuda.Stream(device, priority=-1)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record()
        return event

    def follow(self, mark: torch.cuda.Event) -> None:
        mark.wait()

    def beside(self) -> contextlib.AbstractContextManager[Any]:
        return torch.cuda.stream(self._second)

    def keep(self, tensor: torch.Tensor, aside: bool) -> None:
        tensor.record_stream(self._second if aside else self._main)


def streams_of(device: torch.device) -> DeviceStreams:
    """The streams of a device, for the calling thread."""
    return CudaStreams(device) if device.type == "cuda" else HostStreams()
