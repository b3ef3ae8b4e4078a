"""Attention by CUDA's memory-efficient kernel: the cases that flash does not take, masks and float32 above all.

What the kernel asks for and gives: all query heads in k and v; an additive mask of finite numbers whose rows start at
multiples of 16 bytes; the logsumexp of a query count rounded up to `ROWS`, which the backward wants filled with
infinity, so that what is beyond the last query has no weight. A mask's minus infinity becomes the lowest number that
stays finite in the kernel's units; queries that see no key are then set to zero by name.

Legend: B batch, H query heads, G key heads, S queries, T keys, D head size, E value head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mipipe.graphs.operators import dense_attention as dense
from mipipe.graphs.operators.attention_options import AttentionOptions, padded, with_sinks

ROWS = 32
"""The kernel's logsumexp has room for a multiple of so many queries (aten's kAlignLSE)."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def takes(q: Tensor, k: Tensor, softcap: float) -> bool:
    """Whether the kernel computes a case on CUDA, as far as its inputs say."""
    return q.is_cuda and not softcap and q.dtype in DTYPES and q.numel() > 0 and k.numel() > 0


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
            options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Output [B,H,S,E] and logsumexp [B,H,S]; ``k`` and ``v`` have G heads."""
    bias, hidden = _bias(q, k, mask, options)
    size = _size(q, v)
    out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
        padded(q, size), _wide(k, q, size), _wide(v, q, size), bias, True, 0.0, bias is None and options.causal,
        scale=options.scale)[:2]
    out, lse = out[..., :v.shape[-1]], lse[..., :q.shape[-2]]
    if hidden is not None:
        out, lse = out.masked_fill(hidden.unsqueeze(-1), 0.0), lse.masked_fill(hidden, float("-inf"))
    return with_sinks(out, lse, sinks)


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
             options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `forward` gave."""
    bias, hidden = _bias(q, k, mask, options)
    size, groups, queries = _size(q, v), k.shape[1], q.shape[-2]
    if hidden is not None:
        grad, lse = grad.masked_fill(hidden.unsqueeze(-1), 0.0), lse.masked_fill(torch.isneginf(lse), 0.0)
    lse = torch.nn.functional.pad(lse, (0, -queries % ROWS), value=float("inf"))
    seed, offset = torch.zeros(2, dtype=torch.int64, device=q.device).unbind()
    found = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        padded(grad, size), padded(q, size), _wide(k, q, size), _wide(v, q, size), bias, padded(out, size), lse, seed,
        offset, 0.0, [True, True, True, False], bias is None and options.causal, scale=options.scale)
    return (found[0][..., :q.shape[-1]], dense.sum_heads(found[1][..., :k.shape[-1]], groups),
            dense.sum_heads(found[2][..., :v.shape[-1]], groups))


def _size(q: Tensor, v: Tensor) -> int:
    """The head size that the kernel gets: one for all, in whole 16 bytes."""
    each = 16 // q.element_size()
    return -(-max(q.shape[-1], v.shape[-1]) // each) * each


def _wide(x: Tensor, q: Tensor, size: int) -> Tensor:
    return padded(dense.expand_heads(x, q.shape[1]), size)


def _bias(q: Tensor, k: Tensor, mask: Tensor | None, options: AttentionOptions) -> tuple[Tensor | None, Tensor | None]:
    """The additive mask [B,H,S,T] as the kernel takes it, and which queries see no key; None where its own causal mask
    (from the first query on) or none at all says everything."""
    square = q.shape[-2] == k.shape[-2]
    if mask is None and not options.window and (square or not options.causal):
        return None, None
    bias = dense.bias_of(q, k, mask, options.causal, options.window)
    assert bias is not None
    hidden = torch.isneginf(bias).all(dim=-1)
    keys, each = k.shape[-2], 16 // q.element_size()
    room = bias.new_empty(*bias.shape[:-1], -(-keys // each) * each)[..., :keys]
    room.copy_(bias).clamp_(min=torch.finfo(q.dtype).min / 2)
    while hidden.dim() < 3:
        hidden = hidden.unsqueeze(0)
    return room.expand(*q.shape[:2], q.shape[-2], keys), hidden
