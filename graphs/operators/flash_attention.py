"""Attention by torch's fused kernels, with what they do not take by themselves.

Sinks: the kernel's output is scaled by ``exp(lse - total)``, where ``total = logaddexp(lse, sink)``; its backward,
given that output and ``total``, is then exact: its weights are ``exp(score - total)``, its delta ``sum(grad out)``.
Unequal head sizes: the smaller one is padded with zeros, which adds nothing to scores or output.
On CUDA a window is the kernel's own, and grouped heads are read where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mipipe.graphs.operators import dense_attention as dense
from mipipe.graphs.operators.attention_options import AttentionOptions, padded, with_sinks

LARGEST_HEAD = 256
"""The head size up to which CUDA's flash kernel computes."""


def on_cpu(q: Tensor, softcap: float) -> bool:
    """Whether the CPU's kernel computes this case."""
    return q.device.type == "cpu" and not softcap and q.numel() > 0


def takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: AttentionOptions, softcap: float) -> bool:
    """Whether CUDA's flash kernel computes a case, as far as its inputs say."""
    return (q.is_cuda and mask is None and not softcap and q.dtype in (torch.float16, torch.bfloat16)
            and max(q.shape[-1], v.shape[-1]) <= LARGEST_HEAD and q.numel() > 0 and k.numel() > 0
            and (not (options.causal or options.window) or q.shape[-2] <= k.shape[-2]))


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
                options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Output [B,H,S,E] and logsumexp [B,H,S]; ``k`` and ``v`` have all query heads."""
    plain, bias = _cpu_mask(q, k, mask, options)
    size = max(q.shape[-1], v.shape[-1])
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        padded(q, size), padded(k, size), padded(v, size), 0.0, plain, attn_mask=bias, scale=options.scale)
    out = out[..., :v.shape[-1]]
    if bias is not None:
        out = out.masked_fill(torch.isneginf(lse).unsqueeze(-1), 0.0)
    return with_sinks(out, lse, sinks)


def cpu_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor,
                 options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `cpu_forward` gave."""
    plain, bias = _cpu_mask(q, k, mask, options)
    size = max(q.shape[-1], v.shape[-1])
    if bias is not None:
        grad = grad.masked_fill(torch.isneginf(lse).unsqueeze(-1), 0.0)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        padded(grad, size), padded(q, size), padded(k, size), padded(v, size), padded(out, size), lse, 0.0, plain,
        attn_mask=bias, scale=options.scale)
    return found[0][..., :q.shape[-1]], found[1][..., :k.shape[-1]], found[2][..., :v.shape[-1]]


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, mask: None, sinks: Tensor | None,
                 options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Output [B,H,S,E], which lies in memory as [B,S,H,E], and logsumexp [B,H,S]."""
    size, left, right = _cuda_size(q, v), *_cuda_window(q, k, options)
    out, lse = torch.ops.aten._flash_attention_forward(
        *(padded(item, size).transpose(1, 2) for item in (q, k, v)), None, None, q.shape[-2], k.shape[-2], 0.0,
        _cuda_causal(q, k, options), False, scale=options.scale, window_size_left=left, window_size_right=right)[:2]
    return with_sinks(out.transpose(1, 2)[..., :v.shape[-1]], lse, sinks)


def cuda_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: None, out: Tensor, lse: Tensor,
                  options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `cuda_forward` gave."""
    size, left, right = _cuda_size(q, v), *_cuda_window(q, k, options)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    none = torch.zeros((), dtype=torch.uint64, device=q.device)
    found = torch.ops.aten._flash_attention_backward(
        *(padded(item, size).transpose(1, 2) for item in (grad, q, k, v, out)), lse, None, None, q.shape[-2],
        k.shape[-2], 0.0, _cuda_causal(q, k, options), seed, none, scale=options.scale, window_size_left=left,
        window_size_right=right)
    return tuple(item.transpose(1, 2)[..., :like.shape[-1]] for item, like in zip(found, (q, k, v), strict=True))


def _cpu_mask(q: Tensor, k: Tensor, mask: Tensor | None, options: AttentionOptions) -> tuple[bool, Tensor | None]:
    """Whether the kernel's own causal mask says it all; else the additive mask."""
    plain = options.causal and not options.window and mask is None and q.shape[-2] == k.shape[-2]
    return plain, None if plain else dense.bias_of(q, k, mask, options.causal, options.window)


def _cuda_size(q: Tensor, v: Tensor) -> int:
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _cuda_causal(q: Tensor, k: Tensor, options: AttentionOptions) -> bool:
    """Whether the kernel's plain causal mask is asked for; every other band is a window."""
    return options.causal and not options.window and q.shape[-2] == k.shape[-2]


def _cuda_window(q: Tensor, k: Tensor, options: AttentionOptions) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees (-1: all); keys end where queries end."""
    if _cuda_causal(q, k, options) or not (options.causal or options.window):
        return None, None
    return options.window - 1 if options.window else -1, 0 if options.causal else options.window - 1
