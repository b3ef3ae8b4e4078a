"""Weights that one process of each host makes for all processes there: a whole model is in a host's memory once.

A random initialisation draws all numbers in one order, so whoever wants a part has to make the whole. The first process
of a host does, and hands every other one, tensor by tensor, what that one holds; the bits are those that each would
have made. It keeps nothing once all have theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mipipe.graphs.errors import MipipeError
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks.processes import failures_of, first_of, gather, rank

Find = Callable[[Mapping[str, Tensor], str], Tensor | None]
"""What a process wants of a name: the tensor, its own piece of it, or None where it is not there."""


class HostWeights:
    """The weights that ``make`` gives, made by the first process of this host. All processes of a run make one, and
    call `hand_out` once.

    Raises:
        MipipeError: what ``make`` raised, on every process of the run.
    """

    def __init__(self, make: Callable[[], Mapping[str, Tensor]], timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        hosts = gather((os.environ.get("GROUP_RANK", f"rank {rank()}"), int(os.environ.get("LOCAL_RANK", "0"))))
        here = [number for number, (host, _) in enumerate(hosts) if host == hosts[rank()][0]]
        self._maker = min(here, key=lambda number: hosts[number][1])
        self._others = [number for number in here if number != self._maker]
        self._state: Mapping[str, Tensor] | None = None
        raised: list[Exception] = []

        def attempt() -> None:
            try:
                self._state = make()
            except Exception as error:
                raised.append(error)
                raise

        failure = first_of(failures_of(attempt if rank() == self._maker else lambda: None, timeout_s))
        if failure is not None:
            known = [error for error in gather(next(iter(raised), None) if all(
                isinstance(error, MipipeError) for error in raised) else None) if error is not None]
            raise raised[0] if raised else known[0] if known else RuntimeError(f"making the model failed: {failure}")
        state = gather(torch.get_rng_state() if self._state is not None else None)[self._maker]
        assert state is not None
        torch.set_rng_state(state)  # as if this process had made the model itself

    def hand_out(self, names: Sequence[str], find: Find) -> Mapping[str, Tensor]:
        """What this process wants, to be read in this order, each once; ``find`` is asked where the whole model is.

        All processes call it, and ``find`` must be a module's function or a partial of one: it goes to the maker.
        """
        wanted = gather((list(names), find))
        state, self._state = self._state, None
        offers: dict[int, list[tuple[tuple[int, ...], torch.dtype, bool] | None]] = {}
        if state is not None:
            for other in self._others:
                offers[other] = [_offer(wanted[other][1](state, name)) for name in wanted[other][0]]
        specs = gather(offers)[self._maker].get(rank())
        if state is None:
            assert specs is not None
            return _Handed(self._maker, dict(zip(names, specs, strict=True)), self._timeout)
        rows = [(place, other) for other in self._others for place in range(len(wanted[other][0]))]
        for place, other in sorted(rows):
            tensor = wanted[other][1](state, wanted[other][0][place])
            if tensor is not None and tensor.numel() and not tensor.is_meta:
                comm.wait([dist.isend(tensor.detach().contiguous(), other)], self._timeout,
                          partial("rank {}: giving {} to rank {}".format, rank(), wanted[other][0][place], other))
        return state


def _offer(tensor: Tensor | None) -> tuple[tuple[int, ...], torch.dtype, bool] | None:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.is_meta)


class _Handed(Mapping[str, Tensor]):
    """What the maker sends, received as it is read."""

    def __init__(self, maker: int, specs: Mapping[str, Any], timeout: timedelta) -> None:
        self._maker, self._specs, self._timeout = maker, specs, timeout

    def __getitem__(self, name: str) -> Tensor:
        spec = self._specs.get(name)
        if spec is None:
            raise KeyError(name)
        shape, dtype, meta = spec
        tensor = torch.empty(shape, dtype=dtype, device="meta" if meta else "cpu")
        if not meta and tensor.numel():
            comm.wait([dist.irecv(tensor, self._maker)], self._timeout,
                      partial("rank {}: {} from rank {}, which made the model".format, rank(), name, self._maker))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name for name, spec in self._specs.items() if spec is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)
