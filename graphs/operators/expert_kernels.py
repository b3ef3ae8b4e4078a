"""The operators of expert parallelism (form (b) of a MoE layer): tokens go to the ranks of their experts and back.

- ``mipipe::all_to_all_route``: which row goes where: index [T,k] -> order [T*k], arrive [N], offsets [S], splits [2,W].
- ``mipipe::all_to_all_send``: rows [T*k,H] to their experts' ranks, there sorted by slot: [N,H].
- ``mipipe::all_to_all_return``: rows [N,H] back to where they came from, in the order they had there: [T*k,H].

Sending is a permutation over all ranks, so each of the last two is the other's inverse and the other's gradient.
``order`` lists this rank's rows by destination, ``arrive`` sorts what arrived by slot, ``offsets`` (int32) ends each
slot's rows, ``splits`` (on the host) has the rows sent to and received from each rank. A graph is captured on one rank,
where N = T*k and the slots are all experts; in a run N changes with every call, and `mipipe.runtime.experts.exchange`
gives the operators that talk to other ranks. Nothing is dropped, whatever the load.

Legend: T tokens, k experts per token, H hidden size, N rows received, S slots of a rank, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUTE, SEND, RETURN = (f"mipipe.all_to_all_{name}.default" for name in ("route", "send", "return"))


def route_alone(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`all_to_all_route` on one rank that has every expert: sort by expert."""
    chosen = index.reshape(-1)
    order = torch.sort(chosen, stable=True)[1]
    counts = count_into(torch.zeros(num_experts, dtype=torch.int64, device=index.device), chosen)
    arrive = torch.arange(chosen.shape[0], device=index.device)
    return order, arrive, counts.cumsum(0).to(torch.int32), torch.full((2, 1), chosen.shape[0])


def send_alone(rows: Tensor, order: Tensor, arrive: Tensor, splits: Tensor) -> Tensor:
    """`all_to_all_send` on one rank."""
    return rows[order][arrive]


def return_alone(rows: Tensor, order: Tensor, arrive: Tensor, splits: Tensor) -> Tensor:
    """`all_to_all_return` on one rank."""
    return scatter_rows(scatter_rows(rows, arrive), order)


def scatter_rows(rows: Tensor, places: Tensor) -> Tensor:
    """The tensor whose row ``places[i]`` is ``rows[i]``; ``places`` is a permutation."""
    return torch.empty_like(rows).index_copy_(0, places, rows)


def count_into(counter: Tensor, values: Tensor) -> Tensor:
    """The counter [bins], to which was added how often each of 0 .. bins - 1 occurs. Deterministic, no host sync."""
    return counter.index_add_(0, values, torch.ones_like(values))


def _define() -> None:
    """Register the operators with fake implementations (one rank) and autograd formulas."""
    ops: dict[str, Callable[..., object]] = {"route": route_alone, "send": send_alone, "return": return_alone}
    made = {name: torch.library.custom_op(f"mipipe::all_to_all_{name}", function, mutates_args=())
            for name, function in ops.items()}

    def fake_route(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows = index.shape[0] * index.shape[1]
        return (index.new_empty(rows, dtype=torch.int64), index.new_empty(rows, dtype=torch.int64),
                index.new_empty(num_experts, dtype=torch.int32), index.new_empty(2, 1, dtype=torch.int64))

    def fake_rows(rows: Tensor, order: Tensor, arrive: Tensor, splits: Tensor) -> Tensor:
        return rows.new_empty(rows.shape)

    def keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[1:])

    def send_grad(ctx, grad):  # type: ignore[no-untyped-def]
        return torch.ops.mipipe.all_to_all_return(grad.contiguous(), *ctx.saved_tensors), None, None, None

    def return_grad(ctx, grad):  # type: ignore[no-untyped-def]
        return torch.ops.mipipe.all_to_all_send(grad.contiguous(), *ctx.saved_tensors), None, None, None

    made["route"].register_fake(fake_route)
    for name, gradient in (("send", send_grad), ("return", return_grad)):
        made[name].register_fake(fake_rows)
        made[name].register_autograd(gradient, setup_context=keep)


_define()

ALONE = {ROUTE: route_alone, SEND: send_alone, RETURN: return_alone}
"""What a built phase calls for each operator where nothing else is given: the case of one rank."""
