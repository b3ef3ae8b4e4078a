"""Gradient sums between ranks: replicas of a stage or expert, tied parameters, members of a team, copies of the plan.

Sums start where `mipipe.runtime.engine.buckets` put them, run while the rank goes on computing, and are finished before
the optimizer. Gradients that were there before the step (accumulation over several steps) are set aside first, so that
they are not summed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch

from mipipe.planner.actions import ActionKind
from mipipe.runtime.engine import comm
from mipipe.runtime.engine.buckets import Bucket, buckets_of
from mipipe.runtime.engine.compiling.compiled import Compiled
from mipipe.runtime.experts.moves import ReplicaSums


class Reducer:
    """The reductions of one rank's step: `begin`, `start` by bucket, `finish`."""

    def __init__(self, compiled: Compiled, waits: comm.Waits) -> None:
        self._parameters = compiled.weights.parameters
        self._waits = waits
        self._pending: list[tuple[Any, torch.Tensor, Bucket]] = []
        self._aside: dict[str, torch.Tensor] = {}
        self._done = True
        summed = sorted(set(compiled.graded) - compiled.banks)
        self._shared = [name for name in summed if compiled.reduction(name) is not None]
        early = {name for ready in compiled.instructions if ready.kind is ActionKind.ALL_REDUCE
                 for bucket in ready.argument for name in bucket.names}
        self._late = buckets_of(compiled, sorted(set(summed) - early), "gradients of tied parameters")
        self._replicas = None if compiled.experts is None else ReplicaSums(compiled.experts, compiled.weights,
                                                                           compiled.graded)

    def begin(self) -> None:
        """Set earlier gradients aside."""
        self._pending.clear()
        self._aside.clear()
        self._done = False
        if self._replicas is not None:
            self._replicas.begin()
        for name in self._shared:
            parameter = self._parameters[name]
            if parameter.grad is not None:
                self._aside[name] = parameter.grad
                parameter.grad = None

    def start(self, buckets: Iterable[Bucket]) -> None:
        """Start the sums of these buckets; a gradient that this rank did not make counts as zero."""
        for bucket in buckets:
            flat = torch.cat([self._gradient(name).reshape(-1) for name in bucket.names])
            self._pending.append((comm.start_all_reduce(bucket.group, flat), flat, bucket))

    def finish(self) -> None:
        """Complete all sums and add what was set aside. Later calls in the same step do nothing."""
        if self._done:
            return
        self._done = True
        self.start(self._late)
        if self._replicas is not None:
            self._replicas.finish()
        for work, flat, bucket in self._pending:
            self._waits.wait([work], functools.partial("all-reduce of {}".format, bucket.what))
            offset = 0
            for name in bucket.names:
                gradient = self._gradient(name)
                gradient.copy_(flat[offset:offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()
        self._pending.clear()
        for name, earlier in self._aside.items():
            gradient = self._gradient(name)
            self._parameters[name].grad = gradient.add_(earlier)

    def _gradient(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad
