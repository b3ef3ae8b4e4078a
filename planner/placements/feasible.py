"""Why no plan fits: which device lacks how many bytes, and the smallest memory (or change) that would do.

Saved tensors fit at a placement if and only if one microbatch at a time does: its forwards on a rank are all saved
together before its first gradient frees any. So the bytes that a rank lacks for them are exact at a placement, and the
reason names the placement of the allowed shapes that lacks least. What would do is another question: values in flight
take memory beside saved tensors, by the order. So a size is promised only after a plan was found with it (`enough`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mipipe.graphs.units import exact_bytes, format_bytes
from mipipe.planner import clock
from mipipe.planner.clock import OutOfTimeError
from mipipe.planner.device_memory import memory_for
from mipipe.planner.jobs.arrays import Instance, build
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.jobs.stages import view
from mipipe.planner.placements.cuts import units
from mipipe.planner.placements.shapes import all_placements, keeps_single, resident_bytes, shapes
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem

WEIGHTS = "weights and optimizer state"
ACTIVATIONS = "the activations of one microbatch"

SECONDS = 12.0
"""Most seconds in which `enough` looks for a size that does."""

STEPS = 9
"""Sizes tried above the first, each farther from it: 0.5 % the second, twice that the next, in the end 2.3 times."""

Admits = Callable[[PlanningProblem], bool]
"""Whether a plan is found for a problem."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """Rank ``rank`` has ``room_bytes`` for ``what`` and needs ``need_bytes``, and ``beside_bytes`` in the same
    memory."""

    rank: int
    what: str
    need_bytes: int
    room_bytes: int
    placement: str
    beside_bytes: int = 0

    @property
    def lacking_bytes(self) -> int:
        return self.need_bytes + self.beside_bytes - self.room_bytes


def shortage(problem: PlanningProblem, placement: Placement) -> Shortage | None:
    """The rank that lacks most at a placement; None where one microbatch at a time fits."""
    worst = max(_of_ranks(problem, placement), key=lambda item: item.lacking_bytes)
    return worst if worst.lacking_bytes > 0 else None


def lacking_bytes(problem: PlanningProblem, placement: Placement) -> list[int]:
    """What every rank lacks at a placement: 0 where one microbatch at a time fits it."""
    return [max(0, item.lacking_bytes) for item in _of_ranks(problem, placement)]


def _of_ranks(problem: PlanningProblem, placement: Placement) -> list[Shortage]:
    """What every rank needs and has, by what binds it: weights and state, else one microbatch's activations."""
    held = resident_bytes(problem, placement)
    instance = build(view(problem, placement))
    found = []
    for rank, need in enumerate(single_microbatch_bytes(instance).tolist()):
        memory, room = problem.topology.devices[rank].memory_bytes, resident_room(problem, rank)
        if held[rank] > room:
            beside = need if room == memory else 0  # a limit on weights alone has no room for anything else
            found.append(Shortage(rank, WEIGHTS, held[rank], room, placement.name, beside))
        else:
            found.append(Shortage(rank, ACTIVATIONS, need, int(instance.cap[rank]), placement.name))
    return found


def single_microbatch_bytes(instance: Instance) -> np.ndarray:
    """Bytes each rank needs to run one microbatch alone, the worst over microbatches."""
    ranks, count = len(instance.cap), instance.view.problem.num_microbatches
    total = np.zeros((ranks, count), dtype=np.int64)
    extra = np.zeros((ranks, count), dtype=np.int64)
    for n in clock.asking(range(instance.size)):
        at = instance.rank[n], instance.microbatch[n]
        if instance.kind[n] == 0:
            total[at] += instance.alloc[n]
            extra[at] = max(extra[at], instance.work[n])
        else:
            extra[at] = max(extra[at], instance.alloc[n] + instance.work[n])
    return (total + extra).max(axis=1)


def why_infeasible(problem: PlanningProblem, name: str, admits: Admits | None = None, *, proven: bool = False) -> str:
    """One line: the device, the bytes lacking, and what would do, at the allowed placement that lacks least.

    ``admits``: plans a changed problem, so that a size can be promised; without it none is. ``proven``: no placement
    at all fits, of whatever shape; else the line speaks of those that were tried.
    """
    found: list[Shortage] = []
    offered = list(all_placements(problem, name))
    allowed = [placement for placement in offered if keeps_single(problem, placement)]
    if offered and not allowed:
        return (f"placement {name!r} puts groups on several ranks that may have one replica only (their F changes"
                " buffers, such as batch statistics, or they are of expert-parallel layers); choose another placement")
    for placement in allowed:
        clock.ask()
        lack = shortage(problem, placement)
        if lack is None:
            fullest = Shortage(0, ACTIVATIONS, 0, 0, placement.name)
            return (f"at placement {placement.name} the saved tensors of one microbatch fit, but no order that was"
                    " tried leaves room for the values in flight and workspaces beside them;"
                    f" {_remedy(problem, fullest, admits)}")
        found.append(lack)
    if not found:
        return _why_none(problem, name)
    least = min(found, key=lambda item: item.lacking_bytes)
    device = problem.topology.devices[least.rank].name
    beside = f", and {format_bytes(least.beside_bytes)} beside them for activations" if least.beside_bytes else ""
    at = (f"even at placement {least.placement}, which lacks least" if proven else
          f"at placement {least.placement}, which lacks least of those tried")
    return (f"rank {least.rank} ({device}) has {format_bytes(least.room_bytes)} for {least.what} and needs"
            f" {format_bytes(least.need_bytes)}{beside}: {least.lacking_bytes} bytes lack {at};"
            f" {_remedy(problem, least, admits)}")


def _remedy(problem: PlanningProblem, least: Shortage, admits: Admits | None) -> str:
    """The smallest change found of what binds, and what else helps."""
    limits, devices = problem.limits, problem.topology.devices
    for label, limit, what in (("resident", limits.resident_bytes, WEIGHTS),
                               ("activation", limits.activation_bytes, ACTIVATIONS)):
        if what == least.what and limit is not None and (limit <= least.room_bytes or not least.need_bytes):
            first = max(least.need_bytes, limit)
            size = enough(first, lambda size, key=f"{label}_bytes": problem.replace(  # type: ignore[misc]
                limits=replace(limits, **{key: size})), admits)
            if size is not None:
                return f"raise the {label} limit to {exact_bytes(size)}, use more devices, or recompute"
            if not least.need_bytes:  # nothing says how much, or that it takes more
                return f"raise the {label} limit, use more devices, or recompute"
            return f"raise the {label} limit, at least to {first}B, use more devices, or recompute"
    memory = devices[least.rank].memory_bytes
    equal = len({device.memory_bytes for device in devices}) == 1

    def with_memory(size: int) -> PlanningProblem:
        larger = tuple(replace(device, memory_bytes=max(device.memory_bytes, size)) for device in devices)
        return problem.replace(topology=replace(problem.topology, devices=larger))

    size = enough(memory + least.lacking_bytes, with_memory, admits)
    where = "a device memory of" if equal else "on devices that have less, a memory of"
    if size is not None:
        return f"{where} {exact_bytes(memory_for(devices[least.rank], size))} would do, or more devices"
    if not least.need_bytes:
        return "more memory or more devices may do"
    needed = memory_for(devices[least.rank], memory + least.lacking_bytes)
    return f"{where} at least {needed}B is needed, or more devices"


def enough(first: int, changed: Callable[[int], PlanningProblem], admits: Admits | None) -> int | None:
    """A size, from ``first`` on, with which a plan was found; None where none was tried or found in time.

    Larger sizes are tried until one does, then those between it and the last that did not.
    """
    if admits is None:
        return None
    ends, known = time.monotonic() + SECONDS, None
    low = first
    with contextlib.suppress(OutOfTimeError), clock.watched(lambda: ends - time.monotonic()):
        for step in range(STEPS + 1):
            size = _round_up(first + (first * 2**step // 400 if step else 0))
            if admits(changed(size)):
                known = size
                break
            low = size
        while known is not None and known - low > max(1, known // 500) and low >= first and known != _round_up(first):
            middle = _round_up((low + known) // 2)
            if middle >= known:
                break
            if admits(changed(middle)):
                known = middle
            else:
                low = middle
    return known


def _round_up(size: int) -> int:
    """The size with four digits, not less: as a person would write it."""
    scale = max(1, 10 ** (len(str(size)) - 4))
    return -(-size // scale) * scale


def _why_none(problem: PlanningProblem, name: str) -> str:
    """One line on a shape that does not exist: for other numbers of ranks only, or for more blocks of groups."""
    ranks, blocks = problem.num_ranks, len(units(problem))
    stages = min((shape.num_stages for shape in shapes(ranks, name)), default=None)
    text = f"placement {name!r} does not exist for {ranks} rank{'s' * (ranks > 1)} and {len(problem.groups)} groups"
    if stages is not None and blocks < stages:
        return f"{text}: it has {stages} stages; split the model into more groups or choose another placement"
    fitting = next((more for more in range(ranks + 1, ranks + 4) if shapes(more, name)), None)
    if stages is None and fitting is not None:
        return f"{text}; use {fitting} ranks or choose another placement"
    return f"{text}; choose another placement"


def with_recomputation(problem: PlanningProblem, placement: Placement) -> list[Placement]:
    """The placement with F run twice: by every stage that may, and by the first half of them only."""
    may = [index for index, stage in enumerate(placement.stages)
           if all(problem.groups[group].recompute_bytes is not None for group in stage.groups)]
    return [_recomputing(placement, chosen) for chosen in (may[:(len(may) + 1) // 2], may) if chosen]


def _recomputing(placement: Placement, chosen: Sequence[int]) -> Placement:
    stages = tuple(replace(stage, recompute=index in set(chosen)) for index, stage in enumerate(placement.stages))
    return replace(placement, stages=stages, name=f"{placement.name}+recompute")
