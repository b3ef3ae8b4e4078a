"""What binds a plan: the device with the least idle time, the channel that is busiest, the memory that is full.

Every line is a fact about the plan as simulated, not an opinion: what the bound rests on, where time is lost, and what
would have to change for a shorter step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from mipipe.graphs.topology import UNLIMITED_BYTES
from mipipe.graphs.units import format_bytes, format_ns
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.bounds.load import load_bound
from mipipe.planner.execution.measure import timed
from mipipe.planner.jobs.memory import capacity
from mipipe.planner.jobs.order_times import OrderTimes
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.placements.branches import encoders
from mipipe.planner.problem import Limits
from mipipe.planner.sizes import VERY_MANY

FULL = 0.97
"""Share of a rank's memory from which it is called full."""

_LATENCY_ALONE = "channel: transfers take latency alone and occupy no channel"


def explain_plan(found: Candidate) -> tuple[str, ...]:
    """Lines that say what binds the candidate's best schedule."""
    assert found.best is not None
    told = partial(told_time, unit_ns=found.view.problem.unit_ns)
    times = timed(found.view, found.best.schedule)
    assert times is not None, "a judged schedule is complete"
    spans, makespan = _spans(times), found.makespan_ns
    lines = [_placement(found)]
    above = f", {makespan / found.bound.ns - 1:.1%} above it" if found.bound.ns else ""
    lines.append(f"bound at this placement: {told(found.bound.ns)} ({found.bound.what}); the plan takes"
                 f" {told(makespan)}{above}")
    rank = max(range(len(spans)), key=lambda r: (spans[r].busy, -spans[r].first))
    own = spans[rank]
    lines.append(f"device: rank {rank} has the most work, {told(own.busy)}; it starts at {told(own.first)},"
                 f" ends {told(makespan - own.last)} before the step and idles"
                 f" {told(own.last - own.first - own.busy)} in between")
    return (*lines, *_channel(times), *_memory(found, times))


class _Span(NamedTuple):
    """A rank's compute stream: busy time, start of its first action, end of its last."""

    busy: int
    first: int
    last: int


def _spans(times: OrderTimes) -> list[_Span]:
    """The span of every rank."""
    actions, ranks = times.actions, range(times.actions.view.problem.num_ranks)
    own = [(actions.rank == rank) & (actions.collective == 0) for rank in ranks]
    return [_Span(int(actions.dur[mine].sum()), int(times.start[mine].min(initial=times.makespan_ns)),
                  int(times.end[mine].max(initial=0))) for mine in own]


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


def _channel(times: OrderTimes) -> list[str]:
    """The channel that is occupied longest."""
    problem, value = times.actions.view.problem, times.actions.value
    if not times.moved.any():
        return []
    occupied = value["occupied"][times.moved]
    if not occupied.any():
        return [_LATENCY_ALONE]
    load = np.zeros(int(value["channel"].max()) + 1, dtype=np.int64)
    np.add.at(load, value["channel"][times.moved], occupied)
    source, target = divmod(int(load.argmax()), problem.topology.num_devices)
    told = partial(told_time, unit_ns=problem.unit_ns)
    return [f"channel: rank {source} to rank {target} is the busiest, {told(int(load.max()))} of"
            f" {told(times.makespan_ns)}"]


def _memory(found: Candidate, times: OrderTimes) -> list[str]:
    """How full the fullest rank's activation memory gets, by the order alone (values in flight not counted)."""
    capacities = [capacity(found.view, rank) for rank in range(found.view.problem.num_ranks)]
    peaks = _peaks(times)
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


def _peaks(times: OrderTimes) -> list[int]:
    """Per rank the most bytes of activations held at once along its order of compute actions."""
    actions, nodes = times.actions, times.actions.nodes
    alloc, free, work = (np.zeros(actions.size, dtype=np.int64) for _ in range(3))
    np.add.at(alloc, actions.doer, nodes.alloc)
    np.add.at(free, actions.doer, nodes.free)
    np.maximum.at(work, actions.doer, nodes.work)
    peaks = []
    for rank in range(actions.view.problem.num_ranks):
        own = (actions.rank == rank) & (actions.collective == 0)
        returned = np.cumsum(free[own])
        peaks.append(int((np.cumsum(alloc[own]) - returned + free[own] + work[own]).max(initial=0)))
    return peaks


def _proven_without_memory(found: Candidate) -> bool:
    """Whether the makespan meets a bound at its placement that holds with any memory."""
    if found.makespan_ns > found.bound.ns:
        return False
    if found.instance.size > VERY_MANY:
        return found.makespan_ns <= load_bound(found.instance).ns
    problem = found.view.problem
    devices = tuple(replace(device, memory_bytes=UNLIMITED_BYTES) for device in problem.topology.devices)
    free = problem.replace(limits=Limits(), topology=replace(problem.topology, devices=devices))
    return found.makespan_ns <= placement_bound(view(free, found.placement)).ns
