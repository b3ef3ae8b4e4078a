"""From shares to a placement (whole microbatches, routes that change devices rarely, runs of groups as stages), and
back from a placement to shares."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import PlanningProblem


def to_placement(problem: PlanningProblem, units: Sequence[Sequence[int]], share: Sequence[Sequence[float]],
                 name: str = "mip", again: Collection[int] = ()) -> Placement:
    """The placement in which unit u runs ``share[u][d]`` of the microbatches on device d, as nearly as possible.

    Consecutive groups with equal routes and streams become one stage; ``again``: units that run F again.
    """
    unit_of = {g: u for u, unit in enumerate(units) for g in unit}
    sources: list[list[int]] = [[] for _ in units]
    for edge in problem.edges:
        for target in edge.targets:
            if unit_of[target] != unit_of[edge.source]:
                sources[unit_of[target]].append(unit_of[edge.source])
    route: list[tuple[int, ...]] = []
    for u, wanted in enumerate(share):
        before = [route[p] for p in sources[u] if p < u]
        route.append(deal(wanted, problem.num_microbatches, before[-1] if before else None))
    stages: list[Stage] = []
    routes: list[tuple[int, ...]] = []
    for g in range(len(problem.groups)):
        own = route[unit_of[g]]
        twice = unit_of[g] in again
        if (stages and routes[-1] == own and stages[-1].recompute == twice
                and problem.groups[stages[-1].groups[-1]].stream is problem.groups[g].stream):
            stages[-1] = Stage((*stages[-1].groups, g), stages[-1].ranks, twice)
        else:
            stages.append(Stage((g,), tuple(sorted(set(own))), twice))
            routes.append(own)
    return Placement(tuple(stages), tuple(routes), name + ("+recompute" if again else ""))


def deal(share: Sequence[float], num_microbatches: int, before: Sequence[int] | None) -> tuple[int, ...]:
    """A device for every microbatch: shares met evenly over the step, on the predecessor's device where that is due.

    A device is due while it has fewer microbatches than its share of those dealt so far, give or take one.
    """
    counts = _whole(share, num_microbatches)
    dealt = [0] * len(counts)
    result = []
    for m in range(num_microbatches):
        due = {d: count * (m + 1) / num_microbatches - dealt[d] for d, count in enumerate(counts) if dealt[d] < count}
        best = max(due, key=lambda d: (due[d], -d))
        if before is not None and due.get(before[m], -1.0) > -0.5:
            best = before[m]
        dealt[best] += 1
        result.append(best)
    return tuple(result)


def _whole(share: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the shares, by largest remainders; shares below half a microbatch are dropped,
    unless all are."""
    wanted = [value * total if value * total >= 0.5 else 0.0 for value in share]
    if not any(wanted):  # fewer microbatches than devices that share them
        wanted = list(share)
    scale = total / sum(wanted)
    counts = [int(value * scale + 1e-9) for value in wanted]
    order = sorted(range(len(share)), key=lambda d: counts[d] - wanted[d] * scale)
    for d in order[:total - sum(counts)]:
        counts[d] += 1
    return counts


def to_shares(problem: PlanningProblem, units: Sequence[Sequence[int]], placement: Placement) -> list[list[float]]:
    """``share[u][d]`` of a placement, equal devices numbered by their first unit (as the placement MIP wants them)."""
    stage_of = {g: s for s, stage in enumerate(placement.stages) for g in stage.groups}
    held = [[placement.routes[stage_of[unit[0]]].count(d) / problem.num_microbatches for d in range(problem.num_ranks)]
            for unit in units]
    if problem.topology.overrides:
        return held
    first = [next((u for u, share in enumerate(held) if share[d]), len(units)) for d in range(problem.num_ranks)]
    alike: dict[tuple[str, int, str], list[int]] = {}
    for d, device in enumerate(problem.topology.devices):
        alike.setdefault((device.kind, device.memory_bytes, device.host), []).append(d)
    new = {old: d for members in alike.values()
           for d, old in zip(members, sorted(members, key=lambda d: first[d]), strict=True)}
    return [[share[old] for old in sorted(new, key=lambda old: new[old])] for share in held]
