"""The loss of speech recognisers (CTC; Graves et al., 2006) as one operator with fixed shapes.

ATen's own keeps a table whose size depends on the longest target, which no trace can say. `mipipe::ctc_loss` makes the
gradient together with the loss and keeps that, which has the shape of the log probabilities.
Legend: T frames, B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def loss_and_gradient(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int,
                      zero_infinity: bool) -> tuple[Tensor, Tensor]:
    """Negative log likelihoods [B] and their gradients with respect to ``log_probs`` [T,B,C].

    ``targets``: all labels one after another, or one row for each sample; as torch.nn.functional.ctc_loss takes them.
    """
    nll, table = aten._ctc_loss.Tensor(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    grad = aten._ctc_loss_backward.Tensor(torch.ones_like(nll), log_probs, targets, input_lengths, target_lengths, nll,
                                          table, blank, zero_infinity)
    return (torch.where(torch.isinf(nll), 0.0, nll) if zero_infinity else nll), grad


def ctc_loss_call(log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, blank: int = 0,
                  reduction: str = "mean", zero_infinity: bool = False) -> Tensor:
    """torch.nn.functional.ctc_loss, by `mipipe::ctc_loss`."""
    lengths = [item if isinstance(item, Tensor) else torch.tensor(item, device=log_probs.device)
               for item in (input_lengths, target_lengths)]
    whole = log_probs if log_probs.dim() == 3 else log_probs.unsqueeze(1)
    nll, _ = torch.ops.mipipe.ctc_loss(whole, targets, *[item.reshape(-1) for item in lengths], blank, zero_infinity)
    if reduction == "mean":
        return (nll / lengths[1].reshape(-1).clamp(min=1).to(nll.dtype)).mean()
    return nll.sum() if reduction == "sum" else nll if log_probs.dim() == 3 else nll[0]


def _define() -> None:
    made = torch.library.custom_op("mipipe::ctc_loss", loss_and_gradient, mutates_args=())
    made.register_fake(lambda log_probs, *rest: (log_probs.new_empty(log_probs.shape[1]), torch.empty_like(log_probs)))

    def keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(output[1])

    def gradient(ctx, grad, _):  # type: ignore[no-untyped-def]
        return ctx.saved_tensors[0] * grad[None, :, None], None, None, None, None, None

    made.register_autograd(gradient, setup_context=keep)


_define()

DIRECT: dict[str, Callable[..., object]] = {"mipipe.ctc_loss.default": loss_and_gradient}
"""What a built phase calls, without the dispatcher's detour."""
