"""The time-indexed MIP in the loop: what it says of a placement is true, and it says all it can in the end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.ladder import activities
from mipipe.planner.ladder.activities import Indexing
from mipipe.planner.ladder.admission import admit_placement
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.calls import counting
from mipipe.planner.milp.order import time_indexed
from mipipe.planner.options import PlacementName, PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import Termination, plan

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import may_queue, optimum, placements, problems

TWO_WAY = uniform_problem(ranks=4, microbatches=8, f=3, i=5, w=5, comm=1, layers=4, copies=2, activations=4)
"""Its best order takes 114; the job-shop bound is 113."""

INTERLEAVED = uniform_problem(ranks=3, microbatches=3, f=6, i=2, w=5, comm=2, layers=12, copies=1, activations=2.25)
"""Four placements; the best order known takes 78."""


def run_at(problem: PlanningProblem, shape: PlacementName) -> Run:
    """A run with the placements of a shape, scheduled by list."""
    run = Run(problem, PlanOptions(time_limit_s=60, placement=shape))
    for placement in propose_shapes(problem, shape):
        admit_placement(run, placement)
    run.entered = True
    return run


def to_the_end(run: Run, seconds: float = 5.0) -> Indexing:
    indexing = Indexing(run)
    for _ in range(100):
        if not indexing.step(seconds):
            return indexing
    raise AssertionError("it never ends")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problems(max_microbatches=3, max_jobs=14))
def test_relaxations_and_branches_end_at_the_optimum(problem: PlanningProblem) -> None:
    """Slice by slice as in one go: no bound above the optimum, and none below where all is modeled."""
    stage_view = placements(problem)[-1]
    best = optimum(stage_view)
    assume(best < 1 << 60)
    longer = 2 * best
    model = time_indexed.indexed(stage_view, makespan_ns=longer)
    while not model.relax(longer, 1.0, 0):
        assert model.bound_ns(longer) <= best
    assert placement_bound(stage_view).ns <= model.bound_ns(longer) <= best
    while not model.branch(longer, 1.0, 0):
        assert model.bound_ns(longer) <= best
    assert model.bound_ns(longer) <= best
    if not may_queue(problem):
        assert model.bound_ns(longer) == best and model.found is not None and model.found[1] == best


def test_bounds_rise_to_what_no_other_bound_shows() -> None:
    run = run_at(TWO_WAY, "two-way")
    (found,) = run.candidates
    assert found.bound.ns == 113 * TWO_WAY.unit_ns < run.makespan_ns
    to_the_end(run)
    assert found.bound.ns == 114 * TWO_WAY.unit_ns and found.bound.what == time_indexed.RELAXED
    assert run.ablation[-1]["rung"] == time_indexed.RELAXED and run.ablation[-1]["bound"] == 114


@pytest.mark.slow
def test_of_a_shape_the_lowest_bound_comes_first_and_of_free_placements_the_best_plan() -> None:
    run = run_at(INTERLEAVED, "interleaved")
    lowest = min((found for found in run.candidates if found.bound.ns < run.makespan_ns), key=lambda f: f.bound.ns)
    assert len(run.candidates) > 1
    indexing = Indexing(run)
    assert indexing.step(5.0)
    assert set(indexing.models) == {lowest}
    to_the_end(run)
    assert lowest.bound.ns == run.lowest_ns == 73 * INTERLEAVED.unit_ns  # 72.25 before
    assert all(found.bound.what == time_indexed.RELAXED for found in run.candidates if found.bound.ns < run.makespan_ns)
    free = Run(INTERLEAVED, PlanOptions(time_limit_s=60))
    for placement in propose_shapes(INTERLEAVED, "interleaved"):
        admit_placement(free, placement)
    assert free.best is not None and free.best.bound.ns < free.makespan_ns
    indexing = to_the_end(free)
    assert set(indexing.models) == {free.best} and free.best.bound.ns == lowest.bound.ns


def test_a_makespan_between_two_slots_is_refuted() -> None:
    """Of another placement, whose durations have another divisor."""
    run = run_at(TWO_WAY, "two-way")
    between = 114 * TWO_WAY.unit_ns - 1
    model = time_indexed.indexed(run.candidates[0].view, makespan_ns=between)
    assert model.relax(between, 20.0, 0) and model.bound_ns(between) == between and model.what == time_indexed.RELAXED


def test_what_is_too_large_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activities, "COLUMNS", 1_000)
    with counting() as ledger:
        run = run_at(TWO_WAY, "two-way")
        indexing = Indexing(run)
        assert not indexing.step(5.0) and not indexing.step(5.0)
    assert not ledger.rows()
    monkeypatch.setattr(activities, "COLUMNS", 20_000)
    assert not indexing.step(5.0)  # not asked again before the incumbent is shorter
    indexing.ended[run.candidates[0]] = run.makespan_ns + 1
    assert indexing.step(5.0)


def test_a_solve_of_a_shape_ends_with_this_proof() -> None:
    result = plan(TWO_WAY, PlanOptions(time_limit_s=60, placement="two-way"))
    assert result.termination is Termination.OPTIMAL and result.seconds < 50
    assert result.plan is not None and result.makespan_ns == result.bound_ns == 114 * TWO_WAY.unit_ns
    assert result.how.bound == time_indexed.RELAXED and "bound" in result.how.highs_part
