"""What a plan takes: makespan, busy time and peak memory of every rank, without writing its timeline where possible.

Lowering and simulating costs too much for hundreds of thousands of actions. An order alone gives all figures, by arrays
(`mipipe.planner.jobs.order_times`), but where actions take no time and values in flight take memory: what takes none
may be put anywhere at its moment by lowering. Tests hold the two ways against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.action_arrays import arrays_of
from mipipe.planner.jobs.memory import carries_bytes
from mipipe.planner.jobs.order_memory import peaks_of
from mipipe.planner.jobs.order_times import OrderTimes, times_of
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.jobs.times import evaluate
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
    times = timed(stage_view, schedule)
    if times is None or not exact(times):
        return None
    resident = stage_view.resident_bytes
    return Measures(times.makespan_ns, tuple(busy_of(times).tolist()), resident,
                    tuple(size + peak for size, peak in zip(resident, peaks_of(times), strict=True)))


def makespan_of(stage_view: StageView, schedule: Schedule) -> int:
    """The end of a schedule's last action, sum of gradients or update, in nanoseconds.

    Raises:
        PlanError: as `mipipe.planner.jobs.times.evaluate`, which says what is amiss.
    """
    times = timed(stage_view, schedule)
    return evaluate(stage_view, schedule)[1].makespan_ns if times is None else times.makespan_ns


def busy_of(times: OrderTimes) -> np.ndarray:
    """Time that every rank's compute stream is occupied by actions and by its update."""
    actions, view = times.actions, times.actions.view
    busy = np.array(view.updates_ns(), dtype=np.int64)
    np.add.at(busy, actions.rank, np.where(actions.collective == 0, actions.dur, 0))
    return busy


def exact(times: OrderTimes) -> bool:
    """Whether memory follows from these times (module docstring)."""
    return bool(times.actions.dur.all()) or not carries_bytes(times.actions.view)


class _Same:
    """What is timed, equal to itself alone: comparing two plans of 200,000 actions takes as long as timing one."""

    def __init__(self, stage_view: StageView, schedule: Schedule) -> None:
        self.view, self.schedule = stage_view, schedule
        self.parts = (stage_view.problem, stage_view.placement, schedule)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and all(a is b for a, b in zip(self.parts, other.parts, strict=True))

    def __hash__(self) -> int:
        return hash(tuple(map(id, self.parts)))


def timed(stage_view: StageView, schedule: Schedule) -> OrderTimes | None:
    """The times of a schedule; None where it is incomplete or deadlocks. The last answer is kept: who explains,
    measures and draws a plan asks for the same."""
    return _timed(_Same(stage_view, schedule))


@lru_cache(maxsize=1)
def _timed(given: _Same) -> OrderTimes | None:
    actions = arrays_of(given.view, given.schedule)
    return None if actions is None else times_of(actions)
