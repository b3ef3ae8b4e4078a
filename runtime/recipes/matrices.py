"""What optimizers of matrices compute from one matrix that may lie in parts on several ranks.

- `equilibrate`: rows and columns divided by the roots of their norms (RACS of REG, arXiv 2510.03691);
- `orthogonalise`: the nearest half-orthogonal matrix, about, by Newton-Schulz steps (Muon; Jordan et al., 2024).

Legend: m rows, n columns of the whole matrix; matrices may have batch dimensions before them (experts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mipipe.graphs.operators.collectives import Sections, part_of, whole_of
from mipipe.runtime.ranks import comm

SMALLEST_NORM = 1e-12
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a Newton-Schulz step a X + b (X X^T) X + c (X X^T)^2 X (Jordan et al., Muon, 2024)."""


@dataclass(frozen=True, slots=True)
class Along:
    """One division of a parameter: each block of ``dimension`` (``sections``, as of a `Part`) lies in equal parts on
    the ranks of ``group``."""

    dimension: int
    group: Any
    sections: Sections = 1


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """A rank's part of a parameter, by its divisions, one after the other: members of a team, copies with ``shard:
    parameters``, or both. Ranks wait ``timeout_s`` seconds for one another."""

    divisions: tuple[Along, ...]
    timeout_s: float = 600.0

    def size(self, dimension: int) -> int:
        """How many parts the dimension is in."""
        return math.prod(dist.get_world_size(item.group) for item in self.divisions if item.dimension == dimension)

    def sum(self, total: Tensor, dimensions: tuple[int, ...] = (-2, -1)) -> Tensor:
        """``total``, summed in place over the ranks that have other parts along these dimensions.

        Raises:
            RunError: a rank did not give its part in time.
        """
        for item in self.divisions:
            if item.dimension in dimensions:
                self._wait(comm.start_all_reduce(item.group, total), "sum of a matrix's norms", total)
        return total

    def whole(self, part: Tensor) -> Tensor:
        """The tensor of which ``part`` is this rank's; raises as `sum`."""
        for item in reversed(self.divisions):
            part = part.contiguous()
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size(item.group))]
            self._wait(comm.start_all_gather(item.group, parts, part), "gathering a matrix", part)
            part = whole_of(parts, item.dimension % part.dim(), item.sections)
        return part

    def own(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor."""
        for item in self.divisions:
            whole = part_of(whole, dist.get_rank(item.group), dist.get_world_size(item.group),
                            item.dimension % whole.dim(), item.sections)
        return whole

    def _wait(self, work: Any, what: str, tensor: Tensor) -> None:
        comm.wait([work], timedelta(seconds=self.timeout_s), lambda: f"rank {dist.get_rank()}: the optimizer's {what}",
                  tensor.device.type == "cpu")


def sum_over(shard: ParameterShard | None, total: Tensor, along: int) -> Tensor:
    """``total``, summed over the ranks where the matrix is split along ``along`` (-2: its rows, -1: its columns)."""
    return total if shard is None else shard.sum(total, (along,))


def _norms(matrix: Tensor, along: int, power: float, shard: ParameterShard | None) -> Tensor:
    """The p-norms of rows (``along`` -1) or columns (-2), kept as a dimension of size 1."""
    squares = sum_over(shard, matrix.abs().pow(power).sum(dim=along, keepdim=True), along)
    return squares.pow(1.0 / power).clamp(min=SMALLEST_NORM)


def equilibrate(matrix: Tensor, shard: ParameterShard | None = None, *, power: float = 2.0, passes: int = 1,
                sequential: bool = False) -> Tensor:
    """diag(r)^-1/2 M diag(c)^-1/2 with the p-norms r of rows and c of columns, both of the same M.

    ``sequential``: rows to norm 1, then columns. ``shard``'s dimensions are -2 and -1 here.
    """
    for _ in range(passes):
        if sequential:
            matrix = matrix / _norms(matrix, -1, power, shard)
            matrix = matrix / _norms(matrix, -2, power, shard)
        else:
            rows, columns = _norms(matrix, -1, power, shard), _norms(matrix, -2, power, shard)
            matrix = matrix / rows.sqrt() / columns.sqrt()
    return matrix


def with_rms(matrix: Tensor, rms: float, shard: ParameterShard | None = None) -> Tensor:
    """The matrix scaled so that the root mean square of its entries is ``rms``; zeros stay zeros."""
    square = matrix.square().sum(dim=(-2, -1), keepdim=True)
    if shard is not None:
        shard.sum(square)
    size = math.prod(whole_sizes(matrix, shard))
    return matrix * (rms * math.sqrt(size) / square.sqrt().clamp(min=SMALLEST_NORM))


def orthogonalise(matrix: Tensor, shard: ParameterShard | None = None, *, steps: int = 5) -> Tensor:
    """This rank's part of the matrix with all singular values near 1. A matrix in parts is gathered for it."""
    whole = matrix if shard is None else shard.whole(matrix)
    tall = whole.shape[-2] > whole.shape[-1]
    x = whole.transpose(-2, -1) if tall else whole
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.transpose(-2, -1) if tall else x
    return x if shard is None else shard.own(x)


def whole_sizes(matrix: Tensor, shard: ParameterShard | None) -> tuple[int, int]:
    """m and n of the whole matrix."""
    rows, columns = matrix.shape[-2:]
    if shard is None:
        return rows, columns
    return rows * shard.size(-2), columns * shard.size(-1)
