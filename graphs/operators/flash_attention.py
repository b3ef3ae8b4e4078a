"""Attention by torch's fused kernels, with what they do not take by themselves.

Sinks: the kernel's output is scaled by ``exp(lse - total)``, where ``total = logaddexp(lse, sink)``; its backward,
given that output and ``total``, is then exact: its weights are ``exp(score - total)``, its delta ``sum(grad out)``.
Unequal head sizes: the smaller one is padded with zeros, which adds nothing to scores or output.
On CUDA a window is the kernel's own, and grouped heads are read where they are. A case is computed there only after the
kernel has agreed with the formulas once, on a small input of the case's kind.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mipipe.graphs.operators import dense_attention as dense

LARGEST_HEAD = 256
"""The head size up to which CUDA's flash kernel computes."""
AGREEMENT = 0.03
"""The largest difference from the formulas, relative to their largest value, at which a kernel in half precision is
taken to be right."""


class Options(NamedTuple):
    """How queries see keys; see `mipipe.graphs.operators.kernels.attention`."""

    causal: bool
    window: int
    scale: float


def on_cpu(q: Tensor, softcap: float) -> bool:
    """Whether the CPU's kernel computes this case."""
    return q.device.type == "cpu" and not softcap and q.numel() > 0


def on_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, options: Options,
            softcap: float) -> bool:
    """Whether CUDA's flash kernel computes this case, and has agreed with the formulas."""
    fits = (q.is_cuda and mask is None and not softcap and q.dtype in (torch.float16, torch.bfloat16)
            and max(q.shape[-1], v.shape[-1]) <= LARGEST_HEAD and q.numel() > 0 and k.numel() > 0
            and (not (options.causal or options.window) or q.shape[-2] <= k.shape[-2]))
    return fits and agrees(q.device, q.dtype, (q.shape[-1], v.shape[-1]), q.shape[1] > k.shape[1], sinks is not None,
                           options.causal, options.window > 0, q.shape[-2] == k.shape[-2])


def cpu_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
                options: Options) -> tuple[Tensor, Tensor]:
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
                 options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `cpu_forward` gave."""
    plain, bias = _cpu_mask(q, k, mask, options)
    size = max(q.shape[-1], v.shape[-1])
    if bias is not None:
        grad = grad.masked_fill(torch.isneginf(lse).unsqueeze(-1), 0.0)
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        padded(grad, size), padded(q, size), padded(k, size), padded(v, size), padded(out, size), lse, 0.0, plain,
        attn_mask=bias, scale=options.scale)
    return found[0][..., :q.shape[-1]], found[1][..., :k.shape[-1]], found[2][..., :v.shape[-1]]


def cuda_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Output [B,H,S,E], which lies in memory as [B,S,H,E], and logsumexp [B,H,S]."""
    size, left, right = _cuda_size(q, v), *_cuda_window(q, k, options)
    out, lse = torch.ops.aten._flash_attention_forward(
        *(padded(item, size).transpose(1, 2) for item in (q, k, v)), None, None, q.shape[-2], k.shape[-2], 0.0,
        _cuda_causal(q, k, options), False, scale=options.scale, window_size_left=left, window_size_right=right)[:2]
    return with_sinks(out.transpose(1, 2)[..., :v.shape[-1]], lse, sinks)


def cuda_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                  options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `cuda_forward` gave."""
    size, left, right = _cuda_size(q, v), *_cuda_window(q, k, options)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    none = torch.zeros((), dtype=torch.uint64, device=q.device)
    found = torch.ops.aten._flash_attention_backward(
        *(padded(item, size).transpose(1, 2) for item in (grad, q, k, v, out)), lse, None, None, q.shape[-2],
        k.shape[-2], 0.0, _cuda_causal(q, k, options), seed, none, scale=options.scale, window_size_left=left,
        window_size_right=right)
    return tuple(item.transpose(1, 2)[..., :like.shape[-1]] for item, like in zip(found, (q, k, v), strict=True))


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output and logsumexp once ``sinks`` [H] have joined the softmax's denominator."""
    if sinks is None:
        return out, lse
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    return out * torch.exp(lse - total).to(out.dtype).unsqueeze(-1), total


def padded(x: Tensor, size: int) -> Tensor:
    """A tensor with zeros after its last dimension's end, up to ``size``."""
    return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))


def _cpu_mask(q: Tensor, k: Tensor, mask: Tensor | None, options: Options) -> tuple[bool, Tensor | None]:
    """Whether the kernel's own causal mask says it all; else the additive mask."""
    plain = options.causal and not options.window and mask is None and q.shape[-2] == k.shape[-2]
    return plain, None if plain else dense.bias_of(q, k, mask, options.causal, options.window)


def _cuda_size(q: Tensor, v: Tensor) -> int:
    return -(-max(q.shape[-1], v.shape[-1]) // 8) * 8


def _cuda_causal(q: Tensor, k: Tensor, options: Options) -> bool:
    """Whether the kernel's plain causal mask is asked for; every other band is a window."""
    return options.causal and not options.window and q.shape[-2] == k.shape[-2]


def _cuda_window(q: Tensor, k: Tensor, options: Options) -> tuple[int | None, int | None]:
    """How many keys before and after its own a query sees (-1: all); keys end where queries end."""
    if _cuda_causal(q, k, options) or not (options.causal or options.window):
        return None, None
    return options.window - 1 if options.window else -1, 0 if options.causal else options.window - 1


@functools.cache
def agrees(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int], grouped: bool, sinks: bool, causal: bool,
           window: bool, square: bool) -> bool:
    """Whether CUDA's kernel and the formulas give the same on a small input: outputs and all gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    heads, groups, queries, keys = 4, 2 if grouped else 4, 40, 40 if square else 56
    q, k, v = draw(2, heads, queries, sizes[0]), draw(2, groups, keys, sizes[0]), draw(2, groups, keys, sizes[1])
    grad, sink = draw(2, heads, queries, sizes[1]), draw(heads) if sinks else None
    options = Options(causal, 7 if window else 0, sizes[0] ** -0.5)
    try:
        out, lse = cuda_forward(q, k, v, sink, options)
        found = (out, *cuda_backward(grad, q, k, v, out, lse, options))
    except RuntimeError:
        return False
    wide = [item.double().cpu() for item in (grad, q, k, v)]
    wide_k, wide_v = dense.expand_heads(wide[2], heads), dense.expand_heads(wide[3], heads)
    bias = dense.bias_of(wide[1], wide_k, None, options.causal, options.window)
    right, total = dense.forward(wide[1], wide_k, wide_v, bias, None if sink is None else sink.double().cpu(),
                                 options.scale, 0.0)
    dq, dk, dv = dense.backward(wide[0], wide[1], wide_k, wide_v, bias, right, total, options.scale, 0.0)
    wanted = (right, dq, dense.sum_heads(dk, groups), dense.sum_heads(dv, groups))
    return all(bool((here.double().cpu() - there).abs().max() <= AGREEMENT * there.abs().max())
               for here, there in zip(found, wanted, strict=True))
