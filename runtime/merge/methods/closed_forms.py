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


def pleas(tile: Tile, _stats: Any, *, weight: Sequence[float], ridge: float, least_squares: bool = True,
          **_params: Any) -> Tensor:
    """PLeaS' least squares (arXiv 2407.02447): the ``W`` whose outputs on averaged inputs are nearest to averaged
    outputs.

    ``min ||W z - o||^2`` with ``z = (x_1 + x_2) / 2`` and ``o = (W_1 x_1 + W_2 x_2) / 2``, in closed form from the
    second moments of both models' inputs; the second model is already in the first's order. Of units kept apart ``z``
    and ``o`` are one model's own, and ``W`` is zero from one model's to the other's. A multiple ``ridge`` of the mean
    diagonal pulls to the average. Without samples the average itself.
    """
    fields = tile.measured.fields("joint", 1) if tile.measured is not None and least_squares else {}
    average = plain_average(tile, _stats, weight=weight)
    if "sum" not in fields:
        return average
    assert tile.measured is not None
    both = fields["sum"].double() / float(fields["count"])
    size = len(both) // 2
    columns = [order if (order := tile.measured.columns(number)) is not None else torch.arange(size)
               for number in (0, 1)]
    rows = [order if (order := tile.measured.units(number)) is not None else torch.arange(len(average))
            for number in (0, 1)]
    places = torch.cat([columns[0], torch.where(columns[1] < 0, -1, size + columns[1])])
    both = torch.where((places[:, None] < 0) | (places[None] < 0), 0, both[places.clamp_min(0)][:, places.clamp_min(0)])
    wide = len(columns[0])
    blocks = both.reshape(2, wide, 2, wide).permute(0, 2, 1, 3).to(average.device)
    whole = ((columns[0] >= 0) & (columns[1] >= 0)).to(average.device)
    share = torch.where(whole, 0.5, 1.0).double()  # z = share * (x_1 + x_2), x_k zero where model k has no unit
    inputs = share[:, None] * blocks.sum((0, 1)) * share
    scale = float(inputs.diagonal().mean())
    inputs.diagonal().add_(ridge * scale if scale > 0 else 1.0)
    found, base = average.clone(), average.double()
    pairs = [model.double() for model in tile.models]
    mine = [(order >= 0).to(average.device) for order in rows]
    for chosen, apart in ((mine[0] & mine[1], None), (mine[0] & ~mine[1], 0), (mine[1] & ~mine[0], 1)):
        if not bool(chosen.any()):
            continue
        # o z^T - base z z^T, from differences where there are any, so that equal models come back exactly
        right = torch.zeros_like(base[chosen])
        for number in (0, 1) if apart is None else (apart,):
            part = 0.5 if apart is None else 1.0
            right += part * (pairs[number][chosen] - base[chosen]) @ (blocks[number].sum(0) * share)
            right += base[chosen] @ ((part - share[:, None]) * blocks[number].sum(0) * share)
        free = (columns[0] >= 0 if apart == 0 else columns[1] >= 0 if apart == 1 else columns[0] > -2).to(right.device)
        if apart is not None:  # the other model's input counts in z where units are merged
            right -= base[chosen] @ (share[:, None] * blocks[1 - apart].sum(0) * share)
        solved = torch.zeros_like(right)
        solved[:, free] = torch.linalg.solve(inputs[free][:, free], right[:, free], left=False)
        found[chosen] = (base[chosen] + solved).to(found)
    return found


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
