"""All degrees that a model, a batch and a number of devices allow, each with a bound below every step it can make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mipipe.graphs.operator_graph import Role
from mipipe.planner.teams.degrees import RECOMPUTE, Degrees, Recompute
from mipipe.planner.teams.pieces import ModelPieces, misfit
from mipipe.planner.teams.pricing import PieceCost, Pricer


@dataclass(frozen=True, slots=True)
class Point:
    """Degrees (with one chunk and no recomputation) and seconds that no placement or schedule of theirs is below."""

    bound: float
    degrees: Degrees


SHARES = np.array((0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0))
"""Weights of the memory's bound beside the work's: any is valid."""


PRICES = np.array((0.0, 0.1, 0.2, 0.3, 0.5, 1.0))
"""Prices of holding a microbatch, in steps without recomputation: any is valid."""


def divisors(value: int) -> list[int]:
    """All divisors, the smallest first."""
    return [size for size in range(1, value + 1) if value % size == 0]


def all_degrees(model: ModelPieces, devices: int, global_batch: int, given: Mapping[str, int],
                microbatch: int | None = None) -> Iterator[Degrees]:
    """Every combination of degrees that divides what it must; ``given`` fixes some. Chunks and recomputation are left
    to the master."""
    experts = any(segment.tags.role is Role.EXPERTS for segment in model.graph.segments)
    sequence_given = given.get("sequence")
    for tensor in divisors(devices):
        if given.get("tensor", sequence_given or tensor) != tensor:
            continue
        for context in divisors(devices // tensor):
            if given.get("context", context) != context:
                continue
            for ranks in divisors(devices // tensor // context):
                copies = devices // tensor // context // ranks
                if given.get("ranks", ranks) != ranks or given.get("copies", copies) != copies \
                        or global_batch % copies:
                    continue
                for sequence in (False, True) if tensor > 1 else (False,):
                    if (sequence_given is not None and sequence != (tensor > 1)) or ("tensor" in given and sequence):
                        continue
                    base = Degrees(ranks, tensor, sequence, context, 1, copies)
                    for expert in divisors(tensor * context * copies) if experts else (1,):
                        if given.get("expert", expert) == expert and misfit(
                                model, replace(base, expert=expert), global_batch) is None:
                            yield from _batches(replace(base, expert=expert), global_batch, given, microbatch)


def _batches(degrees: Degrees, global_batch: int, given: Mapping[str, int],
             microbatch: int | None) -> Iterator[Degrees]:
    shared = degrees.copies * degrees.context > 1
    for size in divisors(global_batch // degrees.copies):
        if microbatch in (None, size):
            for zero in (1, 2, 3) if shared else (1,):
                if given.get("zero", zero) == zero:
                    yield replace(degrees, microbatch=size, zero=zero)


def points(pricer: Pricer, devices: int, global_batch: int, given: Mapping[str, int], microbatch: int | None,
           recomputation: Recompute | None) -> tuple[list[Point], int]:
    """The points whose memory may suffice, by their bounds, and how many degrees there are in all."""
    found, count = [], 0
    for degrees in all_degrees(pricer.model, devices, global_batch, given, microbatch):
        count += 1
        bound = bound_of(pricer, degrees, global_batch, recomputation)
        if bound is not None:
            found.append(Point(bound, degrees))
    return sorted(found, key=lambda point: point.bound), count


def mode_costs(pricer: Pricer, degrees: Degrees, recomputation: Recompute | None) -> dict[Recompute, list[PieceCost]]:
    """The cost of every piece in every mode of recomputation that is allowed."""
    allowed: tuple[Recompute, ...] = RECOMPUTE if recomputation is None else (recomputation,)  # type: ignore[assignment]
    return {mode: pricer.costs(replace(degrees, recompute=mode)) for mode in allowed}


def bound_of(pricer: Pricer, degrees: Degrees, global_batch: int, recomputation: Recompute | None) -> float | None:
    """Seconds below which no placement of pieces on these ranks is, in any order; None where memory never suffices.

    The ranks together do all work of all microbatches and the optimizer's; the busiest does at least its share, and at
    least the largest piece. Before it begins, another rank has done a forward (all ranks but one). What a piece keeps
    of a microbatch stays at least as long as the microbatch takes from there to the end of the model and back, so bytes
    times seconds of all that is kept are within what all ranks have left for as long as the step takes (Little's law);
    and when a microbatch's last forward ends, all it keeps is there at once. Recomputation trades one for the other,
    piece by piece: any weighted mean of the bounds, with any price on the last, least over the modes of every piece, is
    a bound (Lagrange).
    """
    by_mode = list(mode_costs(pricer, degrees, recomputation).values())
    microbatches = global_batch // (degrees.copies * degrees.microbatch)
    seconds = np.array([[cost.f.total + cost.backward for cost in costs] for costs in by_mode])
    kept = np.array([[cost.kept for cost in costs] for costs in by_mode], dtype=float)
    again = np.array([[cost.again for cost in costs] for costs in by_mode], dtype=float)
    resident = sum(cost.resident for cost in by_mode[0])
    room = degrees.ranks * pricer.machine.memory_bytes - resident
    largest = max(cost.resident for cost in by_mode[0]) + float((kept + again).min(axis=0).max())
    if room < kept.min(axis=0).sum() or largest > pricer.machine.memory_bytes:
        return None
    least = seconds.min(axis=0)
    action = pricer.machine.kind.achieved.action_ns * 1e-9
    fixed = 2 * action * microbatches * degrees.ranks + sum(cost.optimizer for cost in by_mode[0])
    if degrees.ranks > 1:
        fixed += (degrees.ranks - 1) * by_mode[0][0].f.total
    areas = microbatches * kept * np.cumsum(least[::-1])[::-1] / room
    loads = microbatches * seconds / degrees.ranks
    held, scale = kept / room, float(loads.min(axis=0).sum())
    share, price = SHARES[:, None, None, None], PRICES[None, :, None, None]
    mixed = ((1 - share) * loads + share * areas + price * scale * held).min(axis=2).sum(axis=2)
    mixed += (1 - SHARES[:, None]) * fixed / degrees.ranks - PRICES * scale
    rounding = 2e-9 * (microbatches + 1)  # a problem's durations are whole nanoseconds
    return max(float(mixed.max()), microbatches * float(least.max())) - rounding
