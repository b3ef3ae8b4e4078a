"""Attention in PyTorch's plain operators, where mipipe's one operator does not do: dropout, and masks that train."""

from __future__ import annotations

import torch
from torch import Tensor

import mipipe.graphs.operators.expert_kernels
import mipipe.graphs.operators.kernels  # noqa: F401  (both register mipipe's operators)


def trains(mask: Tensor | None) -> bool:
    """Whether a mask has a gradient (a learned position bias), which the attention operator does not compute."""
    return mask is not None and mask.requires_grad


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
                    scale: float | None) -> Tensor:
    """Attention in plain operators: for dropout (the dropped weights are kept in any case) and masks that train."""
    heads = query.shape[-3]
    key, value = (x.repeat_interleave(heads // x.shape[-3], dim=-3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        band = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~band, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return torch.nn.functional.dropout(scores.softmax(dim=-1), dropout, True) @ value
