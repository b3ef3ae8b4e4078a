"""What arrays say of large plans: the checker's verdict and the simulated timeline, on random plans of every kind."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

from mipipe.cli.printing.terminal import draw_timeline
from mipipe.graphs.errors import PlanError
from mipipe.planner.check.arrays import holds
from mipipe.planner.check.plan import check_plan
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.quick_timeline import by_arrays, timeline_of
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.plan import Plan, Schedule
from mipipe.planner.sizes import VERY_MANY

sys.path.insert(0, str(Path(__file__).parent))
from test_bounds_hold import tight_plan


def damaged(plan: Plan, random: Random) -> Iterator[Plan]:
    """A plan with an action too few, twice, or elsewhere, with other figures, and with less memory."""
    ranks = [number for number, order in enumerate(plan.schedule.ranks) if order.compute]
    if not ranks:  # all on the collective stream
        return
    at = random.choice(ranks)
    compute = list(plan.schedule.ranks[at].compute)
    place = random.randrange(len(compute))
    moved = compute[:place] + compute[place + 1:]
    moved.insert(random.randrange(len(compute)), compute[place])
    actions = [compute[:place] + compute[place + 1:], [*compute, compute[place]], compute[::-1], moved]
    for number, order in [(at, order) for order in actions] + [((at + 1) % len(plan.schedule.ranks), compute)]:
        orders = list(plan.schedule.ranks)
        orders[number] = dataclasses.replace(orders[number], compute=tuple(order))
        yield dataclasses.replace(plan, schedule=Schedule(tuple(orders)))
    assert plan.makespan_ns is not None
    yield dataclasses.replace(plan, makespan_ns=plan.makespan_ns + 1)
    yield dataclasses.replace(plan, bound_ns=plan.makespan_ns + 1)
    yield dataclasses.replace(plan, bound_ns=plan.makespan_ns, placement_bound_ns=plan.makespan_ns - 1)
    limits = plan.problem.limits
    for name in ("activation_bytes", "resident_bytes"):
        known = getattr(limits, name)
        if known is not None:
            yield dataclasses.replace(plan, problem=plan.problem.replace(limits=dataclasses.replace(
                limits, **{name: known - 1})))


def test_the_check_by_arrays_says_what_the_checker_says() -> None:
    """Of random plans of every kind at the limit of their memory, sound and damaged."""
    found = Counter[bool]()
    for seed in range(60):
        plan = tight_plan(seed)
        for other in (plan, *damaged(plan, Random(seed))):
            told = verdict(other)
            assert holds(other) == (not told), seed
            assert verdict(other, large=1) == told
            found[not told] += 1
    assert found[True] > 60 and found[False] > 300


def verdict(plan: Plan, large: int = VERY_MANY) -> str:
    """What the checker says against a plan."""
    try:
        check_plan(plan, large)
    except PlanError as error:
        return str(error)
    return ""


def test_a_timeline_by_arrays_is_the_simulated_one() -> None:
    for seed in range(80):
        found = tight_plan(seed)
        quick, simulated = by_arrays(found), simulate(found, lower(found))
        if quick is None:
            continue
        assert timeline_of(found, large=1) == quick
        assert dataclasses.replace(quick, spans=()) == dataclasses.replace(simulated, spans=()), seed
        assert sorted(map(repr, quick.spans)) == sorted(map(repr, simulated.spans)), seed
        assert (quick.bubbles_ns(), quick.makespan_ns) == (simulated.bubbles_ns(), simulated.makespan_ns)
        assert draw_timeline(quick, 70).plain == draw_timeline(simulated, 70).plain, seed
        assert len(quick.spans) == len(simulated.spans) and quick.spans[-1] == list(quick.spans)[-1]
