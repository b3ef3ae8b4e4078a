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

from mipipe.runtime.engine import comm

SMALLEST_NORM = 1e-12
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of a Newton-Schulz step a X + b (X X^T) X + c (X X^T)^2 X (Jordan et al., Muon, 2024)."""


@dataclass(frozen=True, slots=True)
class ParameterShard:
    """A rank's part of a parameter: equal parts of ``dimension`` (of the parameter) lie on the ranks of ``group``. They
    wait ``timeout_s`` seconds for one another."""

    dimension: int
    group: Any
    timeout_s: float = 600.0

    @property
    def parts(self) -> int:
        return dist.get_world_size(self.group)

    def sum(self, total: Tensor) -> Tensor:
        """``total``, summed over the ranks in place.

        Raises:
            RunError: a rank did not give its part in time.
        """
        self._wait(comm.start_all_reduce(self.group, total), "sum of a matrix's norms", total)
        return total

    def gather(self, part: Tensor) -> list[Tensor]:
        """The parts of all ranks; raises as `sum`."""
        parts = [torch.empty_like(part) for _ in range(self.parts)]
        self._wait(comm.start_all_gather(self.group, parts, part), "gathering a matrix", part)
        return parts

    def _wait(self, work: Any, what: str, tensor: Tensor) -> None:
        comm.wait([work], timedelta(seconds=self.timeout_s), lambda: f"rank {dist.get_rank()}: the optimizer's {what}",
                  tensor.device.type == "cpu")


def sum_over(shard: ParameterShard | None, total: Tensor, along: int) -> Tensor:
    """``total``, summed over the ranks where the matrix is split along ``along`` (-2: its rows, -1: its columns)."""
    if shard is not None and shard.dimension == along:
        shard.sum(total)
    return total


def _norms(matrix: Tensor, along: int, power: float, shard: ParameterShard | None) -> Tensor:
    """The p-norms of rows (``along`` -1) or columns (-2), kept as a dimension of size 1."""
    squares = sum_over(shard, matrix.abs().pow(power).sum(dim=along, keepdim=True), along)
    return squares.pow(1.0 / power).clamp(min=SMALLEST_NORM)


def equilibrate(matrix: Tensor, shard: ParameterShard | None = None, *, power: float = 2.0, passes: int = 1,
                sequential: bool = False) -> Tensor:
    """diag(r)^-1/2 M diag(c)^-1/2 with the p-norms r of rows and c of columns, both of the same M.

    ``sequential``: rows to norm 1, then columns. ``shard``'s dimension is -2 or -1 here.
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
    parts = 1
    if shard is not None:
        shard.sum(square)
        parts = shard.parts
    size = matrix.shape[-2] * matrix.shape[-1] * parts
    return matrix * (rms * math.sqrt(size) / square.sqrt().clamp(min=SMALLEST_NORM))


def orthogonalise(matrix: Tensor, shard: ParameterShard | None = None, *, steps: int = 5) -> Tensor:
    """This rank's part of the matrix with all singular values near 1. A matrix in parts is gathered for it."""
    whole = matrix
    if shard is not None:
        whole = torch.cat(shard.gather(matrix.contiguous()), dim=shard.dimension)
    tall = whole.shape[-2] > whole.shape[-1]
    x = whole.transpose(-2, -1) if tall else whole
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.transpose(-2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.transpose(-2, -1) if tall else x
    return x if shard is None else x.chunk(shard.parts, dim=shard.dimension)[dist.get_rank(shard.group)]


def whole_sizes(matrix: Tensor, shard: ParameterShard | None) -> tuple[int, int]:
    """m and n of the whole matrix."""
    rows, columns = matrix.shape[-2:]
    if shard is None:
        return rows, columns
    return (rows * shard.parts, columns) if shard.dimension == -2 else (rows, columns * shard.parts)
