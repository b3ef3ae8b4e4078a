"""Why no plan fits: which device lacks how many bytes, and the smallest memory (or change) that would do.

A placement can be scheduled if and only if one microbatch at a time fits: its forwards on a rank are all saved together
before its first gradient frees any. So the bytes that rank lacks are exact at a placement; the reason names the
placement of the allowed shapes that lacks least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mipipe.graphs.units import format_bytes
from mipipe.planner import clock
from mipipe.planner.jobs.arrays import Instance, build
from mipipe.planner.jobs.stages import view
from mipipe.planner.placements.cuts import resident_room, units
from mipipe.planner.placements.shapes import all_placements, keeps_single, resident_bytes, shapes
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem


@dataclass(frozen=True, slots=True)
class Shortage:
    """Rank ``rank`` has ``room_bytes`` for ``what`` and needs ``need_bytes``."""

    rank: int
    what: str
    need_bytes: int
    room_bytes: int
    placement: str

    @property
    def lacking_bytes(self) -> int:
        return self.need_bytes - self.room_bytes


def shortage(problem: PlanningProblem, placement: Placement) -> Shortage | None:
    """The rank that lacks most at a placement; None where one microbatch at a time fits."""
    held = resident_bytes(problem, placement)
    found = [Shortage(rank, "weights and optimizer state", held[rank], resident_room(problem, rank), placement.name)
             for rank in range(problem.num_ranks)]
    instance = build(view(problem, placement))
    found += [Shortage(rank, "the activations of one microbatch", int(need), int(instance.cap[rank]), placement.name)
              for rank, need in enumerate(one_at_a_time(instance))]
    worst = max(found, key=lambda item: item.lacking_bytes)
    return worst if worst.lacking_bytes > 0 else None


def one_at_a_time(instance: Instance) -> np.ndarray:
    """Bytes each rank needs to run one microbatch alone, the worst over microbatches."""
    ranks, count = len(instance.cap), instance.view.problem.num_microbatches
    total = np.zeros((ranks, count), dtype=np.int64)
    extra = np.zeros((ranks, count), dtype=np.int64)
    for n in range(instance.size):
        at = instance.rank[n], instance.microbatch[n]
        if instance.kind[n] == 0:
            total[at] += instance.alloc[n]
            extra[at] = max(extra[at], instance.work[n])
        else:
            extra[at] = max(extra[at], instance.alloc[n] + instance.work[n])
    return (total + extra).max(axis=1)


def why_infeasible(problem: PlanningProblem, name: str) -> str:
    """One line: the device, the bytes lacking, and what would do, at the allowed placement that lacks least."""
    found: list[Shortage] = []
    offered = list(all_placements(problem, name))
    allowed = [placement for placement in offered if keeps_single(problem, placement)]
    if offered and not allowed:
        return (f"placement {name!r} puts groups on several ranks that may have one replica only (their F changes"
                " buffers, such as batch statistics); choose another placement")
    for placement in allowed:
        clock.ask()
        lack = shortage(problem, placement)
        if lack is None:
            return (f"at placement {placement.name} the saved tensors of one microbatch fit, but not with the values in"
                    " flight beside them; give the devices more memory, or cut the model elsewhere")
        found.append(lack)
    if not found:
        return _why_none(problem, name)
    least = min(found, key=lambda item: item.lacking_bytes)
    device = problem.topology.devices[least.rank].name
    cap = _cap(problem, least)
    return (f"rank {least.rank} ({device}) has {format_bytes(least.room_bytes)} for {least.what} and needs"
            f" {format_bytes(least.need_bytes)}: {least.lacking_bytes} bytes lack even at placement {least.placement},"
            f" which lacks least; {cap}")


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


def _cap(problem: PlanningProblem, least: Shortage) -> str:
    """The smallest change of the limit that binds."""
    limits = problem.limits
    limited = limits.resident_bytes if least.what.startswith("weights") else limits.activation_bytes
    memory = problem.topology.devices[least.rank].memory_bytes
    if limited is not None and limited <= least.room_bytes:
        name = "resident" if least.what.startswith("weights") else "activation"
        return f"raise the {name} limit to {least.need_bytes} bytes, use more devices, or recompute"
    enough = memory + least.lacking_bytes
    return f"a device memory of {enough} bytes ({format_bytes(enough)}) would do, or more devices"


def with_recomputation(problem: PlanningProblem, placement: Placement) -> list[Placement]:
    """The placement with F run twice: by every stage that may, and by the first half of them only."""
    may = [index for index, stage in enumerate(placement.stages)
           if all(problem.groups[group].recompute_bytes is not None for group in stage.groups)]
    return [_recomputing(placement, chosen) for chosen in (may[:(len(may) + 1) // 2], may) if chosen]


def _recomputing(placement: Placement, chosen: Sequence[int]) -> Placement:
    stages = tuple(replace(stage, recompute=index in set(chosen)) for index, stage in enumerate(placement.stages))
    return replace(placement, stages=stages, name=f"{placement.name}+recompute")
