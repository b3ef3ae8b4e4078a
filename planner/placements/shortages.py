"""How many bytes a rank lacks at a placement for its weights and for one microbatch beside them, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mipipe.graphs.units import MOST, format_bytes
from mipipe.planner import clock
from mipipe.planner.jobs.arrays import Instance, build
from mipipe.planner.jobs.stages import view
from mipipe.planner.placements.cuts import colocated
from mipipe.planner.placements.shapes import resident_bytes
from mipipe.planner.plan import Placement
from mipipe.planner.problem import Group, PlanningProblem

WEIGHTS = "weights and optimizer state"
ACTIVATIONS = "the activations of one microbatch"


@dataclass(frozen=True, slots=True)
class Shortage:
    """What rank ``rank`` needs at a placement for what stays and for one microbatch beside it, and what it may hold of
    each by the problem's limits, and together by its memory."""

    rank: int
    placement: str
    resident_bytes: int
    activation_bytes: int
    resident_limit: int
    activation_limit: int
    memory_bytes: int

    @property
    def lacking_bytes(self) -> int:
        """Bytes of which the rank would have to be relieved; 0 where it fits."""
        over = (max(0, self.resident_bytes - self.resident_limit)
                + max(0, self.activation_bytes - self.activation_limit))
        return max(over, self.resident_bytes + self.activation_bytes - self.memory_bytes, 0)

    def __str__(self) -> str:
        found = [f"has {format_bytes(room)} for {what} and needs {format_bytes(need)}" for what, need, room in (
            (WEIGHTS, self.resident_bytes, self.resident_limit),
            (ACTIVATIONS, self.activation_bytes, self.activation_limit)) if need > room]
        if found:
            return ", and ".join(found)
        if self.resident_bytes > self.memory_bytes:
            beside = f", and {format_bytes(self.activation_bytes)} beside them for activations"
            return (f"has {format_bytes(self.memory_bytes)} for {WEIGHTS} and needs {format_bytes(self.resident_bytes)}"
                    f"{beside if self.activation_bytes else ''}")
        return (f"has {format_bytes(self.memory_bytes - self.resident_bytes)} for {ACTIVATIONS} and needs"
                f" {format_bytes(self.activation_bytes)}")


def shortage(problem: PlanningProblem, placement: Placement) -> Shortage | None:
    """The rank that lacks most at a placement; None where one microbatch at a time fits."""
    most = worst(of_ranks(problem, placement))
    return most if most.lacking_bytes else None


def lacking_bytes(problem: PlanningProblem, placement: Placement) -> list[int]:
    """What every rank lacks at a placement: 0 where one microbatch at a time fits it."""
    return [item.lacking_bytes for item in of_ranks(problem, placement)]


def of_ranks(problem: PlanningProblem, placement: Placement) -> list[Shortage]:
    """What every rank needs and has."""
    needs = single_microbatch_bytes(build(view(problem, placement))).tolist()
    return [_of_rank(problem, rank, placement.name, *need)
            for rank, need in enumerate(zip(resident_bytes(problem, placement), needs, strict=True))]


def _of_rank(problem: PlanningProblem, rank: int, name: str, resident: int, activations: int) -> Shortage:
    limits = problem.limits
    return Shortage(rank, name, resident, activations,
                    MOST if limits.resident_bytes is None else limits.resident_bytes,
                    MOST if limits.activation_bytes is None else limits.activation_bytes,
                    problem.topology.devices[rank].memory_bytes)


def fits_no_device(problem: PlanningProblem) -> tuple[Shortage, list[int]] | None:
    """Groups that stay together and fit no device even alone, with the device that lacks least for them; None if there
    are none.

    Alone: their resident bytes, and what the largest microbatch of one of them saves while its forward runs; every
    order of every placement holds as much on some device.
    """
    for members in colocated(problem):
        resident = sum(problem.groups[g].resident_bytes for g in members)
        activations = max(_of_a_forward(problem.groups[g]) for g in members)
        least = min((_of_rank(problem, rank, "", resident, activations) for rank in range(problem.num_ranks)),
                    key=lambda item: item.lacking_bytes)
        if least.lacking_bytes:
            return least, members
    return None


def _of_a_forward(group: Group) -> int:
    """Bytes held while a group's largest microbatch runs forward."""
    saved = (group.saved_fi_bytes, group.saved_fw_bytes)
    largest = [round(size * max(group.loads)) for size in saved] if group.loads else saved
    return sum(largest) + group.forward_workspace


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


def worst(ranks: Sequence[Shortage]) -> Shortage:
    """The rank that lacks most."""
    return max(ranks, key=lambda item: item.lacking_bytes)
