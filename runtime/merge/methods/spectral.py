"""Merging singular directions: TSVM (arXiv 2412.00081) and R-TSVM (arXiv 2502.06876)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.arithmetic import mean_from
from mipipe.runtime.merge.methods.method import Tile

LIVE = 1e-8
"""Singular values below this share of the largest carry no direction of the task."""
LIVE_FACTOR = 1e-6
"""The same bound for the concatenated singular vectors, whose polar factor is sought."""


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin ``(U, s, Vh)`` of a matrix, in at least float32."""
    return torch.linalg.svd(matrix if matrix.dtype == torch.float64 else matrix.float(), full_matrices=False)


def partial_isometry(matrix: Tensor) -> Tensor:
    """The polar factor on the matrix's range: nearest matrix with orthonormal columns where it has full rank.

    Directions of (nearly) vanishing singular values are left out, where the polar factor would be arbitrary.
    """
    left, values, right = svd(matrix)
    live = values > LIVE_FACTOR * values[:1]
    return left[:, live] @ right[live]


def merged_directions(deltas: Sequence[Tensor], counts: Sequence[int], weights: Sequence[float]) -> Tensor:
    """``polar(U) diag(s) polar(V)^T`` of the leading ``counts[i]`` singular triplets of each task vector.

    Singular values are scaled by ``weights``; triplets with (nearly) zero singular value, which are arbitrary for
    low-rank task vectors, are dropped.
    """
    lefts, values, rights = [], [], []
    for delta, count, weight in zip(deltas, counts, weights, strict=True):
        left, value, right = svd(delta)
        live = int((value[:count] > LIVE * value[0]).sum()) if float(value[0]) > 0 else 0
        lefts.append(left[:, :live])
        values.append(value[:live] * weight)
        rights.append(right[:live])
    if not sum(len(value) for value in values):
        return torch.zeros_like(deltas[0])
    left, right = partial_isometry(torch.cat(lefts, 1)), partial_isometry(torch.cat(rights, 0).T)
    return (left * torch.cat(values)) @ right.T


def tsvm(tile: Tile, _stats: Any, *, lambda_: float) -> Tensor:
    """``theta_0 + lambda delta``, delta from the top ``floor(r / T)`` directions of every task, decorrelated."""
    deltas = tile.deltas()
    count = min(deltas[0].shape) // len(deltas)
    if count == 0:
        return mean_from(tile.origin, tile.models, lambda_)
    delta = merged_directions(deltas, [count] * len(deltas), [1.0] * len(deltas))
    return tile.origin + lambda_ * delta.to(tile.origin.dtype)


def outlier_mass(delta: Tensor) -> float:
    """``sum |tau|`` over the entries with ``|tau| > mean + 3 std``."""
    size = delta.abs()
    bound = size.mean() + 3 * size.std(correction=0)
    return float(size[size > bound].sum(dtype=torch.float64))


def outlier_weights(masses: Sequence[float]) -> list[float]:
    """``T o_i / sum_j o_j`` clipped to [0.5, 2]; 1 for all without outliers."""
    total = sum(masses)
    if total == 0:
        return [1.0] * len(masses)
    return [min(2.0, max(0.5, len(masses) * mass / total)) for mass in masses]


def sparsity(delta: Tensor) -> float:
    """Share of entries below 1 % of the largest magnitude."""
    size = delta.abs()
    return float((size < 0.01 * size.max()).double().mean()) if float(size.max()) > 0 else 1.0


def adaptive_ranks(sparsities: Sequence[float], rank: int) -> list[int]:
    """``max(1, ceil((1 - q_i) r / T))``, reduced in proportion until they sum to at most r."""
    count = len(sparsities)
    wanted = [max(1, math.ceil((1 - share) * rank / count - 1e-9)) for share in sparsities]
    total = sum(wanted)
    return wanted if total <= rank else [max(1, wish * rank // total) for wish in wanted]


def rtsvm(tile: Tile, _stats: Any, *, lambda_: float, clip_outliers: bool) -> Tensor:
    """TSVM with weights by outlier mass and ranks by sparsity (formulas reconstructed)."""
    deltas = tile.deltas()
    if min(deltas[0].shape) < len(deltas):
        return mean_from(tile.origin, tile.models, lambda_)
    weights = outlier_weights([outlier_mass(delta) for delta in deltas])
    counts = adaptive_ranks([sparsity(delta) for delta in deltas], min(deltas[0].shape))
    if clip_outliers:
        bounds = [float(delta.abs().mean() + 3 * delta.abs().std(correction=0)) for delta in deltas]
        deltas = [delta.clamp(-bound, bound) for delta, bound in zip(deltas, bounds, strict=True)]
    return tile.origin + lambda_ * merged_directions(deltas, counts, weights).to(tile.origin.dtype)
