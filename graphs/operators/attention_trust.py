"""Whether a fused kernel of attention has earned its cases: it is used for a kind of case once it has agreed with the
formulas on a small input of that kind, outputs and all gradients. A kernel that a library changes, or that an older
device lacks, then costs speed, not a run's mathematics.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mipipe.graphs.operators import dense_attention as dense
from mipipe.graphs.operators.attention_options import AttentionOptions

AGREEMENT = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.03}
"""The largest difference from the formulas, relative to their largest value, at which a kernel is taken to be right."""


class AttentionKernel(NamedTuple):
    """A kernel: ``forward(q, k, v, mask, sinks, options)`` gives output and logsumexp, ``backward(grad, q, k, v, mask,
    out, lse, options)`` the gradients of q, k and v; heads of k and v as they come."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class AttentionKind(NamedTuple):
    """A kind of case: what decides which code of a kernel runs. ``masked``: none, bool or added."""

    dtype: torch.dtype
    sizes: tuple[int, int]
    grouped: bool
    sinks: bool
    causal: bool
    window: bool
    square: bool
    masked: str

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
           options: AttentionOptions) -> AttentionKind:
        masked = "none" if mask is None else "bool" if mask.dtype is torch.bool else "added"
        return cls(q.dtype, (q.shape[-1], v.shape[-1]), q.shape[1] > k.shape[1], sinks is not None, options.causal,
                   options.window > 0, q.shape[-2] == k.shape[-2], masked)


@functools.cache
def agrees(kernel: AttentionKernel, device: torch.device, kind: AttentionKind) -> bool:
    """Whether a kernel and the formulas give the same on a small input."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, kind.dtype)

    heads, groups, queries, keys = 4, 2 if kind.grouped else 4, 40, 40 if kind.square else 57
    q, k = draw(2, heads, queries, kind.sizes[0]), draw(2, groups, keys, kind.sizes[0])
    v, grad = draw(2, groups, keys, kind.sizes[1]), draw(2, heads, queries, kind.sizes[1])
    sink = draw(heads) if kind.sinks else None
    seen = torch.rand(2, 1, queries, keys, generator=generator) > 0.3
    seen[0, 0, 5] = False  # a query that sees nothing
    added = torch.randn(2, 1, queries, keys, generator=generator).masked_fill(~seen, float("-inf"))
    mask = {"none": None, "bool": seen.to(device), "added": added.to(device, kind.dtype)}[kind.masked]
    options = AttentionOptions(kind.causal, 7 if kind.window else 0, kind.sizes[0] ** -0.5)
    try:
        out, lse = kernel.forward(q, k, v, mask, sink, options)
        found = (out, *kernel.backward(grad, q, k, v, mask, out, lse, options))
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel
    except RuntimeError as error:  # how torch says that a device, a size or a build has no such kernel, and that the
        # operator itself is not there on it (NotImplementedError, a RuntimeError as well)
        _tell(kernel, device, kind, str(error).strip().partition("\n")[0])
        return False
    wide = [item.double().cpu() for item in (grad, q, k, v)]
    there = None if mask is None else mask.cpu() if mask.dtype is torch.bool else mask.double().cpu()
    wanted = by_formulas(wide[0], wide[1], wide[2], wide[3], there, None if sink is None else sink.double().cpu(),
                         options)
    worst = max(float((here.double().cpu() - right).abs().max() / right.abs().max())
                for here, right in zip(found, wanted, strict=True))
    if not worst <= AGREEMENT[kind.dtype]:
        _tell(kernel, device, kind, f"differs by {worst:.1e} of the largest value")
        return False
    return True


def _tell(kernel: AttentionKernel, device: torch.device, kind: AttentionKind, why: str) -> None:
    """Say once that a kind of case takes more time and memory than its costs say."""
    warnings.warn(f"attention: the {kernel.name} kernel on {device.type} is not used for {kind}: {why}", RuntimeWarning,
                  stacklevel=3)


def by_formulas(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
                options: AttentionOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and gradients of q, k and v by `mipipe.graphs.operators.dense_attention`."""
    heads, groups = q.shape[1], k.shape[1]
    wide_k, wide_v = dense.expand_heads(k, heads), dense.expand_heads(v, heads)
    bias = dense.bias_of(q, wide_k, mask, options.causal, options.window)
    out, lse = dense.forward(q, wide_k, wide_v, bias, sinks, options.scale, 0.0)
    dq, dk, dv = dense.backward(grad, q, wide_k, wide_v, bias, out, lse, options.scale, 0.0)
    return out, dq, dense.sum_heads(dk, groups), dense.sum_heads(dv, groups)
