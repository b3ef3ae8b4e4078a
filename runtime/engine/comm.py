"""Transfers between ranks: start, wait with a timeout, and say who kept whom waiting.

One message for each value of a transfer, in the transfer's order, on the channel's own process group: values that go
alone need no packing copy, and a saved value does not keep its neighbours alive. With gloo a started send or receive is
driven by gloo's own thread; a large send ends when its receive has been posted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import RunError


def start_send(group: Any, tensors: Sequence[torch.Tensor], peer: int) -> list[Any]:
    """The works of one send per tensor; ``peer`` is the receiver's rank within the group."""
    return [group.send([tensor], peer, 0) for tensor in tensors]


def start_receive(group: Any, tensors: Sequence[torch.Tensor], peer: int) -> list[Any]:
    """The works of one receive per tensor; ``peer`` is the sender's rank within the group."""
    return [group.recv([tensor], peer, 0) for tensor in tensors]


def start_all_reduce(group: Any, tensor: torch.Tensor) -> Any:
    """The work of a sum over the group, in place."""
    return dist.all_reduce(tensor, group=group, async_op=True)


def start_all_to_all(group: Any, output: torch.Tensor, rows: torch.Tensor, arriving: Sequence[int] | None = None,
                     leaving: Sequence[int] | None = None) -> Any:
    """The work of an exchange of rows: ``leaving[r]`` rows go to rank r of the group, ``arriving[r]`` come from it into
    ``output``; None: equally many."""
    return dist.all_to_all_single(output, rows, None if arriving is None else list(arriving),
                                  None if leaving is None else list(leaving), group=group, async_op=True)


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


def _reason(text: str, timeout: timedelta) -> str:
    if "Timed out" in text or "timeout" in text.lower():
        return f"nothing for {timeout.total_seconds():g} s; the peer hangs or never starts its side"
    if "closed by peer" in text or "reset by peer" in text or "Broken pipe" in text:
        return "the connection is closed; the peer has failed"
    return f"communication failed: {text.splitlines()[0]}"
