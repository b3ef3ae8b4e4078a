"""Durations and bytes under the loads of microbatches (`mipipe.planner.problem.Group.loads`), as bounds may count them.

Every amount is multiplied by a microbatch's load and rounded by itself, so that sums, rates and the least of them are
those of rounded amounts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mipipe.planner.problem import Group, PlanningProblem


def least_of(group: Group, amount: int) -> int:
    """A group's duration or bytes for the microbatch of its least load."""
    return round(amount * min(group.loads)) if group.loads else amount


def work_of(problem: PlanningProblem, group: Group, amount: int) -> int:
    """The duration of one phase of a group, or its bytes, of all microbatches."""
    if not group.loads:
        return amount * problem.num_microbatches
    return sum(round(amount * load) for load in group.loads)


def forwards_of(problem: PlanningProblem, group: Group, f_ns: int) -> tuple[float, int]:
    """Most nanoseconds of F for each byte that it saves, and nanoseconds of the F of all microbatches that save none:
    durations and bytes are rounded apart for each load."""
    rate, free = 0.0, 0
    for load, count in Counter(group.loads).items() if group.loads else [(1, problem.num_microbatches)]:
        saved = round(group.saved_fi_bytes * load) + round(group.saved_fw_bytes * load)
        duration = round(f_ns * load)
        rate, free = (max(rate, duration / saved), free) if saved else (rate, free + duration * count)
    return rate, free


def at_mean_load(group: Group, amount: int) -> float:
    """The least an amount is in proportion to the load, for a microbatch of the mean load."""
    mean = sum(group.loads) / len(group.loads) if group.loads else 1.0
    return mean * min((round(amount * load) / load for load in group.loads if load > 0), default=float(amount))


def part_of(problem: PlanningProblem, together: Sequence[Group], group: Group, amount: int) -> int:
    """What a device with a share n of the microbatches has, times n, of an amount of one of the groups that stay
    together: n counts microbatches by their loads where all those groups have the same, else one by one."""
    if not any(other.loads for other in together):
        return amount * problem.num_microbatches
    if all(other.loads == group.loads for other in together):
        return int(at_mean_load(group, amount) * problem.num_microbatches)
    return least_of(group, amount) * problem.num_microbatches
