"""No bound is above a schedule that exists: problems of every kind, with the memory that one of their schedules takes.

A random plan (branches, loads, collectives, replicas, unlike devices, transfers, updates, recomputation, pairs) is
simulated, and what it takes becomes the problem's limits, so that bounds that reason with memory have all they need to
be wrong. What the planner then makes of the problem is held against the same bounds, and the small ones among the
problems against exhaustive search in `test_overlap` and `test_bounds`.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mipipe.graphs.errors import PlanError
from mipipe.graphs.topology import Topology
from mipipe.planner.bounds.at_placement import placement_bound, problem_bound
from mipipe.planner.check import check_plan
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.execution.steps import schedule_period
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.period import period_bound
from mipipe.planner.milp.placement import shares
from mipipe.planner.milp.placement.configurations import configuration_bound
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.problem import Group, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from test_overlap import fused
from test_simulate import random_plan


def tight_plan(seed: int) -> Plan:
    """A random plan whose problem has little more memory than it takes, limits of which some are absent."""
    rng = random.Random(seed)
    found = random_plan(seed)
    found = fused(found, rng) if rng.random() < 0.5 else found
    timeline = simulate(found, lower(found))
    ranks = range(found.problem.num_ranks)
    saved = max(timeline.peak_bytes(rank) - timeline.resident_bytes[rank] for rank in ranks)
    limits = Limits(activation_bytes=rng.choice([None, max(1, saved)]),
                    resident_bytes=rng.choice([None, max(1, *timeline.resident_bytes)]))
    problem = found.problem.replace(limits=limits)
    if rng.random() < 0.5:
        devices = tuple(replace(device, memory_bytes=max(1, timeline.peak_bytes(rank)))
                        for rank, device in enumerate(problem.topology.devices))
        problem = problem.replace(topology=replace(problem.topology, devices=devices))
    return replace(found, problem=problem, makespan_ns=timeline.makespan_ns)


def test_bounds_are_below_a_plan_that_exists() -> None:
    met = 0
    for seed in range(250):
        found = tight_plan(seed)
        check_plan(found)
        stages = view(found.problem, found.placement)
        assert found.makespan_ns is not None
        assert problem_bound(found.problem).ns <= found.makespan_ns, seed
        assert period_bound(found.problem).ns <= schedule_period(stages, found.schedule), seed
        try:
            bound = placement_bound(stages).ns
        except PlanError:  # an action of no time holds its bytes for none, and the bound counts them all the same
            assert any(not times.f_ns for group in found.problem.groups for times in group.times.values()), seed
            continue
        assert bound <= found.makespan_ns, seed
        met += bound == found.makespan_ns
    assert met > 20  # the bounds say something


def test_the_placement_mip_rounds_loads_as_the_plan_does() -> None:
    """Phase by phase: half of 5, of 4 and of 2 ns are 2, 2 and 1, but half of all three is 6; a plan of 112 exists."""
    assert (shares.free_bound(tight_plan(1071).problem, time_limit_s=5.0, seed=0)[0] or 0) <= 112


def test_the_period_s_bound_rounds_loads_as_the_plan_does() -> None:
    """Half of 5, of 4 and of 2 ns are 2, 2 and 1; half of all three is 6."""
    groups = (Group("g", {"device": PhaseTimes(5, 4, 2)}, loads=(0.5,) * 3),)
    assert period_bound(PlanningProblem("half", groups, (), Topology.uniform(1), 3)).ns == 15


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mips_are_below_a_plan_that_exists_and_below_what_is_planned() -> None:
    planned = 0
    for seed in range(1000, 1150):
        found = tight_plan(seed)
        assert found.makespan_ns is not None
        bounds = {"configurations": configuration_bound(found.problem, time_limit_s=1.0)[0].ns,
                  "shares": shares.free_bound(found.problem, time_limit_s=1.0, seed=0)[0] or 0}
        ours = plan(found.problem, PlanOptions(time_limit_s=0.5, threads=1, seed=seed))
        best = min(found.makespan_ns, ours.makespan_ns or found.makespan_ns)
        assert max(bounds.values()) <= best, (seed, bounds, best)
        if ours.plan is None:  # what was simulated has no room to spare, and recomputes
            continue
        planned += 1
        assert ours.bound_ns is not None and ours.placement_bound_ns is not None and ours.makespan_ns is not None
        assert ours.bound_ns <= best, (seed, ours.how.bound)
        assert ours.bound_ns <= ours.placement_bound_ns <= ours.makespan_ns, (seed, ours.how)
    assert planned > 60
