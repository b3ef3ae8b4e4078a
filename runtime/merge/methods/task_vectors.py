"""TIES, DARE, DELLA and Breadcrumbs: sparse task vectors, with or without a vote on every entry's sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.arithmetic import SMALL, add_deltas
from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.sparsify import (
    Cutoffs,
    breadcrumbs_counts,
    breadcrumbs_deltas,
    dare_deltas,
    dare_norm_round,
    della_deltas,
    deltas_of,
    kept,
    norm_round,
    threshold_rounds,
    trim,
    trimmed_norm_round,
)


def elected_signs(deltas: Sequence[Tensor], weight: Sequence[float], zero_sum: float = 1.0) -> Tensor:
    """Per entry the sign of the weighted sum, +1 or -1; ``zero_sum`` where it is exactly zero."""
    total = torch.zeros_like(deltas[0])
    for share, delta in zip(weight, deltas, strict=True):
        # Products are rounded before they are added (no fused multiply-add): deltas of bfloat16 models are coarse, so
        # opposite votes of equal weight are common, and they must cancel the same way everywhere.
        total.add_(delta * share)
    if zero_sum == 1.0:
        return torch.copysign(torch.ones_like(total), total)  # the sum starts at +0, so it never is -0
    return torch.where(total == 0, zero_sum, total.sign())


def agreeing(deltas: Sequence[Tensor], weight: Sequence[float], signs: Tensor, combine: str) -> Tensor:
    """Merge of the entries whose weighted value has the elected sign.

    ``mean``: ``sum w tau / sum w`` over the agreeing models; ``sum``: without the division; ``max``: the largest
    weighted magnitude with the elected sign. Zero where none agrees.
    """
    merged = torch.zeros_like(signs)
    total = torch.zeros_like(signs)
    for share, delta in zip(weight, deltas, strict=True):
        agreed = (delta * share).mul_(signs).clamp_min_(0)  # the magnitude where the sign agrees, else 0
        if combine == "max":
            merged = torch.maximum(merged, agreed)
        else:
            merged.add_(agreed)
            if combine == "mean":
                total.add_(agreed.sign_(), alpha=share)
    if combine != "mean":
        return merged.mul_(signs)
    if min(weight) >= SMALL:  # where none agrees, 0 / SMALL
        return merged.div_(total.clamp_min_(SMALL)).mul_(signs)
    return torch.where(total.abs() < SMALL, 0.0, merged / total).mul_(signs)


def vote(base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], lambda_: float, combine: str,
         zero_sum: float = 1.0) -> Tensor:
    """``base + lambda * agreeing(...)``."""
    signs = elected_signs(deltas, weight, zero_sum)
    return base + agreeing(deltas, weight, signs, combine).mul_(lambda_)


# TIES -----------------------------------------------------------------------------------------------------------------


def _ties_counts(entries: list[int], _nonzero: list[int], *, density: Sequence[float], scope: str,
                 **_params: Any) -> list[list[int]]:
    # Over the whole model the k-th value rule of the reference code holds: entries at least as large as the
    # (d - k)-th smallest stay, which are k + 1 when all differ.
    extra = 1 if scope == "model" else 0
    return [[min(size, kept(share, size) + extra)] for size, share in zip(entries, density, strict=True)]


def _measure_majority(tile: Tile, cutoffs: Cutoffs | None, *, weight: Sequence[float], **_params: Any) -> Tensor:
    return elected_signs(trim(tile, cutoffs), weight, 0.0).sum(dtype=torch.float64)


def _finish_majority(total: Tensor, cutoffs: Cutoffs | None, **_params: Any) -> tuple[Cutoffs | None, float]:
    for selection in cutoffs or ():
        selection[0].used = 0  # the measuring pass has used up the quota of ties
    return cutoffs, 1.0 if total >= 0 else -1.0


def ties_rounds(*, density: Sequence[float], scope: str, zero_sum: str, rescale: bool,
                **_params: Any) -> tuple[Round, ...]:
    """Two counting rounds where entries are trimmed, one for their norms and one for the majority sign where these are
    asked for."""
    rounds: tuple[Round, ...] = ()
    if min(density) < 1.0:
        rounds = threshold_rounds(deltas_of, _ties_counts, keep_ties=scope == "model")
        if rescale:
            rounds += (trimmed_norm_round(trim),)
    if zero_sum == "majority":
        rounds += (Round(_measure_majority, _finish_majority),)
    return rounds


def ties(tile: Tile, stats: Any, *, weight: Sequence[float], density: Sequence[float], lambda_: float,
         normalize: bool, combine: str, zero_sum: str, **_params: Any) -> Tensor:
    """Trim small entries, elect one sign per entry, average what agrees (arXiv 2306.01708).

    Exactly ``floor(density * n)`` entries of a tensor are kept. Differences of bfloat16 weights are coarse, so many
    have the magnitude of the last one kept: of these the first in row order stay. mergekit keeps as many, but leaves
    which of the equal ones to an unstable sort, so on bfloat16 checkpoints results differ in such entries, and only
    there (benchmarks/merge_vs_mergekit.py counts them). With ``scope: model`` all of them stay (the k-th value rule),
    because tensors share the threshold.
    """
    cutoffs, substitute = stats if zero_sum == "majority" else (stats, 1.0)
    combine = combine if normalize or combine == "max" else "sum"
    return vote(tile.origin, trim(tile, cutoffs), weight, lambda_, combine, substitute)


# DARE -----------------------------------------------------------------------------------------------------------------


def dare_rounds(*, density: Sequence[float], rescale: bool, rescale_norm: str, **_params: Any) -> tuple[Round, ...]:
    return (dare_norm_round(),) if rescale and rescale_norm == "l1" and min(density) < 1.0 else ()


def _dare(tile: Tile, factors: Sequence[float] | None, density: Sequence[float], rescale: bool) -> list[Tensor]:
    """Dropped and rescaled task vectors; by 1/density, which keeps the expectation, unless factors were measured."""
    if factors is None:
        factors = [1.0 / share if rescale and share > 0 else 1.0 for share in density]
    return dare_deltas(tile, density, factors)


def dare_linear(tile: Tile, stats: Any, *, weight: Sequence[float], density: Sequence[float], lambda_: float,
                normalize: bool, rescale: bool, **_params: Any) -> Tensor:
    """Task arithmetic on randomly dropped and rescaled task vectors (arXiv 2311.03099)."""
    return add_deltas(tile.origin, _dare(tile, stats, density, rescale), weight, lambda_, normalize)


def dare_ties(tile: Tile, stats: Any, *, weight: Sequence[float], density: Sequence[float], lambda_: float,
              normalize: bool, rescale: bool, **_params: Any) -> Tensor:
    """TIES' vote on randomly dropped and rescaled task vectors (arXiv 2311.03099)."""
    return vote(tile.origin, _dare(tile, stats, density, rescale), weight, lambda_, "mean" if normalize else "sum")


# DELLA ----------------------------------------------------------------------------------------------------------------


def della_rounds(*, density: Sequence[float], rescale: bool, rescale_norm: str, **_params: Any) -> tuple[Round, ...]:
    """The factors that restore L1 norms, where they are asked for and something is dropped."""
    return (norm_round(_plain_della),) if rescale and rescale_norm == "l1" and min(density) < 1.0 else ()


def _plain_della(tile: Tile, *, density: Sequence[float], epsilon: Sequence[float], **_params: Any) -> list[Tensor]:
    return della_deltas(tile, density, epsilon, False)


def della_linear(tile: Tile, stats: Sequence[float] | None, *, weight: Sequence[float], density: Sequence[float],
                 epsilon: Sequence[float], lambda_: float, normalize: bool, rescale: bool, **_params: Any) -> Tensor:
    """Task arithmetic after magnitude-aware dropping (arXiv 2406.11617)."""
    return add_deltas(tile.origin, della_deltas(tile, density, epsilon, rescale, stats), weight, lambda_, normalize)


def della(tile: Tile, stats: Sequence[float] | None, *, weight: Sequence[float], density: Sequence[float],
          epsilon: Sequence[float], lambda_: float, normalize: bool, rescale: bool, **_params: Any) -> Tensor:
    """TIES' vote after magnitude-aware dropping (arXiv 2406.11617)."""
    return vote(tile.origin, della_deltas(tile, density, epsilon, rescale, stats), weight, lambda_,
                "mean" if normalize else "sum")


# Breadcrumbs ----------------------------------------------------------------------------------------------------------


def breadcrumbs_rounds(*, rescale: bool, **_params: Any) -> tuple[Round, ...]:
    return threshold_rounds(deltas_of, breadcrumbs_counts) + (
        (trimmed_norm_round(breadcrumbs_deltas),) if rescale else ())


def breadcrumbs(tile: Tile, stats: Cutoffs, *, weight: Sequence[float], lambda_: float, normalize: bool,
                **_params: Any) -> Tensor:
    """Task arithmetic without outliers and small entries (arXiv 2312.06795)."""
    return add_deltas(tile.origin, breadcrumbs_deltas(tile, stats), weight, lambda_, normalize)


def breadcrumbs_ties(tile: Tile, stats: Cutoffs, *, weight: Sequence[float], lambda_: float, normalize: bool,
                     **_params: Any) -> Tensor:
    """TIES' vote without outliers and small entries (arXiv 2312.06795)."""
    return vote(tile.origin, breadcrumbs_deltas(tile, stats), weight, lambda_, "mean" if normalize else "sum")
