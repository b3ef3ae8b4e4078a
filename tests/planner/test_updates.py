"""A rank's update at the end of a step: evaluator, simulator and checker agree, and bounds count it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import PlanError
from mipipe.planner.actions import ActionKind
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.check import check_plan, check_program
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.stages import view
from mipipe.planner.options import PlanOptions
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from planner_random import ample

ONE = next(item for item in BASELINES if item.name == "1F1B")


def with_updates(problem, updates):
    groups = tuple(dataclasses.replace(group, update_ns=update)
                   for group, update in zip(problem.groups, updates, strict=True))
    return problem.replace(groups=groups)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_a_step_ends_with_the_slowest_update(seed):
    """Every rank's update follows its last action; the makespan is the end of the last of them."""
    random = Random(seed)
    problem = ample(random)
    updates = [random.choice([0, 0, random.randrange(1, 5000)]) for _ in problem.groups]
    problem = with_updates(problem, updates)
    found = ONE.plan(problem, split=random.random() < 0.5, cut="balanced")
    check_plan(found)
    program = lower(found)
    check_program(found, program)
    timeline = simulate(found, program)
    assert timeline.makespan_ns == found.makespan_ns
    updated = {span.rank: span for span in timeline.spans if span.kind is ActionKind.OPTIMIZER_STEP}
    stages = view(found.problem, found.placement)
    for rank, total in enumerate(stages.updates_ns()):
        assert (rank in updated) == bool(total)
        if total:
            last = max(span.end_ns for span in timeline.spans if span.rank == rank and span.kind in (
                ActionKind.F, ActionKind.I, ActionKind.W, ActionKind.B))
            assert (updated[rank].start_ns, updated[rank].end_ns) == (last, last + total)
    assert placement_bound(stages).ns <= timeline.makespan_ns


def test_a_plan_that_forgets_the_update_is_refused():
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1)
    found = ONE.plan(with_updates(problem, [7 * 10**6] * 4))
    bare = ONE.plan(problem)
    assert found.makespan_ns == bare.makespan_ns + 14 * 10**6
    with pytest.raises(PlanError, match="makespan"):
        check_plan(dataclasses.replace(found, makespan_ns=bare.makespan_ns))


def test_the_planner_counts_updates():
    """All its ranks end with an update, so the step is longer by at least the mean of them."""
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1)
    options = PlanOptions(time_limit_s=3, placement="chain")
    plain, more = plan(problem, options), plan(with_updates(problem, [10**6] * 4), options)
    assert plain.plan is not None and more.plan is not None and more.bound_ns is not None
    assert more.makespan_ns >= plain.makespan_ns + 10**6
    assert more.bound_ns <= more.makespan_ns
    check_plan(more.plan)
