"""List scheduling, instances and the mirror quotient."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from mipipe.graphs.topology import Topology
from mipipe.planner.jobs.arrays import build, mirror, orders_from, with_mirrors
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder.admission import seed_search
from mipipe.planner.ladder.candidate import candidate
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.placements.shortages import shortage, single_microbatch_bytes
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.search import lists as greedy

sys.path.insert(0, str(Path(__file__).parent))
from planner_problems import problems


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(tight=True))
def test_lists_are_complete_fit_memory_and_fail_only_where_nothing_fits(problem: PlanningProblem) -> None:
    for placement in propose_shapes(problem):
        instance = build(view(problem, placement))
        orders = greedy.schedule(instance, greedy.RULES[0])
        if orders is None:
            assert shortage(problem, placement) is not None
            continue
        assert sorted(n for row in orders.lists() for n in row) == list(range(instance.size))
        _, evaluation = evaluate(instance.view, with_mirrors(instance, orders.lists()))
        assert evaluation.makespan_ns >= orders.makespan_ns or instance.view.problem.topology.num_devices > 1
        for order in orders.lists():
            used = 0
            for n in order:
                used += instance.alloc[n]
                assert used + instance.work[n] <= instance.cap[instance.rank[n]]
                used -= instance.free[n]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(max_groups=7, max_ranks=4, max_microbatches=6))
def test_memory_for_one_microbatch_suffices_for_all(problem: PlanningProblem) -> None:
    """Weight gradients that keep more than their input gradients return, and ends spread over ranks, block nothing."""
    for placement in propose_shapes(problem):
        instance = build(view(problem, placement))
        instance.cap[:] = single_microbatch_bytes(instance)
        for rule in greedy.RULES:
            assert greedy.schedule(instance, rule) is not None, placement


def test_the_interpreted_kernel_gives_the_compiled_ones_schedule() -> None:
    problem = uniform_problem(ranks=3, microbatches=5, f=3, i=4, w=2, comm=1, activations=3)
    instance = build(view(problem, next(propose_shapes(problem, "v"))))
    slow, fast = (greedy.schedule(instance, greedy.ListRule(), compiled=compiled) for compiled in (False, True))
    assert slow is not None and fast is not None
    assert slow.makespan_ns == fast.makespan_ns and (slow.seq == fast.seq).all()


@pytest.mark.parametrize("shape", ["two-way", "two-way-v"])
def test_a_schedule_of_the_quotient_is_one_of_the_whole(shape: str) -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1)
    stage_view = view(problem, next(propose_shapes(problem, shape)))
    assert mirror(stage_view) is not None
    half, whole = build(stage_view, halve=True), build(stage_view)
    assert 2 * half.size == whole.size
    orders = greedy.schedule(half, greedy.RULES[0])
    assert orders is not None
    schedule = with_mirrors(half, orders.lists())
    _, evaluation = evaluate(stage_view, schedule)
    assert evaluation.makespan_ns == orders.makespan_ns
    assert sorted(n for row in orders_from(whole, schedule) for n in row) == list(range(whole.size))


def test_a_chain_has_no_mirror_image() -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1)
    assert mirror(view(problem, next(propose_shapes(problem, "chain")))) is None


def test_more_trials_are_never_worse() -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, activations=4)
    instance = build(view(problem, next(propose_shapes(problem, "v"))))
    few, many = (greedy.best_of(instance, trials, np.random.default_rng(0), 5.0) for trials in (0, 40))
    assert few is not None and many is not None
    assert many.orders.makespan_ns <= few.orders.makespan_ns


@pytest.mark.parametrize("compiled", [False, True])
def test_full_memory_never_keeps_a_gradient_from_running(compiled: bool) -> None:
    """Two microbatches fill rank 0; the first one's gradient takes 3 bytes for its W before it returns 4.

    Lists once counted these 3 bytes twice, found no way on, and the planner called the problem infeasible.
    """
    group = Group("g0", {"d": PhaseTimes(1, 1, 1)}, saved_fi_bytes=4, saved_fw_bytes=2, saved_iw_bytes=3,
                  workspace_bytes=2)
    problem = PlanningProblem("full", (group, replace(group, name="g1")), (GroupEdge(0, (1,), 0, 0, "v"),),
                              Topology.uniform(2, kind="d"), 4, limits=Limits(activation_bytes=17))
    found = candidate(problem, next(propose_shapes(problem, "chain")))
    assert (single_microbatch_bytes(found.instance) == 11).all()
    assert seed_search(Run(problem, PlanOptions()), found, compiled=compiled)
    assert found.best is not None and found.best.fits
