"""What is measured while models run: sums over tokens of what goes into and comes out of linear maps.

A statistic is fed batch by batch with every member's `Capture`s and gives tensors named by parameter and field. All are
sums, with the number of tokens beside them, so parts of a stream add up.

    mean_abs   sum |x|                              of a linear map's inputs, one member
    gram       sum x x^T                            one member
    moments    sum a, b, a a, b b, a b              of outputs a (first member) and b (second)
    cross      sum b a^T, a a^T, b b^T              of inputs a (first member) and b (second)
    joint      sum (a, b)(a, b)^T                   of inputs, both members one after the other
    routing    sum a a^T, z a^T, diag(p) - p p^T    of routers: inputs a (first member), logits z, p = softmax z
    (second)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

AS = "as:"
"""What the field begins with that names the map under which a shared sum is stored."""
Fields = dict[tuple[str, str], Tensor]
"""Tensors by (parameter, field)."""


@dataclass(frozen=True, slots=True)
class Capture:
    """What a module that holds the weight ``name`` saw in a batch: valid tokens' inputs and outputs, ``[tokens, n]``.

    ``linear``: a linear map. ``shared``: the first module of the layer that had the same inputs. ``after``: for modules
    that are no linear maps, the next one that is.
    """

    name: str
    inputs: Tensor
    outputs: Tensor
    linear: bool
    shared: str
    after: str
    router: bool = False
    """Whether the outputs are logits that send tokens to experts."""


class Statistic(Protocol):
    """A statistic of one layer."""

    def add(self, captures: Sequence[Mapping[str, Capture]]) -> None:
        """Take a batch: the captures of every member by name."""

    def result(self) -> Fields:
        """The sums."""


class Sums:
    """Sums of tensors by parameter and field."""

    def __init__(self) -> None:
        self.found: Fields = {}

    def put(self, name: str, field: str, value: Tensor) -> None:
        key = name, field
        if key in self.found:
            self.found[key] += value
        else:
            self.found[key] = value.clone()

    def share(self, seen: Capture) -> None:
        """Count the tokens, and say under which name the sums are where another map has the same inputs."""
        item = "count" if seen.shared == seen.name else AS + seen.shared
        self.put(seen.name, item, _count(seen.inputs))

    def result(self) -> Fields:
        return self.found


def _count(tokens: Tensor) -> Tensor:
    return torch.tensor([float(len(tokens))], dtype=torch.float64)


class MeanAbs(Sums):
    """``sum |x_j|`` of the inputs of every linear map."""

    def add(self, captures: Sequence[Mapping[str, Capture]]) -> None:
        for name, seen in captures[0].items():
            if seen.linear:
                self.put(name, "sum", seen.inputs.abs().sum(0, dtype=torch.float64))
                self.put(name, "count", _count(seen.inputs))


class Gram(Sums):
    """``sum x x^T`` of the inputs of every linear map; maps with the same inputs share one."""

    def add(self, captures: Sequence[Mapping[str, Capture]]) -> None:
        for name, seen in captures[0].items():
            if seen.linear and seen.shared == name:
                self.put(name, "sum", seen.inputs.T @ seen.inputs)
            if seen.linear:
                self.share(seen)


class OutputMoments(Sums):
    """First and second moments, feature by feature, of two members' outputs."""

    def add(self, captures: Sequence[Mapping[str, Capture]]) -> None:
        first, second = captures
        for name in first.keys() & second.keys():
            seen = first[name]
            source = seen.after if not seen.linear and seen.after else name
            one, other = first[source].outputs.double(), second[source].outputs.double()
            for field, value in (("a", one), ("b", other), ("aa", one * one), ("bb", other * other),
                                 ("ab", one * other)):
                self.put(name, field, value.sum(0))
            self.put(name, "count", _count(one))


class Cross(Sums):
    """Products of two members' inputs with themselves and each other."""

    def add(self, captures: Sequence[Mapping[str, Capture]]) -> None:
        first, second = captures
        for name in first.keys() & second.keys():
            seen, other = first[name], second[name]
            if seen.linear and seen.shared == name:
                self.put(name, "ba", other.inputs.T @ seen.inputs)
                self.put(name, "aa", seen.inputs.T @ seen.inputs)
                self.put(name, "bb", other.inputs.T @ other.inputs)
            if seen.linear:
                self.share(seen)


class JointMoments(Sums):
    """The second moment of two members' inputs side by side, and the sum of each; of linear maps."""

    def add(self, captures: Sequence[Mapping[str, Capture]]) -> None:
        first, second = captures
        for name in first.keys() & second.keys():
            seen = first[name]
            if seen.linear and seen.shared == name:
                both = torch.cat([seen.inputs, second[name].inputs], 1)
                self.put(name, "sum", both.T @ both)
            if seen.linear:
                self.share(seen)


class RouterStatistics(Sums):
    """What a router of the first member sees, what the second member's router says of the same tokens, and how much
    that matters: the mean Hessian ``diag(p) - p p^T`` of its softmax."""

    def add(self, captures: Sequence[Mapping[str, Capture]]) -> None:
        first, second = captures
        for name in first.keys() & second.keys():
            seen, other = first[name], second[name]
            if seen.router:
                shares = torch.softmax(other.outputs, -1)
                self.put(name, "xx", seen.inputs.T @ seen.inputs)
                self.put(name, "zx", other.outputs.T @ seen.inputs)
                self.put(name, "hessian", torch.diag(shares.sum(0)) - shares.T @ shares)
                self.put(name, "count", _count(seen.inputs))


FORWARD: dict[str, Callable[[], Statistic]] = {
    "mean_abs": MeanAbs, "gram": Gram, "moments": OutputMoments, "cross": Cross, "joint": JointMoments,
    "routing": RouterStatistics}
"""Statistics of forward passes by name."""
