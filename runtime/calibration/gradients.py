"""What is measured on gradients, sample by sample: the loss is the mean next-token cross-entropy of a sample.

    fisher      sum_s g_s^2                        of every parameter (the empirical Fisher information's diagonal)
    sensitivity sum_s sum |g_s theta|              one number for every tensor
    votes:L     sum_s sign(-(S_s + L F delta^2))   RCP's votes: F = mean_s (g_s theta)^2 of the first member, S_s = g_s
    theta
                                                   of the second, delta their difference; a zero counts as agreement
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mipipe.runtime.calibration.statistics import Fields, Sums

Gradients = Mapping[str, tuple[Tensor, Tensor]]
"""Of one sample, by parameter: its gradient and its value."""


class GradientStatistic(Protocol):
    """A statistic of one layer's gradients."""

    def add(self, member: int, sample: Gradients) -> None:
        """Take a sample of a member; all samples of a member come before those of the next."""

    def result(self) -> Fields:
        """The sums."""


class _Base(Sums, GradientStatistic):
    def __init__(self, _values: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()

    def add(self, member: int, sample: Gradients) -> None:
        """Take a sample."""

    def count(self, name: str) -> None:
        self.put(name, "count", torch.ones(1, dtype=torch.float64))


class Fisher(_Base):
    """Sums of squared gradients."""

    def add(self, member: int, sample: Gradients) -> None:
        for name, (gradient, _) in sample.items():
            self.put(name, "sum", gradient * gradient)
            self.count(name)


class Sensitivity(_Base):
    """Sums of ``|g theta|`` over a tensor."""

    def add(self, member: int, sample: Gradients) -> None:
        for name, (gradient, value) in sample.items():
            self.put(name, "sum", (gradient * value).abs().sum(dtype=torch.float64).reshape(1))
            self.count(name)


class RcpVotes(_Base):
    """RCP-Merging's votes (arXiv 2508.03140) on every entry."""

    def __init__(self, values: Sequence[Mapping[str, Tensor]], strength: float) -> None:
        """``values``: the parameters of both members; ``strength``: the weight of the prior."""
        super().__init__(values)
        self._values, self._strength = values, strength
        self._squares: dict[str, Tensor] = {}
        self._samples = 0
        self._bars: dict[str, Tensor] = {}

    def add(self, member: int, sample: Gradients) -> None:
        if member == 0:
            self._samples += 1
            for name, (gradient, value) in sample.items():
                square = (gradient * value) ** 2
                self._squares[name] = self._squares[name] + square if name in self._squares else square
            return
        for name, (gradient, value) in sample.items():
            if name not in self._bars:
                change = self._values[0][name] - self._values[1][name]
                self._bars[name] = self._strength * self._squares.pop(name) / max(1, self._samples) * change ** 2
            score = gradient * value + self._bars[name]
            self.put(name, "sum", torch.where(score <= 0, 1.0, -1.0))
            self.count(name)


ENTRYWISE = ("fisher", "votes")
"""Statistics whose fields have a tensor's own shape, so that rows belong to rows."""


def make(name: str, values: Sequence[Mapping[str, Tensor]]) -> GradientStatistic:
    """The statistic of a name; ``values`` are every member's parameters of the layer."""
    kind, _, number = name.partition(":")
    if kind == "votes":
        return RcpVotes(values, float(number))
    return {"fisher": Fisher, "sensitivity": Sensitivity}[kind](values)
