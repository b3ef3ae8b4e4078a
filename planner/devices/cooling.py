"""One annealing run: on a contracted instance, from a start there, for a number of steps or for the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mipipe.planner.devices import kernels
from mipipe.planner.devices.instances.instance import PlaceInstance
from mipipe.planner.devices.starts import contracted, fill_in_order, pack_first


class Moves(NamedTuple):
    """How to anneal: the share of exchanges, how many of them are of large pieces and the most classes of the others,
    the norm's exponent (a power of two), the last temperature."""

    exchanges: float
    large: float
    small: int
    doublings: int
    cold: float


OPERATORS, LAYERS = Moves(0.5, 0.5, 1, 4, 1e-4), Moves(0.7, 0.2, 5, 8, 1e-5)
"""Transfers that cost much want a low norm; plain load balancing a high one, a long end and exchanges of a few
classes."""

PROBE, LONGEST = 2_000, 500_000
"""Steps per class that say how fast a long run is; it takes the time left, and at most so many steps per class."""

FINISHED = 0.9
"""Share of the time left that a long run is sized for: one that ends before it is cold is lost."""


@dataclass(frozen=True, slots=True)
class Cooling:
    """A run from temperature ``hot`` (of an accelerator's equal share of the work).

    ``effort``: steps per class of the whole instance, of which there are ``classes``; None: as long as time allows.
    """

    moves: Moves
    hot: float
    effort: int | None
    classes: int
    contiguous: bool
    seed: int


def cool(small: PlaceInstance, merged: np.ndarray, known: np.ndarray | None, run: Cooling, left: Callable[[], float],
         stop: np.ndarray) -> np.ndarray:
    """The best assignment seen, of the instance that ``small`` contracts.

    Args:
        small: the contracted instance.
        merged: its class of every class of the instance.
        known: an assignment to start from, followed as far as ``small`` can; None: afresh, from a packed start.
        run: how.
        left: seconds left.
        stop: ends the run where ``stop[0]`` turns true.
    """
    workload = kernels.workload_of(small)
    start = (contracted(known, merged) if known is not None else
             fill_in_order(small) if run.contiguous else pack_first(small))
    if start is None or (run.contiguous and not all(kernels.is_contiguous(workload, d, start)
                                                    for d in range(small.num_devices))):
        start = np.full(small.num_classes, small.num_accelerators if small.num_cpus else 0, dtype=np.int64)
    scale = float(small.acc.sum()) / max(small.num_accelerators, 1)
    heat = (run.hot * scale, run.moves.cold * scale, run.moves.exchanges, run.moves.large, run.moves.small,
            run.moves.doublings, run.seed, stop)
    steps = PROBE * run.classes if run.effort is None else run.effort * run.classes // (4 if run.contiguous else 1)
    began = time.monotonic()
    device, _ = kernels.anneal_throughput(workload, start, run.contiguous, steps, *heat)
    if run.effort is None:
        pace = steps / max(time.monotonic() - began, 1e-3)
        steps = int(min(max(FINISHED * left() * pace, steps), LONGEST * run.classes))
        device, _ = kernels.anneal_throughput(workload, start, run.contiguous, steps, *heat)
    return device[merged]
