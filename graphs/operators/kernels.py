"""The operators that mipipe adds to ATen, each with a backward of its own and one place that picks its implementation.

- ``mipipe::attention``: softmax(Q K^T scale + mask) V as one operator that keeps (q, k, v, out, logsumexp) for its
  backward on every device; decomposed, it would keep the scores as well (S x S).
- ``mipipe::grouped_mm``: rows grouped by expert times one matrix each; rows beyond the last offset are zero. Its input
  and weight gradients are separate operators, so that the second can be delayed.
- ``mipipe::histogram``: ``aten::histc`` of integers, which the CPU lacks.

Left out: attention dropout (it is decomposed where it is used), and nested tensors.
Legend: B batch, H query heads, G key heads (H a multiple of G), S queries, T keys, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mipipe.graphs.operators import dense_attention as dense
from mipipe.graphs.operators import efficient_attention as efficient
from mipipe.graphs.operators import flash_attention as flash
from mipipe.graphs.operators.attention_options import AttentionOptions
from mipipe.graphs.operators.attention_trust import AttentionKernel, AttentionKind, agrees

HAS_GROUPED_MM = hasattr(torch.ops.aten, "_grouped_mm")


def _heads_inside(x: Tensor) -> Tensor:
    """The same [B,H,S,D] tensor laid out as [B,S,H,D]: how projections give it and take it back, without copies."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, causal: bool, window: int,
              scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Output [B,H,S,E] and logsumexp of the scores [B,H,S]; ``sinks`` [H] join the softmax's denominator alone.

    Queries that see no key give zeros. ``window`` 0 and ``softcap`` 0.0 switch these off. The output lies in memory as
    [B,S,H,E].
    """
    options = AttentionOptions(causal, window, scale)
    kernel = fused_kernel(q, k, v, mask, sinks, options, softcap)
    if kernel is not None:
        out, lse = kernel.forward(q, k, v, mask, sinks, options)
        return _heads_inside(out), lse.contiguous()
    wide_k, wide_v = dense.expand_heads(k, q.shape[1]), dense.expand_heads(v, q.shape[1])
    if flash.on_cpu(q, softcap):
        out, lse = flash.cpu_forward(q, wide_k, wide_v, mask, sinks, options)
        return _heads_inside(out), lse.contiguous()
    out, lse = dense.forward(q, wide_k, wide_v, dense.bias_of(q, k, mask, causal, window), sinks, scale, softcap)
    return _heads_inside(out), lse


def attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
                       out: Tensor, lse: Tensor, causal: bool, window: int, scale: float,
                       softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, from what `attention` kept."""
    options = AttentionOptions(causal, window, scale)
    kernel = fused_kernel(q, k, v, mask, sinks, options, softcap)
    if kernel is not None:
        dq, dk, dv = kernel.backward(grad, q, k, v, mask, out, lse, options)
        return _heads_inside(dq), _heads_inside(dk), _heads_inside(dv)
    heads, groups = q.shape[1], k.shape[1]
    wide_k, wide_v = dense.expand_heads(k, heads), dense.expand_heads(v, heads)
    if flash.on_cpu(q, softcap):
        dq, dk, dv = flash.cpu_backward(grad, q, wide_k, wide_v, mask, out, lse, options)
    else:
        bias = dense.bias_of(q, k, mask, causal, window)
        dq, dk, dv = dense.backward(grad, q, wide_k, wide_v, bias, out, lse, scale, softcap)
    return (_heads_inside(dq), _heads_inside(dense.sum_heads(dk, groups)),
            _heads_inside(dense.sum_heads(dv, groups)))


FLASH = AttentionKernel("flash", flash.cuda_forward, flash.cuda_backward)
EFFICIENT = AttentionKernel("memory-efficient", efficient.forward, efficient.backward)


def fused_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, options: AttentionOptions,
                 softcap: float) -> AttentionKernel | None:
    """The kernel of CUDA that computes a case: the first that takes it and has agreed with the formulas."""
    if not q.is_cuda:
        return None
    fits = ((FLASH, flash.takes(q, k, v, mask, options, softcap)), (EFFICIENT, efficient.takes(q, k, softcap)))
    return next((kernel for kernel, taken in fits
                 if taken and agrees(kernel, q.device, AttentionKind.of(q, k, v, mask, sinks, options))), None)


def takes_grouped(*operands: Tensor) -> bool:
    """Whether torch's grouped kernel takes these operands, else a loop multiplies: bfloat16, not empty, and in rows or
    in columns without gaps that start at multiples of 16 bytes."""
    def aligned(item: Tensor) -> bool:
        inner, outer = sorted(item.stride()[-2:])
        near = item.shape[-1] if item.stride(-1) == 1 else item.shape[-2]
        each = 16 // item.element_size()
        steps = (outer, *item.stride()[:-2])
        return inner == 1 and outer >= near and item.data_ptr() % 16 == 0 and all(step % each == 0 for step in steps)

    return HAS_GROUPED_MM and all(item.dtype is torch.bfloat16 and item.numel() and aligned(item) for item in operands)


def grouped_rows(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_mm` as one product of torch's grouped kernel, which does not write the rows beyond the last group."""
    out = torch.ops.aten._grouped_mm(x, weight, offsets)
    beyond = torch.arange(x.shape[0], device=x.device) >= offsets[-1]
    return out.masked_fill_(beyond[:, None], 0)


def grouped_weight(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_mm_weight` as one product of torch's grouped kernel, whose result for a group without rows is not
    read: it is zero."""
    out = torch.ops.aten._grouped_mm(x.t(), grad, offsets)
    rows = torch.diff(offsets, prepend=offsets.new_zeros(1))
    return out.masked_fill_((rows <= 0)[:, None, None], 0)


def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows x [N,K] of group e (rows offsets[e-1] to offsets[e]) times weight[e] [K,M]; rows beyond are zero: [N,M]."""
    if x.is_cuda and takes_grouped(x, weight):
        return grouped_rows(x, weight, offsets)
    out = torch.empty(x.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert], out=out[start:end])
        start = end
    out[start:] = 0
    return out


def grouped_mm_weight(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """The weight gradient of `grouped_mm`, x_e^T grad_e per group e: [groups,K,M]; groups without rows give zero."""
    if x.is_cuda and takes_grouped(x, grad):
        return grouped_weight(x, grad, offsets)
    weight = torch.empty(offsets.shape[0], x.shape[1], grad.shape[1], dtype=x.dtype, device=x.device)
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(x[start:end].t(), grad[start:end], out=weight[expert])
        else:
            weight[expert] = 0
        start = end
    return weight


def histogram(x: Tensor, bins: int, low: int, high: int) -> Tensor:
    """How many integers of x fall into each of ``bins`` equal bins from ``low`` to ``high`` inclusive, in x's dtype."""
    if x.is_cuda:
        return torch.histc(x.int(), bins, low, high).to(x.dtype)
    return torch.histc(x.double(), bins, low, high).to(x.dtype)


def _define() -> None:
    """Register the operators with fake implementations and autograd formulas."""
    def op(name: str, function: Callable[..., object], fake: Callable[..., object]) -> torch.library.CustomOpDef:
        made = torch.library.custom_op(f"mipipe::{name}", function, mutates_args=())
        made.register_fake(fake)
        return made

    def stats(q: Tensor) -> Tensor:
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        return q.new_empty(q.shape[:-1], dtype=wide)

    def inside(x: Tensor, size: int) -> Tensor:
        batch, heads, length, _ = x.shape
        return x.new_empty(batch, length, heads, size).transpose(1, 2)

    made = op("attention", attention, lambda q, k, v, *rest: (inside(q, v.shape[-1]), stats(q)))
    op("attention_backward", attention_backward,
       lambda grad, q, k, v, *rest: tuple(inside(x, x.shape[-1]) for x in (q, k, v)))
    op("sink_gradient", dense.sink_gradient, lambda grad, sinks, out, lse: sinks.new_empty(sinks.shape))
    grouped = op("grouped_mm", grouped_mm, lambda x, weight, offsets: x.new_empty(x.shape[0], weight.shape[2]))
    op("grouped_mm_weight", grouped_mm_weight,
       lambda x, grad, offsets: x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1]))
    op("histogram", histogram, lambda x, bins, low, high: x.new_empty(bins))
    made.register_autograd(_attention_grad, setup_context=_keep_attention)
    grouped.register_autograd(_grouped_grad, setup_context=_keep_grouped)


def _keep_attention(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, mask, sinks, *options = inputs
    ctx.save_for_backward(q, k, v, mask, sinks, *output)
    ctx.options = options


def _attention_grad(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, mask, sinks, out, lse = ctx.saved_tensors
    dq, dk, dv = torch.ops.mipipe.attention_backward(grad, q, k, v, mask, sinks, out, lse, *ctx.options)
    dsinks = torch.ops.mipipe.sink_gradient(grad, sinks, out, lse) if ctx.needs_input_grad[4] else None
    return dq, dk, dv, None, dsinks, None, None, None, None


def _keep_grouped(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _grouped_grad(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, offsets = ctx.saved_tensors
    dx = torch.ops.mipipe.grouped_mm(grad, weight.transpose(-2, -1), offsets) if ctx.needs_input_grad[0] else None
    dw = None
    if ctx.needs_input_grad[1] and weight.stride(-2) == 1 and weight.stride(-1) != 1:  # a transposed view of the bank
        dw = torch.ops.mipipe.grouped_mm_weight(grad, x, offsets).transpose(-2, -1)
    elif ctx.needs_input_grad[1]:
        dw = torch.ops.mipipe.grouped_mm_weight(x, grad, offsets)
    return dx, dw, None


_define()

DIRECT: dict[str, Callable[..., object]] = {
    "mipipe.attention.default": attention,
    "mipipe.attention_backward.default": attention_backward,
    "mipipe.sink_gradient.default": dense.sink_gradient,
    "mipipe.grouped_mm.default": grouped_mm,
    "mipipe.grouped_mm_weight.default": grouped_mm_weight,
    "mipipe.histogram.default": histogram,
}
"""What a built phase calls for each of our operators: the function itself, without the dispatcher's detour."""

ANY_LAYOUT: dict[str, Callable[..., object]] = {
    "aten.view.default": torch.reshape,
    "aten._unsafe_view.default": torch.reshape,
    "aten.view.dtype": lambda x, dtype: x.contiguous().view(dtype),
    "aten.view_as_complex.default": lambda x: torch.view_as_complex(x.contiguous()),
}
"""What a built phase calls for views that only some layouts allow: they copy where a kernel (``cat``, ``add``, a
library's own) laid its result out otherwise than the trace's fake tensors said. Where views can be, they are views."""
