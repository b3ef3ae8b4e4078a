"""Methods that read what running the models found out (`mipipe.runtime.calibration`): closed forms and coefficients.

Tensors that no statistic was taken of (token tables, experts in banks, parts outside the decoder) are merged by each
method's plain rule: the average, or its host without the data-driven factor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.merging.tensor_classes import layer_index
from mipipe.runtime.merge.methods.arithmetic import task_arithmetic
from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.task_vectors import ties, ties_rounds

# Closed forms ---------------------------------------------------------------------------------------------------------


def regmean(tile: Tile, _stats: Any, *, weight: Sequence[float], reduce: float, ridge: float) -> Tensor:
    """``W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1``, RegMean's closed form (arXiv 2212.09849, equation 2).

    ``G_i`` is the mean of ``x x^T`` over model i's own inputs, its off-diagonal entries times ``reduce``. A multiple
    ``ridge`` of the mean diagonal is added to the sum on both sides, about the models' average, so directions that no
    input has stay averaged.
    """
    grams = [_mean_field(tile, "gram", number) for number in range(len(tile.models))]
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
    found = [_mean_field(tile, "fisher", number) for number in range(len(tile.models))]
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


def _mean_field(tile: Tile, statistic: str, number: int) -> Tensor | None:
    """A statistic's sum over its count; None where it was not measured."""
    fields = tile.measured.fields(statistic, number) if tile.measured is not None else {}
    if "sum" not in fields:
        return None
    return fields["sum"].to(tile.models[0].device) / float(fields["count"])


# Methods on top of a host ---------------------------------------------------------------------------------------------


def _host(tile: Tile, stats: Any, *, host: str, weight: Sequence[float], density: Sequence[float], lambda_: float,
          normalize: bool, **_params: Any) -> Tensor:
    """The host method's merge of a tile."""
    if host == "ties":
        return ties(tile, stats, weight=weight, density=density, lambda_=lambda_, normalize=normalize, combine="mean",
                    zero_sum="plus", scope="tensor")
    return task_arithmetic(tile, None, weight=weight, lambda_=lambda_, normalize=normalize)


def _host_rounds(*, host: str, density: Sequence[float], **_params: Any) -> tuple[Round, ...]:
    if host != "ties":
        return ()
    return tuple(Round(functools.partial(step.measure, scope="tensor"), functools.partial(step.finish, scope="tensor"))
                 for step in ties_rounds(density=density, scope="tensor", zero_sum="plus"))


def aim_rounds(**params: Any) -> tuple[Round, ...]:
    """The host's."""
    return _host_rounds(**params)


def aim(tile: Tile, stats: Any, *, omega: float, **params: Any) -> Tensor:
    """Activation-informed merging (arXiv 2502.02421): the host's change, smaller where the base's inputs are large.

    ``delta_:,j (1 - a_j (1 - omega))`` with ``a_j`` the base's mean ``|x_j|`` over the largest of them. Reconstructed:
    the paper's abstract fixes only that salient weights of the base are kept.
    """
    merged = _host(tile, stats, **params)
    mean = _mean_field(tile, "mean_abs", -1)
    if mean is None or merged.dim() < 2:
        return merged
    share = (mean / mean.max().clamp_min(1e-30)).to(merged)
    return tile.origin + (merged - tile.origin) * (1 - share * (1 - omega))


def acm_rounds(**params: Any) -> tuple[Round, ...]:
    """The host's, on scaled task vectors."""
    def scaled(step: Round) -> Round:
        return Round(lambda tile, stats, **given: step.measure(_acm_scaled(tile, **given), stats, **given), step.finish)

    return tuple(map(scaled, _host_rounds(**params)))


def acm(tile: Tile, stats: Any, **params: Any) -> Tensor:
    """Activation-guided consensus (arXiv 2505.14009): task vectors scaled by how little their activations say of the
    base's, then the host.

    ``lambda = scale (1 - 1 / (1 + exp(-t I)))`` with ``I`` the mutual information of a module's outputs in base and
    expert. Reconstructed from the abstract, which fixes that the coefficient falls with the information: Gaussian,
    feature by feature, ``-0.5 ln(1 - rho^2)`` averaged over features; with ``normalise_information``, over the expert's
    largest.
    """
    return _host(_acm_scaled(tile, **params), stats, **params)


def _acm_scaled(tile: Tile, *, t: float, scale: float, normalise_information: bool, **_params: Any) -> Tile:
    factors = [acm_coefficient(_information(tile, number, normalise_information), t, scale)
               for number in range(len(tile.models))]
    return _scaled(tile, factors)


def acm_coefficient(information: float, t: float, scale: float) -> float:
    """``scale * sigmoid(-t I)``."""
    return scale / (1 + math.exp(min(700.0, t * information)))


def _information(tile: Tile, number: int, normalise: bool) -> float:
    """The information of the tile's tensor: its own, else its layer's mean, else (heads) the last layer's."""
    assert tile.measured is not None
    every = tile.measured.every("moments", number, "information")
    largest = max(every.values(), default=0.0)
    own = every.get(tile.measured.name)
    if own is None:
        layers = [layer for name in every if (layer := layer_index(name)) is not None]
        wanted = tile.layer if tile.layer is not None else max(layers, default=None)
        near = [value for name, value in every.items() if layer_index(name) == wanted]
        own = sum(near) / len(near) if near else 0.0
    return own / largest if normalise and largest > 0 else own


def _scaled(tile: Tile, factors: Sequence[float]) -> Tile:
    """The tile with each model's task vector times a factor."""
    base = tile.origin
    return dataclasses.replace(tile, models=tuple(base + (model - base) * factor
                                                  for model, factor in zip(tile.models, factors, strict=True)))


def sens(tile: Tile, stats: Any, *, temperature: float, alpha: float, **params: Any) -> Tensor:
    """Sens-Merging (arXiv 2502.12420): task arithmetic with each layer's coefficient by its sensitivity.

    ``alpha * (s_l / mean_l s_l) * T softmax_i(S_i / (mean S * temperature))``: ``s_l`` is ``|g theta|`` summed over a
    layer and averaged over an expert's samples, ``S_i`` the expert's sum over layers. Reconstructed from the abstract:
    how layers are normalised, and the factor across tasks, which is 1 for a single expert. Tensors outside the layers
    take the factor of an average layer.
    """
    assert tile.measured is not None
    totals, layers = [], []
    for number in range(len(tile.models)):
        sums = _by_layer(tile.measured.every("sensitivity", number, "sum"))
        count = next(iter(tile.measured.every("sensitivity", number, "count").values()), 1.0)
        sums = {layer: value / count for layer, value in sums.items()}
        mean = sum(sums.values()) / max(1, len(sums))
        layers.append(sums.get(tile.layer, mean) / mean if mean > 0 and tile.layer is not None else 1.0)
        totals.append(sum(sums.values()))
    across = softmax([value / max(1e-30, sum(totals) / len(totals)) for value in totals], temperature)
    factors = [alpha * layer * share * len(totals) for layer, share in zip(layers, across, strict=True)]
    return _host(_scaled(tile, factors), stats, host="task_arithmetic", density=(1.0,) * len(factors), **params)


def _by_layer(values: Mapping[str, float]) -> dict[int | None, float]:
    found: dict[int | None, float] = {}
    for name, value in values.items():
        layer = layer_index(name)
        if layer is not None:
            found[layer] = found.get(layer, 0.0) + value
    return found


def softmax(values: Sequence[float], temperature: float) -> list[float]:
    """``exp(v / temperature)`` as shares."""
    top = max(values)
    powers = [math.exp((value - top) / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def expert_merging(tile: Tile, _stats: Any, *, coefficients: Sequence[Sequence[float]], **_params: Any) -> Tensor:
    """``theta_0 + sum_k alpha_k tau_k`` with the coefficients that `mipipe.runtime.merge.programs.expert_merging`
    learned, ``[models][parts]``: each holds for its contiguous part of the tensor."""
    shares = torch.tensor(coefficients, dtype=tile.origin.dtype, device=tile.origin.device)
    return merged_tensor(tile.origin, tile.deltas(), shares)


def merged_tensor(base: Tensor, deltas: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """``base + sum_k alpha_k delta_k`` with ``alphas`` ``[models, parts]``, each for its part of the flattened
    tensor."""
    count = alphas.shape[1]
    if count == 1:
        return base + sum(alphas[number, 0] * delta for number, delta in enumerate(deltas))
    sizes = torch.tensor([late - early for early, late in itertools.pairwise(chunk_bounds(base.numel(), count))])
    spread = [torch.repeat_interleave(row, sizes.to(row.device)).reshape(base.shape) for row in alphas]
    return base + sum(share * delta for share, delta in zip(spread, deltas, strict=True))


def chunk_bounds(size: int, count: int) -> list[int]:
    """Where ``count`` contiguous parts of a flattened tensor begin and end: ``round(c size / count)``."""
    return [round(part * size / count) for part in range(count + 1)]


# Rotations and votes --------------------------------------------------------------------------------------------------


def arm(tile: Tile, _stats: Any, *, eta: float, energy: float) -> Tensor:
    """A step of streaming merging by activation-guided rotations (arXiv 2602.03237): ``theta + eta tau R``.

    ``theta`` (the base) is the model merged so far, the last model the next checkpoint; ``tau`` its change from the
    checkpoint before (the first of two models), or from ``theta``. ``R`` turns the checkpoint's inputs onto the merged
    model's (orthogonal Procrustes) and is the identity where neither has any. Reconstructed from the abstract.
    """
    before = tile.models[0] if len(tile.models) == 2 else tile.origin
    delta = tile.models[-1] - before
    fields = tile.measured.fields("cross", len(tile.models) - 1) if tile.measured is not None else {}
    if "ba" in fields and delta.dim() == 2:
        delta = (delta.double() @ rotation(fields["ba"].to(delta.device).double(), energy)).to(delta)
    return tile.origin + eta * delta


def rotation(cross: Tensor, energy: float) -> Tensor:
    """The orthogonal ``R`` nearest to ``||X_phi R - X_theta||``'s minimum, of ``cross = X_phi^T X_theta`` ``[n, n]``.

    Of the singular triplets the leading ones that hold a share ``energy`` of the squares are turned; what is left goes
    through as it is, as far as that is orthogonal (polar factor of both together).
    """
    left, values, right = torch.linalg.svd(cross)
    total = (values ** 2).cumsum(0)
    if float(total[-1]) == 0:
        return torch.eye(len(cross), dtype=cross.dtype, device=cross.device)
    keep = int((total < energy * total[-1]).sum()) + 1
    keep = min(keep, int((values > 1e-10 * values[0]).sum()))
    one, two = left[:, :keep], right[:keep].T
    identity = torch.eye(len(cross), dtype=cross.dtype, device=cross.device)
    joined = one @ two.T + (identity - one @ one.T) @ (identity - two @ two.T)
    first, _, second = torch.linalg.svd(joined)
    found: Tensor = first @ second
    return found


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


def rcp(tile: Tile, _stats: Any, *, strength: float) -> Tensor:
    """RCP-Merging (arXiv 2508.03140): ``theta_R + 1[V > 0] (theta_D - theta_0)``; the models are reasoning, domain.

    ``V`` are votes of the domain's samples, ``c_s = S_s + strength F (theta_R - theta_D)^2 <= 0``. Tensors without
    gradients of their own (a tied token table) stay the reasoning model's.
    """
    reasoning, domain = tile.models
    fields = tile.measured.fields(f"votes:{strength!r}", 1) if tile.measured is not None else {}
    if "sum" not in fields:
        return reasoning.clone()
    votes = fields["sum"].to(reasoning).reshape(reasoning.shape)
    return reasoning + torch.where(votes > 0, domain - tile.origin, 0.0)
