"""Floating-point operations of one operator: torch.utils.flop_counter's formulas, and ours where it counts nothing, or
takes no account of groups (weight gradients of convolutions). And the bytes that it moves and holds in itself.

As there, a multiply-add counts 2, only matrix products, convolutions and attention count, and a causal mask is not
discounted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from mipipe.graphs.operators import dense_attention, vocabulary
from mipipe.graphs.operators.owned_experts import owned_mm_flops, owned_mm_weight_flops
from mipipe.graphs.operators.recurrent import recurrence_backward_flops, recurrence_flops


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> int:
    """Q K^T and P V: 2 B H S T (D + E)."""
    batch, heads, queries, size = q.shape
    return 2 * batch * heads * queries * k.shape[2] * (size + v.shape[3])


def _attention_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> int:
    """The scores again, then dV, dP, dQ, dK: 2 B H S T (3 D + 2 E)."""
    batch, heads, queries, size = q.shape
    return 2 * batch * heads * queries * k.shape[2] * (3 * size + 2 * v.shape[3])


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> int:
    """2 N K M: every row passes through exactly one group's matrix."""
    return 2 * x.shape[0] * weight.shape[1] * weight.shape[2]


def _grouped_mm_weight(x: torch.Tensor, grad: torch.Tensor, offsets: torch.Tensor) -> int:
    """2 N K M, the same product transposed."""
    return 2 * x.shape[0] * x.shape[1] * grad.shape[1]


def _convolution_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: Any, stride: Any,
                          padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
                          wanted: Sequence[bool]) -> int:
    """2 N prod(spatial) prod(weight), for each of the input's and the weight's gradient: in groups as well."""
    spatial = (x if transposed else grad).shape[2:]
    return 2 * x.shape[0] * math.prod(spatial) * math.prod(weight.shape) * sum(map(bool, wanted[:2]))


FORMULAS: dict[str, Callable[..., int]] = {
    "aten.convolution_backward.default": _convolution_backward,
    "mipipe.attention.default": _attention,
    "mipipe.attention_backward.default": _attention_backward,
    "mipipe.grouped_mm.default": _grouped_mm,
    "mipipe.grouped_mm_weight.default": _grouped_mm_weight,
    "mipipe.owned_mm.default": owned_mm_flops,
    "mipipe.owned_mm_weight.default": owned_mm_weight_flops,
    "mipipe.recurrence.default": recurrence_flops,
    "mipipe.recurrence_backward.default": recurrence_backward_flops,
    **vocabulary.FORMULAS,
}


def count_flops(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> int:
    """The flops of calling ``target`` (an OpOverload) on tensors (fake ones will do) with result ``value``."""
    formula = FORMULAS.get(str(target))
    if formula is not None:
        return formula(*args, **kwargs)
    packet = getattr(target, "overloadpacket", None)
    if packet is None or packet not in flop_registry:
        return 0
    return int(flop_registry[packet](*args, **kwargs, out_val=value))


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in a value or nested sequence of values."""
    if isinstance(value, torch.Tensor):
        return math.prod(value.shape) * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(num_bytes(item) for item in value)
    return 0


_SCORED = {"mipipe.attention.default": ("forward", 0, 8), "mipipe.attention_backward.default": ("backward", 1, 11)}
"""For each of attention's operators: which it is, and where its queries (keys behind them) and its softcap are."""


def inside_bytes(target: Any, args: Sequence[Any]) -> tuple[int, int]:
    """Bytes that an operator moves, and holds at most, beside its arguments and results: attention's whole scores where
    no device has a fused kernel (a softcap)."""
    if str(target) not in _SCORED:
        return 0, 0
    which, queries_at, softcap_at = _SCORED[str(target)]
    if not args[softcap_at]:
        return 0, 0
    q, k = args[queries_at], args[queries_at + 1]
    scores = 4 * math.prod(q.shape[:3]) * int(k.shape[2])
    return dense_attention.MOVED[which] * scores, dense_attention.HELD[which] * scores
