"""Merges that decide entry by entry which of a model's changes come in: Arcee Fusion, NearSwap, and RAM.

Arcee Fusion takes the entries whose change matters most, NearSwap those that hardly changed, and RAM keeps changes that
only one model has as they are while it averages those that several have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.sparsify import Cutoffs, threshold_rounds

SMALL_SHARE = 1e-8
"""Added to every probability before Arcee Fusion divides them (mergekit's constant)."""
SMALL_STEP = 1e-6
"""NearSwap divides by no less than this (mergekit's constant)."""


# Arcee Fusion ---------------------------------------------------------------------------------------------------------


def importance(base: Tensor, model: Tensor) -> Tensor:
    """``|model - base|`` times the Kullback-Leibler divergence of the row's softmax from the base's, never negative."""
    after, before = torch.softmax(model, -1) + SMALL_SHARE, torch.softmax(base, -1) + SMALL_SHARE
    divergence = (after * torch.log(after / before)).sum(-1, keepdim=True)
    return ((model - base).abs() * divergence).clamp_min_(0)


def _importance(tile: Tile, **_params: Any) -> list[Tensor]:
    return [importance(tile.origin, tile.models[0])]


def _quartile_counts(entries: list[int], _nonzero: list[int], **_params: Any) -> list[list[int]]:
    """The quartiles as ranks from the top: the value at place ``floor(q (n - 1))`` of the ascending order."""
    places = [int(np.float32(share) * np.float32(entries[0] - 1)) for share in (0.25, 0.5, 0.75)]
    return [[entries[0] - place for place in places]]


def arcee_fusion_rounds(**_params: Any) -> tuple[Round, ...]:
    """Two counting rounds that find the quartiles of the importance exactly."""
    return threshold_rounds(_importance, _quartile_counts)


def fusion_bound(cutoffs: Cutoffs) -> Tensor:
    """``median + 1.5 (upper quartile - lower quartile)``, float32."""
    upper, median, lower = (torch.tensor(selection.threshold.value) for selection in reversed(cutoffs[0]))
    return median + 1.5 * (upper - lower)


def arcee_fusion(tile: Tile, cutoffs: Cutoffs, **_params: Any) -> Tensor:
    """The base, with the model's entries where their importance reaches `fusion_bound` (Arcee AI's Arcee Fusion).

    Quartiles are of the whole piece; mergekit estimates them from a million random entries where it has more.
    """
    base, model = tile.origin, tile.models[0]
    chosen = importance(base, model) >= fusion_bound(cutoffs).to(base.device)
    return base + (model - base) * chosen


# NearSwap -------------------------------------------------------------------------------------------------------------


def nearswap(tile: Tile, _stats: Any, *, t: float) -> Tensor:
    """``base + min(1, t / |delta|) delta``: at most ``t`` towards the model in every entry (alchemonaut's NearSwap)."""
    delta = tile.models[0] - tile.origin
    return tile.origin + delta * (t / delta.abs().clamp_min(SMALL_STEP)).clamp_(0, 1)


# RAM ------------------------------------------------------------------------------------------------------------------


def _changed(tile: Tile, epsilon: float) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Task vectors with negligible entries at zero, 1 where they are not, and how many models changed an entry."""
    deltas = tile.deltas()
    masks = [(delta.abs() > epsilon).to(delta.dtype) for delta in deltas]
    count = torch.zeros_like(deltas[0])
    for mask in masks:
        count.add_(mask)
    return [delta.mul_(mask) for delta, mask in zip(deltas, masks, strict=True)], masks, count


def ram(tile: Tile, _stats: Any, *, epsilon: float) -> Tensor:
    """``theta_0`` plus, per entry, the mean of the task vectors that change it (Reinforced Agent Merging, 2601.13572).

    A change is a magnitude above ``epsilon``; what only one model changes comes in whole.
    """
    deltas, _, count = _changed(tile, epsilon)
    count.clamp_min_(1)
    merged = tile.origin.clone()
    for delta in deltas:
        merged.add_(delta / count)
    return merged


def _measure_overlap(tile: Tile, _stats: Any, *, epsilon: float, **_params: Any) -> Tensor:
    """Per model: entries changed by others too, and by it alone, ``[models, 2]``."""
    _, masks, count = _changed(tile, epsilon)
    return torch.stack([torch.stack([(mask * (count > 1)).count_nonzero(), (mask * (count == 1)).count_nonzero()])
                        for mask in masks])


def _finish_overlap(total: Tensor, _stats: Any, *, r: float, alpha: float, epsilon: float) -> list[float]:
    """``lambda_i = 1 + r min(alpha, shared_i / unique_i)``."""
    return [1.0 + r * min(alpha, int(shared) / max(int(unique), epsilon, 1e-30)) for shared, unique in total]


def ramplus_rounds(**_params: Any) -> tuple[Round, ...]:
    """One round that counts shared and unique changes of the piece."""
    return (Round(_measure_overlap, _finish_overlap),)


def ramplus_tl(tile: Tile, scales: Sequence[float], *, epsilon: float, **_params: Any) -> Tensor:
    """`ram` with each model's unique changes enlarged by ``lambda_i``, counted in this tensor (RAM+, 2601.13572)."""
    deltas, _, count = _changed(tile, epsilon)
    alone = count == 1
    count.clamp_min_(1)
    merged = tile.origin.clone()
    for delta, scale in zip(deltas, scales, strict=True):
        merged.add_(delta * torch.where(alone, scale, 1.0) / count)
    return merged
