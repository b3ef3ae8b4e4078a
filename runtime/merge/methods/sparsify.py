"""Which entries of a task vector stay: the largest (TIES), random ones (DARE, DELLA), neither largest nor smallest
(Breadcrumbs).

Trimming by rank needs the k-th largest magnitude of a whole piece or model; `threshold_rounds` finds it exactly in two
passes of counting (`mipipe.runtime.merge.methods.quantile`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.quantile import (
    LOW_BITS,
    NUM_HIGH,
    Threshold,
    TopK,
    count_high,
    count_low,
    find_bin,
    magnitude_keys,
)

Cutoffs = tuple[tuple[TopK, ...], ...]
"""Per series of values, one selection for each requested count."""


def threshold_rounds(series: Callable[..., Sequence[Tensor]], counts: Callable[..., list[list[int]]],
                     keep_ties: bool = False) -> tuple[Round, ...]:
    """Two rounds whose result is `Cutoffs`: the top ``counts`` of each series of values.

    Args:
        series: ``series(tile, **params)`` gives the values ranked by magnitude, one tensor per series.
        counts: ``counts(entries, nonzero, **params)`` gives the counts wanted of each series, from its number of
            entries and of nonzero entries (both lists, one per series).
        keep_ties: keep every entry equal to the last one selected (needed where pieces share a threshold).
    """

    def measure_high(tile: Tile, _stats: Any, **params: Any) -> Tensor:
        rows = []
        for values in series(tile, **params):
            keys = magnitude_keys(values)
            rows.append(torch.cat([count_high(keys), torch.count_nonzero(keys)[None]]))
        return torch.stack(rows)

    def finish_high(total: Tensor, _stats: Any, **params: Any) -> list[list[tuple[int, int]]]:
        entries = [int(row[:NUM_HIGH].sum()) for row in total]
        wanted = counts(entries, [int(row[NUM_HIGH]) for row in total], **params)
        return [[find_bin(row[:NUM_HIGH], min(count, size)) for count in group]
                for row, group, size in zip(total, wanted, entries, strict=True)]

    def measure_low(tile: Tile, bins: list[list[tuple[int, int]]], **params: Any) -> Tensor:
        return torch.stack([count_low(magnitude_keys(values), high)
                            for values, group in zip(series(tile, **params), bins, strict=True) for high, _ in group])

    def finish_low(total: Tensor, bins: list[list[tuple[int, int]]], **_params: Any) -> Cutoffs:
        rows = iter(total)
        return tuple(tuple(_top_k(high, rank, next(rows), keep_ties) for high, rank in group) for group in bins)

    return Round(measure_high, finish_high), Round(measure_low, finish_low)


def _top_k(high: int, rank: int, low_counts: Tensor, keep_ties: bool) -> TopK:
    if high < 0:
        return TopK(Threshold.nothing())
    low, quota = find_bin(low_counts, rank)
    return TopK(Threshold((high << LOW_BITS) | low, None if keep_ties else quota))


def deltas_of(tile: Tile, **_params: Any) -> list[Tensor]:
    """The task vectors as series to rank."""
    return tile.deltas()


def kept(density: float, entries: int) -> int:
    """How many of ``entries`` a density keeps: ``floor(density * entries)``, at least one unless the density is 0."""
    return max(1, math.floor(density * entries + 1e-9)) if density > 0 else 0


def trim(tile: Tile, cutoffs: Cutoffs | None) -> list[Tensor]:
    """Task vectors with all but the selected entries set to zero; all of them without cutoffs."""
    deltas = tile.deltas()
    if cutoffs is None:
        return deltas
    return [delta.mul_(selection[0].mask(delta))
            for delta, selection in zip(deltas, cutoffs, strict=True)]


def breadcrumbs_deltas(tile: Tile, cutoffs: Cutoffs) -> list[Tensor]:
    """Task vectors without their largest entries and their smallest (arXiv 2312.06795).

    The first selection of each series is the outliers that go, the second everything that is not small.
    """
    result = []
    for delta, (outliers, large) in zip(tile.deltas(), cutoffs, strict=True):
        stay = large.mask(delta).sub_(outliers.mask(delta))
        result.append(delta.mul_(stay))
    return result


def breadcrumbs_counts(entries: list[int], _nonzero: list[int], *, density: Sequence[float], gamma: Sequence[float],
                       **_params: Any) -> list[list[int]]:
    """Per model: the outliers, ``floor(gamma n)``, and the outliers plus the ``floor(density n)`` that stay.

    Where both do not fit, fewer outliers go (as in mergekit): the density counts, and at density 1 nothing is dropped.
    """
    result = []
    for size, share, top in zip(entries, density, gamma, strict=True):
        stay = kept(share, size)
        outliers = min(math.floor(top * size + 1e-9), size - stay)
        result.append([outliers, outliers + stay])
    return result


def dare_mask(tile: Tile, model: int, density: float) -> Tensor:
    """1 with probability ``density`` for each entry, else 0; the same in every execution."""
    return positive(density - tile.random(model))


def positive(values: Tensor) -> Tensor:
    """1 where a value is above zero, else 0, in its dtype and in place: faster than comparing on a CPU."""
    return values.sign_().clamp_min_(0)


def dare_deltas(tile: Tile, density: Sequence[float], rescale: Sequence[float]) -> list[Tensor]:
    """Task vectors with random entries dropped and the others multiplied by ``rescale`` (arXiv 2311.03099)."""
    result = []
    for index, (delta, share, factor) in enumerate(zip(tile.deltas(), density, rescale, strict=True)):
        if share < 1.0:
            delta = delta.mul_(dare_mask(tile, index, share)).mul_(factor)
        result.append(delta)
    return result


def norm_round(dropped: Callable[..., Sequence[Tensor]]) -> Round:
    """Measures L1 norms before and after dropping (``dropped(tile, **params)``); gives factors that restore them."""

    def measure(tile: Tile, _stats: Any, **params: Any) -> Tensor:
        rows = [torch.stack([delta.abs().sum(dtype=torch.float64), left.abs().sum(dtype=torch.float64)])
                for delta, left in zip(tile.deltas(), dropped(tile, **params), strict=True)]
        return torch.stack(rows)

    def finish(total: Tensor, _stats: Any, **_params: Any) -> list[float]:
        return [_restoring(before, after) for before, after in total]

    return Round(measure, finish)


def trimmed_norm_round(trimmed: Callable[[Tile, Cutoffs], Sequence[Tensor]]) -> Round:
    """Restores the L1 norms that trimming (``trimmed(tile, cutoffs)``) lessens: the factors go into the cutoffs."""

    def measure(tile: Tile, cutoffs: Cutoffs, **_params: Any) -> Tensor:
        rows = [torch.stack([delta.abs().sum(dtype=torch.float64), left.abs().sum(dtype=torch.float64)])
                for delta, left in zip(tile.deltas(), trimmed(tile, cutoffs), strict=True)]
        return torch.stack(rows)

    def finish(total: Tensor, cutoffs: Cutoffs, **_params: Any) -> Cutoffs:
        for (before, after), selections in zip(total, cutoffs, strict=True):
            for selection in selections:
                selection.factor = _restoring(before, after)
                selection.used = 0  # the measuring pass has used up the quota of ties
        return cutoffs

    return Round(measure, finish)


def _restoring(before: Tensor, after: Tensor) -> float:
    """The factor from one norm to another; 1 where one of them is about zero."""
    return float(before / after) if min(before, after) >= 1e-7 else 1.0


def dare_norm_round() -> Round:
    """The factors that restore DARE's L1 norms."""
    return norm_round(lambda tile, *, density, **_params: [
        delta * dare_mask(tile, index, share) for index, (delta, share) in enumerate(zip(tile.deltas(), density,
                                                                                         strict=True))])


def della_deltas(tile: Tile, density: Sequence[float], epsilon: Sequence[float], rescale: bool,
                 factors: Sequence[float] | None = None) -> list[Tensor]:
    """Task vectors after MagPrune: the larger an entry within its row, the likelier it stays (arXiv 2406.11617).

    Entry of ascending rank r = 0 .. n - 1 of its row stays with probability ``density - eps + 2 eps r / (n - 1)``,
    mergekit's meaning of epsilon (the paper's is twice that), and is divided by it, or multiplied by its model's factor
    where there are ``factors``; a vector is one row. At density 1 everything stays, at 0 nothing.
    """
    result = []
    for index, (delta, share, spread) in enumerate(zip(tile.deltas(), density, epsilon, strict=True)):
        if share in (0.0, 1.0):
            result.append(delta * share)
            continue
        rows = delta if delta.dim() == 2 else delta[None]
        order = rows.abs().argsort(dim=1, stable=True)
        ranks = torch.empty_like(order).scatter_(1, order, torch.arange(rows.shape[1], device=rows.device)
                                                 .expand_as(order))
        place = ranks.to(delta.dtype) / (rows.shape[1] - 1) if rows.shape[1] > 1 else 0.5
        stay = share - spread + 2 * spread * place + torch.zeros_like(rows)
        stay = stay.reshape(delta.shape)
        chosen = positive(stay - tile.random(index))
        if factors is not None:
            delta = delta * factors[index]
        elif rescale:
            delta = delta / stay
        result.append(delta * chosen)
    return result
