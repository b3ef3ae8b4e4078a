"""What binds a plan: the device with the least idle time, the channel that is busiest, the memory that is full.

Every line is a fact about the plan as simulated, not an opinion: what the bound rests on, where time is lost, and what
would have to change for a shorter step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from mipipe.graphs.units import format_bytes, format_ns
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.execution.measure import Timed, timed
from mipipe.planner.jobs.memory import capacity
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import ActionNodes, Evaluation, evaluate
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.placements.branches import encoders
from mipipe.planner.problem import Limits

FULL = 0.97
"""Share of a rank's memory from which it is called full."""

_LATENCY_ALONE = "channel: transfers take latency alone and occupy no channel"


def explain_plan(found: Candidate) -> tuple[str, ...]:
    """Lines that say what binds the candidate's best schedule."""
    assert found.best is not None
    told = partial(told_time, unit_ns=found.view.problem.unit_ns)
    spans, channel = _spans(found)
    makespan = found.makespan_ns
    lines = [_placement(found)]
    above = f", {makespan / found.bound.ns - 1:.1%} above it" if found.bound.ns else ""
    lines.append(f"bound at this placement: {told(found.bound.ns)} ({found.bound.what}); the plan takes"
                 f" {told(makespan)}{above}")
    rank = max(range(len(spans)), key=lambda r: (spans[r].busy, -spans[r].first))
    own = spans[rank]
    lines.append(f"device: rank {rank} has the most work, {told(own.busy)}; it starts at {told(own.first)},"
                 f" ends {told(makespan - own.last)} before the step and idles"
                 f" {told(own.last - own.first - own.busy)} in between")
    return (*lines, *channel, *_memory(found))


class _Span(NamedTuple):
    """A rank's compute stream: busy time, start of its first action, end of its last."""

    busy: int
    first: int
    last: int


def _spans(found: Candidate) -> tuple[list[_Span], list[str]]:
    """The span of every rank, and what is to be said of channels; by arrays where an order alone gives the times."""
    assert found.best is not None
    ranks = range(found.view.problem.num_ranks)
    quick = timed(found.view, found.best.schedule)
    if quick is None:
        compiled, evaluation = evaluate(found.view, found.best.schedule)
        compute = [node for node in range(len(compiled.ranks)) if compiled.streams[node] is Stream.COMPUTE]
        where = np.array([compiled.ranks[node] for node in compute])
        start = np.array([evaluation.starts[node] for node in compute])
        taken = np.array([compiled.durations[node] for node in compute])
        channel = _channel(compiled, evaluation)
    else:
        instance, start, _ = quick
        compute_machine = np.array([stream is Stream.COMPUTE for _, stream in instance.machine_key])
        chosen = compute_machine[instance.machine]
        where, start, taken = instance.rank[chosen], start[chosen], instance.dur[chosen]
        source = np.repeat(instance.rank, np.diff(instance.succ_ptr))
        moved = bool((source != instance.rank[instance.succ]).any())
        channel = [_LATENCY_ALONE] if moved else []
    spans = [_Span(int(taken[own].sum()), int(start[own].min(initial=found.makespan_ns)),
                   int((start[own] + taken[own]).max(initial=0))) for own in (where == rank for rank in ranks)]
    return spans, channel


def told_time(time_ns: float, unit_ns: int) -> str:
    """A time in the problem's unit, or with a unit of its own where times were measured or estimated."""
    return f"{time_ns / unit_ns:g}" if unit_ns != 1 else format_ns(time_ns)


def _placement(found: Candidate) -> str:
    stages = found.placement.stages
    copies = max(len(stage.ranks) for stage in stages)
    ranks = {rank for stage in stages for rank in stage.ranks}
    per_rank = max(sum(rank in stage.ranks for stage in stages) for rank in ranks)
    line = (f"placement {found.placement.name}: {len(stages)} stages on {len(ranks)} ranks, up to {per_rank} stages"
            f" on a rank, up to {copies} replicas of a stage")
    again = sum(stage.recompute for stage in stages)
    if again:
        line += f"; {again} stages run their forward again"
    chosen = set(encoders(found.view.problem))
    if chosen:
        own, other = ({rank for stage in stages if bool(chosen.intersection(stage.groups)) is wanted
                       for rank in stage.ranks} for wanted in (True, False))
        shared = "apart from" if own.isdisjoint(other) else "beside"
        line += f"; encoders on ranks {', '.join(map(str, sorted(own)))}, {shared} the rest"
    return line


def _channel(compiled: ActionNodes, evaluation: Evaluation) -> list[str]:
    told = partial(told_time, unit_ns=compiled.view.problem.unit_ns)
    topology = compiled.view.problem.topology
    moved: dict[tuple[int, int], int] = defaultdict(int)
    for transfer in evaluation.transfers:
        action = compiled.actions[transfer.producer]
        source, target = compiled.view.rank(action.stage, action.microbatch), compiled.ranks[transfer.consumer]
        moved[source, target] += transfer.end_ns - transfer.start_ns - topology.link(source, target).latency_ns
    if not moved:
        return []
    if not any(moved.values()):
        return [_LATENCY_ALONE]
    (source, target), load = max(moved.items(), key=lambda item: item[1])
    return [f"channel: rank {source} to rank {target} is the busiest, {told(load)} of"
            f" {told(evaluation.makespan_ns)}"]


def _memory(found: Candidate) -> list[str]:
    """How full the fullest rank's activation memory gets, by the order alone (values in flight not counted)."""
    assert found.best is not None
    capacities = [capacity(found.view, rank) for rank in range(found.view.problem.num_ranks)]
    peaks = _peaks(found)
    share = [peak / max(1, room) for peak, room in zip(peaks, capacities, strict=True)]
    rank = max(range(len(share)), key=share.__getitem__)
    if not peaks[rank]:
        return []
    if share[rank] <= FULL:
        told = "which does not bind"
    elif _proven_without_memory(found):
        told = "which does not bind: no order at this placement is shorter, whatever the memory"
    else:
        told = "which binds: more memory may shorten the step"
    return [f"memory: rank {rank} uses {share[rank]:.0%} of its {format_bytes(capacities[rank])} for activations,"
            f" {told}"]


def _peaks(found: Candidate) -> list[int]:
    """Per rank the most bytes of activations held at once along its order of compute actions."""
    assert found.best is not None
    quick = timed(found.view, found.best.schedule)
    if quick is not None and quick.instance.dur.all():  # no B among the actions, which is held as one
        return _elementary_peaks(quick)
    instance, peaks = found.instance, [0] * found.view.problem.num_ranks
    for rank, order in enumerate(found.best.schedule.ranks):
        used = 0
        for action in order.compute:
            nodes = [n for kind, stage, m in action.parts() if (n := instance.number.get((stage, kind, m))) is not None]
            if not nodes:
                break  # a halved instance knows half of the ranks
            used += sum(int(instance.alloc[n]) for n in nodes)
            peaks[rank] = max(peaks[rank], used + max(int(instance.work[n]) for n in nodes))
            used -= sum(int(instance.free[n]) for n in nodes)
    return peaks


def _elementary_peaks(quick: Timed) -> list[int]:
    """The same by arrays, where every action is an F, I or W."""
    instance, peaks = quick.instance, [0] * len(quick.instance.cap)
    for (rank, _), order, length in zip(instance.machine_key, quick.seq, instance.lengths(), strict=True):
        nodes = order[:length]
        held = np.cumsum(instance.alloc[nodes]) - np.cumsum(instance.free[nodes])
        peaks[rank] = int((held + instance.free[nodes] + instance.work[nodes]).max(initial=0))
    return peaks


def _proven_without_memory(found: Candidate) -> bool:
    """Whether the makespan meets a bound at its placement that holds with any memory."""
    if found.makespan_ns > found.bound.ns:
        return False
    problem = found.view.problem
    devices = tuple(replace(device, memory_bytes=1 << 60) for device in problem.topology.devices)
    free = problem.replace(limits=Limits(), topology=replace(problem.topology, devices=devices))
    return found.makespan_ns <= placement_bound(view(free, found.placement)).ns
