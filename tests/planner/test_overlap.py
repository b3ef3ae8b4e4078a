"""Overlapped pairs: no bound counts them out, the planner chooses them, the check knows the ones that cannot be."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import MipipeError, PlanError
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.bounds.at_placement import placement_bound, problem_bound
from mipipe.planner.check import check_plan
from mipipe.planner.compare import compare
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.milp.order import time_indexed
from mipipe.planner.milp.order.exact import solve_exact
from mipipe.planner.milp.order.job_shop import solve_order
from mipipe.planner.milp.placement import shares as placement_mip
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import Group, OverlapRule, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import at, optimum, placements, problems, with_pairs
from test_simulate import random_plan

CASES = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def dualpipes(fb: float = 2.55, ranks: int = 8, microbatches: int = 20, **more: float) -> PlanningProblem:
    """DualPipe's problem: F,I,W = 1,1.1,0.9, a stage on each rank, its memory."""
    return uniform_problem(ranks=ranks, microbatches=microbatches, f=1, i=1.1, w=0.9, fb=fb, layers=ranks,
                           **{"activations": ranks + 1, **more})


SHORT = st.tuples(problems(max_groups=2), st.sampled_from([(1, 2), (3, 5), (17, 20)]), st.sampled_from([1, 1000]))


@settings(CASES, max_examples=20)
@given(SHORT)
def test_bounds_are_below_the_optimum_with_pairs(case):
    """Exhaustive search over all orders of all choices of pairs. Large durations are hardly rounded."""
    below_the_optimum(*case, mips=False)


@settings(CASES, max_examples=5)
@given(SHORT)
def test_mips_are_below_the_optimum_with_pairs(case):
    below_the_optimum(*case, mips=True)


@pytest.mark.slow
@settings(CASES, max_examples=40)
@given(SHORT)
def test_more_mips_are_below_the_optimum_with_pairs(case):
    below_the_optimum(*case, mips=True)


def below_the_optimum(problem: PlanningProblem, ratio: tuple[int, int], unit: int, *, mips: bool) -> None:
    """Assert that no bound is above the best of all schedules."""
    times = [{"device": PhaseTimes(*(value if value is None else value * unit for value in (t.f_ns, t.i_ns, t.w_ns)))}
             for t in (group.times["device"] for group in problem.groups)]
    problem = problem.replace(overlap=OverlapRule(*ratio), groups=tuple(
        replace(group, times=time) for group, time in zip(problem.groups, times, strict=True)))
    overall = 1 << 60
    for stage_view in placements(problem):
        best = 1 << 60
        for actions in with_pairs(stage_view):
            best = optimum(stage_view, best, actions)
        overall = min(overall, best)
        if best == 1 << 60:
            continue
        assert placement_bound(stage_view).ns <= best
        if not mips:
            continue
        assert solve_order(stage_view, time_limit_s=5, seed=0).bound_ns <= best
        longer = sum(group.times["device"].total_ns for group in problem.groups) * 9
        assert time_indexed.bound(stage_view, makespan_ns=longer, time_limit_s=1, seed=0,
                                  max_columns=2_000).bound_ns <= best
    assume(overall < 1 << 60)
    assert problem_bound(problem).ns <= overall
    if not mips:
        return
    assert (placement_mip.free_bound(problem, time_limit_s=2, seed=0)[0] or 0) <= overall
    assert solve_exact(problem, time_limit_s=5, seed=0).bound_ns <= overall


def fused(plan: Plan, rng: random.Random) -> Plan:
    """The plan with neighbouring F and B overlapped wherever an order can be."""
    ranks = [list(order.compute) for order in plan.schedule.ranks]
    for order in ranks:
        spot = 0
        while spot + 1 < len(order):
            one, two = order[spot:spot + 2]
            forward, back = (one, two) if one.kind is ActionKind.F else (two, one)
            if (forward.kind, back.kind) == (ActionKind.F, ActionKind.B) and rng.random() < 0.8:
                both = Action(forward.stage, ActionKind.OVERLAP_F_B, forward.microbatch, (back.stage, back.microbatch))
                kept, order[spot:spot + 2] = order[spot:spot + 2], [both]
                try:
                    evaluate(view(plan.problem, plan.placement), _schedule(plan, ranks))
                except PlanError:
                    order[spot:spot + 1] = kept
            spot += 1
    return replace(plan, schedule=_schedule(plan, ranks))


def _schedule(plan: Plan, ranks: list[list[Action]]) -> Schedule:
    return Schedule(tuple(RankOrder(tuple(order), rank.collective)
                          for order, rank in zip(ranks, plan.schedule.ranks, strict=True)))


def test_bounds_are_below_random_schedules_with_pairs():
    """Branches, loads, collectives, two device kinds, recomputation, replicas: every kind of problem there is."""
    pairs = 0
    for seed in range(150):
        found = fused(random_plan(seed), random.Random(seed))
        pairs += found.schedule.has_pairs
        stages = view(found.problem, found.placement)
        makespan = evaluate(stages, found.schedule)[1].makespan_ns
        assert simulate(found, lower(found)).makespan_ns == makespan
        check_plan(replace(found, makespan_ns=makespan))
        assert problem_bound(found.problem).ns <= makespan, seed
        try:
            assert placement_bound(stages).ns <= makespan, seed
        except PlanError as error:
            pytest.fail(f"{seed}: {error}")
    assert pairs > 20


@settings(CASES, max_examples=4)
@given(st.sampled_from([(2, 4), (2, 6), (4, 8)]), st.sampled_from([0.6, 0.8, 1.0]), st.sampled_from([0, 0.2]),
       st.sampled_from([0, 0.7]), st.sampled_from([1.0, 1.5]), st.booleans(), st.integers(0, 9))
def test_no_schedule_of_the_product_is_below_a_bound(size, ratio, comm, last, memory, streams, seed):
    """Baselines and solves of one problem: none below a bound of any of them, ours below all within the limits."""
    ranks, microbatches = size
    if streams:
        problem = two_stream_problem(ranks=ranks, microbatches=microbatches, comm=comm, fb=92 * ratio,
                                     activations=memory * (ranks + 1))
    else:
        problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=1, i=1.2, w=0.8, comm=comm, fb=3 * ratio,
                                  last=last, activations=memory * (ranks + 1))
    ours = plan(problem, PlanOptions(time_limit_s=0.3, seed=seed, threads=1))
    assert ours.plan is not None and ours.makespan_ns is not None
    assert ours.bound_ns <= ours.placement_bound_ns <= ours.makespan_ns
    bound = max(ours.bound_ns, problem_bound(problem).ns)
    for baseline in BASELINES:
        for split in (True, False):
            try:
                other = baseline.plan(problem, split=split)
            except MipipeError:
                continue
            if other.problem == problem:  # memory limits are not a baseline's: only bounds without them hold for it
                free = problem.replace(limits=replace(problem.limits, activation_bytes=None, resident_bytes=None))
                assert problem_bound(free).ns <= other.makespan_ns
                assert placement_bound(view(free, other.placement)).ns <= other.makespan_ns
    assert bound <= ours.makespan_ns


def test_a_pair_shortens_nothing_beside_collectives():
    """There its gain is planned by operators: the pair takes the sum."""
    problem = two_stream_problem(ranks=2, microbatches=4, fb=10)
    stages = view(problem, next(propose_shapes(problem, "chain")))
    stage = stages.streams.index(Stream.COMPUTE)
    assert pair_gain(problem).ratio == 1
    assert (stages.duration_ns(ActionKind.OVERLAP_F_B, stage, 0, (stage, 1))
            == stages.duration_ns(ActionKind.F, stage, 0) + stages.duration_ns(ActionKind.B, stage, 1))


@pytest.mark.parametrize(("size", "least"), [((8, 20), 57.9), ((4, 8), 23.3)])
def test_forwards_before_the_first_gradient_are_in_no_pair(size, least):
    """8 x 20: 11.3 until rank 3 can see a gradient, 8 of its forwards until then; 12 pairs and 8 backwards remain."""
    problem = dualpipes(ranks=size[0], microbatches=size[1])
    bound = placement_bound(view(problem, next(propose_shapes(problem, "two-way"))))
    assert bound.ns / problem.unit_ns == pytest.approx(least, abs=1e-4)
    assert bound.ns <= least * problem.unit_ns


def test_the_planner_overlaps_by_itself():
    """Without a published schedule: DualPipe's blocks take 24.85 at its own placement, 23.65 is known."""
    problem = dualpipes(ranks=4, microbatches=8)
    plan(problem, PlanOptions(time_limit_s=0.2, placement="two-way", use_baselines=False))  # compiles, if nothing has
    result = plan(problem, PlanOptions(time_limit_s=1.5, placement="two-way", use_baselines=False))
    assert result.plan is not None and result.plan.schedule.has_pairs
    assert result.makespan_ns <= 24 * problem.unit_ns
    check_plan(result.plan)


@pytest.mark.slow
@pytest.mark.parametrize(("fb", "most"), [(2.55, 59.6), (2.1, 54)])
def test_never_above_a_published_schedule(fb, most):
    for placement in ("two-way", "free"):
        problem = dualpipes(fb)
        rows = compare(problem, None, PlanOptions(time_limit_s=30, placement=placement))
        assert rows[-1].makespan <= most
        assert rows[-1].bound <= rows[-1].makespan
        assert all(rows[-1].makespan <= row.makespan for row in rows if row.makespan is not None
                   and row.peak_activations <= 9 and row.parameter_copies <= 2)


def chain_plan(order: str, stages: tuple[Stage, ...] = (Stage((0, 1), (0,)),)) -> Plan:
    """Two groups in a chain on one rank, two microbatches."""
    problem = uniform_problem(ranks=1, microbatches=2, f=1, i=1, w=1, fb=2, layers=2, activations=9)
    placement = Placement(stages, tuple((0, 0) for _ in stages))
    return Plan("by hand", problem, placement, Schedule((RankOrder(tuple(map(Action.parse, order.split()))),)))


APART = (Stage((0,), (0,)), Stage((1,), (0,)))


@pytest.mark.parametrize(("order", "stages"), [
    ("(0F0;0B0)OVERLAP_F_B 0F1 0B1", (Stage((0, 1), (0,)),)),
    ("0F1 1F1 1B1 0B1 0F0 (1F0;1B0)OVERLAP_F_B 0B0", APART),
    ("0F1 1F1 1B1 0B1 1F0 (0F0;1B0)OVERLAP_F_B 0B0", APART),
    ("0F1 1F1 1B1 0B1 0F0 1B0 (1F0;0B0)OVERLAP_F_B", APART),
])
def test_a_microbatch_cannot_overlap_with_its_own_backward(order, stages):
    with pytest.raises(PlanError, match=r"overlaps microbatch 0 with its own backward: \dI0 needs \dF0 to have ended"):
        check_plan(chain_plan(order, stages))
    with pytest.raises(PlanError):
        found = chain_plan(order, stages)
        evaluate(view(found.problem, found.placement), found.schedule)


def test_one_microbatch_may_overlap_where_branches_part():
    """Two heads on one trunk: the forward of one and the backward of the other need nothing of each other."""
    check_plan(chain_plan("0F0 0F1 (0F1;0B0)OVERLAP_F_B 0B1".replace("0F1 (", "(")))
    base = uniform_problem(ranks=1, microbatches=1, f=1, i=1, w=1, fb=2, layers=2, activations=9)
    problem = base.replace(edges=())
    found = Plan("branches", problem, Placement(APART, ((0,), (0,))), Schedule((RankOrder(tuple(
        map(Action.parse, ("0F0", "(1F0;0B0)OVERLAP_F_B", "1B0")))),)))
    check_plan(found)
    assert problem_bound(problem).ns <= evaluate(view(problem, found.placement), found.schedule)[1].makespan_ns
    assert isinstance(problem.groups[0], Group) and at(problem, (0, 0)).num_stages == 2
