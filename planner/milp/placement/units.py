"""What the placement MIP knows of its units: work, bytes, and how long activations stay at the least.

A unit is a colocated set of groups. Areas are bytes x time of one step; `mipipe.planner.milp.placement.shares` says how
the model uses each figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mipipe.planner.actions import Stream
from mipipe.planner.bounds.first_gradients import colocated
from mipipe.planner.bounds.loads import forwards_of, least_of, part_of, work_of
from mipipe.planner.bounds.over_placements import GroupTimes, facts_of
from mipipe.planner.bounds.tails import Tails, tails_of
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.problem import Group, PlanningProblem


@dataclass(frozen=True, slots=True)
class Units:
    """Per unit: its groups, the work of a step [stream][unit][device], bytes, heads and returns in nanoseconds.

    ``saved`` counts what is held at once (`held_together`), ``area`` everything. ``kept`` and ``kept_area`` are what
    stays of the two where F runs again (None: it may not), ``again`` the time that takes; ``light`` that of forwards
    that save nothing.
    """

    groups: list[list[int]]
    work: dict[Stream, list[list[int]]]
    resident: list[int]
    saved: list[int]
    kept: list[int | None]
    area: list[int]
    kept_area: list[int]
    again: list[int]
    light: list[int]
    head: list[int]
    gradient: list[int | None]


def units_of(problem: PlanningProblem, *, shared: bool = False) -> Units:
    """Colocated sets as units, in topological order of their first groups; ``shared``: devices may share the
    microbatches of a unit, and amounts are what a share of them has at the least (`loads.part_of`)."""
    facts, tails, together = facts_of(problem), tails_of(problem), held_together(problem)
    groups = colocated(problem)
    unit_of = {g: unit for unit in groups for g in unit}
    kinds = [device.kind for device in problem.topology.devices]

    def total(g: int, amount: int) -> int:
        if not shared:
            return work_of(problem, problem.groups[g], amount)
        return part_of(problem, [problem.groups[other] for other in unit_of[g]], problem.groups[g], amount)

    def work(g: int, kind: str) -> int:
        times = problem.groups[g].times[kind]
        return sum(total(g, phase or 0) for phase in (times.f_ns, times.i_ns, times.w_ns))

    area = [0 if facts.gradient_head[g] is None else _area(group, total, tails, g)
            for g, group in enumerate(problem.groups)]
    kept_area = [min(area[g], _kept_area(problem, total, tails, facts, g)) for g in range(len(problem.groups))]
    return Units(
        groups=groups,
        work={stream: [[sum(work(g, kind) for g in unit if problem.groups[g].stream is stream) for kind in kinds]
                       for unit in groups] for stream in (Stream.COMPUTE, Stream.COLLECTIVE)},
        resident=[sum(problem.groups[g].resident_bytes for g in unit) for unit in groups],
        saved=[sum(_saved(problem, g) for g in unit if g in together) for unit in groups],
        kept=[sum(_kept(problem, g) for g in unit if g in together) if _may_recompute(problem, unit) else None
              for unit in groups],
        area=[sum(area[g] for g in unit) for unit in groups],
        kept_area=[sum(kept_area[g] for g in unit) for unit in groups],
        again=[sum(total(g, facts.f[g]) for g in unit) for unit in groups],
        light=[sum(_light(problem, g, shared) for g in unit) for unit in groups],
        head=[min(facts.head[g] for g in unit) for unit in groups],
        gradient=[min((head for g in unit if (head := facts.gradient_head[g]) is not None), default=None)
                  for unit in groups])


def held_together(problem: PlanningProblem) -> set[int]:
    """Groups whose saved bytes of one microbatch are all held at one moment in every schedule: a last group, and those
    whose gradients wait for its own. Of several last groups the one with the most bytes behind it."""
    readers: list[list[int]] = [[] for _ in problem.groups]  # those whose input gradients a group waits for
    for edge in problem.edges:
        if edge.grad_bytes is not None:
            readers[edge.source] += [target for target in edge.targets
                                     if all(times.i_ns is not None for times in problem.groups[target].times.values())]
    best: set[int] = set()
    for last in range(len(problem.groups)):
        held = {last} if not readers[last] and _has_gradient(problem.groups[last]) else set()
        for g in reversed(range(last)):
            if not held.isdisjoint(readers[g]) and _has_gradient(problem.groups[g]):
                held.add(g)
        best = max(best, held, key=lambda groups: sum(_saved(problem, g) for g in groups))
    return best


def _has_gradient(group: Group) -> bool:
    return all(times.i_ns is not None or times.w_ns is not None for times in group.times.values())


def _saved(problem: PlanningProblem, g: int) -> int:
    group = problem.groups[g]
    return least_of(group, group.saved_fi_bytes) + least_of(group, group.saved_fw_bytes)


def _kept(problem: PlanningProblem, g: int) -> int:
    return min(_saved(problem, g), least_of(problem.groups[g], problem.groups[g].recompute_bytes or 0))


def _may_recompute(problem: PlanningProblem, unit: Sequence[int]) -> bool:
    """Whether F of a unit may run again, and whether that would give memory back."""
    groups = [problem.groups[g] for g in unit]
    return (all(group.recompute_bytes is not None and group.stream is Stream.COMPUTE for group in groups)
            and sum(_kept(problem, g) for g in unit) < sum(_saved(problem, g) for g in unit))


def _area(group: Group, total: Callable[[int, int], int], tails: Tails, g: int) -> int:
    """Bytes x time of one step's activations of a group: from F's start to the end of I and of W."""
    _, until_i, until_w = tails.held[g]
    return total(g, group.saved_fi_bytes) * until_i + total(g, group.saved_fw_bytes) * until_w


def _kept_area(problem: PlanningProblem, total: Callable[[int, int], int], tails: Tails, facts: GroupTimes,
               g: int) -> int:
    """The same where F runs again, just before the gradient: until then only what is kept counts."""
    group, gain = problem.groups[g], pair_gain(problem)
    i, w = least_of(group, facts.i[g]), least_of(group, facts.w[g])
    fi, fw = total(g, group.saved_fi_bytes), total(g, group.saved_fw_bytes)
    kept = min(fi + fw, total(g, group.recompute_bytes or 0)) * tails.held[g][0]
    return kept + fi * gain.shortened(i) + fw * gain.shortened(i + w)


def forwards_per_byte(problem: PlanningProblem) -> float | None:
    """Most nanoseconds of compute F per saved byte; None where forwards may hold nothing."""
    rate = 0.0
    for group in problem.groups:
        phases = next(iter(group.times.values()))
        if group.recompute_bytes is not None or (phases.i_ns is None and phases.w_ns is None):
            return None
        if group.stream is Stream.COMPUTE:
            slowest = max(times.f_ns for times in group.times.values())
            rate = max(rate, forwards_of(problem, group, slowest)[0])
    return rate


def _light(problem: PlanningProblem, g: int, shared: bool) -> int:
    """Most nanoseconds of a group's forwards that save nothing; ``shared``: as if all microbatches took the longest."""
    group = problem.groups[g]
    if group.stream is not Stream.COMPUTE:
        return 0
    slowest = max(times.f_ns for times in group.times.values())
    free = forwards_of(problem, group, slowest)[1]
    if not (free and shared and group.loads):
        return free
    rate = max(round(slowest * load) / load for load in group.loads if load > 0)
    return max(math.ceil(rate * sum(group.loads)), round(slowest * max(group.loads)) * problem.num_microbatches)
