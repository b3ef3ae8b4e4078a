"""Coefficients from how much the models vary: SCE and VaRM (FuseChat), FRANK's closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.arithmetic import add_deltas
from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.sparsify import Cutoffs, threshold_rounds
from mipipe.runtime.merge.methods.task_vectors import agreeing, elected_signs


def energy_weights(energies: Tensor) -> list[float]:
    """Shares ``E_i / sum_j E_j``; equal ones when all are zero."""
    total = float(energies.sum())
    if total == 0.0:
        return [1.0 / len(energies)] * len(energies)
    return [float(energy) / total for energy in energies]


# SCE ------------------------------------------------------------------------------------------------------------------


def _variance(tile: Tile, **_params: Any) -> list[Tensor]:
    """Population variance over the models, entry by entry."""
    return [variance_of(tile.deltas())]


def variance_of(deltas: Sequence[Tensor]) -> Tensor:
    """Variance over models, per entry, to the bits of ``torch.var``, which adds in double too, but takes far longer."""
    mean = deltas[0].double().clone()
    for delta in deltas[1:]:
        mean.add_(delta)
    mean.div_(len(deltas))
    total = torch.zeros_like(mean)
    for delta in deltas:
        moved = delta - mean
        total.addcmul_(moved, moved)
    return total.div_(len(deltas)).to(deltas[0].dtype)


def _sce_counts(_entries: list[int], nonzero: list[int], *, select_topk: float, **_params: Any) -> list[list[int]]:
    return [[math.floor(select_topk * count + 1e-9)] for count in nonzero]


def _selected(tile: Tile, deltas: Sequence[Tensor], cutoffs: Cutoffs | None) -> Tensor | None:
    return None if cutoffs is None else cutoffs[0][0].mask(variance_of(deltas))


def _measure_energy(tile: Tile, cutoffs: Cutoffs | None, **_params: Any) -> Tensor:
    deltas = tile.deltas()
    mask = _selected(tile, deltas, cutoffs)
    return torch.stack([(delta if mask is None else delta * mask).square().sum(dtype=torch.float64)
                        for delta in deltas])


def _finish_energy(total: Tensor, cutoffs: Cutoffs | None, **_params: Any) -> tuple[Cutoffs | None, list[float]]:
    if cutoffs is not None:
        cutoffs[0][0].used = 0  # the measuring pass has used up the quota of ties
    return cutoffs, energy_weights(total)


def sce_rounds(*, select_topk: float, **_params: Any) -> tuple[Round, ...]:
    """Selection by variance (two counting rounds, none when everything is selected), then the energies."""
    select = threshold_rounds(_variance, _sce_counts) if select_topk < 1.0 else ()
    return (*select, Round(_measure_energy, _finish_energy))


def sce(tile: Tile, stats: tuple[Cutoffs | None, list[float]], *, select_topk: float, mask_deltas: bool) -> Tensor:
    """Select entries of high variance, calculate weights from their energy, erase minority signs (arXiv 2408.07990).

    ``mask_deltas`` also drops the unselected entries from the sum, as mergekit's ``sce`` does; FuseChat's own code
    uses the selection for the weights only. Of entries with equal variance at the edge of the selection (common between
    bfloat16 models) the first in row order are selected; mergekit leaves that to an unstable sort.
    """
    cutoffs, weight = stats
    deltas = tile.deltas()
    mask = _selected(tile, deltas, cutoffs) if mask_deltas else None
    if mask is not None:
        deltas = [delta * mask for delta in deltas]
    signs = elected_signs(deltas, [1.0] * len(deltas))
    return tile.origin + agreeing(deltas, weight, signs, "mean")


# VaRM -----------------------------------------------------------------------------------------------------------------


def varm_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_energy, lambda total, _stats, **_params: energy_weights(total)),)


def varm(tile: Tile, stats: list[float]) -> Tensor:
    """``theta_0 + sum_i w_i tau_i`` with weights by mean squared variation (FuseChat's earlier VaRM)."""
    return add_deltas(tile.origin, tile.deltas(), stats, 1.0, normalize=False)


# FRANK ----------------------------------------------------------------------------------------------------------------


def frank_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_energy_all, _finish_frank),)


def _measure_energy_all(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    return torch.stack([delta.square().sum(dtype=torch.float64) for delta in tile.deltas()])


def _finish_frank(total: Tensor, _stats: Any, **_params: Any) -> list[float]:
    return [float(energy) for energy in total]


def frank_lambdas(energies: Sequence[float], weights: Sequence[float]) -> list[float]:
    """``lambda_t = w_t n_t / sum_k w_k n_k`` with ``n_t = ||tau_t||^2`` of a block; zeros when nothing moved."""
    total = sum(weight * energy for weight, energy in zip(weights, energies, strict=True))
    if total == 0.0:
        return [0.0] * len(energies)
    return [weight * energy / total for weight, energy in zip(weights, energies, strict=True)]


def frank_prior(alpha: float, num_layers: int, norm: str) -> list[float]:
    """The vision model's weight in each layer: ``exp(-alpha l)``, l from 1, divided by its sum or its maximum."""
    decay = [math.exp(-alpha * layer) for layer in range(num_layers)]
    return [value / (sum(decay) if norm == "sum" else 1.0) for value in decay]


def frank(tile: Tile, stats: list[float] | None, *, weight: Sequence[float], prior_alpha: float | None,
          prior_norm: str) -> Tensor:
    """Layer-wise closed form of the second-order bound (FRANK, arXiv 2505.16151).

    Outside the layers the first model (the multimodal one) is kept. ``prior_alpha`` is the decay of visual attention
    over layers, measured on images; without it ``weight`` counts.
    """
    if tile.layer is None or stats is None:
        return tile.models[0].clone()
    if prior_alpha is not None:
        vision = frank_prior(prior_alpha, tile.num_layers, prior_norm)[tile.layer]
        weight = (vision, *[1.0 - vision] * (len(tile.models) - 1))
    return add_deltas(tile.origin, tile.deltas(), frank_lambdas(stats, weight), 1.0, normalize=False)
