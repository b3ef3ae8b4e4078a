"""The order MIP and the exact MIP against exhaustive search, against each other and on published optima."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from mipipe.graphs.errors import PlanError, ProblemError
from mipipe.graphs.topology import Topology
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.at_placement import placement_bound, problem_bound
from mipipe.planner.jobs.job_shop import job_shop, peak_memory, relabel
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate, run_orders
from mipipe.planner.milp.highs import SolverStatus
from mipipe.planner.milp.order.exact import solve_exact
from mipipe.planner.milp.order.job_shop import solve_order
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import at, may_queue, optimum, placements, problems

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def chain(problem: PlanningProblem):
    """Group g on rank g."""
    return at(problem, tuple(range(problem.num_ranks)))


@SLOW
@given(problems())
def test_order_equals_exhaustive_search(problem):
    """FIFO, memory arcs, window fixing and big-M lose nothing: the makespan is the exhaustive optimum."""
    for stage_view in placements(problem)[-2:]:
        best = optimum(stage_view)
        assume(best < 1 << 60)
        result = solve_order(stage_view, time_limit_s=30, seed=0)
        assert result.outcome.termination is SolverStatus.OPTIMAL
        assert result.makespan_ns == best == result.bound_ns
        assert placement_bound(stage_view).ns <= best
        compiled, evaluation = evaluate(stage_view, result.schedule)
        jobs = job_shop(stage_view, compiled.actions)
        assert all(peak <= room for peak, room in zip(peak_memory(jobs, evaluation.starts), jobs.capacity, strict=True))


@SLOW
@given(problems(max_jobs=9))
def test_exact_equals_exhaustive_search_over_placements(problem):
    best = min(optimum(stage_view) for stage_view in placements(problem))
    assume(best < 1 << 60)
    result = solve_exact(problem, time_limit_s=60, seed=0)
    assert result.outcome.termination is SolverStatus.OPTIMAL
    assert result.bound_ns <= best <= result.makespan_ns
    assert problem_bound(problem).ns <= best
    if not may_queue(problem):  # otherwise the clock's queue is one of the orders the MIP allows
        assert result.makespan_ns == best == result.bound_ns


@SLOW
@given(problems(max_jobs=12))
def test_exact_and_order_agree(problem):
    """At the placement the exact MIP chose, the order MIP finds the same makespan."""
    result = solve_exact(problem, time_limit_s=60, seed=0)
    assume(result.placement is not None and result.outcome.termination is SolverStatus.OPTIMAL)
    fixed = solve_order(view(problem, result.placement), time_limit_s=30, seed=0)
    assert fixed.makespan_ns <= result.makespan_ns
    assert fixed.makespan_ns >= result.bound_ns


def test_chain_optimum():
    """F = I = W = 1, P ranks, memory of 1F1B: ZB-H1's makespan 3M + P - 1 (bubble P - 1), proven without a start."""
    problem = uniform_problem(ranks=3, microbatches=5, f=1, i=1, w=1, layers=3, activations=3)
    result = solve_order(chain(problem), time_limit_s=120, seed=0)
    assert result.outcome.termination is SolverStatus.OPTIMAL
    assert result.makespan_ns == result.bound_ns == 17 * problem.unit_ns


def test_start_is_kept_and_improved():
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, layers=2, activations=2)
    stage_view = chain(problem)
    slow = solve_order(stage_view, time_limit_s=30, seed=0, split_backward=False)
    assert {action.kind.value for action in slow.schedule.actions()} == {"F", "B"}
    fast = solve_order(stage_view, time_limit_s=30, seed=0)
    assert fast.makespan_ns < slow.makespan_ns
    again = solve_order(stage_view, time_limit_s=30, seed=0, start=fast.schedule)
    assert (again.schedule, again.makespan_ns) == (fast.schedule, fast.makespan_ns)
    assert again.outcome.termination is SolverStatus.OPTIMAL


def test_a_horizon_below_the_optimum_is_refuted():
    problem = uniform_problem(ranks=2, microbatches=3, f=1, i=1, w=1, layers=2, activations=2)
    best = solve_order(chain(problem), time_limit_s=30, seed=0).makespan_ns
    result = solve_order(chain(problem), time_limit_s=30, seed=0, horizon_ns=best - problem.unit_ns)
    assert result.schedule is None and result.outcome.termination is SolverStatus.INFEASIBLE
    assert best - problem.unit_ns < result.bound_ns <= best


def test_no_time_is_an_outcome():
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, layers=4, activations=4)
    result = solve_order(chain(problem), time_limit_s=0.05, seed=0)
    assert result.schedule is None and result.outcome.termination is SolverStatus.TIME_LIMIT
    assert result.bound_ns == placement_bound(chain(problem)).ns


def test_memory_too_small_for_one_microbatch_is_an_error():
    problem = uniform_problem(ranks=2, microbatches=3, f=1, i=1, w=1, layers=2, activations=2)
    limits = problem.limits
    tiny = problem.replace(limits=type(limits)(limits.resident_bytes, limits.activation_bytes // 4))
    with pytest.raises(PlanError, match="rank 0: 0F0 needs"):
        solve_order(chain(tiny), time_limit_s=10, seed=0)


def test_two_streams_overlap():
    """Collectives of one microbatch run beside compute of the other; a rank runs one of each at a time."""
    groups = (Group("a", {"device": PhaseTimes(2, 2, None)}),
              Group("b", {"device": PhaseTimes(2, 2, None)}, stream=Stream.COLLECTIVE))
    problem = PlanningProblem("two", groups, (GroupEdge(0, (1,)),), Topology.uniform(1), 2)
    stage_view = at(problem, (0, 0))
    result = solve_order(stage_view, time_limit_s=30, seed=0)
    assert result.makespan_ns == optimum_of_two_streams(stage_view)


def optimum_of_two_streams(stage_view) -> int:
    """Exhaustive over the orders of both streams."""
    jobs = job_shop(stage_view, fifo=False)
    machines = jobs.by_machine()
    best = 1 << 60
    for orders in itertools.product(*(itertools.permutations(members) for members in machines.values())):
        evaluation = run_orders(jobs.compiled, [list(order) for order in orders])
        if evaluation is not None:
            best = min(best, evaluation.makespan_ns)
    return best


def test_exact_keeps_colocation_and_refuses_collective_memory():
    groups = tuple(Group(f"g{g}", {"device": PhaseTimes(2, 2, 1)}) for g in range(3))
    edges = (GroupEdge(0, (1,)), GroupEdge(1, (2,)))
    problem = PlanningProblem("tied", groups, edges, Topology.uniform(2), 2, colocate=((0, 2),))
    result = solve_exact(problem, time_limit_s=60, seed=0)
    assert result.placement.routes[0] == result.placement.routes[2]
    held = Group("c", {"device": PhaseTimes(1, 1, None)}, stream=Stream.COLLECTIVE, saved_fi_bytes=1)
    with pytest.raises(ProblemError, match="collective stream"):
        solve_exact(problem.replace(groups=(groups[0], groups[1], held), colocate=()), time_limit_s=1, seed=0)


def test_relabel_restores_first_in_first_out():
    """Swapping two equal microbatches on one rank is undone, and the schedule is not slower."""
    problem = uniform_problem(ranks=2, microbatches=3, f=1, i=1, w=1, layers=2, activations=3)
    stage_view = chain(problem)
    schedule = solve_order(stage_view, time_limit_s=30, seed=0).schedule
    swap = {0: 1, 1: 0, 2: 2}
    order = schedule.ranks[0]
    renamed = type(order)(tuple(type(a)(a.stage, a.kind, swap[a.microbatch]) for a in order.compute))
    mixed = type(schedule)((renamed, schedule.ranks[1]))
    before = evaluate(stage_view, mixed)[1].makespan_ns if _runs(stage_view, mixed) else 1 << 60
    assert evaluate(stage_view, relabel(stage_view, mixed))[1].makespan_ns <= before
    assert relabel(stage_view, mixed) == relabel(stage_view, schedule)


def _runs(stage_view, schedule) -> bool:
    try:
        evaluate(stage_view, schedule)
    except PlanError:
        return False
    return True


def test_resident_bytes_beyond_the_device_are_an_error():
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1, layers=2)
    small = Topology.uniform(2, memory_bytes=1, kind="device")
    placement = Placement((Stage((0,), (0,)), Stage((1,), (1,))), ((0, 0), (1, 1)))
    with pytest.raises(PlanError, match="resident bytes"):
        solve_order(view(problem.replace(topology=small), placement), time_limit_s=1, seed=0)
