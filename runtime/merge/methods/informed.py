"""Task arithmetic and TIES with factors that running the models found out (`mipipe.runtime.calibration`): of inputs, of
activations, of layers.

Tensors that no statistic was taken of (token tables, experts in banks, parts outside the decoder) are merged by each
method's plain rule: the host without the factor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mipipe.graphs.merging.checkpoints.tensor_classes import layer_index
from mipipe.runtime.merge.methods.arithmetic import task_arithmetic
from mipipe.runtime.merge.methods.closed_forms import mean_field
from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.task_vectors import ties, ties_rounds


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
                 for step in ties_rounds(density=density, scope="tensor", zero_sum="plus", rescale=False))


def aim_rounds(**params: Any) -> tuple[Round, ...]:
    """The host's."""
    return _host_rounds(**params)


def aim(tile: Tile, stats: Any, *, omega: float, **params: Any) -> Tensor:
    """Activation-informed merging (arXiv 2502.02421): the host's change, smaller where the base's inputs are large.

    ``delta_:,j (1 - a_j (1 - omega))`` with ``a_j`` the base's mean ``|x_j|`` over the largest of them. Reconstructed:
    the paper's abstract fixes only that salient weights of the base are kept.
    """
    merged = _host(tile, stats, **params)
    mean = mean_field(tile, "mean_abs", -1)
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
