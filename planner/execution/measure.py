"""What a plan takes: makespan, busy time and peak memory of every rank, without writing its timeline where possible.

Lowering and simulating costs too much for hundreds of thousands of actions. Where every action is elementary or a B (an
I that takes as long as both, then a W of no time) and values in flight take neither memory nor channels, an order alone
gives all figures, by arrays. Tests hold the two ways against each other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs import paths as kernels
from mipipe.planner.jobs.arrays import Instance, build, to_array
from mipipe.planner.jobs.memory import carries_bytes, peaks
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.plan import Plan, Schedule


@dataclass(frozen=True, slots=True)
class Measures:
    """Per rank: compute time ``busy_ns``, ``resident_bytes`` of its stages, and ``peak_bytes`` with these included."""

    makespan_ns: int
    busy_ns: tuple[int, ...]
    resident_bytes: tuple[int, ...]
    peak_bytes: tuple[int, ...]


def measure(plan: Plan) -> Measures:
    """The measures of a complete plan.

    Raises:
        PlanError: the order is incomplete or deadlocks.
    """
    stage_view = view(plan.problem, plan.placement)
    found = by_arrays(stage_view, plan.schedule)
    if found is not None:
        return found
    timeline = simulate(plan, lower(plan))
    ranks = range(plan.problem.num_ranks)
    return Measures(timeline.makespan_ns, tuple(map(timeline.busy_ns, ranks)), timeline.resident_bytes,
                    tuple(map(timeline.peak_bytes, ranks)))


def by_arrays(stage_view: StageView, schedule: Schedule) -> Measures | None:
    """The measures by arrays; None where the schedule needs more (module docstring), is incomplete or deadlocks."""
    found = timed(stage_view, schedule)
    if found is None:
        return None
    instance, start, _ = found
    ranks = stage_view.problem.num_ranks
    compute = np.array([stream is Stream.COMPUTE for _, stream in instance.machine_key])[instance.machine]
    busy = np.zeros(ranks, dtype=np.int64)
    np.add.at(busy, instance.rank[compute], instance.dur[compute])
    resident, end = stage_view.resident_bytes, start + instance.dur
    most = peaks(instance.rank, start, end, instance.alloc + instance.work, instance.free + instance.work, ranks)
    return Measures(int(end.max()), tuple(busy.tolist()), resident,
                    tuple(size + peak for size, peak in zip(resident, most, strict=True)))


class Timed(NamedTuple):
    """The actions as arrays, the start of each, and the order of each machine as `to_array` has it."""

    instance: Instance
    start: np.ndarray
    seq: np.ndarray


class _Same:
    """What is timed, equal to itself alone: comparing two plans of 200,000 actions takes as long as timing one."""

    def __init__(self, stage_view: StageView, schedule: Schedule) -> None:
        self.view, self.schedule = stage_view, schedule
        self.parts = (stage_view.problem, stage_view.placement, schedule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and all(a is b for a, b in zip(self.parts, other.parts, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.parts)))


def timed(stage_view: StageView, schedule: Schedule) -> Timed | None:
    """The actions of a schedule with their times; None as `by_arrays`. The last answer is kept: who explains, measures
    and draws a plan asks for the same."""
    return _timed(_Same(stage_view, schedule))


@lru_cache(maxsize=1)
def _timed(given: _Same) -> Timed | None:
    stage_view, schedule = given.view, given.schedule
    if carries_bytes(stage_view) or any(stage_view.updates_ns()) \
            or any(stage_view.reduce_ns(stage) for stage in range(stage_view.num_stages)):
        return None
    instance = build(stage_view)
    if (instance.dur == 0).any():
        return None  # what takes no time may come in any order at its moment
    orders, fused = _orders(instance, schedule)
    if orders is None:
        return None
    instance = _joined(instance, fused)
    seq, length = to_array(orders), instance.lengths()
    start = np.zeros(instance.size, dtype=np.int64)
    spare = [np.zeros(instance.size, dtype=np.int64) for _ in range(3)]
    makespan = kernels.times(seq, length, instance.dur, instance.succ_ptr, instance.succ, instance.lag, instance.waits,
                             start, *spare)
    return None if makespan < 0 else Timed(instance, start, seq)


def _orders(instance: Instance, schedule: Schedule) -> tuple[list[list[int]] | None, list[int]]:
    """The schedule in node numbers, every node once on its machine (None if it is not that); the I of every B."""
    number = instance.number
    orders, fused = [], []
    for rank, stream in instance.machine_key:
        order = schedule.ranks[rank].compute if stream is Stream.COMPUTE else schedule.ranks[rank].collective
        line: list[int] = []
        try:
            for action in order:
                if action.kind is ActionKind.B:
                    line += [number[part[1], part[0], part[2]] for part in action.parts()]
                    fused.append(line[-2])
                else:
                    line.append(number[action.stage, action.kind, action.microbatch])
        except KeyError:
            return None, []
        orders.append(line)
    everything = np.concatenate([np.array(order, dtype=np.int64) for order in orders])
    machines = np.repeat(np.arange(len(orders)), [len(order) for order in orders])
    given = sum(len(rank.compute) + len(rank.collective) for rank in schedule.ranks) + len(fused)
    if given != len(everything) or (np.bincount(everything, minlength=instance.size) != 1).any():
        return None, []
    return (orders if (instance.machine[everything] == machines).all() else None), fused


def _joined(instance: Instance, fused: list[int]) -> Instance:
    """The instance with the durations of every B on its I; the W that follows takes none."""
    if not fused:
        return instance
    one = np.array(fused, dtype=np.int64)
    two = np.array([instance.number[int(instance.depth[n]), ActionKind.W, int(instance.own_microbatch[n])]
                    for n in fused], dtype=np.int64)
    dur = instance.dur.copy()
    dur[one] += dur[two]
    dur[two] = 0
    return replace(instance, dur=dur)
