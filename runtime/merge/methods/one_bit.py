"""1bit-Merging: task vectors as signs and one scale, rebuilt for the task a prompt is routed to (arXiv 2502.10743)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.task_vectors import vote


def pack_signs(delta: Tensor) -> Tensor:
    """Signs as bits, eight to a byte, ``[ceil(n / 8)]`` uint8; zero counts as positive (bit 1)."""
    bits = (delta.flatten() >= 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).reshape(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """+1 and -1 in the shape given, float32."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    count = 1
    for size in shape:
        count *= size
    return (bits.flatten()[:count].float() * 2 - 1).reshape(tuple(shape))


def scale_of(delta: Tensor) -> Tensor:
    """``mean |tau|``: the scale that minimises ``||tau - a sign(tau)||`` (BitDelta)."""
    return delta.abs().mean(dtype=torch.float64)


def quantised(delta: Tensor, scale: float) -> Tensor:
    """``a sign(tau)`` with sign(0) = +1."""
    return torch.where(delta >= 0, scale, -scale).to(delta.dtype)


def _measure_scale(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    deltas = tile.deltas()
    sums = torch.stack([delta.abs().sum(dtype=torch.float64) for delta in deltas])
    return torch.cat([sums, sums.new_tensor([deltas[0].numel()])])


def _finish_scale(total: Tensor, _stats: Any, **_params: Any) -> list[float]:
    return [float(value / total[-1]) for value in total[:-1]]


def one_bit_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_scale, _finish_scale),)


def one_bit(tile: Tile, stats: list[float] | None, *, route: int, full_precision: Sequence[bool],
            others_weight: float, others: str) -> Tensor:
    """``theta_0 + tau^_t + w_o Merge(tau^_j, j != t)`` for the routed task t.

    Matrices of a model are 1-bit unless ``full_precision`` (given per tensor filter: which module classes keep full
    precision is the recipe's choice); embeddings, heads and vectors always are. Merge is the sum (``linear``) or TIES.
    """
    deltas = tile.deltas()
    if stats is not None and tile.tensor_class is TensorClass.MATRIX:
        deltas = [delta if keep else quantised(delta, scale)
                  for delta, scale, keep in zip(deltas, stats, full_precision, strict=True)]
    merged = tile.origin + deltas[route]
    rest = [delta for index, delta in enumerate(deltas) if index != route]
    if others_weight and rest:
        if others == "ties":
            merged.add_(vote(torch.zeros_like(merged), rest, [1.0] * len(rest), 1.0, "mean"), alpha=others_weight)
        else:
            for delta in rest:
                merged.add_(delta, alpha=others_weight)
    return merged
