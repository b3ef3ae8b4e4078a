"""Bounds in seconds below every step that one combination of degrees can make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mipipe.planner.teams.bounds.windows import apart, path_times, phase_table, table, windows_of
from mipipe.planner.teams.prices.degrees import Degrees, Recompute
from mipipe.planner.teams.prices.piece_cost import PieceCost
from mipipe.planner.teams.prices.pricing import Pricer

SHARES = np.array((0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
"""Weights of the memory's bound beside the work's: any is valid."""
PRICES = np.array((0.0, 0.1, 0.2, 0.3, 0.5, 1.0))
"""Prices of holding a microbatch, in steps without recomputation: any is valid."""


def mode_costs(pricer: Pricer, degrees: Degrees, recomputation: Recompute | None) -> dict[Recompute, list[PieceCost]]:
    """The cost of every piece in every mode of recomputation that is allowed."""
    allowed = pricer.model.recompute if recomputation is None else (recomputation,)
    return {mode: pricer.costs(replace(degrees, recompute=mode)) for mode in allowed}


def bound_of(pricer: Pricer, degrees: Degrees, global_batch: int,
             recomputation: Recompute | None) -> tuple[float, float, float] | None:
    """Seconds below which no placement of pieces on these ranks is, in any order without overlapped pairs, and in any
    order at all, and the share of their time that overlapped pairs take at least; None where memory never suffices.

    The ranks together do all work of all microbatches and the optimizer's; the busiest does at least its share. What a
    piece keeps of a microbatch stays at least as long as the microbatch takes from there to the end of the model and
    its gradients back, and what weight gradients need until they are made, so bytes times seconds of all that is kept
    are within what all ranks have left for as long as the step takes (Little's law); and when a microbatch's last
    forward ends, all it keeps is there at once. Recomputation trades one for the other, piece by piece: any weighted
    mean of the bounds, with any price on the last, least over the modes of every piece, is a bound (Lagrange). What the
    first forwards and the last backwards leave undone is a bound, too (`mipipe.planner.teams.bounds.windows`).

    Overlapped pairs hide collectives behind kernels or kernels behind collectives (`stages.overlap_rule`), in all as
    much as the shorter of both, so the longer stays, and in the windows all. Every action in a pair takes as much of
    its own time at least as the rule leaves of a pair's, so that share of the work stays, too.
    """
    of_mode = mode_costs(pricer, degrees, recomputation)
    costs = next(iter(of_mode.values()))
    by_mode = apart(of_mode.values())
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    forward, inputs, weights = (phase_table(by_mode, name) for name in ("f", "i", "w"))
    kept, again = table(by_mode, lambda cost: cost.kept), table(by_mode, lambda cost: cost.again)
    read = table(by_mode, lambda cost: cost.late + cost.until_w)
    seconds = forward + inputs + weights
    resident = sum(cost.resident for cost in costs)
    usable = pricer.machine.usable_bytes
    room = degrees.ranks * usable - resident
    largest = max(cost.resident for cost in costs) + float((kept + again).min(axis=0).max())
    if room < kept.min(axis=0).sum() or largest > usable:
        return None
    paths = path_times(pricer.model, forward.min(axis=0).tolist(), inputs.min(axis=0).tolist())
    windows = windows_of(pricer.model, of_mode, paths, degrees.ranks, microbatches, usable)
    update = sum(cost.optimizer for cost in costs)
    fixed = 2 * pricer.machine.kind.achieved.action_ns * 1e-9 * microbatches + update
    areas = microbatches * (kept * paths.stay + np.minimum(kept, read) * weights) / room
    loads = microbatches * seconds / degrees.ranks
    held, scale = kept / room, float(loads.min(axis=0).sum())
    share, price = SHARES[:, None, None, None], PRICES[None, :, None, None]
    mixed = ((1 - share) * loads + share * areas + price * scale * held).min(axis=2).sum(axis=2)
    mixed += (1 - SHARES[:, None]) * fixed / degrees.ranks - PRICES * scale
    rounding = 2e-9 * (microbatches + 1)  # a problem's durations are whole nanoseconds
    bound = float(mixed.max()) - rounding
    kernels = table(by_mode, seconds_in_kernels)
    stays, most = _pairs(kernels, seconds - kernels, 3e-9 * pricer.machine.kind.achieved.action_ns * len(costs))
    busy = max(float(kernels.min(axis=0).sum()), float((seconds - kernels).min(axis=0).sum()))
    floor = max(microbatches * busy + update, microbatches * busy + stays * update
                + (1 - most) * (paths.first + paths.last) * degrees.ranks) / degrees.ranks - rounding
    floor = max(floor, windows.mean(stays), stays * bound)
    bound = max(bound, windows.mean())
    return bound, min(bound, floor), stays


def _pairs(kernels: np.ndarray, talk: np.ndarray, overhead: float) -> tuple[float, float]:
    """The least and the largest share of their time that overlapped pairs take, whatever the modes of pieces (seconds
    of both [modes, pieces]). ``overhead``: of actions, all seconds that it may add to kernels."""
    least, most = kernels.min(axis=0).sum(), kernels.max(axis=0).sum() + overhead
    low, high = talk.min(axis=0).sum(), talk.max(axis=0).sum()
    shares = [1 - high / max(1e-30, high + least), 1 - most / max(1e-30, most + low)]
    ends = [most / max(1e-30, most + low), high / max(1e-30, high + least)]
    return max(0.5, *shares) - 1e-6, min(1.0, max(ends) + 1e-6)


def seconds_in_kernels(cost: PieceCost) -> float:
    """Seconds of a piece's own kernels for one microbatch."""
    return sum(phase.compute for phase in (cost.f, cost.i, cost.w) if phase is not None)


def packed(pricer: Pricer, degrees: Degrees, global_batch: int, recomputation: Recompute | None,
           stays: float = 1.0) -> tuple[float, float]:
    """Seconds below which no step is in which every piece is on one rank: without overlapped pairs, and where they take
    the share ``stays`` of their time at least. The busiest rank of the best packing bounds both, and what the first
    forwards and the last backwards leave undone."""
    by_mode = mode_costs(pricer, degrees, recomputation)
    costs = apart(by_mode.values())
    forward, inputs = (phase_table(costs, name).min(axis=0) for name in ("f", "i"))
    paths = path_times(pricer.model, forward.tolist(), inputs.tolist())
    windows = windows_of(pricer.model, by_mode, paths, degrees.ranks,
                         global_batch // (degrees.copies * degrees.microbatch), pricer.machine.usable_bytes)
    return windows.busiest(), windows.busiest(stays) if stays < 1 else windows.busiest()
