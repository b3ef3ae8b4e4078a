"""Merging singular directions: TSVM (arXiv 2412.00081), R-TSVM (arXiv 2502.06876), Iso-C and Iso-CTS (2502.04959)."""

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


# Isotropic merging ----------------------------------------------------------------------------------------------------


def iso_c(tile: Tile, _stats: Any, *, lambda_: float) -> Tensor:
    """``theta_0 + lambda mean(s) U V^T`` of ``sum_i tau_i = U diag(s) V^T``: its directions, all equally long.

    Directions of (nearly) vanishing singular values, which are arbitrary, are left out; the mean is over all values.
    """
    total = torch.stack(tile.deltas()).sum(0)
    return tile.origin + (lambda_ * svd(total)[1].mean() * partial_isometry(total)).to(total.dtype)


def common_size(rank: int, fraction: float, count: int) -> tuple[int, int]:
    """Directions of the common subspace and of each task: ``count`` equal parts of about ``1 - fraction`` of all."""
    own = round((rank - int(rank * fraction)) / count)
    return rank - own * count, own


def iso_cts(tile: Tile, _stats: Any, *, lambda_: float, common_space_fraction: float) -> Tensor:
    """Iso-C with the last directions replaced by each task's own: those of ``tau_i`` outside the common subspace.

    ``theta_0 + lambda mean(s) polar(U) polar(V)^T`` with the leading triplets of ``sum_i tau_i`` and of
    ``tau_i - U_c U_c^T tau_i``; triplets with (nearly) zero singular value are dropped.
    """
    deltas = tile.deltas()
    left, values, right = svd(torch.stack(deltas).sum(0))
    common, own = common_size(len(values), common_space_fraction, len(deltas))
    parts = [(left[:, :common], values[:common], right[:common])]
    for delta in deltas if own else ():
        rest = svd(delta - (left[:, :common] @ (left[:, :common].T @ delta)))
        parts.append((rest[0][:, :own], rest[1][:own], rest[2][:own]))
    strength = torch.cat([part[1] for part in parts])
    live = strength > LIVE * strength.max()
    if not bool(live.any()):
        return tile.origin.clone()
    lefts, rights = torch.cat([part[0] for part in parts], 1)[:, live], torch.cat([part[2] for part in parts])[live]
    merged = partial_isometry(lefts) @ partial_isometry(rights.T).T
    return tile.origin + (lambda_ * strength.mean() * merged).to(tile.origin.dtype)
