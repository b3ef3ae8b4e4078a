"""Log probabilities of labels, and distances to a teacher, without the logits of a whole vocabulary in memory.

- ``mipipe::label_log_probs``: log softmax(h W^T + b) at one label per row, by blocks of the vocabulary.
- ``mipipe::teacher_distance``: KL(teacher || student) per row, by the same blocks.

Both keep one or two numbers per row for their backward, which computes the blocks of logits once more; input and weight
gradients are operators of their own, so that the second can be delayed.
Legend: N rows, D and E hidden sizes of student and teacher, V vocabulary, C block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _blocks(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: int,
            factor: float = 1.0) -> Iterator[tuple[int, int, Tensor]]:
    """First and last entry of each block of the vocabulary, and its logits [N,C], times ``factor``, in wide floats."""
    for first in range(0, weight.shape[0], block):
        last = min(first + block, weight.shape[0])
        logits = (hidden @ weight[first:last].t()).to(_wide(hidden))
        if bias is not None:
            logits = logits + bias[first:last].to(logits.dtype)
        yield first, last, logits * factor if factor != 1.0 else logits


def _log_sums(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: int, factor: float = 1.0) -> Tensor:
    """log sum exp of the logits [N]."""
    total = torch.full(hidden.shape[:1], float("-inf"), dtype=_wide(hidden), device=hidden.device)
    for _, _, logits in _blocks(hidden, weight, bias, block, factor):
        total = torch.logaddexp(total, logits.logsumexp(-1))
    return total


def label_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
                    block: int) -> tuple[Tensor, Tensor]:
    """Log probabilities [N] of ``labels`` [N] (0 where a label is -100), and log sum exp of the logits [N].

    ``hidden`` [N,D], ``weight`` [V,D]; both results are float32, or float64 for float64.
    """
    sums = _log_sums(hidden, weight, bias, block)
    valid = labels != IGNORED
    rows = weight[labels.clamp(min=0)]
    chosen = (hidden.to(sums.dtype) * rows.to(sums.dtype)).sum(-1)
    if bias is not None:
        chosen = chosen + bias[labels.clamp(min=0)].to(sums.dtype)
    return torch.where(valid, chosen - sums, 0.0), sums


def _label_gradients(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, sums: Tensor,
                     block: int) -> Iterator[tuple[int, int, Tensor]]:
    """The gradients of the logits, block by block: grad (onehot - softmax)."""
    grad = torch.where(labels != IGNORED, grad, 0.0)
    for first, last, logits in _blocks(hidden, weight, bias, block):
        made = -(logits - sums[:, None]).exp_()
        inside = (labels >= first) & (labels < last)
        place = (labels - first).clamp(0, last - first - 1)
        made.scatter_add_(1, place[:, None], inside[:, None].to(made.dtype))
        yield first, last, made * grad[:, None]


def label_log_probs_input(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
                          sums: Tensor, block: int) -> Tensor:
    """The gradient of ``hidden`` [N,D]."""
    total = torch.zeros(hidden.shape, dtype=_wide(hidden), device=hidden.device)
    for first, last, made in _label_gradients(grad, hidden, weight, bias, labels, sums, block):
        total += (made.to(hidden.dtype) @ weight[first:last]).to(total.dtype)
    return total.to(hidden.dtype)


def label_log_probs_weight(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
                           sums: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The gradients of ``weight`` [V,D] and of ``bias`` [V] (empty where there is none)."""
    made = torch.empty_like(weight)
    shift = weight.new_empty(0 if bias is None else weight.shape[0])
    for first, last, logits in _label_gradients(grad, hidden, weight, bias, labels, sums, block):
        made[first:last] = logits.to(hidden.dtype).t() @ hidden
        if bias is not None:
            shift[first:last] = logits.sum(0).to(shift.dtype)
    return made, shift


def teacher_distance(hidden: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor, teacher: Tensor,
                     teacher_bias: Tensor | None, temperature: float, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """KL(teacher || student) at a temperature [N], and both log sums [N].

    ``hidden`` [N,D] and ``weight`` [V,D] are the student's, ``other`` [N,E] and ``teacher`` [V,E] the teacher's.
    """
    factor = 1.0 / temperature
    own, others = _log_sums(hidden, weight, bias, block, factor), _log_sums(other, teacher, teacher_bias, block, factor)
    total = torch.zeros_like(own)
    pairs = zip(_blocks(hidden, weight, bias, block, factor), _blocks(other, teacher, teacher_bias, block, factor),
                strict=True)
    for (_, _, mine), (_, _, theirs) in pairs:
        log_teacher = theirs - others[:, None]
        total += (log_teacher.exp() * (log_teacher - mine + own[:, None])).sum(-1).to(total.dtype)
    return total, own, others


def _distance_gradients(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor,
                        teacher: Tensor, teacher_bias: Tensor | None, sums: Tensor, others: Tensor, temperature: float,
                        block: int) -> Iterator[tuple[int, int, Tensor]]:
    """The gradients of the student's logits, block by block: grad (student - teacher) / temperature."""
    factor = 1.0 / temperature
    pairs = zip(_blocks(hidden, weight, bias, block, factor), _blocks(other, teacher, teacher_bias, block, factor),
                strict=True)
    for (first, last, mine), (_, _, theirs) in pairs:
        made = (mine - sums[:, None]).exp_() - (theirs - others[:, None]).exp_().to(mine.dtype)
        yield first, last, made * (grad * factor)[:, None]


def teacher_distance_input(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor,
                           teacher: Tensor, teacher_bias: Tensor | None, sums: Tensor, others: Tensor,
                           temperature: float, block: int) -> Tensor:
    """The gradient of the student's ``hidden`` [N,D]."""
    total = torch.zeros(hidden.shape, dtype=_wide(hidden), device=hidden.device)
    for first, last, made in _distance_gradients(grad, hidden, weight, bias, other, teacher, teacher_bias, sums, others,
                                                 temperature, block):
        total += (made.to(hidden.dtype) @ weight[first:last]).to(total.dtype)
    return total.to(hidden.dtype)


def teacher_distance_weight(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor,
                            teacher: Tensor, teacher_bias: Tensor | None, sums: Tensor, others: Tensor,
                            temperature: float, block: int) -> tuple[Tensor, Tensor]:
    """The gradients of the student's ``weight`` [V,D] and ``bias`` [V] (empty where there is none)."""
    made = torch.empty_like(weight)
    shift = weight.new_empty(0 if bias is None else weight.shape[0])
    for first, last, logits in _distance_gradients(grad, hidden, weight, bias, other, teacher, teacher_bias, sums,
                                                   others, temperature, block):
        made[first:last] = logits.to(hidden.dtype).t() @ hidden
        if bias is not None:
            shift[first:last] = logits.sum(0).to(shift.dtype)
    return made, shift


def _products(count: int) -> Callable[..., int]:
    """Flops of ``count`` products of the student's rows and vocabulary: 2 N V D each."""
    def flops(*args: Any) -> int:
        hidden, weight = [item for item in args if isinstance(item, Tensor) and item.dim() == 2][:2]
        return count * 2 * hidden.shape[0] * weight.shape[0] * weight.shape[1]
    return flops


def _pair_products(own: int, others: int) -> Callable[..., int]:
    """Flops of so many products of the student's, and of the teacher's, rows and vocabulary."""
    def flops(*args: Any) -> int:
        hidden, weight, other, teacher = [item for item in args if isinstance(item, Tensor) and item.dim() == 2][:4]
        return 2 * hidden.shape[0] * (own * weight.shape[0] * weight.shape[1]
                                      + others * teacher.shape[0] * other.shape[1])
    return flops


FORMULAS: dict[str, Callable[..., int]] = {
    "mipipe.label_log_probs.default": _products(1), "mipipe.label_log_probs_input.default": _products(2),
    "mipipe.label_log_probs_weight.default": _products(2),
    "mipipe.teacher_distance.default": _pair_products(2, 2),
    "mipipe.teacher_distance_input.default": _pair_products(2, 1),
    "mipipe.teacher_distance_weight.default": _pair_products(2, 1),
}


def _define() -> None:
    """Register the operators with fake implementations and autograd formulas."""
    def op(name: str, function: Callable[..., object], fake: Callable[..., object]) -> torch.library.CustomOpDef:
        made = torch.library.custom_op(f"mipipe::{name}", function, mutates_args=())
        made.register_fake(fake)
        return made

    def rows(hidden: Tensor) -> Tensor:
        return hidden.new_empty(hidden.shape[:1], dtype=_wide(hidden))

    def weights(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(weight), weight.new_empty(0 if bias is None else weight.shape[0])

    def same(grad: Tensor, hidden: Tensor, *rest: Any) -> Tensor:
        return torch.empty_like(hidden)

    labels = op("label_log_probs", label_log_probs, lambda hidden, *rest: (rows(hidden), rows(hidden)))
    op("label_log_probs_input", label_log_probs_input, same)
    op("label_log_probs_weight", label_log_probs_weight, weights)
    distance = op("teacher_distance", teacher_distance, lambda hidden, *rest: tuple(rows(hidden) for _ in range(3)))
    op("teacher_distance_input", teacher_distance_input, same)
    op("teacher_distance_weight", teacher_distance_weight, weights)
    labels.register_autograd(_label_grad, setup_context=_keep_labels)
    distance.register_autograd(_distance_grad, setup_context=_keep_distance)


def _keep_labels(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.block = inputs
    ctx.save_for_backward(*tensors, output[1])


def _label_grad(ctx, grad, _):  # type: ignore[no-untyped-def]
    args = (grad.contiguous(), *ctx.saved_tensors, ctx.block)
    ops, needs = torch.ops.mipipe, ctx.needs_input_grad
    dh = ops.label_log_probs_input(*args) if needs[0] else None
    dw, db = ops.label_log_probs_weight(*args) if needs[1] or needs[2] else (None, None)
    return dh, dw if needs[1] else None, db if needs[2] else None, None, None


def _keep_distance(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.temperature, ctx.block = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _distance_grad(ctx, grad, *_):  # type: ignore[no-untyped-def]
    args = (grad.contiguous(), *ctx.saved_tensors, ctx.temperature, ctx.block)
    ops, needs = torch.ops.mipipe, ctx.needs_input_grad
    dh = ops.teacher_distance_input(*args) if needs[0] else None
    dw, db = ops.teacher_distance_weight(*args) if needs[1] or needs[2] else (None, None)
    return (dh, dw if needs[1] else None, db if needs[2] else None) + (None,) * 5


_define()

DIRECT: dict[str, Callable[..., object]] = {
    "mipipe.label_log_probs.default": label_log_probs,
    "mipipe.label_log_probs_input.default": label_log_probs_input,
    "mipipe.label_log_probs_weight.default": label_log_probs_weight,
    "mipipe.teacher_distance.default": teacher_distance,
    "mipipe.teacher_distance_input.default": teacher_distance_input,
    "mipipe.teacher_distance_weight.default": teacher_distance_weight,
}
"""What a built phase calls, without the dispatcher's detour."""
