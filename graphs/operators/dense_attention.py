"""Attention by its formulas on whole score matrices: what any device and any option can compute.

Legend: B batch, H query heads, G key heads (H a multiple of G), S queries, T keys, D head size, E value head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOVED, HELD = {"forward": 17, "backward": 42}, {"forward": 3, "backward": 6}
"""How often a softcapped score is read and written, and how many are alive for it at once, each of 4 bytes."""


def expand_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B,G,T,D] repeated to the query heads [B,H,T,D] (grouped-query attention)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_heads(grad: Tensor, groups: int) -> Tensor:
    """The gradient [B,H,T,D] of repeated heads, summed back to [B,G,T,D]."""
    if grad.shape[1] == groups:
        return grad
    split: Tensor = grad.unflatten(1, (groups, grad.shape[1] // groups))  # type: ignore[no-untyped-call]
    return split.sum(dim=2)


def bias_of(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window: int) -> Tensor | None:
    """The additive mask [..,S,T] in q's dtype: ``mask`` (boolean: True attends) with the causal band, if any.

    Query i of S sits at key position i + T - S; a window of w lets it see the last w keys, itself included.
    """
    bias = mask
    if mask is not None and mask.dtype is torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    if causal or window:
        queries, keys = q.shape[-2], k.shape[-2]
        distance = (torch.arange(queries, device=q.device)[:, None] + (keys - queries)
                    - torch.arange(keys, device=q.device)[None, :])
        hidden = distance < 0 if causal else distance.abs() >= window
        if causal and window:
            hidden = hidden | (distance >= window)
        band = torch.zeros(queries, keys, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
        bias = band if bias is None else bias + band
    return bias


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Scores [B,H,S,T] in float32 (float64 for float64), before the softmax."""
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    scores = torch.matmul(q.to(wide), k.to(wide).transpose(-2, -1)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return scores if bias is None else scores + bias.to(wide)


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, scale: float,
            softcap: float) -> tuple[Tensor, Tensor]:
    """Output [B,H,S,E] in q's dtype and logsumexp [B,H,S], sinks included; ``k`` and ``v`` have all query heads."""
    scores = _scores(q, k, bias, scale, softcap)
    lse = torch.logsumexp(scores, dim=-1)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    weights = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse).unsqueeze(-1))
    return torch.matmul(weights, v.to(weights.dtype)).to(q.dtype), lse


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor,
             scale: float, softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: the formulas of the flash backward (Dao et al., FlashAttention, 2022, appendix B)."""
    wide = lse.dtype
    scores = _scores(q, k, bias, scale, softcap)
    weights = torch.exp(scores - torch.where(torch.isneginf(lse), 0.0, lse).unsqueeze(-1))
    grad_w, out_w = grad.to(wide), out.to(wide)
    dv = torch.matmul(weights.transpose(-2, -1), grad_w)
    delta = (grad_w * out_w).sum(dim=-1, keepdim=True)
    dscores = weights * (torch.matmul(grad_w, v.to(wide).transpose(-2, -1)) - delta)
    if softcap:
        capped = torch.tanh(torch.matmul(q.to(wide), k.to(wide).transpose(-2, -1)) * (scale / softcap))
        dscores = dscores * (1 - capped * capped)
    dq = torch.matmul(dscores, k.to(wide)) * scale
    dk = torch.matmul(dscores.transpose(-2, -1), q.to(wide)) * scale
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def sink_gradient(grad: Tensor, sinks: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient [H] of attention sinks: ``-sum(exp(sink - lse) * <grad, out>)``; needs no scores."""
    share = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    return -(share * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)).sum(dim=(0, 2)).to(sinks.dtype)
