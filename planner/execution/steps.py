"""Steps that follow each other without a barrier: what one step costs once they repeat.

A rank begins its next step as soon as all its own work of the last is done: its last action on either stream, and the
reductions of its stages. Other ranks may still be in the last step. The *period* is the time from step to step once
these repeat; it is never above the longest span of a rank from its first to its last action, and never below the
busiest rank's work. The zero-bubble paper's bubble is ``1 - work / period`` (arXiv 2401.10241, section 4).

What the runtime must keep for it: the optimizer's step is a rank's own, so nothing that all ranks must agree on (the
loss's sum, the gradients' norm) may be waited for before it. Left out, as everywhere: the optimizer's time.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from mipipe.graphs.errors import PlanError
from mipipe.planner.jobs.action_arrays import arrays_of
from mipipe.planner.jobs.order_times import no_channel_used, times_of
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.plan import Plan, Schedule
from mipipe.planner.sizes import MANY

MOST_STEPS = 24
"""Steps after which those that do not repeat exactly are averaged, over the last half."""


def quick_period(plan: Plan) -> int | None:
    """The period of a plan where that takes less than a second or two; None for larger ones."""
    count = sum(len(order.compute) + len(order.collective) for order in plan.schedule.ranks)
    return period_of(plan) if count <= MANY else None


def period_of(plan: Plan) -> int:
    """The period of a plan, in nanoseconds.

    Raises:
        PlanError: the order is incomplete or deadlocks.
    """
    return schedule_period(view(plan.problem, plan.placement), plan.schedule)


def schedule_period(stage_view: StageView, schedule: Schedule) -> int:
    """The period of a schedule at a placement, rounded up to a nanosecond."""
    ends = step_ends(stage_view, schedule, MOST_STEPS)
    if (repeated := _repeated(ends)) is not None:
        return repeated
    half = len(ends) // 2
    return max(-(-(last - middle) // (len(ends) - 1 - half))
               for last, middle in zip(ends[-1], ends[half], strict=True))


def step_ends(stage_view: StageView, schedule: Schedule, most: int) -> list[list[int]]:
    """The end of every rank's work in each step, until steps repeat exactly, at most ``most``; 0 for an idle rank."""
    actions = arrays_of(stage_view, schedule)
    if actions is None:
        evaluate(stage_view, schedule)  # says what is amiss
    assert actions is not None
    members = [list(stage.ranks) for stage in stage_view.placement.stages]
    since, channels = np.zeros(stage_view.problem.num_ranks, dtype=np.int64), no_channel_used(stage_view)
    found: list[list[int]] = []
    for _ in range(most):
        times = times_of(actions, since, channels)
        if times is None:
            raise PlanError("schedule: the order deadlocks; see `mipipe check`")
        ends = since.copy()
        np.maximum.at(ends, actions.rank, times.end)
        for stage, _, end in times.reductions:
            ends[members[stage]] = np.maximum(ends[members[stage]], end)
        found.append(ends.tolist())
        since = ends
        if _repeated(found) is not None:
            break
    return found


def _repeated(ends: list[list[int]]) -> int | None:
    """What the last two steps took on every rank that works, if that is one number."""
    taken = {later - sooner for pair in pairwise(ends[-3:]) for sooner, later in zip(*pair, strict=True)
             if later > sooner}
    return taken.pop() if len(ends) > 2 and len(taken) == 1 else None
