"""Transfers between ranks: start, wait with a timeout, and say who kept whom waiting, whatever the backend.

One message for each value of a transfer, in the transfer's order, on the channel's own process group: values that go
alone need no packing copy, and a saved value does not keep its neighbours alive. With gloo a started send or receive is
driven by gloo's own thread; a large send ends when its receive has been posted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import RunError

_REDUCE_SCATTER: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_ALL_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Their names from torch 2.13 on, and before."""


def start_send(group: Any, tensors: Sequence[torch.Tensor], peer: int) -> list[Any]:
    """The works of a send of every tensor; ``peer`` is the receiver's rank within the group."""
    return _together(group, tensors, lambda tensor: group.send([tensor], peer, 0))


def start_receive(group: Any, tensors: Sequence[torch.Tensor], peer: int) -> list[Any]:
    """The works of a receive of every tensor; ``peer`` is the sender's rank within the group."""
    return _together(group, tensors, lambda tensor: group.recv([tensor], peer, 0))


def _together(group: Any, tensors: Sequence[torch.Tensor], start: Callable[[torch.Tensor], Any]) -> list[Any]:
    """Start one message for each tensor; where each would be a kernel of its own (NCCL), as one launch with one
    work."""
    if len(tensors) < 2 or tensors[0].device.type == "cpu":
        return [start(tensor) for tensor in tensors]
    device = tensors[0].device
    group._start_coalescing(device)
    for tensor in tensors:
        start(tensor)
    return [group._end_coalescing(device)]


def start_all_reduce(group: Any, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> Any:
    """The work of a sum (or another reduction) over the group, in place."""
    return dist.all_reduce(tensor, op, group=group, async_op=True)


def start_all_gather(group: Any, parts: list[torch.Tensor], part: torch.Tensor) -> Any:
    """The work of a gathering of every rank's ``part`` into ``parts``, by rank within the group."""
    return dist.all_gather(parts, part, group=group, async_op=True)


def start_reduce_scatter(group: Any, part: torch.Tensor, parts: torch.Tensor) -> Any:
    """The work of a sum of every rank's ``parts`` [ranks,...], of which ``part`` gets this rank's."""
    return _REDUCE_SCATTER(part, parts, group=group, async_op=True)


def start_reduce_scatters(group: Any, parts: Sequence[torch.Tensor], wholes: Sequence[torch.Tensor]) -> list[Any]:
    """The works of sums of every rank's ``wholes``, of whose first dimension ``parts`` get this rank's range; a part
    may be the view of its whole."""
    pairs = dict(zip(map(id, parts), wholes, strict=True))
    return _together(group, parts, lambda part: _REDUCE_SCATTER(part, pairs[id(part)], group=group, async_op=True))


def start_gather_parts(group: Any, wholes: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], size: int,
                       dim: int = 0) -> tuple[list[Any], Callable[[], None]]:
    """The works of a gathering of every rank's ``parts`` (of one dtype) into ``wholes`` along a dimension, and what to
    call when they are done; a part may be the view of its whole."""
    if wholes[0].is_cuda and not dim:
        pairs = dict(zip(map(id, parts), wholes, strict=True))
        return _together(group, parts, lambda part: _ALL_GATHER(pairs[id(part)], part, group=group,
                                                                async_op=True)), lambda: None
    flat = torch.cat([part.detach().reshape(-1) for part in parts])
    every = flat.new_empty(size, flat.numel())

    def put() -> None:
        place = 0
        for whole, part in zip(wholes, parts, strict=True):
            found = every[:, place:place + part.numel()].unflatten(1, part.shape)
            whole.unflatten(dim, (size, -1)).movedim(dim, 0).copy_(found)
            place += part.numel()

    return [dist.all_gather(list(every), flat, group=group, async_op=True)], put


def start_all_to_all(group: Any, output: torch.Tensor, rows: torch.Tensor, arriving: Sequence[int] | None = None,
                     leaving: Sequence[int] | None = None) -> Any:
    """The work of an exchange of rows: ``leaving[r]`` rows go to rank r of the group, ``arriving[r]`` come from it into
    ``output``; None: equally many."""
    return dist.all_to_all_single(output, rows, None if arriving is None else list(arriving),
                                  None if leaving is None else list(leaving), group=group, async_op=True)


@dataclass(frozen=True, slots=True)
class Coming:
    """A tensor on its way to the host: ``tensor`` is complete when ``event`` is (None: at once)."""

    tensor: torch.Tensor
    event: Any = None


def to_host(tensor: torch.Tensor) -> Coming:
    """Start to bring a small tensor to the host, through page-locked memory; `Waits.arrived` gives it.

    The copy is in the order of the current stream: where that is one of its own, nothing else is waited for.
    """
    if tensor.device.type == "cpu":
        return Coming(tensor)
    target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    target.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return Coming(target, event)


def wait(works: Sequence[Any], timeout: timedelta, where: Callable[[], str], blocking: bool = True) -> None:
    """Return when all works are done. ``where`` names rank, instruction and peer for the message.

    Without ``blocking`` (CUDA) the current stream waits, not the host.

    Raises:
        RunError: the time ran out, or the peer is gone.
    """
    try:
        for work in works:
            if blocking:
                work.wait(timeout)
            else:
                work.wait()
    except RuntimeError as error:
        raise RunError(f"{where()}: {_reason(str(error), timeout)}") from None


class Waits:
    """What one rank waits for in a step, with the same errors on every backend.

    Where a host waits for its works itself (``blocking``: CPUs), `wait` does. Where it runs ahead of its device, the
    device waits, and `settle` is where the host comes to know: it looks at the works in the order of their waits until
    all are done, and names the first that is not while nothing has got on for the timeout. The backend's own watchdog,
    which ends a process without a word of ours, has a longer one.
    """

    def __init__(self, timeout: timedelta, blocking: bool) -> None:
        self.timeout, self.blocking = timeout, blocking
        self._open: list[tuple[Any, Callable[[], str]]] = []
        self.talk: list[tuple[str, str, int, int]] = []

    def wait(self, works: Sequence[Any], where: Callable[[], str]) -> None:
        """As `wait`: what follows, on the host or on its device, has what the works bring."""
        wait(works, self.timeout, where, self.blocking)
        if not self.blocking:
            self._open += [(work, where) for work in works]

    def wait_along(self, axis: str, what: str, work: Any, where: Callable[[], str]) -> None:
        """`wait` for a collective of the team, which is recorded in ``talk`` (axis, what, start, end) where the host
        waits for it itself."""
        start = time.perf_counter_ns()
        self.wait([work], where)
        if self.blocking:
            self.talk.append((axis, what, start, time.perf_counter_ns()))

    def arrived(self, coming: Coming, where: Callable[[], str]) -> torch.Tensor:
        """A tensor that the host needs now.

        Raises:
            RunError: it does not come within the timeout.
        """
        until = time.monotonic() + self.timeout.total_seconds()
        while coming.event is not None and not coming.event.query():
            if time.monotonic() > until:
                raise RunError(f"{where()}: {_reason('timeout', self.timeout)}")
            time.sleep(_SOON_S)
        return coming.tensor

    def settle(self) -> None:
        """Return when all that was waited for is done.

        Raises:
            RunError: nothing came for the time of the timeout; with the place of the first wait that is not over.
        """
        until = time.monotonic() + self.timeout.total_seconds()
        for work, where in self._open:
            while not work.is_completed():
                if time.monotonic() > until:
                    self._open = []
                    raise RunError(f"{where()}: {_reason('timeout', self.timeout)}")
                time.sleep(_LOOK_S)
            until = time.monotonic() + self.timeout.total_seconds()
        self._open = []

    def forget(self) -> None:
        """Drop what is not settled, after a failed step."""
        self._open = []


_LOOK_S, _SOON_S = 0.0005, 0.00002
"""How often the host looks whether its device has got on, and whether something that it needs now has come."""


def _reason(text: str, timeout: timedelta) -> str:
    if "timed out" in text.lower() or "timeout" in text.lower():
        return f"nothing for {timeout.total_seconds():g} s; the peer hangs or never starts its side"
    if "closed by peer" in text or "reset by peer" in text or "Broken pipe" in text:
        return "the connection is closed; the peer has failed"
    return f"communication failed: {text.splitlines()[0]}"
