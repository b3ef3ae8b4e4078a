"""What all of attention's kernels share: how queries see keys, sinks, and heads of unequal sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionOptions(NamedTuple):
    """How queries see keys; see `mipipe.graphs.operators.kernels.attention`."""

    causal: bool
    window: int
    scale: float


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and logsumexp once ``sinks`` [H] have joined the softmax's denominator."""
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    return out * torch.exp(lse - total).to(out.dtype).unsqueeze(-1), total


def padded(x: Tensor, size: int) -> Tensor:
    """A tensor with zeros after its last dimension's end, up to ``size``."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))
