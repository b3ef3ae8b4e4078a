"""What the placement MIP knows of its units: work, bytes, and how long activations stay at the least.

A unit is a colocated set of groups. Areas are bytes x time of one step; `mipipe.planner.milp.placement.shares` says how
the model uses each figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mipipe.planner.actions import Stream
from mipipe.planner.bounds.first_gradients import colocated
from mipipe.planner.bounds.over_placements import GroupTimes, facts_of, work_of
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.problem import Group, PlanningProblem


@dataclass(frozen=True, slots=True)
class Units:
    """Per unit: its groups, the work of a step [stream][unit][device], bytes, heads and returns in nanoseconds.

    ``kept`` and ``kept_area`` are what stays of ``saved`` and ``area`` where F runs again (None: it may not), ``again``
    the time that takes.
    """

    groups: list[list[int]]
    work: dict[Stream, list[list[int]]]
    resident: list[int]
    saved: list[int]
    kept: list[int | None]
    area: list[int]
    kept_area: list[int]
    again: list[int]
    head: list[int]
    gradient: list[int | None]


def units_of(problem: PlanningProblem) -> Units:
    """Colocated sets as units, in topological order of their first groups."""
    facts = facts_of(problem)
    groups = colocated(problem)
    kinds = [device.kind for device in problem.topology.devices]
    work = {stream: [[sum(_work(problem, problem.groups[g], kind)
                          for g in unit if problem.groups[g].stream is stream) for kind in kinds] for unit in groups]
            for stream in (Stream.COMPUTE, Stream.COLLECTIVE)}
    gradient = [min((head for g in unit if (head := facts.gradient_head[g]) is not None), default=None)
                for unit in groups]
    return Units(groups, work, [sum(problem.groups[g].resident_bytes for g in unit) for unit in groups],
                 [sum(_saved(problem, g) for g in unit) for unit in groups],
                 [sum(_kept(problem, g) for g in unit) if _may_recompute(problem, unit) else None for unit in groups],
                 [sum(_area(problem, facts, g) for g in unit) for unit in groups],
                 [sum(_kept_area(problem, facts, g) for g in unit) for unit in groups],
                 [sum(work_of(problem, problem.groups[g], facts.f[g]) for g in unit) for unit in groups],
                 [min(facts.head[g] for g in unit) for unit in groups], gradient)


def _work(problem: PlanningProblem, group: Group, kind: str) -> int:
    """Work of all phases of a group on a kind of device; loads are multiplied out and rounded for each phase."""
    times = group.times[kind]
    return sum(work_of(problem, group, phase or 0) for phase in (times.f_ns, times.i_ns, times.w_ns))


def _saved(problem: PlanningProblem, g: int) -> int:
    group = problem.groups[g]
    return int((group.saved_fi_bytes + group.saved_fw_bytes) * min(group.loads, default=1.0))


def _kept(problem: PlanningProblem, g: int) -> int:
    group = problem.groups[g]
    return int(min(group.saved_fi_bytes + group.saved_fw_bytes, group.recompute_bytes or 0)
               * min(group.loads, default=1.0))


def _may_recompute(problem: PlanningProblem, unit: Sequence[int]) -> bool:
    """Whether F of a unit may run again, and whether that would give memory back."""
    groups = [problem.groups[g] for g in unit]
    return (all(group.recompute_bytes is not None and group.stream is Stream.COMPUTE for group in groups)
            and sum(_kept(problem, g) for g in unit) < sum(_saved(problem, g) for g in unit))


def _area(problem: PlanningProblem, facts: GroupTimes, g: int) -> int:
    """Bytes x time of one step's activations of a group: from F's start to the end of I and of W."""
    group, back = problem.groups[g], facts.gradient_head[g]
    if back is None:
        return 0
    light, gain = min(group.loads, default=1.0), pair_gain(problem)
    until_i = back + int(light * facts.i[g]) - facts.head[g]
    sizes = (group.saved_fi_bytes * gain.shortened(until_i)
             + group.saved_fw_bytes * gain.shortened(until_i + int(light * facts.w[g])))
    return int(sizes * _microbatches(problem, g))


def _kept_area(problem: PlanningProblem, facts: GroupTimes, g: int) -> int:
    """The same where F runs again, just before the gradient: until then only what is kept counts."""
    group, back = problem.groups[g], facts.gradient_head[g]
    if back is None:
        return 0
    light, gain = min(group.loads, default=1.0), pair_gain(problem)
    gradients = int(light * facts.i[g])
    sizes = (min(group.recompute_bytes or 0, group.saved_fi_bytes + group.saved_fw_bytes) * (back - facts.head[g])
             + group.saved_fi_bytes * gain.shortened(gradients)
             + group.saved_fw_bytes * gain.shortened(gradients + int(light * facts.w[g])))
    return int(min(sizes * _microbatches(problem, g), _area(problem, facts, g)))


def _microbatches(problem: PlanningProblem, g: int) -> float:
    """Microbatches of a step, by their loads."""
    group = problem.groups[g]
    return sum(group.loads) if group.loads else problem.num_microbatches


def forwards_per_byte(problem: PlanningProblem) -> float | None:
    """Most nanoseconds of compute F per saved byte; None where forwards may hold nothing."""
    rate = 0.0
    for group in problem.groups:
        phases = next(iter(group.times.values()))
        if group.recompute_bytes is not None or (phases.i_ns is None and phases.w_ns is None):
            return None
        saved = group.saved_fi_bytes + group.saved_fw_bytes
        if saved and group.stream is Stream.COMPUTE:
            rounding = 1.001 if group.loads else 1.0  # loads round sizes and durations apart
            rate = max(rate, max(times.f_ns for times in group.times.values()) / saved * rounding)
    return rate


def light_forwards(problem: PlanningProblem, unit: Sequence[int]) -> int:
    """Nanoseconds of a unit's forwards that save nothing."""
    return sum(work_of(problem, problem.groups[g], max(times.f_ns for times in problem.groups[g].times.values()))
               for g in unit if problem.groups[g].stream is Stream.COMPUTE
               and not problem.groups[g].saved_fi_bytes + problem.groups[g].saved_fw_bytes)
