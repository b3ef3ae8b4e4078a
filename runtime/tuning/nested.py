"""Nested MAP (arXiv 2406.07529): many experts' weights found pair by pair, each pair by quadratics of two values.

The models are nodes: at first the experts, each with its own score. Of the current nodes the two whose scores are
nearest are merged: so many scalings (c1, c2) in [0, 1]^2, a fifth of them with c1 = c2, are measured, a quadratic is
fitted to each of both scores, and the best scaling by preference takes the place of the pair. A node's preference is
the sum of its members', its score their mean by preference. A merge of T experts takes T + 21 (T - 1) points in place
of the (T + 1)(T + 2) of MAP, each of which has T scores.

A merge by weights is linear, so a node is a vector of the experts' weights, and a scaling of two nodes is one too.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from mipipe.graphs.errors import InputError
from mipipe.graphs.tuning.space import SearchSpace
from mipipe.runtime.tuning.surrogate import Array, fit, left_out, num_coefficients

PAIR, ISOTROPIC = 20, 0.2
"""Scalings that are measured for a pair, and the share of them with equal values (the reference's)."""
POOL = 4096
"""Scalings of which a pair's best is chosen by its quadratics."""


@dataclass(frozen=True)
class Node:
    """A model on the way: the experts' weights in [0, 1] of their ranges, its members, its score."""

    weights: Array
    members: tuple[int, ...]
    score: float


class Nested:
    """The search; the n-th free value is the weight of the expert of the n-th score."""

    def __init__(self, space: SearchSpace, budget: int, seed: int, weights: Mapping[str, float]) -> None:
        size = len(space.free)
        odd = next((item.name for item in space.free if item.low != 0), None)
        if odd is not None:
            raise InputError(f"--search nested-map: {odd} does not begin at 0, where an expert is left out; give the"
                             " range {search: [0, 1]}")
        pairs = max(1, size - 1)
        self._each = min(PAIR, (budget - size - pairs) // pairs)
        if size < 2 or self._each < num_coefficients(2):
            raise InputError(f"--search nested-map: {size} free values and --budget {budget}; expected two values or"
                             f" more, the weights of experts, and a budget of at least"
                             f" {size + pairs * (1 + num_coefficients(2))}")
        self._space, self._names = space, tuple(item.name for item in space.free)
        self._weights = dict(weights)
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._run = self._nodes()
        self._asked: Array | None = next(self._run)
        self._facts: list[dict[str, Any]] = []

    def ask(self) -> list[tuple[Any, ...]]:
        return [] if self._asked is None else [self._space.point(row) for row in self._asked.tolist()]

    def tell(self, found: Sequence[tuple[Any, Mapping[str, float]]]) -> None:
        names = list(found[0][1])
        if len(names) != len(self._names):
            raise InputError(f"--search nested-map: {len(self._names)} free values, but {len(names)} scores"
                             f" ({', '.join(names)}); expected one for each expert, in their order")
        scores = np.array([[scores[name] for name in names] for _, scores in found])
        self._shares = np.array([self._weights.get(name, 0.0 if self._weights else 1.0) for name in names])
        try:
            self._asked = self._run.send(scores)
        except StopIteration:
            self._asked = None

    def facts(self) -> dict[str, Any]:
        return {"pairs": self._facts}

    def _nodes(self) -> Generator[Array, Array, None]:
        """Points to measure ``[points, experts]``, one set after the other; their scores ``[points, experts]`` come
        back."""
        size = len(self._names)
        alone = yield np.eye(size)
        nodes = [Node(np.eye(size)[place], (place,), float(alone[place, place])) for place in range(size)]
        while len(nodes) > 1:
            one, other = min(combinations(nodes, 2), key=lambda pair: abs(pair[0].score - pair[1].score))
            scalings = self._scalings()
            scores = yield scalings @ np.stack([one.weights, other.weights])
            chosen = self._best(one, other, scalings, scores)
            weights = chosen @ np.stack([one.weights, other.weights])
            members = (*one.members, *other.members)
            measured = yield weights[None]
            nodes = [node for node in nodes if node is not one and node is not other]
            nodes.append(Node(weights, members, float(self._mean(members, measured)[0])))

    def _scalings(self) -> Array:
        """The pair's scalings ``[points, 2]``."""
        found = self._generator.random((self._each, 2))
        equal = round(ISOTROPIC * self._each)
        found[:equal, 1] = found[:equal, 0]
        return found

    def _mean(self, members: Sequence[int], scores: Array) -> Array:
        """A node's scores ``[points]``: the mean of its members' by preference."""
        shares = self._shares[list(members)]
        shares = shares if shares.sum() > 0 else np.ones(len(members))
        found: Array = scores[:, list(members)] @ (shares / shares.sum())
        return found

    def _best(self, one: Node, other: Node, scalings: Array, scores: Array) -> Array:
        """The scaling that the quadratics of both scores say is best by preference ``[2]``."""
        own = [self._mean(node.members, scores) for node in (one, other)]
        shares = np.array([self._shares[list(node.members)].sum() for node in (one, other)])
        shares = shares if shares.sum() > 0 else np.ones(2)
        pool = np.vstack([self._generator.random((POOL, 2)), scalings])
        fitted = np.column_stack([fit(scalings, column)(pool) for column in own])
        self._facts.append({"of": [[self._names[place] for place in node.members] for node in (one, other)],
                            "r_squared": [round(left_out(scalings, column), 4) for column in own]})
        found: Array = pool[int((fitted @ shares).argmax())]
        return found
