"""Methods in closed form of what running the models found out (`mipipe.runtime.calibration`): least squares, weighted
means.

Tensors that no statistic was taken of (token tables, experts in banks, parts outside the decoder) are merged by each
method's plain rule: the average, or what the base has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.method import Tile


def regmean(tile: Tile, _stats: Any, *, weight: Sequence[float], reduce: float, ridge: float) -> Tensor:
    """``W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1``, RegMean's closed form (arXiv 2212.09849, equation 2).

    ``G_i`` is the mean of ``x x^T`` over model i's own inputs, its off-diagonal entries times ``reduce``. A multiple
    ``ridge`` of the mean diagonal is added to the sum on both sides, about the models' average, so directions that no
    input has stay averaged.
    """
    grams = [mean_field(tile, "gram", number) for number in range(len(tile.models))]
    if any(gram is None for gram in grams):
        return plain_average(tile, _stats, weight=weight)
    average = plain_average(tile, _stats, weight=weight).double()
    total = torch.zeros(average.shape[1], average.shape[1], dtype=torch.float64, device=average.device)
    right = torch.zeros_like(average)
    for share, gram, model in zip(weight, grams, tile.models, strict=True):
        assert gram is not None
        reduced = gram.double() * reduce
        reduced.diagonal().copy_(gram.diagonal())
        total.add_(reduced, alpha=share)
        right.addmm_(model.double() - average, reduced, alpha=share)
    scale = float(total.diagonal().mean())
    total.diagonal().add_(ridge * scale if scale > 0 else 1.0)
    return (average + torch.linalg.solve(total, right, left=False)).to(tile.models[0])


def pleas(tile: Tile, _stats: Any, *, weight: Sequence[float], ridge: float, **_params: Any) -> Tensor:
    """PLeaS' least squares (arXiv 2407.02447): the ``W`` whose outputs on averaged inputs are nearest to averaged
    outputs.

    ``min ||W z - o||^2`` with ``z = (x_1 + x_2) / 2`` and ``o = (W_1 x_1 + W_2 x_2) / 2``, in closed form from the
    second moments of both models' inputs; the second model is already in the first's order. A multiple ``ridge`` of the
    mean diagonal pulls to the average. Without samples the average itself.
    """
    fields = tile.measured.fields("joint", 1) if tile.measured is not None else {}
    average = plain_average(tile, _stats, weight=weight)
    if "sum" not in fields:
        return average
    assert tile.measured is not None
    both = fields["sum"].double() / float(fields["count"])
    size, order = len(both) // 2, tile.measured.columns(1)
    if order is not None:
        places = torch.cat([torch.arange(size), size + order])
        both = both[places][:, places]
    blocks = both.reshape(2, size, 2, size).permute(0, 2, 1, 3).to(average.device)
    inputs = blocks.sum((0, 1)) / 4
    first, second = (model.double() - average for model in tile.models)
    right = (first @ blocks[0].sum(0) + second @ blocks[1].sum(0)) / 4
    scale = float(inputs.diagonal().mean())
    inputs.diagonal().add_(ridge * scale if scale > 0 else 1.0)
    return (average + torch.linalg.solve(inputs, right, left=False)).to(tile.models[0])


def plain_average(tile: Tile, _stats: Any, *, weight: Sequence[float], **_params: Any) -> Tensor:
    """``sum_i w_i theta_i / sum_i w_i``, from differences, so equal models come back exactly."""
    total = sum(weight)
    merged = tile.models[0].clone()
    for share, model in zip(weight[1:], tile.models[1:], strict=True):
        merged.add_(model - tile.models[0], alpha=share / total)
    return merged


def fisher(tile: Tile, _stats: Any, *, weight: Sequence[float], floor: float) -> Tensor:
    """``sum_i w_i F_i theta_i / sum_i w_i F_i``, Fisher-weighted averaging (arXiv 2111.09832, equation 5).

    ``F_i`` is the mean squared gradient of the loss on model i's own samples, at least ``floor``.
    """
    found = [mean_field(tile, "fisher", number) for number in range(len(tile.models))]
    if any(part is None for part in found):
        return plain_average(tile, _stats, weight=weight)
    merged, total = torch.zeros_like(tile.models[0]), torch.zeros_like(tile.models[0])
    first = tile.models[0]
    for share, part, model in zip(weight, found, tile.models, strict=True):
        assert part is not None
        mass = part.to(model).reshape(model.shape).clamp_min(floor) * share
        merged.addcmul_(mass, model - first)
        total.add_(mass)
    return first + merged / total


def mean_field(tile: Tile, statistic: str, number: int) -> Tensor | None:
    """A statistic's sum over its count; None where it was not measured."""
    fields = tile.measured.fields(statistic, number) if tile.measured is not None else {}
    if "sum" not in fields:
        return None
    return fields["sum"].to(tile.models[0].device) / float(fields["count"])


def router_calibration(tile: Tile, _stats: Any, *, weight: Sequence[float], ridge: float, hessian: bool) -> Tensor:
    """Routers of a merged mixture of experts (the base) that send tokens where the experts' own routers send them.

    ``W`` minimises ``sum_i w_i tr(H_i (W x - z_i)(W x - z_i)^T)`` over the tokens of expert i's samples: ``x`` are the
    merged model's inputs of the router, ``z_i`` expert i's logits, ``H_i`` the mean Hessian of its softmax (the
    identity without ``hessian``), with a pull ``ridge`` to the merged router. Solved by conjugate gradients on ``sum_i
    w_i H_i W G_i``, without a matrix of that system. Reconstructed from what the abstract of arXiv 2606.03391 says:
    that merged routers break, and that a closed form with a Hessian mends them, matrix-free. Everything but routers
    stays the base's.
    """
    found = [tile.measured.fields("routing", number) if tile.measured is not None else {}
             for number in range(len(tile.models))]
    if any("xx" not in fields for fields in found):
        return tile.origin.clone()
    base = tile.origin.double()
    grams, wanted, bends = [], [], []
    for share, fields in zip(weight, found, strict=True):
        count = float(fields["count"])
        bend = fields["hessian"].to(base) / count
        bend = bend if hessian else torch.eye(len(base), dtype=base.dtype, device=base.device)
        grams.append(fields["xx"].to(base) * (share / count))
        wanted.append(bend @ fields["zx"].to(base) * (share / count))
        bends.append(bend)
    size = sum(float(gram.diagonal().mean() * bend.diagonal().mean()) for gram, bend in zip(grams, bends, strict=True))
    pull = ridge * size if size > 0 else 1.0

    def apply(value: Tensor) -> Tensor:
        return sum((bend @ value @ gram for bend, gram in zip(bends, grams, strict=True)), pull * value)

    return conjugate_gradients(apply, sum(wanted, pull * base), base).to(tile.origin)


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, start: Tensor, steps: int = 1000,
                        tolerance: float = 1e-12) -> Tensor:
    """The solution of a symmetric positive definite system (Hestenes and Stiefel 1952), which ``apply`` multiplies
    by."""
    found = start.clone()
    rest = right - apply(found)
    way, size = rest.clone(), float((rest * rest).sum())
    least = tolerance ** 2 * float((right * right).sum())
    for _ in range(steps):
        if size <= least:
            break
        turned = apply(way)
        length = size / float((way * turned).sum())
        found.add_(way, alpha=length)
        rest.sub_(turned, alpha=length)
        before, size = size, float((rest * rest).sum())
        way = rest + size / before * way
    return found
