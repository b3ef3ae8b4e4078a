"""A first order for a new placement from that of another: every action at the moment its groups have there.

A proposal often differs from a known placement in a few positions. Its list schedule begins anew; the order that was
annealed for the other placement is nearer to a good one for this.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.jobs.dependencies import KINDS
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder.activities import offer_orders
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.ladder.state import Run
from mipipe.planner.plan import Schedule
from mipipe.planner.search import follow, lists
from mipipe.planner.search.orders import Orders

RUNG = "inherited order"

Moments = dict[tuple[int, ActionKind, int], int]
"""When every (group, kind, microbatch) starts, in ns."""


def inherit(run: Run, found: Candidate) -> bool:
    """Offer a candidate the best plan's order; whether it was shorter than what the candidate had."""
    best = run.best
    if best is None or best is found or best.best is None or best.best.schedule.has_pairs:
        return False
    orders = inherited(moments_of(best.view, best.best.schedule), found.instance, lambda: run.left <= 0)
    return orders is not None and offer_orders(run, found, orders, RUNG, best.lineage)


def moments_of(view: StageView, schedule: Schedule) -> Moments:
    """When every group's actions start under a schedule."""
    compiled, evaluation = evaluate(view, schedule)
    return {(group, action.kind, action.microbatch): start
            for action, start in zip(compiled.actions, evaluation.starts, strict=True)
            for group in view.placement.stages[action.stage].groups}


def inherited(known: Moments, instance: Instance, stop: Callable[[], bool]) -> Orders | None:
    """The shortest schedule found that starts actions in the order of their groups' mean moments; None where it breaks
    the memory, or where an action has no moment. Actions that only this placement has (forwards that run again, an
    input gradient of a stage whose groups had weight gradients alone) start with the phase that reads what they make.
    """
    moments = np.zeros(instance.size)
    rows = zip(instance.depth.tolist(), instance.kind.tolist(), instance.own_microbatch.tolist(), strict=True)
    stages = instance.view.placement.stages
    for n, (stage, kind, m) in enumerate(rows):
        for phase in KINDS[kind:]:
            starts = [known[group, phase, m] for group in stages[stage].groups if (group, phase, m) in known]
            if starts:
                break
        else:
            return None
        moments[n] = sum(starts) / len(starts)
    for c in range(len(instance.base) - 1):  # a class keeps its own order
        own = slice(instance.base[c], instance.base[c + 1])
        moments[own] = np.maximum.accumulate(moments[own])
    return follow.squeezed(instance, moments, float(lists.period(instance)), stop=stop)
