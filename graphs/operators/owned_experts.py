"""Grouped products of a member that holds some of the experts: its own rows are computed, the others are zero.

All members see all rows, sorted by expert, so a member's rows are one range: from ``start`` to the last of its own
``offsets``. Legend: N rows, E experts of this member, ``shares`` the members that share the experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mipipe.graphs.operators import kernels


def owned_mm(x: Tensor, weight: Tensor, offsets: Tensor, start: Tensor, shares: int) -> Tensor:
    """Row i of x [N,K] times the matrix of its expert: [N,M]; rows of other members' experts are zero.

    ``weight`` [E,K,M]; ``offsets`` [E] ends each own expert's rows, ``start`` [1] begins the first's.
    """
    if x.is_cuda:  # no sizes reach the host: own rows are turned to the front and back
        places = torch.arange(x.shape[0], device=x.device)
        front = torch.remainder(places + start, x.shape[0])
        out = kernels.grouped_mm(x[front], weight, (offsets - start).to(torch.int32))
        return out[torch.remainder(places - start, x.shape[0])]
    first = int(start)
    out = torch.zeros(x.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    out[first:] = kernels.grouped_mm(x[first:], weight, offsets - first)
    return out


def owned_mm_weight(x: Tensor, grad: Tensor, offsets: Tensor, start: Tensor, shares: int) -> Tensor:
    """The weight gradient of `owned_mm`: [E,K,M]."""
    first = int(start)
    return kernels.grouped_mm_weight(x[first:], grad[first:], offsets - first)


def owned_mm_flops(x: Tensor, weight: Tensor, offsets: Tensor, start: Tensor, shares: int) -> int:
    """2 N K M over all members, of which each has an equal share where experts are equally busy."""
    return 2 * x.shape[0] * weight.shape[1] * weight.shape[2] // shares


def owned_mm_weight_flops(x: Tensor, grad: Tensor, offsets: Tensor, start: Tensor, shares: int) -> int:
    """As `owned_mm_flops`, transposed."""
    return 2 * x.shape[0] * x.shape[1] * grad.shape[1] // shares


def _define() -> None:
    ops: tuple[tuple[str, Callable[..., Tensor], Callable[..., Tensor]], ...] = (
        ("owned_mm", owned_mm, lambda x, weight, *rest: x.new_empty(x.shape[0], weight.shape[2])),
        ("owned_mm_weight", owned_mm_weight,
         lambda x, grad, offsets, *rest: x.new_empty(offsets.shape[0], x.shape[1], grad.shape[1])))
    for name, function, fake in ops:
        torch.library.custom_op(f"mipipe::{name}", function, mutates_args=()).register_fake(fake)


_define()

DIRECT: dict[str, Callable[..., object]] = {"mipipe.owned_mm.default": owned_mm,
                                            "mipipe.owned_mm_weight.default": owned_mm_weight}
"""What a built phase calls, without the dispatcher's detour."""
