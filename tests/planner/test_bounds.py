"""Combinatorial bounds: closed forms, and never above an optimum found by exhaustive search."""

from __future__ import annotations

import random
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from mipipe.graphs.errors import PlanError
from mipipe.planner.bounds.at_placement import heads_and_tails, placement_bound, preemptive_bound, problem_bound
from mipipe.planner.jobs.job_shop import job_shop
from mipipe.planner.jobs.stages import view
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import at, optimum, placements, problems

SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@SLOW
@given(problems())
def test_bounds_are_below_the_optimum(problem):
    best = 1 << 60
    for stage_view in placements(problem):
        here = optimum(stage_view)
        try:
            bound = placement_bound(stage_view).ns
        except PlanError:
            assert here == 1 << 60
            continue
        assert bound <= here
        best = min(best, here)
    assume(best < 1 << 60)
    assert problem_bound(problem).ns <= best


@pytest.mark.parametrize(("ranks", "microbatches", "f", "i", "w"),
                         [(2, 4, 1, 1, 1), (4, 8, 1, 1, 1), (8, 20, 2, 2, 1)])
def test_chain_with_the_memory_of_1f1b(ranks, microbatches, f, i, w):
    """The bound meets ZB-H1's closed form, bubble (P-1)(F+I-W), which is therefore optimal while W <= F = I."""
    problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=f, i=i, w=w, layers=ranks, activations=ranks)
    bound = placement_bound(at(problem, tuple(range(ranks)))).ns / problem.unit_ns
    assert bound == microbatches * (f + i + w) + (ranks - 1) * (f + i - w)


def test_two_way_bubble_of_two():
    """Two replicas on mirrored ranks, F, I, W = 2, 2, 1, 4 ranks x 8: the middle ranks start one stage late."""
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, layers=4, activations=5)
    stages = tuple(Stage((s,), (s, 3 - s)) for s in range(4))
    routes = tuple(tuple(s if m % 2 else 3 - s for m in range(8)) for s in range(4))
    assert placement_bound(view(problem, Placement(stages, routes))).ns == 42 * problem.unit_ns


def test_preemptive_bound_is_head_load_tail_of_the_worst_subset():
    """Jackson's schedule against the definition: max over subsets of least head + load + least tail (Carlier 1982)."""
    rng = random.Random(0)
    for _ in range(200):
        jobs = [(rng.randint(0, 9), rng.randint(1, 5), rng.randint(0, 9)) for _ in range(rng.randint(1, 6))]
        worst = 0
        for subset in range(1, 1 << len(jobs)):
            chosen = [job for k, job in enumerate(jobs) if subset >> k & 1]
            worst = max(worst, min(j[0] for j in chosen) + sum(j[1] for j in chosen) + min(j[2] for j in chosen))
        assert preemptive_bound(jobs) == worst


def test_heads_follow_memory_arcs():
    """With one activation the second microbatch starts when the first is done."""
    problem = uniform_problem(ranks=1, microbatches=2, f=1, i=1, w=1, layers=1, activations=1)
    jobs = job_shop(at(problem, (0,)))
    heads, tails = heads_and_tails(jobs)
    starts = sorted(heads)
    assert [start // problem.unit_ns for start in starts] == [0, 1, 2, 3, 4, 5]
    assert max(tails) == 6 * problem.unit_ns


def test_memory_that_never_fits_names_the_rank():
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1, layers=4, activations=1)
    stage_view = view(problem, Placement((Stage((0,), (0,)), Stage((1, 2), (1,)), Stage((3,), (0,))),
                                         ((0, 0), (1, 1), (0, 0))))
    assert placement_bound(stage_view).ns > 0  # one microbatch at a time fits
    groups = tuple(group if g else type(group)(group.name, group.times, saved_fw_bytes=10**6)
                   for g, group in enumerate(problem.groups))
    placement = Placement((Stage((0,), (0,)), Stage((1, 2), (1,)), Stage((3,), (0,))), ((0, 0), (1, 1), (0, 0)))
    with pytest.raises(PlanError, match="rank 0: 0F0 needs 1000000 bytes"):
        placement_bound(view(problem.replace(groups=groups), placement))


def test_work_alone_without_memory_or_transfers():
    problem = uniform_problem(ranks=8, microbatches=20, f=1, i=1, w=1, layers=32, first=Fraction(1, 5),
                              last=Fraction(3, 5))
    assert problem_bound(problem).ns == 66 * problem.unit_ns


def test_devices_wait_for_gradients_when_their_memory_is_full():
    """One copy, 0.75 of 1F1B's memory: no device can be busy until the first gradient with forwards alone."""
    problem = uniform_problem(ranks=8, microbatches=16, f=1, i=1, w=1, layers=8, copies=1, activations=6)
    bound = problem_bound(problem)
    # work 48; gradients reach the 8 devices 8, 9, ... 15 after the start; each has run 6 forwards by then
    assert bound.ns == pytest.approx((48 + 11.5 - 6) * problem.unit_ns, rel=1e-6)
    assert "gradients" in bound.what


def test_devices_wait_for_their_first_group():
    problem = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4, copies=1, activations=100)
    bound = problem_bound(problem)
    assert bound.ns == pytest.approx((24 + 1.5) * problem.unit_ns)
    assert "first group" in bound.what


def test_one_microbatch_is_bounded_by_its_path():
    problem = uniform_problem(ranks=4, microbatches=1, f=1, i=1, w=1, comm=1, layers=4, copies=1)
    # four groups that fit no two on a device: three transfers each way
    assert problem_bound(problem).ns == (4 + 3 + 4 + 3 + 1) * problem.unit_ns


def test_collective_stream_has_its_own_bound():
    problem = two_stream_problem(ranks=2, microbatches=4, comm=0, dispatch=(50, 50), activations=100)
    # dispatch and combine: 4 microbatches x (50 + 50 + 8 + 8) per device, longer than its compute
    assert problem_bound(problem).ns >= 4 * 116 * problem.unit_ns


def test_the_last_forward_waits_for_gradients_that_make_room():
    """Two streams, two-way, 9 activations: 433 until rank 3 sees a gradient, of its work until then at most 180; 830
    must be done before its last forward, whose way to the loss and back takes 465. The search reaches 1,550."""
    problem = two_stream_problem(ranks=8, microbatches=20, activations=9)
    bound = placement_bound(view(problem, next(propose_shapes(problem, "two-way"))))
    assert bound.ns == (433 - 180 + 830 + 465) * problem.unit_ns
    assert "last forward" in bound.what
