"""Objectives other than the makespan: each is several solves of the same ladder.

- ``memory``: the least activation memory with which the makespan stays within ``1 + epsilon`` of the first solve's:
  bisection on the activation limit. The first solve and each step have an equal part of the time.
- ``utilisation``: the highest share of computing time of the devices in use, ``sum(busy) / (devices in use *
  makespan)``, at a makespan within ``1 + epsilon`` of the first solve's, on all devices. With a given number of equal
  devices that is the shortest makespan; but a device that shortens the step by less than its share is better used
  elsewhere, so devices are given back, the slowest first, while the makespan stays within the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from mipipe.planner import clock
from mipipe.planner.execution.measure import measure
from mipipe.planner.ladder.candidate import peak_activations
from mipipe.planner.ladder.state import Progress
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan, RankOrder, Schedule
from mipipe.planner.problem import PlanningProblem

DEVICES_GIVEN_BACK = 3
"""Most devices `best_utilisation` tries to do without: each costs a solve."""

OUT_OF_TIME = "time up without a plan"
"""The termination of a solve that had no time for a first plan."""

STEPS = 5
"""Solves of the bisection on memory: the limit is then known to 1/32 of the range."""


def parts(count: int, options: PlanOptions, solve: Callable[..., Any],
          on_progress: Callable[[Progress], None] | None) -> Callable[[PlanningProblem], Any]:
    """A function that solves one of ``count`` problems after another within the options' time, which the solves to come
    share evenly. The first, if it ends without a plan for want of time, goes on for all of it, as any solve may; None
    for one whose turn comes when less is left than half of what the one before took: it would end without a plan."""
    began, turns, last = time.monotonic(), 0, 0.0

    def run(problem: PlanningProblem, seconds: float) -> Any:
        return solve(problem, replace(options, objective="makespan", time_limit_s=seconds), on_progress)

    def solve_part(problem: PlanningProblem) -> Any:
        nonlocal turns, last
        now = time.monotonic()
        left = options.time_limit_s - (now - began)
        if turns and left < 0.5 * last:
            return None
        part = max(clock.LEAST_S, left / (count - turns))
        turns += 1
        with clock.watched(lambda: now + part - time.monotonic()) if turns > 1 else nullcontext():
            found = run(problem, part)
        if turns == 1 and count > 1 and found.termination.value == OUT_OF_TIME:
            found = run(problem, max(clock.LEAST_S, options.time_limit_s - (time.monotonic() - began)))
            if found.termination.value == OUT_OF_TIME:
                found = replace(found, reason=no_plan_within(options.time_limit_s))
        last = time.monotonic() - now
        return replace(found, seconds=time.monotonic() - began)

    return solve_part


def no_plan_within(seconds: float) -> str:
    """What is said of a solve whose time was up before its first plan."""
    return f"no plan within {seconds:g} s; try a longer time limit"


def interrupted(found: Any) -> bool:
    """Whether Ctrl-C ended a solve: those to come are not begun."""
    return bool(found.termination.value == "interrupted")


def limited(problem: PlanningProblem, activation_bytes: int) -> PlanningProblem:
    """The problem with an activation limit per rank."""
    return problem.replace(limits=replace(problem.limits, activation_bytes=activation_bytes))


def least_memory(problem: PlanningProblem, options: PlanOptions, solve: Callable[..., Any],
                 on_progress: Callable[[Progress], None] | None = None) -> Any:
    """The result with the smallest peak activation memory at a makespan within ``1 + epsilon`` of the first solve's."""
    solve_part = parts(STEPS + 1, options, solve, on_progress)
    best = solve_part(problem)
    if best.plan is None or best.makespan_ns is None or interrupted(best):
        return best
    most = int(best.makespan_ns * (1 + options.epsilon))
    low, high = 0, peak_activations(best.plan)
    for _ in range(STEPS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        found = solve_part(limited(problem, middle))
        if found is None or interrupted(found):
            break
        if found.plan is not None and found.makespan_ns is not None and found.makespan_ns <= most:
            # what limits the placement at less memory is no bound for the problem; that over all placements is one
            kept = replace(found.plan, problem=problem, bound_ns=best.bound_ns, placement_bound_ns=best.bound_ns)
            how = replace(found.how, bound=best.how.bound, placement_bound=best.how.bound)
            best = replace(found, plan=kept, bound_ns=best.bound_ns, placement_bound_ns=best.bound_ns, how=how)
            high = min(middle, peak_activations(found.plan))
        else:
            low = middle
    return best


def best_utilisation(problem: PlanningProblem, options: PlanOptions, solve: Callable[..., Any],
                     on_progress: Callable[[Progress], None] | None = None) -> Any:
    """The result with the highest utilisation at a makespan within ``1 + epsilon`` of the first solve's.

    Its plan is one of the whole problem: devices given back hold nothing. Provenance has ``devices_in_use`` and
    ``utilisation``.
    """
    tries = min(DEVICES_GIVEN_BACK, problem.num_ranks - 1)
    solve_part = parts(tries + 1, options, solve, on_progress)
    best = first = solve_part(problem)
    if first.plan is None or first.makespan_ns is None:
        return first
    tries = 0 if interrupted(first) else tries
    most = int(first.makespan_ns * (1 + options.epsilon))
    in_use = list(range(problem.num_ranks))
    for _ in range(tries):
        in_use = without_slowest(problem, in_use)
        found = solve_part(on_devices(problem, in_use))
        if found is None or interrupted(found):
            break
        if found.plan is None or found.makespan_ns is None or found.makespan_ns > most:
            break
        bound, source = first.bound_ns, first.how.bound
        if options.placement != "free" and bound is not None and (found.bound_ns or 0) < bound:
            bound, source = found.bound_ns or 0, found.how.bound  # the first is one for one shape on all devices only
        here = max(filter(None, (bound, found.placement_bound_ns)), default=None)
        plan = replace(spread_plan(problem, in_use, found.plan), bound_ns=bound, placement_bound_ns=here)
        if utilisation(plan)[0] > utilisation(best.plan)[0]:
            how = replace(found.how, bound=source,
                          placement_bound=found.how.placement_bound if here != bound else source)
            best = replace(found, plan=plan, bound_ns=bound, placement_bound_ns=here, how=how)
    value, count = utilisation(best.plan)
    noted = {**best.plan.provenance, "utilisation": round(value, 4), "devices_in_use": count}
    return replace(best, plan=replace(best.plan, provenance=noted))


def utilisation(plan: Plan) -> tuple[float, int]:
    """(share of computing time of the devices that hold a stage, how many these are)."""
    used = {rank for stage in plan.placement.stages for rank in stage.ranks}
    busy = busy_ns(plan)
    return sum(busy) / (len(used) * max(1, plan.makespan_ns or 0)), len(used)


def without_slowest(problem: PlanningProblem, ranks: Sequence[int]) -> list[int]:
    """The ranks but the one on which all groups together take longest; the last of equals."""
    load = {rank: sum(group.times[problem.topology.devices[rank].kind].total_ns for group in problem.groups)
            for rank in ranks}
    slowest = max(ranks, key=lambda rank: (load[rank], rank))
    return [rank for rank in ranks if rank != slowest]


def on_devices(problem: PlanningProblem, ranks: Sequence[int]) -> PlanningProblem:
    """The problem on some of its devices, numbered anew."""
    new = {str(old): at for at, old in enumerate(ranks)}
    overrides = {}
    for key, link in problem.topology.overrides.items():
        source, _, target = key.partition("->")
        if source in new and target in new:
            overrides[f"{new[source]}->{new[target]}"] = link
    devices = tuple(problem.topology.devices[rank] for rank in ranks)
    return problem.replace(topology=replace(problem.topology, devices=devices, overrides=overrides))


def spread_plan(problem: PlanningProblem, ranks: Sequence[int], plan: Plan) -> Plan:
    """A plan of `on_devices` as one of the whole problem."""
    stages = tuple(replace(stage, ranks=tuple(ranks[rank] for rank in stage.ranks)) for stage in plan.placement.stages)
    routes = tuple(tuple(ranks[rank] for rank in route) for route in plan.placement.routes)
    orders = [RankOrder()] * problem.num_ranks
    for rank, order in zip(ranks, plan.schedule.ranks, strict=True):
        orders[rank] = order
    return replace(plan, problem=problem, placement=replace(plan.placement, stages=stages, routes=routes),
                   schedule=Schedule(tuple(orders)))


def busy_ns(plan: Plan) -> list[int]:
    """Busy time of the compute streams of all ranks."""
    return list(measure(plan).busy_ns)
