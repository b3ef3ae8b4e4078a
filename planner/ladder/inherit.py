"""A first order for a new placement from the best plan's: every action at the moment its groups have there.

A proposal often differs from the best placement in a few positions. Its list schedule begins anew; the order that was
annealed for the other placement is nearer to a good one for this.
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.dependencies import KINDS
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder.activities import offer_orders
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.ladder.state import Run
from mipipe.planner.search import follow, lists

RUNG = "inherited order"


def inherit(run: Run, found: Candidate) -> bool:
    """Offer a candidate the best plan's order; whether it was shorter than what the candidate had."""
    best = run.best
    if best is None or best is found or best.best is None or best.best.schedule.has_pairs or found.two_streams:
        return False
    compiled, evaluation = evaluate(best.view, best.best.schedule)
    known: dict[tuple[int, ActionKind, int], int] = {}
    for action, start in zip(compiled.actions, evaluation.starts, strict=True):
        for group in best.placement.stages[action.stage].groups:
            known[group, action.kind, action.microbatch] = start
    instance = found.instance
    moments = np.zeros(instance.size)
    rows = zip(instance.depth.tolist(), instance.kind.tolist(), instance.own_microbatch.tolist(), strict=True)
    for n, (stage, kind, m) in enumerate(rows):
        starts = [known.get((group, KINDS[kind], m)) for group in found.placement.stages[stage].groups]
        if any(start is None for start in starts):
            return False  # forwards that run again, or phases in one there and in two here
        moments[n] = sum(filter(None, starts)) / len(starts)
    for c in range(len(instance.base) - 1):  # a class keeps its own order
        own = slice(instance.base[c], instance.base[c + 1])
        moments[own] = np.maximum.accumulate(moments[own])
    orders = follow.squeezed(instance, moments, float(lists.period(instance)), stop=lambda: run.left <= 0)
    return orders is not None and offer_orders(run, found, orders, RUNG, best.lineage)
