"""Whether memory suffices at every moment: the checker's own account of the rules in `mipipe.planner.problem`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from mipipe.graphs.errors import PlanError
from mipipe.graphs.units import format_bytes
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.check.facts import Demands, Part, part_text, scaled, workspace_bytes
from mipipe.planner.check.times import CheckedTimes


def check_resident(facts: Demands) -> None:
    """Raise `PlanError` if a rank's weights and optimizer state exceed its device or the problem's limit."""
    problem = facts.plan.problem
    for rank, device in enumerate(problem.topology.devices):
        size = facts.resident_bytes(rank)
        if size > device.memory_bytes:
            raise PlanError(f"rank {rank}: its stages' resident bytes are {_bytes(size)}, but device {device.name} has"
                            f" {_bytes(device.memory_bytes)}; move a stage away or drop a replica")
        limit = problem.limits.resident_bytes
        if limit is not None and size > limit:
            raise PlanError(f"rank {rank}: its stages' resident bytes are {_bytes(size)}, but the problem's limit is"
                            f" {_bytes(limit)}; move a stage away or drop a replica")


def check_activations(facts: Demands, times: CheckedTimes) -> None:
    """Raise `PlanError` at the first moment at which a rank holds more than its device or the problem's limit."""
    problem = facts.plan.problem
    curves = _curves(facts, times)
    for rank, device in enumerate(problem.topology.devices):
        resident = facts.resident_bytes(rank)
        limit = problem.limits.activation_bytes
        for time_ns, size in curves[rank]:
            if limit is not None and size > limit:
                raise PlanError(f"{_moment(facts, times, rank, time_ns)}: activations and buffers take {_bytes(size)},"
                                f" but the problem's limit is {_bytes(limit)}; run fewer forwards ahead of their"
                                " gradients")
            if resident + size > device.memory_bytes:
                raise PlanError(f"{_moment(facts, times, rank, time_ns)}: takes {_bytes(resident + size)}, of it"
                                f" {_bytes(resident)} resident, but device {device.name} has"
                                f" {_bytes(device.memory_bytes)}; run fewer forwards ahead of their gradients, or,"
                                " where one action needs that much, smaller microbatches")


def _bytes(size: int) -> str:
    return f"{size} bytes ({format_bytes(size)})"


def _moment(facts: Demands, times: CheckedTimes, rank: int, time_ns: int) -> str:
    running = [part_text(part) for part, (begin, end) in times.parts.items()
               if begin <= time_ns < end and facts.rank(*part[1:]) == rank]
    return f"rank {rank}, at {time_ns} ns ({'during ' + ', '.join(running) if running else 'while it waits'})"


def _curves(facts: Demands, times: CheckedTimes) -> list[list[tuple[int, int]]]:
    """Per rank ``(ns, bytes)`` after every change, without resident bytes."""
    changes: list[defaultdict[int, int]] = [defaultdict(int) for _ in facts.plan.problem.topology.devices]

    def hold(rank: int, begin: int, end: int, size: int) -> None:
        changes[rank][begin] += size
        changes[rank][end] -= size

    for stage in range(len(facts.phases)):
        for microbatch in range(facts.plan.problem.num_microbatches):
            _hold_saved(facts, times, stage, microbatch, hold)
    for order in facts.plan.schedule.ranks:
        for action in (*order.compute, *order.collective):
            _hold_workspace(facts, times, action, hold)
    for number, flow in enumerate(facts.flows):
        made, read = times.parts[flow.producer][1], times.parts[flow.consumer][0]
        source, target = facts.rank(*flow.producer[1:]), facts.rank(*flow.consumer[1:])
        if number in times.moved:
            hold(source, made, times.moved[number][1], flow.num_bytes)
            hold(target, times.posted[number], max(read, times.posted[number]), flow.num_bytes)
        elif read > made:
            hold(source, made, read, flow.num_bytes)
    curves = []
    for change in changes:
        level, curve = 0, []
        for time_ns, difference in sorted(change.items()):
            level += difference
            curve.append((time_ns, level))
        curves.append(curve)
    return curves


def _hold_saved(facts: Demands, times: CheckedTimes, stage: int, microbatch: int,
                hold: Callable[..., None]) -> None:
    """Saved tensors of one stage and microbatch, group by group."""
    rank = facts.rank(stage, microbatch)

    def span(kind: ActionKind) -> tuple[int, int] | None:
        part: Part = (kind, stage, microbatch)
        return times.parts[part] if kind in facts.phases[stage] else None

    forward, again, back_i, back_w = map(span, (ActionKind.F, ActionKind.RECOMPUTE, ActionKind.I, ActionKind.W))
    assert forward is not None
    begin = (again or forward)[0]
    end_i, end_w = (back_i or back_w or forward)[1], (back_w or back_i or forward)[1]
    for number, group in zip(facts.plan.placement.stages[stage].groups, facts.groups(stage), strict=True):
        if again is not None:
            hold(rank, forward[0], begin, scaled(group.recompute_bytes or 0, group, microbatch))
        hold(rank, begin, end_i, scaled(group.saved_fi_bytes, group, microbatch))
        hold(rank, begin, end_w, scaled(group.saved_fw_bytes, group, microbatch))
        if back_i is not None and back_w is not None:
            sizes = [group.saved_iw_bytes]
            if all(found.i_ns is None and found.w_ns is not None for found in group.times.values()):
                groups = facts.plan.problem.groups
                sizes += [edge.grad_bytes or 0 for edge in facts.plan.problem.edges if edge.source == number
                          and any(found.i_ns is not None for other in edge.targets
                                  for found in groups[other].times.values())]
            for size in sizes:
                hold(rank, back_i[0], end_w, scaled(size, group, microbatch))


def _hold_workspace(facts: Demands, times: CheckedTimes, action: Action, hold: Callable[..., None]) -> None:
    """What an action needs while it runs: its largest group's, for each stage it works on, forward or backward."""
    part = action.parts()[0]
    begin, end = times.parts[part]
    needs: dict[int, int] = {}
    for kind, stage, _ in action.parts():
        ahead = kind in (ActionKind.F, ActionKind.RECOMPUTE)
        largest = max(workspace_bytes(group, ahead) for group in facts.groups(stage))
        needs[stage] = max(needs.get(stage, 0), largest)
    hold(facts.rank(*part[1:]), begin, end, sum(needs.values()))
