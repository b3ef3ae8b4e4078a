"""Gradient sums between ranks: replicas of a stage or expert, tied parameters, members of a team, copies of the plan.

Sums start where `mipipe.runtime.engine.compiling.buckets` put them, run while the rank goes on computing, and are
finished before the optimizer. The gradients of a bucket are made side by side in one flat tensor, which is summed as it
is: nothing is copied before or after. Of parameters that devices update in parts, each gets its part of the sum
(`mipipe.runtime.engine.parts`). Gradients that were there before the step (accumulation over several steps) are set
aside first, so that they are not summed twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.planner.actions import ActionKind
from mipipe.runtime.engine.compiling.buckets import Bucket, buckets_of
from mipipe.runtime.engine.compiling.compiled import Compiled
from mipipe.runtime.engine.parts import scattered
from mipipe.runtime.experts.moves import ReplicaSums
from mipipe.runtime.ranks import comm

ALIGNED = 16
"""Gradients start at multiples of this many bytes, as vectorised kernels want it."""


class FlatGradients:
    """The gradients of parameters of one dtype and device as views of one tensor, which is made with the first."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self._step = max(1, ALIGNED // self._parameters[0].element_size())
        self._flat: Tensor | None = None
        self.lay_out()

    def lay_out(self) -> None:
        """Measure the parameters, which may have other sizes now: banks of experts that have moved."""
        sizes = [-(-item.numel() // self._step) * self._step for item in self._parameters]
        self._starts = [0, *itertools.accumulate(sizes)]
        self._gaps = self._starts[-1] != sum(item.numel() for item in self._parameters)

    def homes(self) -> dict[nn.Parameter, Any]:
        """What makes the memory of each parameter's gradient, not initialised."""
        return {item: functools.partial(self._view, place) for place, item in enumerate(self._parameters)}

    def whole(self) -> Tensor:
        """All gradients as one vector; those that were not made are zero from now on."""
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                parameter.grad = self._view(place).zero_()
        assert self._flat is not None
        return self._flat

    def forget(self) -> None:
        """Leave the memory to the gradients that are made in it."""
        self._flat = None

    def _view(self, place: int) -> Tensor:
        parameter, start = self._parameters[place], self._starts[place]
        if self._flat is None:
            make = torch.zeros if self._gaps else torch.empty
            self._flat = make(self._starts[-1], dtype=parameter.dtype, device=parameter.device)
        return self._flat[start:start + parameter.numel()].view(parameter.shape)


class Reducer:
    """The reductions of one rank's step: `begin`, `start` by bucket, `finish`."""

    def __init__(self, compiled: Compiled, waits: comm.Waits) -> None:
        self._parameters, self._sums, self._mesh = compiled.weights.parameters, compiled.weights.sums, compiled.mesh
        self._parts = compiled.weights.parts
        self._waits = waits
        self._pending: list[tuple[list[Any], Bucket]] = []
        self._aside: dict[str, Tensor] = {}
        self._done = True
        summed = sorted(compiled.graded)
        self._shared = [name for name in summed if compiled.reduction(name) is not None]
        early = [bucket for ready in compiled.instructions if ready.kind is ActionKind.ALL_REDUCE
                 for bucket in ready.argument]
        there = {name for bucket in early for name in bucket.names}
        self._late = buckets_of(compiled, sorted(set(summed) - there), "gradients of tied parameters")
        self._flat = {bucket.names: FlatGradients([compiled.weights.summed(name) for name in bucket.names])
                      for bucket in (*early, *self._late)}
        for flat in self._flat.values():
            compiled.weights.homes.update(flat.homes())
        self._experts = compiled.experts
        self._map = None if self._experts is None else self._experts.map
        self._replicas = None if self._experts is None else ReplicaSums(self._experts, compiled.weights,
                                                                        compiled.graded)

    def begin(self) -> None:
        """Set earlier gradients aside."""
        self._pending.clear()
        self._aside.clear()
        self._done = False
        for item in self._sums.values():
            item.grad = None
        if self._replicas is not None:
            self._replicas.begin()
        if self._experts is not None and self._experts.map is not self._map:
            self._map = self._experts.map
            for flat in self._flat.values():
                flat.lay_out()
        for flat in self._flat.values():
            flat.forget()
        for name in self._shared:
            parameter = self._parameters[name]
            if parameter.grad is not None:
                self._aside[name] = parameter.grad
                parameter.grad = None

    def start(self, buckets: Iterable[Bucket]) -> None:
        """Start the sums of these buckets; a gradient that this rank did not make counts as zero."""
        for bucket in buckets:
            flat = self._flat[bucket.names].whole()
            sums = {name: grad for name in bucket.names if name in self._sums
                    and (grad := self._sums[name].grad) is not None}
            parts = [self._parts[name] for name in sums]
            by_rows = bool(parts) and not parts[0].division.dim  # banks are not
            works = scattered(bucket.group, parts, list(sums.values()), flat) \
                if by_rows and bucket.group is self._mesh.alike.get(parts[0].division.axis) \
                else [comm.start_all_reduce(bucket.group, flat)]
            self._pending.append((works, bucket))

    def finish(self) -> None:
        """Complete all sums and add what was set aside. Later calls in the same step do nothing."""
        if self._done:
            return
        self._done = True
        self.start(self._late)
        for works, bucket in self._pending:
            self._waits.wait(works, functools.partial("sum of {}".format, bucket.what))
            self._flat[bucket.names].forget()
            self._take_parts(bucket.names)
        self._pending.clear()
        if self._replicas is not None:  # of sums over the copies that hold the same experts, where there are such
            self._replicas.finish()
        for name, earlier in self._aside.items():
            gradient = self._parameters[name].grad
            assert gradient is not None
            gradient.add_(earlier)
        self._aside.clear()

    def _take_parts(self, names: Iterable[str]) -> None:
        """Leave this device's parts of these sums to the parameters."""
        for name in names:
            if name in self._sums:
                whole, self._sums[name].grad = self._sums[name].grad, None
                assert whole is not None
                self._parameters[name].grad = self._parts[name].of(whole).contiguous()
