"""WIDEN: merging by how far each column's magnitude and direction have moved (arXiv 2408.03092)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.runtime.merge.methods.method import Tile


def ranks(values: Tensor) -> Tensor:
    """Ascending stable rank of every entry within its row, divided by the row's length: 0, 1/n, .., (n-1)/n."""
    order = values.argsort(dim=1, stable=True)
    counts = torch.arange(values.shape[1], device=values.device, dtype=values.dtype) / values.shape[1]
    return torch.empty_like(values).scatter_(1, order, counts.expand_as(values).contiguous())


def scores(significance: Tensor, ratio: float, calibrated: float, counted: bool = False) -> Tensor:
    """Softmax over models (first axis); ``calibrated`` wherever an entry exceeds ``ratio`` times its model's mean.

    ``counted``: the entries are `ranks`, compared as the integers they stand for. With an odd number of columns the
    median is the mean exactly, which fractions would decide by rounding.
    """
    weights = torch.softmax(significance, dim=0)
    flat = significance.flatten(1)
    if counted:
        flat = (flat.double() * flat.shape[1]).round()
    above = flat > ratio * flat.mean(dim=1, keepdim=True)
    return torch.where(above.reshape(significance.shape), calibrated, weights)


def column_moves(base: Tensor, model: Tensor) -> tuple[Tensor, Tensor]:
    """Per column: change of the norm, and 1 - cosine of the directions (0 for a zero column), ``[columns]`` each."""
    norm_base, norm_model = base.norm(dim=0), model.norm(dim=0)
    both = norm_base * norm_model
    cosine = (base * model).sum(dim=0) / torch.where(both > 0, both, 1.0)
    # A zero column has no direction, so it has not turned.
    return (norm_model - norm_base).abs(), torch.where(both > 0, 1.0 - cosine, 0.0)


def widen(tile: Tile, _stats: Any, *, above_average_ratio: float, calibrated_score: float) -> Tensor:
    """``W_0 + sum_i tau_i w_i`` with a weight for every model and column; for vectors, every entry.

    Embeddings are turned first, so that their "columns" are tokens.
    """
    base, models, deltas = tile.origin, tile.models, tile.deltas()
    if base.dim() == 1:
        weights = scores(torch.stack(deltas).abs(), above_average_ratio, calibrated_score)
        return base + (weights * torch.stack(deltas)).sum(0)
    turned = tile.tensor_class is TensorClass.EMBEDDING
    moves = [column_moves(base.T, model.T) if turned else column_moves(base, model) for model in models]
    magnitude, direction = (torch.stack(part) for part in zip(*moves, strict=True))
    weights = (scores(ranks(magnitude), above_average_ratio, calibrated_score, counted=True)
               + scores(ranks(direction), above_average_ratio, calibrated_score, counted=True)) / 2
    merged = base.clone()
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(delta * (weight[:, None] if turned else weight))
    return merged
