"""Low-rank estimates: LoRE-Merging, Twin-Merging's exclusive parts, RMM's shared basis of adapters, and Evo-Merging's
factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.runtime.merge.methods.arithmetic import SMALL
from mipipe.runtime.merge.methods.method import Tile
from mipipe.runtime.merge.methods.quantile import top_k_mask
from mipipe.runtime.merge.methods.sparsify import kept
from mipipe.runtime.merge.methods.spectral import svd
from mipipe.runtime.merge.methods.task_vectors import vote


def soft_threshold(matrix: Tensor, mu: float) -> Tensor:
    """``U diag(max(s - mu, 0)) V^T``: the proximal map of ``mu`` times the nuclear norm."""
    left, values, right = svd(matrix)
    return (left * (values - mu).clamp_min(0)) @ right


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    left, values, right = svd(matrix)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


# LoRE -----------------------------------------------------------------------------------------------------------------


def lore_estimate(models: Sequence[Tensor], mu: float, iterations: int,
                  start: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Latent base and low-rank task vectors by block coordinate descent.

    Minimises ``sum_i (0.5 ||theta_0 + delta_i - theta_i||^2 + mu ||delta_i||_*)``, whose exact block steps are the
    mean and the soft threshold (arXiv 2502.10749, with the un-squared norm its solver implies). ``start`` is the first
    theta_0; without it the first is the mean.
    """
    first = models[0]
    base = first if start is None else start
    deltas = [torch.zeros_like(first) for _ in models]
    for step in range(iterations):
        if step or start is None:
            base = first + sum(model - delta - first for model, delta in zip(models, deltas, strict=True)) / len(models)
        deltas = [soft_threshold(model - base, mu).to(first.dtype) for model in models]
    return base, deltas


def lore(tile: Tile, _stats: Any, *, mu: float, lambda_: float, iterations: int, combine: str,
         density: Sequence[float]) -> Tensor:
    """``theta_0 + lambda tau*``, tau* the mean of the estimated task vectors, or TIES on them.

    With two models and no base the mean of the deltas is zero at every step, so ``combine: mean`` is plain averaging:
    two models want ``ties`` or a base.
    """
    base, deltas = lore_estimate(tile.models, mu, iterations, tile.base)
    if combine == "ties":
        trimmed = [delta * top_k_mask(delta, kept(share, delta.numel())) if share < 1 else delta
                   for delta, share in zip(deltas, density, strict=True)]
        return vote(base, trimmed, [1.0] * len(deltas), lambda_, "mean")
    merged = base.clone()
    for delta in deltas:
        merged.add_(delta, alpha=lambda_ / len(deltas))
    return merged


# Twin-Merging ---------------------------------------------------------------------------------------------------------


def twin_rank(shape: Sequence[int], density: float) -> int:
    """``floor(density * min(shape))``."""
    return math.floor(density * min(shape) + 1e-9)


def twin(tile: Tile, _stats: Any, *, shared_scale: float, density: float, route: Sequence[float | None]) -> Tensor:
    """Shared part plus rank-compressed exclusive parts, mixed by a route (arXiv 2406.15479).

    ``theta_s = theta_0 + shared_scale sum_i tau_i``; ``theta = theta_s + sum_t route_t SVD_k(theta_t - theta_s)``.
    Without a route (the study that compares merges for shorter reasoning) every expert has weight 1/T. Vectors are
    not compressed.
    """
    shared = tile.origin.clone()
    for delta in tile.deltas():
        shared.add_(delta, alpha=shared_scale)
    merged = shared.clone()
    for share, model in zip(mixture(route, len(tile.models)), tile.models, strict=True):
        if share == 0.0:
            continue
        exclusive = model - shared
        if exclusive.dim() == 2 and density < 1.0:
            exclusive = truncated(exclusive, twin_rank(exclusive.shape, density)).to(merged.dtype)
        merged.add_(exclusive, alpha=share)
    return merged


def mixture(route: Sequence[float | None], count: int) -> list[float]:
    """The router's weights of the experts; equal ones without a route. A model without a weight has none."""
    if all(share is None for share in route):
        return [1.0 / count] * count
    return [share or 0.0 for share in route]


# RMM ------------------------------------------------------------------------------------------------------------------


def canonical_factors(product_left: Tensor, product_right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``(U sqrt(S), sqrt(S) V^T)`` of ``B A``, zero-padded to ``rank``; LoRA factors are not unique otherwise.

    Each right vector's largest entry is positive. Via QR of the factors: the product is never formed.
    """
    left_q, left_r = torch.linalg.qr(product_left)
    right_q, right_r = torch.linalg.qr(product_right.T)
    left, values, right = svd(left_r @ right_r.T)
    out, into = left_q @ left * values.sqrt(), (right_q @ right.T * values.sqrt()).T
    peaks = into.gather(1, into.abs().argmax(1, keepdim=True)).sign()
    signs = torch.where(peaks == 0, 1.0, peaks)
    out, into = out * signs.T, into * signs
    missing = rank - out.shape[1]
    if missing > 0:
        out = torch.cat([out, out.new_zeros(len(out), missing)], 1)
        into = torch.cat([into, into.new_zeros(missing, into.shape[1])], 0)
    return out, into


def rmm_compress(vectors: Tensor, num_basis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``[..., d]``, basis ``[..., p, d]`` and coefficients ``[..., T, p]`` of stacks of vectors ``[..., T, d]``.

    PCA: the minimiser of ``sum_i ||x_i - mu - V z_i||^2`` (arXiv 2510.14163).
    """
    mean = vectors.mean(-2)
    centred = vectors - mean[..., None, :]
    right = torch.linalg.svd(centred, full_matrices=False)[2][..., :num_basis, :]
    return mean, right, centred @ right.transpose(-1, -2)


def rmm_reconstruct(mean: Tensor, basis: Tensor, coefficients: Tensor) -> Tensor:
    """``mu + V z``: vectors ``[..., d]`` for coefficients ``[..., p]``, or ``[..., T, d]`` for ``[..., T, p]``."""
    if coefficients.dim() == basis.dim():
        return mean[..., None, :] + coefficients @ basis
    return mean + (coefficients[..., None, :] @ basis)[..., 0, :]


def rmm(tile: Tile, _stats: Any, *, num_basis: int, rank: int, route: Sequence[float | None]) -> Tensor:
    """The base plus one model's task vector recovered from RMM's basis, or the routed mixture of several.

    Task vectors are reduced to ``rank`` (adapters keep theirs if it is at least their own), their canonical factors
    compressed row by row of A and column by column of B.
    """
    deltas = tile.deltas()
    rank = min(rank, *deltas[0].shape)
    factors = [canonical_factors(*_factor(delta, rank), rank) for delta in deltas]
    lefts = _recover(torch.stack([left.T for left, _ in factors], 1), num_basis)
    rights = _recover(torch.stack([right for _, right in factors], 1), num_basis)
    merged = tile.origin.clone()
    for index, share in enumerate(mixture(route, len(deltas))):
        if abs(share) >= SMALL:
            merged.add_((lefts[:, index].T @ rights[:, index]).to(merged.dtype), alpha=share)
    return merged


def _factor(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = svd(delta)
    return left[:, :rank] * values[:rank], right[:rank]


def _recover(vectors: Tensor, num_basis: int) -> Tensor:
    """Vectors ``[rank, T, d]`` as their compressed form gives them back."""
    return rmm_reconstruct(*rmm_compress(vectors, min(num_basis, vectors.shape[1])))


def routed_mean(tile: Tile, _stats: Any, *, route: Sequence[float | None], **_params: Any) -> Tensor:
    """Vectors in routed methods: ``theta_0 + sum_t route_t tau_t``, the mean without a route."""
    merged = tile.origin.clone()
    for share, delta in zip(mixture(route, len(tile.models)), tile.deltas(), strict=True):
        merged.add_(delta, alpha=share)
    return merged


def evo(tile: Tile, _stats: Any, *, weight: Sequence[float | None], keep: Sequence[float]) -> Tensor:
    """Evo-Merging's served model (arXiv 2509.12951): ``theta_0 + (sum_i b_i s_i B_i)(sum_i b_i A_i^)`` of LoRA
    adapters.

    ``A^`` keeps the ``round(keep n)`` largest entries of A (ties too; none for 0, else at least one). Factors are added
    apart, so an adapter alone is scaled by the square of its weight, and its sign shows only beside others. What
    searches ``keep`` and ``weight`` is `mipipe tune --search cma`.

    Raises:
        InputError: adapters of different ranks.
    """
    found = [(share if share is not None else 1.0 / len(weight), kept, pair)
             for share, kept, pair in zip(weight, keep, tile.factors, strict=True) if pair is not None]
    if not found:
        return tile.origin.clone()
    ranks = sorted({len(pair[1]) for _, _, pair in found})
    if len(ranks) > 1:
        raise InputError(f"{tile.key}: evo adds the factors of adapters, which must have one rank; found"
                         f" {' and '.join(map(str, ranks))}")
    up = torch.stack([share * pair[0] for share, _, pair in found]).sum(0)
    down = torch.stack([share * largest(pair[1], kept) for share, kept, pair in found]).sum(0)
    return tile.origin + up @ down


def largest(values: Tensor, keep: float) -> Tensor:
    """The entries of largest magnitude, ``round(keep n)`` of them and those equal to the last; zero elsewhere."""
    count = 0 if keep == 0 else max(1, round(keep * values.numel()))
    if count == 0:
        return torch.zeros_like(values)
    bound = values.abs().flatten().topk(count).values[-1]
    return torch.where(values.abs() >= bound, values, 0.0)
