"""Weighted sums: averages and task arithmetic, and copying one model.

Every function takes a `Tile` and returns the merged tile. Differences are taken before sums, so equal inputs come back
bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.method import Tile

SMALL = 1e-8
"""Sums of weights below this count as zero (mergekit's convention for ``normalize``)."""


def linear(tile: Tile, _stats: Any, *, weight: Sequence[float], normalize: bool) -> Tensor:
    """``sum_i w_i theta_i``, divided by ``sum_i w_i`` when normalised.

    Computed as ``W theta_1 + sum_i w_i (theta_i - theta_1)``: models that agree give themselves exactly.
    """
    total = sum(weight)
    scale = 1.0 / total if normalize and abs(total) >= SMALL else 1.0
    first = tile.models[0]
    factor = total * scale if not normalize or abs(total) < SMALL else 1.0
    merged = first.clone() if factor == 1.0 else first * factor
    for share, model in zip(weight[1:], tile.models[1:], strict=True):
        merged.add_(model - first, alpha=share * scale)
    return merged


def task_arithmetic(tile: Tile, _stats: Any, *, weight: Sequence[float], lambda_: float, normalize: bool) -> Tensor:
    """``theta_0 + lambda sum_i w_i tau_i`` (arXiv 2212.04089)."""
    return add_deltas(tile.origin, tile.deltas(), weight, lambda_, normalize)


def add_deltas(base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], lambda_: float,
               normalize: bool) -> Tensor:
    """``base + lambda sum_i w_i delta_i``, the sum divided by ``sum_i w_i`` when normalised."""
    total = sum(weight)
    scale = lambda_ / total if normalize and abs(total) >= SMALL else lambda_
    merged = base.clone()
    for share, delta in zip(weight, deltas, strict=True):
        merged.add_(delta, alpha=share * scale)
    return merged


def mean_of_tasks(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    """``theta_0 + mean_i tau_i``: the default for vectors in methods that only define matrices."""
    return mean_from(tile.origin, tile.models)


def scaled_mean_of_tasks(tile: Tile, _stats: Any, *, lambda_: float, **_params: Any) -> Tensor:
    """``theta_0 + lambda mean_i tau_i``."""
    return mean_from(tile.origin, tile.models, lambda_)


def plain_mean(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    """``mean_i theta_i``: the same default where there is no base."""
    return mean_from(tile.models[0], tile.models)


def mean_from(start: Tensor, models: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """``start + scale * mean_i (models_i - start)``."""
    merged = start.clone()
    for model in models:
        merged.add_(model - start, alpha=scale / len(models))
    return merged


def base_value(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    """The base, unchanged."""
    return tile.origin.clone()


def passthrough(tile: Tile, _stats: Any, *, scale: Sequence[float]) -> Tensor:
    """The only model, scaled."""
    model = tile.models[0]
    return model.clone() if scale[0] == 1.0 else model * scale[0]


def layer_swapping(tile: Tile, _stats: Any, *, bottom: int, top: int, transition: int, beta: float) -> Tensor:
    """Bottom and top layers of the first model (language), the middle of the second (task), a blend in between.

    Embeddings follow the first layer, final norm and head the last (arXiv 2410.01335; the zones of tensors outside the
    layers are this project's assumption).
    """
    language, task = tile.models
    if tile.layer is not None:
        layer = tile.layer
    else:
        layer = 0 if tile.tensor_class == "embedding" else tile.num_layers - 1
    return torch.lerp(language, task, layer_swapping_weight(layer, tile.num_layers, bottom, top, transition, beta))


def layer_swapping_weight(layer: int, num_layers: int, bottom: int, top: int, transition: int, beta: float) -> float:
    """The task model's weight in a layer: 0 in the outer zones, ``beta`` in the transitions, 1 between."""
    if layer < bottom or layer >= num_layers - top:
        return 0.0
    if layer < bottom + transition or layer >= num_layers - top - transition:
        return beta
    return 1.0
