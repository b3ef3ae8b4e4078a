"""Means along arcs: SLERP, NuSLERP, Multi-SLERP, the Karcher mean, and Model Stock.

All of them give a linear combination of the models whose coefficients depend on inner products only. So one pass
measures the Gram matrix of a piece, the coefficients are found in float64 from its few numbers, and a second pass
combines: no tensor is ever flattened in memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import RunError
from mipipe.runtime.merge.methods.method import Round, Tile

NEARLY_PARALLEL = 0.9995
"""Above this |cosine| the arc is a line to rounding, and ``sin(phi)`` a bad divisor (mergekit's bound)."""
ZERO_NORM = 1e-8
COLINEAR = 1e-8
"""Below this sine, vectors are colinear to NuSLERP (mergekit's bound); its coefficients are found in float64."""


def gram(tensors: Sequence[Tensor]) -> Tensor:
    """Inner products of flattened tensors, float64 ``[T, T]``."""
    rows = torch.stack([tensor.flatten() for tensor in tensors])
    return (rows @ rows.T).double()


def _measure_gram(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    return gram(tile.models)


def _measure_delta_gram(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    return gram(tile.deltas())


def cosine(product: float, norm_a: float, norm_b: float) -> float:
    """Cosine from inner product and norms; a vector shorter than `ZERO_NORM` is not normalised."""
    return product / ((norm_a if norm_a > ZERO_NORM else 1.0) * (norm_b if norm_b > ZERO_NORM else 1.0))


def slerp_coefficients(cos: float, t: float) -> tuple[float, float] | None:
    """``(sin((1-t) phi), sin(t phi)) / sin(phi)``; None where a straight line is meant."""
    if abs(cos) > NEARLY_PARALLEL:
        return None
    phi = math.acos(cos)
    return math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)


def interpolate(first: Tensor, second: Tensor, t: float, coefficients: tuple[float, float] | None) -> Tensor:
    """``a first + b second``, or the straight line between them without coefficients."""
    if coefficients is None:
        return torch.lerp(first, second, t)
    return (first * coefficients[0]).add_(second, alpha=coefficients[1])


# SLERP ----------------------------------------------------------------------------------------------------------------


def _finish_slerp(total: Tensor, _stats: Any, *, t: float) -> tuple[float, float] | None:
    norms = total.diagonal().sqrt()
    return slerp_coefficients(cosine(float(total[0, 1]), float(norms[0]), float(norms[1])), t)


def slerp_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_gram, _finish_slerp),)


def slerp(tile: Tile, stats: tuple[float, float] | None, *, t: float) -> Tensor:
    """The point at ``t`` on the arc from the first model to the second (Shoemake 1985)."""
    return interpolate(tile.models[0], tile.models[1], t, stats)


# NuSLERP --------------------------------------------------------------------------------------------------------------


def nuslerp_position(weight: Sequence[float]) -> float:
    """``w_2 / (w_1 + w_2)``; halfway when the weights cancel."""
    total = sum(weight)
    return weight[1] / total if abs(total) > ZERO_NORM else 0.5


def _ends(tile: Tile) -> tuple[Tensor, ...]:
    return tile.models if tile.base is None else tuple(tile.deltas())


def _measure_nuslerp(tile: Tile, _stats: Any, *, nuslerp_flatten: bool, nuslerp_row_wise: bool,
                     **_params: Any) -> Tensor:
    """Products of the two ends, ``[3]`` over all entries or ``[3, columns]`` along the rows."""
    first, second = _ends(tile)
    products = torch.stack([first * first, second * second, first * second])
    if nuslerp_flatten or first.dim() < 2 or not nuslerp_row_wise:
        return products.flatten(1).sum(1, dtype=torch.float64)
    return products.sum(1, dtype=torch.float64)


def _finish_nuslerp(total: Tensor, _stats: Any, *, weight: Sequence[float], **_params: Any) -> Tensor:
    return arc_weights(total[0], total[1], total[2], nuslerp_position(weight))


def arc_weights(square_a: Tensor, square_b: Tensor, product: Tensor, t: float) -> Tensor:
    """SLERP's two coefficients from squared norms and inner products, elementwise, ``[2, ...]`` float64."""
    norm_a, norm_b = (torch.where(square.sqrt() > ZERO_NORM, square.sqrt(), 1.0) for square in (square_a, square_b))
    cos = (product / norm_a / norm_b).double()
    phi = torch.acos(cos.clamp(-1.0, 1.0))
    straight = torch.sin(phi).abs() < COLINEAR
    arc = torch.stack([torch.sin((1 - t) * phi), torch.sin(t * phi)]) / torch.where(straight, 1.0, torch.sin(phi))
    line = torch.stack([torch.full_like(cos, 1 - t), torch.full_like(cos, t)])
    return torch.where(straight, line, arc)


def nuslerp_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_nuslerp, _finish_nuslerp),)


def nuslerp(tile: Tile, stats: Any, *, weight: Sequence[float], nuslerp_flatten: bool,
            nuslerp_row_wise: bool) -> Tensor:
    """SLERP with ``t`` from two weights: of task vectors where a base is given, else of the models.

    ``nuslerp_flatten``: one arc for the whole piece; otherwise, with mergekit's meaning of the words, one per row, or
    per column with ``nuslerp_row_wise``. A vector is one arc.
    """
    first, second = _ends(tile)
    if not nuslerp_flatten and not nuslerp_row_wise and first.dim() == 2:
        weights = arc_weights(first.double().square().sum(1), second.double().square().sum(1),
                              (first.double() * second.double()).sum(1), nuslerp_position(weight))[..., None]
    else:
        weights = stats
    weights = weights.to(first.dtype)
    merged = first + (second - first) * weights[1] + first * (weights[0] + weights[1] - 1)
    return merged if tile.base is None else tile.base + merged


# Multi-SLERP ----------------------------------------------------------------------------------------------------------


def multislerp_coefficients(products: Tensor, weight: Sequence[float], normalize: bool, eps: float) -> list[float]:
    """Coefficients of the models in their barycentre on the sphere, from their Gram matrix.

    The unit vectors' weighted mean ``m``, scaled to the weighted mean of the norms: ``n / |m| sum_i w_i u_i``. (The
    published text goes on from ``m`` along the weighted mean of the tangents there, which is zero for these weights.)
    Two opposite models, and models without length, are combined on the line.

    Raises:
        RunError: more than two models whose directions cancel.
    """
    norms = products.diagonal().clamp_min(0.0).sqrt()
    share = torch.tensor(weight, dtype=torch.float64)
    if normalize:
        share = share / share.sum()
    shares = share / (norms + eps)
    length = float(torch.sqrt((shares @ products @ shares).clamp_min(0.0)))
    if length < eps:
        if len(weight) > 2 and float(norms.max()) > eps:
            raise RunError("multislerp: the models' directions cancel with these weights, so they have no mean on the"
                           " sphere; give other weights")
        return [float(item) for item in share]
    return [float(item) for item in float(share @ norms) / length * shares]


def _measure_ends(tile: Tile, _stats: Any, **_params: Any) -> Tensor:
    return gram(_ends(tile))


def _finish_multislerp(total: Tensor, _stats: Any, *, weight: Sequence[float], normalize_weights: bool,
                       eps: float) -> list[float]:
    return multislerp_coefficients(total.cpu(), weight, normalize_weights, eps)


def multislerp_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_ends, _finish_multislerp),)


def multislerp(tile: Tile, stats: Sequence[float], **_params: Any) -> Tensor:
    """SLERP of any number of models, or of task vectors where a base is given (Goddard's Multi-SLERP).

    One model is returned as it is.
    """
    if len(tile.models) == 1:
        return tile.models[0].clone()
    ends = _ends(tile)
    merged = ends[0] * sum(stats)
    for coefficient, end in zip(stats[1:], ends[1:], strict=True):
        merged.add_(end - ends[0], alpha=coefficient)
    return merged if tile.base is None else merged.add_(tile.base)


# Karcher mean ---------------------------------------------------------------------------------------------------------


def karcher_coefficients(products: Tensor, weight: Sequence[float], max_iter: int, tol: float) -> list[float]:
    """Coefficients of the models in their Karcher mean, from the Gram matrix of the models.

    The weighted mean on the sphere of the unit vectors ``u_i`` (gradient descent with unit step: ``q <- exp_q(sum_i
    w_i log_q(u_i))``, Karcher 1977), scaled by the weighted mean of the norms. Every iterate is a combination of the
    ``u_i``, so the iteration runs on coefficients. Zero vectors are left out.
    """
    norms = products.diagonal().sqrt()
    live = [index for index in range(len(weight)) if norms[index] > ZERO_NORM]
    total = sum(weight[index] for index in live)
    if not live or abs(total) < ZERO_NORM:
        return [0.0] * len(weight)
    share = torch.tensor([weight[index] / total for index in live], dtype=torch.float64)
    unit = products[live][:, live] / norms[live][:, None] / norms[live][None, :]
    point = share.clone()
    length = torch.sqrt(point @ unit @ point)
    if length < ZERO_NORM:  # opposite vectors: any start off the origin will do; the first model's direction
        point = torch.zeros_like(share).index_fill_(0, torch.tensor(0), 1.0)
        length = torch.tensor(1.0, dtype=torch.float64)
    point = point / length
    for _ in range(max_iter):
        cosines = (unit @ point).clamp(-1.0, 1.0)
        angles = torch.acos(cosines)
        sines = torch.sin(angles)
        pull = torch.where(sines > ZERO_NORM, angles / sines.clamp_min(ZERO_NORM), 1.0) * share
        step = pull - (pull * cosines).sum() * point
        size = torch.sqrt((step @ unit @ step).clamp_min(0.0))
        if size < tol:
            break
        point = point * torch.cos(size) + step * (torch.sin(size) / size)
        point = point / torch.sqrt(point @ unit @ point)
    scale = (share * norms[live]).sum()
    result = [0.0] * len(weight)
    for place, index in enumerate(live):
        result[index] = float(scale * point[place] / norms[index])
    return result


def _finish_karcher(total: Tensor, _stats: Any, *, weight: Sequence[float], max_iter: int, tol: float) -> list[float]:
    return karcher_coefficients(total.cpu(), weight, max_iter, tol)


def karcher_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_gram, _finish_karcher),)


def karcher(tile: Tile, stats: Sequence[float], **_params: Any) -> Tensor:
    """The Karcher mean of the models' directions, with the mean of their norms."""
    first = tile.models[0]
    merged = first * sum(stats)
    for coefficient, model in zip(stats[1:], tile.models[1:], strict=True):
        merged.add_(model - first, alpha=coefficient)
    return merged


# Model Stock ----------------------------------------------------------------------------------------------------------


def model_stock_ratio(products: Tensor) -> Tensor:
    """``t = T c / (1 + (T - 1) c)`` from the Gram matrices ``[..., T, T]`` of task vectors, c the mean pairwise cosine.

    Model Stock (arXiv 2403.19522), equation 2 for T models. Zero task vectors have cosine 0. With T = 1, t = 1.
    """
    count = products.shape[-1]
    norms = products.diagonal(dim1=-2, dim2=-1).clamp_min(0.0).sqrt()
    safe = torch.where(norms > ZERO_NORM, norms, 1.0)
    cosines = products / safe[..., :, None] / safe[..., None, :]
    if count == 1:
        return torch.ones(products.shape[:-2], dtype=torch.float64, device=products.device)
    above = torch.triu(torch.ones(count, count, dtype=torch.bool, device=products.device), 1)
    mean = cosines[..., above].mean(-1).clamp(-1.0, 1.0)
    divisor = 1 + (count - 1) * mean
    # Opposite task vectors have no mean to go to: the divisor vanishes and the base stays.
    live = divisor.abs() > ZERO_NORM
    return torch.where(live, count * mean / torch.where(live, divisor, 1.0), 0.0)


def _finish_stock(total: Tensor, _stats: Any, **_params: Any) -> float:
    return float(model_stock_ratio(total))


def model_stock_rounds(**_params: Any) -> tuple[Round, ...]:
    return (Round(_measure_delta_gram, _finish_stock),)


def model_stock(tile: Tile, stats: float, *, filter_wise: bool) -> Tensor:
    """``theta_0 + t mean_i tau_i``, with t from the angles between task vectors: per piece, or per row.

    A vector has one t, not one per entry.
    """
    deltas = tile.deltas()
    mean = deltas[0].clone()
    for delta in deltas[1:]:
        mean.add_(delta)
    mean.div_(len(deltas))
    if not filter_wise or mean.dim() == 1:
        return tile.origin + mean.mul_(stats)
    rows = torch.stack([delta.reshape(len(delta), -1) for delta in deltas], dim=1).double()
    ratio = model_stock_ratio(rows @ rows.transpose(1, 2)).to(mean.dtype)
    return tile.origin + mean * ratio[:, None]
