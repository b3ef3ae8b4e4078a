"""Ways to search: a grid, CMA-ES, NSGA-III, and quadratic surrogates (nested ones: `mipipe.runtime.tuning.nested`).
Each asks for points in rounds and is told their scores.

All are the same on every run with the same seed and scores, so a search that was interrupted repeats its questions and
finds their answers in the journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mipipe.graphs.errors import InputError
from mipipe.graphs.tuning.space import SearchSpace
from mipipe.runtime.tuning.nested import Nested
from mipipe.runtime.tuning.surrogate import (
    Array,
    bin_scores,
    bins_of,
    directions,
    fit,
    left_out,
    num_coefficients,
    propose,
    start_points,
)

Values = tuple[Any, ...]
Scores = Mapping[str, float]
KINDS = ("grid", "cma", "nsga3", "map", "bayes-map", "nested-map")
TEMPERATURE = 0.07
"""Of the softmax over bins by which Bayesian MAP chooses directions (the reference's)."""
ROUND = 4
"""Points that a surrogate proposes before it is fitted anew."""


class CandidateSearch(Protocol):
    """A way to search."""

    def ask(self) -> list[Values]:
        """The points to be measured next; none at the end."""

    def tell(self, found: Sequence[tuple[Values, Scores]]) -> None:
        """The scores of the points asked for, in their order; higher is better."""

    def facts(self) -> dict[str, Any]:
        """What the search knows at its end, for its report."""


def make_search(kind: str, space: SearchSpace, budget: int, points: int, seed: int,
                weights: Mapping[str, float]) -> CandidateSearch:
    """The search of a name.

    Raises:
        InputError: CMA-ES over choices, or without its library.
    """
    if kind == "grid":
        return GridSearch(space, points)
    if any(item.choices for item in space.free):
        name = next(item.name for item in space.free if item.choices)
        raise InputError(f"--search {kind}: {name} is one of a few values, which only --search grid takes; give it a"
                         " range")
    if kind == "cma":
        return Evolution(space, budget, seed, weights)
    if kind == "nsga3":
        return Fronts(space, budget, seed)
    if kind == "nested-map":
        return Nested(space, budget, seed, weights)
    return (Bayesian if kind == "bayes-map" else Surrogates)(space, budget, seed, weights)


def total(scores: Scores, weights: Mapping[str, float]) -> float:
    """The weighted sum of scores; equal weights where none are given."""
    return sum(weights.get(name, 0.0 if weights else 1.0) * value for name, value in scores.items())


class GridSearch:
    """Every combination, once."""

    def __init__(self, space: SearchSpace, points: int) -> None:
        self._left = space.grid(points)

    def ask(self) -> list[Values]:
        found, self._left = self._left[:1], self._left[1:]
        return found

    def tell(self, found: Sequence[tuple[Values, Scores]]) -> None:
        """A grid learns nothing."""

    def facts(self) -> dict[str, Any]:
        return {}


class Evolution:
    """CMA-ES (Hansen and Ostermeier 2001) on the weighted sum of scores, by the library ``cmaes``."""

    def __init__(self, space: SearchSpace, budget: int, seed: int, weights: Mapping[str, float]) -> None:
        try:
            from cmaes import CMA
        except ImportError:
            raise InputError("--search cma needs the library cmaes: pip install 'mipipe[tune]'") from None
        size = len(space.free)
        if size < 2:
            raise InputError("--search cma: found one free value, expected two or more; use --search grid or map")
        self._space, self._left, self._weights = space, budget, dict(weights)
        self._optimiser = CMA(mean=np.full(size, 0.5), sigma=0.25, seed=seed,
                              bounds=np.tile([0.0, 1.0], (size, 1)))
        self._asked: list[Any] = []

    def ask(self) -> list[Values]:
        if self._left < self._optimiser.population_size or self._optimiser.should_stop():
            return []
        self._asked = [self._optimiser.ask() for _ in range(self._optimiser.population_size)]
        self._left -= len(self._asked)
        return [self._space.point(units.tolist()) for units in self._asked]

    def tell(self, found: Sequence[tuple[Values, Scores]]) -> None:
        self._optimiser.tell([(units, -total(scores, self._weights))
                              for units, (_, scores) in zip(self._asked, found, strict=True)])

    def facts(self) -> dict[str, Any]:
        return {"generations": self._optimiser.generation, "population": self._optimiser.population_size}


class Fronts:
    """NSGA-III (Deb and Jain 2014) on all scores at once, by the library ``pymoo``: points that no other beats, spread
    along the front. A fifth of the budget is one generation, from 4 to 40 points; the first is drawn at random."""

    def __init__(self, space: SearchSpace, budget: int, seed: int) -> None:
        try:
            import pymoo.algorithms.moo.nsga3  # noqa: F401
        except ImportError:
            raise InputError("--search nsga3 needs the library pymoo: pip install 'mipipe[pareto]'") from None
        self._space, self._left, self._seed = space, budget, seed
        self._size = min(max(4, budget // 5), 40)
        self._algorithm: Any = None
        self._points = np.random.Generator(np.random.PCG64(seed)).random((self._size, len(space.free)))
        self._asked: Any = None
        self._generations = 0

    def ask(self) -> list[Values]:
        if self._algorithm is not None:
            self._asked = self._algorithm.ask()
            self._points = np.array(self._asked.get("X")) if self._asked is not None else self._points[:0]
        if not 0 < len(self._points) <= self._left:
            return []
        self._left -= len(self._points)
        return [self._space.point(row) for row in self._points.tolist()]

    def tell(self, found: Sequence[tuple[Values, Scores]]) -> None:
        from pymoo.core.evaluator import Evaluator
        from pymoo.problems.static import StaticProblem

        losses = np.array([[-value for value in scores.values()] for _, scores in found])
        if self._algorithm is None:
            self._algorithm = self._begun(self._points, losses.shape[1])
            self._asked = self._algorithm.ask()  # the points that were drawn
        Evaluator().eval(StaticProblem(self._algorithm.problem, F=losses), self._asked)
        self._algorithm.tell(infills=self._asked)
        self._generations += 1

    def _begun(self, points: Array, scores: int) -> Any:
        """The algorithm with its first generation."""
        from pymoo.algorithms.moo.nsga3 import NSGA3
        from pymoo.core.problem import Problem
        from pymoo.util.ref_dirs import get_reference_directions

        if scores < 2:
            raise InputError("--search nsga3: found one score, expected two or more that may disagree; use --search cma"
                             " or grid")
        size = points.shape[1]
        found = NSGA3(get_reference_directions("energy", scores, self._size, seed=self._seed), pop_size=self._size,
                      sampling=points)
        found.setup(Problem(n_var=size, n_obj=scores, xl=np.zeros(size), xu=np.ones(size)), seed=self._seed,
                    verbose=False)
        return found

    def facts(self) -> dict[str, Any]:
        return {"generations": self._generations, "population": self._size}


class Surrogates:
    """MAP: a quadratic for each score, fitted to a first set of points and then to what its front proposes."""

    def __init__(self, space: SearchSpace, budget: int, seed: int, weights: Mapping[str, float]) -> None:
        self._space, self._budget, self._weights = space, budget, dict(weights)
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._points: list[list[float]] = []
        self._scores: list[Scores] = []
        self._asked: list[list[float]] = []

    def ask(self) -> list[Values]:
        size, left = len(self._space.free), self._budget - len(self._points)
        if left <= 0:
            return []
        if not self._points:
            units = start_points(size, min(left, 2 * num_coefficients(size)), self._generator)
        else:
            units = self._propose(min(left, ROUND))
        self._asked = units.tolist()
        return [self._space.point(row) for row in self._asked]

    def _propose(self, count: int) -> Array:
        """Points on the front of surrogates fitted to all scores so far."""
        points, names = np.array(self._points), list(self._scores[0])
        fitted = [fit(points, np.array([scores[name] for scores in self._scores])) for name in names]
        weights = [self._weights.get(name, 0.0) for name in names] if self._weights else None
        return propose(fitted, [1.0] * len(names), points, points.shape[1], count, self._generator, weights)

    def tell(self, found: Sequence[tuple[Values, Scores]]) -> None:
        self._points += self._asked
        self._scores += [scores for _, scores in found]

    def facts(self) -> dict[str, Any]:
        if len(self._points) < 5:
            return {}
        points = np.array(self._points)
        return {"r_squared": {name: round(left_out(points, np.array([scores[name] for scores in self._scores])), 4)
                              for name in self._scores[0]}}


class Bayesian(Surrogates):
    """Bayesian MAP: after the first points, half of the budget goes where the surrogates are worst, by directions."""

    def _propose(self, count: int) -> Array:
        if len(self._points) > (self._budget + 2 * num_coefficients(len(self._space.free))) // 2:
            return super()._propose(count)
        points, names = np.array(self._points), list(self._scores[0])
        scores = np.array([[scores[name] for name in names] for scores in self._scores])
        found = bin_scores(points, scores / np.maximum(scores.std(0), 1e-12), self._generator)
        powers = np.exp((found - found.max()) / TEMPERATURE)
        size = points.shape[1]
        number = bins_of(size)
        rows = []
        for chosen in self._generator.choice(len(found), count, p=powers / powers.sum()):
            digits = np.array(np.unravel_index(chosen, (number,) * (size - 1)))
            angles = (digits + self._generator.random(size - 1)) * (np.pi / 2) / number
            rows.append(np.clip(self._generator.uniform(0.2, 0.8) * directions(angles[None])[0], 0, 1))
        return np.array(rows)
