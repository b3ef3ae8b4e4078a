"""The operations of one period: what a periodic schedule of a placement has to place. Plain numbers, no solver."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.job_shop import job_shop
from mipipe.planner.jobs.stages import StageView

OperationKey = tuple[int, ActionKind, int]
"""(stage, kind, class), a class named by its first microbatch."""

PACES = (1.0, 1.01, 1.02, 1.035, 1.05)
"""Periods that are tried, in loads of the busiest rank: what a good pattern has."""

WEIGHT_DELAYS = (0.0, 1.0, 3.0, 8.0)
"""Periods by which weight gradients may stand back when a pattern is followed. Which wins differs from case to case."""


@dataclass(frozen=True, slots=True)
class PeriodicPattern:
    """The operations of one period: ``alias[o]`` is the operation whose times o shares; roving ones have no machine."""

    keys: list[OperationKey]
    alias: dict[OperationKey, OperationKey]
    duration: dict[OperationKey, int]
    machine: dict[OperationKey, int]
    arcs: list[tuple[OperationKey, OperationKey, int]]
    alloc: dict[OperationKey, int]
    free: dict[OperationKey, int]
    workspace: dict[OperationKey, int]
    capacity: list[int]
    load: int


def roving(view: StageView) -> list[bool]:
    """Per stage whether its microbatches go to more than two ranks: it is then no machine's regular work."""
    return [len(set(route)) > 2 for route in view.placement.routes]


def route_names(view: StageView) -> list[int]:
    """Per microbatch the first one with the same route, roving stages aside. Loads may differ."""
    kept = [route for route, roves in zip(view.placement.routes, roving(view), strict=True) if not roves]
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(route[m] for route in kept), m) for m in range(view.problem.num_microbatches)]


def pattern_of(view: StageView) -> PeriodicPattern:
    """The operations of one microbatch of every class, with durations and sizes averaged over the class's loads.

    Classes here are routes: microbatches that differ only in load share a pattern. Operations of roving stages take
    time but no machine; their work counts in the machines' loads, and the unrolled order finds them their places.
    """
    jobs = job_shop(view, fifo=False)
    name, free = route_names(view), roving(view)
    members: dict[OperationKey, list[int]] = defaultdict(list)
    for job, action in enumerate(jobs.compiled.actions):
        members[action.stage, action.kind, name[action.microbatch]].append(job)

    def mean(column: list[int]) -> dict[OperationKey, int]:
        return {key: -(-sum(column[job] for job in found) // len(found)) for key, found in members.items()}

    index = {job: key for key, found in members.items() for job in found}
    longest: dict[tuple[OperationKey, OperationKey], int] = {}
    for a, b, lag in jobs.arcs:
        longest[index[a], index[b]] = max(lag, longest.get((index[a], index[b]), 0))
    keys = list(members)
    machine = {key: jobs.machine[found[0]] for key, found in members.items() if not free[key[0]]}
    duration = mean(jobs.durations)
    periods = max(name.count(first) for first in set(name))
    load: dict[int, int] = defaultdict(int)
    for job, where in enumerate(jobs.machine):
        load[where] += jobs.durations[job]
    return PeriodicPattern(keys, _aliases(view, sorted(set(name)), keys, duration, free), duration, machine,
                           [(a, b, lag) for (a, b), lag in sorted(longest.items())], mean(jobs.alloc), mean(jobs.free),
                           mean(jobs.workspace), list(jobs.capacity), -(-max(load.values()) // periods))


def _aliases(view: StageView, names: list[int], keys: list[OperationKey], duration: dict[OperationKey, int],
             free: list[bool]) -> dict[OperationKey, OperationKey]:
    """Identity, or the second class on the first where an exchange of ranks maps one onto the other."""
    alias = {key: key for key in keys}
    if len(names) != 2:
        return alias
    one, two = names
    kept = [route for route, roves in zip(view.placement.routes, free, strict=True) if not roves]
    image = {route[one]: route[two] for route in kept}
    swaps = all(image[route[one]] == route[two] and image.get(route[two]) == route[one] for route in kept)
    if swaps and all(duration[stage, kind, one] == duration[stage, kind, two] for stage, kind, _ in keys):
        alias.update({(stage, kind, two): (stage, kind, one) for stage, kind, _ in keys})
    return alias
