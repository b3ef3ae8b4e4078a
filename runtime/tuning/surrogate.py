"""Quadratic surrogates of scores over a recipe's free values (MAP, arXiv 2406.07529), and fronts of several scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
RIDGE = 1e-6
"""Pull to zero, with fewer points than coefficients."""


def num_coefficients(size: int) -> int:
    """Coefficients of a quadratic in ``size`` values: ``(n + 1)(n + 2) / 2``."""
    return (size + 1) * (size + 2) // 2


def design(points: Array) -> Array:
    """Squares, cross terms, values and one, in this order (the reference's), ``[points, coefficients]``."""
    size = points.shape[1]
    crosses = [points[:, i] * points[:, j] for i in range(size) for j in range(i + 1, size)]
    return np.column_stack([points ** 2, *crosses, points, np.ones(len(points))])


@dataclass(frozen=True)
class Surrogate:
    """A fitted quadratic; ``link`` bends it to the score's range (identity, or softplus for losses)."""

    coefficients: Array
    link: str = "identity"

    def __call__(self, points: Array) -> Array:
        found: Array = design(points) @ self.coefficients
        return np.logaddexp(0.0, found) if self.link == "softplus" else found


def fit(points: Array, scores: Array, link: str = "identity") -> Surrogate:
    """Least squares of a quadratic; with fewer points than coefficients the one with small coefficients.

    ``softplus``: of scores above zero, on their inverse softplus.
    """
    wanted = scores if link == "identity" else scores + np.log(-np.expm1(-np.maximum(scores, 1e-12)))
    rows: Array = design(points)
    if len(rows) < rows.shape[1]:
        square = rows.T @ rows + RIDGE * np.eye(rows.shape[1])
        return Surrogate(np.asarray(np.linalg.solve(square, rows.T @ wanted), dtype=np.float64), link)
    return Surrogate(np.asarray(np.linalg.lstsq(rows, wanted, rcond=None)[0], dtype=np.float64), link)


def r_squared(surrogate: Callable[[Array], Array], points: Array, scores: Array) -> float:
    """The share of the scores' variance that a surrogate explains."""
    spread = float(((scores - scores.mean()) ** 2).sum())
    left = float(((surrogate(points) - scores) ** 2).sum())
    return 1.0 - left / spread if spread > 0 else float(left == 0)


def left_out(points: Array, scores: Array, link: str = "identity") -> float:
    """``r_squared`` of points that were left out, each once: of five parts one at a time."""
    found = np.empty(len(scores))
    for part in range(5):
        held = np.arange(len(points)) % 5 == part
        if held.any() and not held.all():
            found[held] = fit(points[~held], scores[~held], link)(points[held])
    spread = float(((scores - scores.mean()) ** 2).sum())
    return 1.0 - float(((found - scores) ** 2).sum()) / spread if spread > 0 else 0.0


def not_dominated(scores: Array) -> list[int]:
    """Rows that no other row beats: at least as high everywhere, and higher somewhere. All scores: higher is better."""
    order = np.argsort(-scores.sum(1), kind="stable")  # a row is only dominated by one of a larger sum
    kept: list[int] = []
    found = np.empty_like(scores)
    for row in order:
        rivals, own = found[:len(kept)], scores[row]
        if not bool(((rivals >= own).all(1) & (rivals > own).any(1)).any()):
            found[len(kept)] = own
            kept.append(int(row))
    return sorted(kept)


def start_points(size: int, count: int, generator: np.random.Generator) -> Array:
    """Scalings to begin with, in [0, 1]: every corner of one value alone, these disturbed, and uniform ones."""
    found = [np.eye(size)[number] for number in range(size)]
    found += [np.clip(row + generator.normal(0, 0.15, size), 0, 1) for row in np.eye(size)]
    while len(found) < count:
        found.append(generator.random(size))
    return np.array(found[:count])


def propose(surrogates: Sequence[Surrogate], signs: Sequence[float], seen: Array, size: int, count: int,
            generator: np.random.Generator, weights: Sequence[float] | None = None) -> Array:
    """Points on the surrogates' front, spread out and away from those seen, ``[count, size]``.

    A dense random sample of the space takes the place of the paper's NSGA-III: the surrogates cost nothing.

    Args:
        signs: +1 for scores that are the better the higher, -1 for losses.
        weights: preferences; the best of them is the first point.
    """
    pool = np.vstack([generator.random((4096, size)), np.clip(seen + generator.normal(0, 0.05, seen.shape), 0, 1)])
    scores = np.column_stack([sign * surrogate(pool) for surrogate, sign in zip(surrogates, signs, strict=True)])
    spread = scores.std(0)
    scores = scores / np.where(spread > 0, spread, 1.0)
    shares = np.full(scores.shape[1], 1.0) if weights is None else np.asarray(weights, dtype=np.float64)
    chosen = [int((scores @ shares).argmax())]
    front = not_dominated(scores) if scores.shape[1] > 1 else list(np.argsort(-scores[:, 0])[:count])
    while len(chosen) < min(count, len(front)):
        known = np.vstack([pool[chosen], seen])
        away = np.min(((pool[front][:, None] - known[None]) ** 2).sum(2), 1)
        chosen.append(front[int(away.argmax())])
    found: Array = pool[chosen[:count]]
    return found


# Bayesian MAP: where to look next -------------------------------------------------------------------------------------


RESAMPLES, DROPPED = 30, 0.2
"""Bootstrap resamples, and the share of points that each drops (the reference's)."""


def bins_of(size: int) -> int:
    """Bins of every angle: 4 with fewer than four values, else 2."""
    return 4 if size < 4 else 2


def directions(angles: Array) -> Array:
    """Unit vectors ``[points, size]`` with positive entries, of their angles ``[points, size - 1]`` in [0, pi / 2]."""
    ones = np.ones((len(angles), 1))
    sines = np.cumprod(np.hstack([ones, np.sin(angles)]), 1)
    return sines * np.hstack([np.cos(angles), ones])


def angles_of(points: Array) -> Array:
    """The angles of points with entries of at least zero."""
    squares = np.cumsum((points ** 2)[:, ::-1], 1)[:, ::-1]
    found: Array = np.arctan2(np.sqrt(squares[:, 1:]), points[:, :-1])
    return found


def bin_scores(points: Array, scores: Array, generator: np.random.Generator) -> Array:
    """How much each bin of directions is worth a look, ``[bins of all angles]``; -inf where no point is.

    The mean squared error of the quadratics fitted to all scores ``[points, scores]``, plus half the standard deviation
    of that error over fits to resampled points.
    """
    size, number = points.shape[1], bins_of(points.shape[1])
    places = np.minimum((angles_of(points) / (np.pi / 2) * number).astype(int), number - 1)
    index = np.ravel_multi_index(tuple(places.T), (number,) * (size - 1)) if size > 1 else np.zeros(len(points), int)

    def errors(chosen: npt.NDArray[np.intp]) -> Array:
        found = [(fit(points[chosen], column[chosen])(points) - column) ** 2 for column in scores.T]
        mean: Array = np.mean(found, 0)
        return mean

    every = np.arange(len(points))
    whole = errors(every)
    kept = max(1, round(len(points) * (1 - DROPPED)))
    spread = np.std([errors(np.sort(generator.permutation(every)[:kept])) for _ in range(RESAMPLES)], 0)
    found = np.full(number ** (size - 1), -np.inf)
    for place in np.unique(index):
        found[place] = (whole + 0.5 * spread)[index == place].mean()
    return found
