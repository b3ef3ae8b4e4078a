"""Gradient sums between ranks: replicas of a stage, tied parameters in several stages, copies of the whole plan.

Reductions start where the program says so and are finished before the optimizer. Gradients that were there before the
step (accumulation over several steps) are set aside first, so that they are not summed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch

from mipipe.runtime import comm
from mipipe.runtime.compiled import Compiled

BUCKET_BYTES = 25 * 2**20
"""Size of one all-reduce between copies; DistributedDataParallel's default, enough to hide latency."""


class Reducer:
    """The reductions of one rank's step: `begin`, `start` by stage, `finish`."""

    def __init__(self, compiled: Compiled, timeout: timedelta, blocking: bool) -> None:
        self._compiled = compiled
        self._timeout = timeout
        self._blocking = blocking
        self._pending: list[tuple[Any, torch.Tensor, Sequence[str], str]] = []
        self._aside: dict[str, torch.Tensor] = {}
        self._started: set[str] = set()
        self._done = True
        self._copies = compiled.mesh.copy_group is not None
        self._graded = frozenset(compiled.graded)
        self._shared = [name for name in compiled.graded if self._copies or len(compiled.holders[name]) > 1]

    def begin(self) -> None:
        """Set earlier gradients aside."""
        self._pending.clear()
        self._aside.clear()
        self._started.clear()
        self._done = False
        for name in self._shared:
            parameter = self._compiled.weights.parameters[name]
            if parameter.grad is not None:
                self._aside[name] = parameter.grad
                parameter.grad = None

    def start(self, stage: int) -> None:
        """Start the sum of a stage's gradients over its replicas; parameters tied to other stages wait for `finish`."""
        compiled = self._compiled
        names = [name for name in compiled.stages[stage].parameters
                 if name in self._graded and name in compiled.exclusive and len(compiled.holders[name]) > 1]
        self._launch(names, f"gradients of stage {stage}")

    def finish(self) -> None:
        """Complete all sums and add what was set aside. Later calls in the same step do nothing."""
        if self._done:
            return
        self._done = True
        rest: dict[tuple[int, ...], list[str]] = {}
        for name in sorted(self._compiled.graded):
            if len(self._compiled.holders[name]) > 1 and name not in self._started:
                rest.setdefault(self._compiled.holders[name], []).append(name)
        for holders in sorted(rest):
            self._launch(rest[holders], "gradients of tied parameters")
        self._wait()
        if self._copies:
            self._sum_copies()
        for name, earlier in self._aside.items():
            gradient = self._gradient(name)
            self._compiled.weights.parameters[name].grad = gradient.add_(earlier)

    def _sum_copies(self) -> None:
        bucket: list[str] = []
        size = 0
        for name in sorted(self._compiled.graded):
            bucket.append(name)
            size += self._compiled.weights.parameters[name].nbytes
            if size >= BUCKET_BYTES:
                self._launch(bucket, "gradients of the plan's copies", self._compiled.mesh.copy_group)
                bucket, size = [], 0
        self._launch(bucket, "gradients of the plan's copies", self._compiled.mesh.copy_group)
        self._wait()

    def _gradient(self, name: str) -> torch.Tensor:
        parameter = self._compiled.weights.parameters[name]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _launch(self, names: Sequence[str], what: str, group: Any = None) -> None:
        """Start the sums of these gradients, one flat tensor for each dtype and set of holders."""
        kinds: dict[tuple[Any, tuple[int, ...]], list[str]] = {}
        for name in names:
            holders = () if group is not None else self._compiled.holders[name]
            kinds.setdefault((self._compiled.weights.parameters[name].dtype, holders), []).append(name)
        for (_, holders), members in kinds.items():
            flat = torch.cat([self._gradient(name).reshape(-1) for name in members])
            used = group if group is not None else self._compiled.mesh.reduction(holders)
            self._pending.append((comm.start_all_reduce(used, flat), flat, members, what))
            if group is None:
                self._started.update(members)

    def _wait(self) -> None:
        for work, flat, names, what in self._pending:
            comm.wait([work], self._timeout, functools.partial("all-reduce of {}".format, what), self._blocking)
            offset = 0
            for name in names:
                gradient = self._gradient(name)
                gradient.copy_(flat[offset:offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()
        self._pending.clear()
