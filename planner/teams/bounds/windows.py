"""What the first forwards and the last backwards of a step leave undone, below every step with these degrees.

No backward begins before a microbatch's forward went through the whole model (``first`` seconds), and after the last
forward one microbatch's gradients go all the way back (``last`` seconds). In the first of these windows ranks do
forwards alone, and nothing that they keep is freed: so much of them as the memory holds. In the last one they do only
the backwards of what the memory held when it began. All other work is done in between, so on every rank

    step >= first + last + M work - forwards(first window) - backwards(last window)

The most that a window takes within the memory is a linear program; any price of memory in it gives a bound (duality),
which goes piece by piece: with prices a and b of memory in both windows a piece of a rank adds

    M (f + i + w) - M max(0, f - a kept) - M max(0, i + w - b kept, w - b late) + (a + b) resident

and the rank ``first + last - a ahead - b memory`` besides (f, i, w: its seconds of F, I and W; ``late``: what W needs;
``ahead`` and ``memory``: what is left while the least forward and the least backward run).
Each piece counts with the mode of recomputation that adds least. All ranks together hold every piece (the mean over
ranks bounds all placements); where a piece is on one rank, the busiest rank of the best packing bounds. A window may be
left out: then nothing of it waits, and the optimizer's update comes after the work.

Overlapped pairs need a forward and a backward, so there are none in the windows; elsewhere they take at least the share
``stays`` of their parts' time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mipipe.planner.teams.bounds.packing import least_busiest
from mipipe.planner.teams.prices.degrees import Recompute
from mipipe.planner.teams.prices.piece_cost import PhaseCost, PieceCost
from mipipe.planner.teams.prices.pieces import ModelPieces

SHARES = (0.0, 0.3, 0.6, 0.8, 0.9, 0.95, 1.0, 1.05, 1.2, 1.5, 2.0)
"""Prices of memory that are tried, in seconds of work that a piece's bytes give in the first mode: any is valid."""
TRIED = 3
"""Prices with the highest mean that are packed."""


@dataclass(frozen=True)
class IdleWindows:
    """Prices of a combination of degrees. ``added[price, kind]`` seconds of a piece, ``spared[price]`` what the memory
    of a rank takes away; ``used[price]``: which windows count (the first price has neither); ``ends``: their seconds;
    ``rounding``: seconds by which a problem's whole nanoseconds may be below.

    ``stays`` of the methods: the share of their time that overlapped pairs take at least; 1: there are none.
    """

    counts: tuple[int, ...]
    ranks: int
    added: np.ndarray
    spared: np.ndarray
    used: np.ndarray
    ends: tuple[float, float]
    rounding: float

    def mean(self, stays: float = 1.0) -> float:
        """Seconds below which no placement is."""
        return float(self._means(stays).max()) - self.rounding

    def busiest(self, stays: float = 1.0) -> float:
        """Seconds below which no placement with every piece on one rank is."""
        base, chosen = self._base(stays), {0, *np.argsort(-self._means(stays))[:TRIED].tolist()}
        return max(float(base[price]) + stays * least_busiest(self.added[price].tolist(), self.counts, self.ranks)
                   for price in chosen) - self.rounding

    def _base(self, stays: float) -> np.ndarray:
        base: np.ndarray = np.where(self.used, 1.0, 1 - stays) @ np.array(self.ends) - stays * self.spared
        return base

    def _means(self, stays: float) -> np.ndarray:
        means: np.ndarray = self._base(stays) + stays * (self.added @ np.array(self.counts)) / self.ranks
        return means


@dataclass(frozen=True, slots=True)
class PathTimes:
    """The longest ways through a model, in seconds of no placement: ``first`` of a forward to an end of it, the least
    over ends; ``last`` of gradients from an end back, likewise; ``stay[p]`` of a microbatch from the begin of piece
    p's forward to the end of its input gradient."""

    first: float
    last: float
    stay: np.ndarray


def path_times(model: ModelPieces, forward: Sequence[float], inputs: Sequence[float]) -> PathTimes:
    """The ways through a model whose pieces take these seconds forward, and for their input gradients."""
    count = len(model.pieces)
    come, back, stay = np.zeros(count), np.zeros(count), np.zeros(count)
    for piece, (readers, graded) in enumerate(model.readers):
        come[piece] += forward[piece]
        back[piece] += inputs[piece]
        for reader in readers:
            come[reader] = max(come[reader], come[piece])
        for reader in graded:
            back[reader] = max(back[reader], back[piece])
    for piece in reversed(range(count)):
        beyond = max((stay[reader] for reader in model.readers[piece][1]), default=0.0)
        stay[piece] = forward[piece] + inputs[piece] + beyond
    first = min(come[piece] for piece, (_, graded) in enumerate(model.readers) if not graded)
    last = min(back[piece] for piece, (readers, _) in enumerate(model.readers) if not readers)
    return PathTimes(float(first), float(last), stay)


def windows_of(model: ModelPieces, by_mode: Mapping[Recompute, Sequence[PieceCost]], paths: PathTimes, ranks: int,
               microbatches: int, memory: int) -> IdleWindows:
    """The windows' prices for pieces of these costs.

    Args:
        model: in pieces; equal ones have equal costs.
        by_mode: the cost of every piece in every mode of recomputation that is allowed.
        paths: of pieces in the mode that takes least.
        ranks: of the pipeline.
        microbatches: M of a step of one copy.
        memory: bytes of a rank's member; an action that runs needs its workspace, too.
    """
    counts, place = [0] * len(model.kinds), [0] * len(model.kinds)
    for number, piece in enumerate(model.pieces):
        counts[piece.kind] += 1
        place[piece.kind] = number
    of_kinds = [[costs[number] for number in place] for costs in by_mode.values()]
    own = apart(of_kinds)
    f, i, w = (phase_table(own, name) for name in ("f", "i", "w"))
    kept, late = table(own, lambda cost: cost.kept), table(own, lambda cost: cost.late + cost.until_w)
    resident, update = table(own, lambda cost: cost.resident)[0], table(own, lambda cost: cost.optimizer)[0]
    every = [cost for costs in of_kinds for cost in costs]
    rooms = np.array([memory - min(cost.forward_space for cost in every),
                      memory - min(replace(cost, late=0).while_running for cost in every)])
    grid = np.array([(first, last) for first in (np.nan, *SHARES) for last in (np.nan, *SHARES)])
    used = ~np.isnan(grid)
    most = int(np.argmax(np.array(counts) * f[0]))
    prices = np.nan_to_num(grid) * np.array([f[0, most], i[0, most] + w[0, most]]) / max(1.0, kept[0, most])
    a, b = prices[:, 0, None, None], prices[:, 1, None, None]
    early = np.where(used[:, 0, None, None], np.maximum(0.0, f - a * kept), 0.0)
    after = np.where(used[:, 1, None, None], np.maximum(0.0, np.maximum(i + w - b * kept, w - b * late)), 0.0)
    added = (microbatches * (f + i + w - early - after).min(axis=1) + prices.sum(axis=1)[:, None] * resident
             + np.where(used[:, 1, None], 0.0, update))
    return IdleWindows(tuple(counts), ranks, added, prices @ rooms, used, (paths.first, paths.last),
                   2e-9 * (microbatches + len(model.pieces) + 1))


Apart = tuple[list[PieceCost], np.ndarray]
"""The costs of pieces: each once (equal pieces have one cost), and which of them every piece has."""


def apart(by_mode: Iterable[Sequence[PieceCost]]) -> list[Apart]:
    """The costs of all pieces in every mode, each once."""
    found = []
    for costs in by_mode:
        known = {id(cost): cost for cost in costs}
        places = {key: number for number, key in enumerate(known)}
        found.append((list(known.values()), np.array([places[id(cost)] for cost in costs])))
    return found


def table(by_mode: Iterable[Apart], read: Callable[[PieceCost], float]) -> np.ndarray:
    """What is read of every cost: [modes, pieces]."""
    return np.array([np.array([read(cost) for cost in costs], dtype=float)[places] for costs, places in by_mode])


def phase_table(by_mode: Iterable[Apart], name: Literal["f", "i", "w"]) -> np.ndarray:
    """Seconds of a phase of every piece [modes, pieces]; 0 where there is none."""
    def seconds(cost: PieceCost) -> float:
        phase: PhaseCost | None = getattr(cost, name)
        return 0.0 if phase is None else phase.total

    return table(by_mode, seconds)
