"""Periodic, windows, time-indexed and placement MIPs: valid, never worse, and right where the answer is known."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from mipipe.graphs.errors import PlanError
from mipipe.planner.bounds.at_placement import placement_bound, problem_bound
from mipipe.planner.jobs.arrays import build, with_mirrors
from mipipe.planner.jobs.job_shop import elementary_actions, job_shop, peak_memory
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.milp.highs import SolverStatus
from mipipe.planner.milp.order import time_indexed, windows
from mipipe.planner.milp.order.job_shop import solve_order
from mipipe.planner.milp.periodic import pattern_mip as periodic
from mipipe.planner.milp.periodic.modulo import greedy
from mipipe.planner.milp.periodic.pattern import pattern_of
from mipipe.planner.milp.placement import shares as placement
from mipipe.planner.plan import Placement, RankOrder, Schedule, Stage
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.search.follow import followed, moments_at, squeezed

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import at, may_queue, optimum, placements, problems

SLOW = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


def chain_view(problem) -> StageView:
    return at(problem, tuple(range(problem.num_ranks)))


def v_view(problem) -> StageView:
    ranks = [*range(problem.num_ranks), *reversed(range(problem.num_ranks))]
    return at(problem, tuple(ranks))


def two_way_view(problem) -> StageView:
    last = problem.num_ranks - 1
    stages = tuple(Stage((s,), (s, last - s)) for s in range(problem.num_ranks))
    routes = tuple(tuple(s if m % 2 == 0 else last - s for m in range(problem.num_microbatches))
                   for s in range(problem.num_ranks))
    return view(problem, Placement(stages, routes))


def one_by_one(stage_view: StageView) -> Schedule:
    """Every microbatch from its first F to its last W before the next begins: always within memory."""
    actions = sorted(elementary_actions(stage_view), key=lambda a: (
        a.microbatch, "FIW".index(a.kind.value), a.stage if a.kind.value == "F" else -a.stage))
    ranks: list[list] = [[] for _ in range(stage_view.problem.num_ranks)]
    for action in actions:
        ranks[stage_view.rank(action.stage, action.microbatch)].append(action)
    return Schedule(tuple(RankOrder(tuple(order)) for order in ranks))


def unrolled(stage_view: StageView, result: periodic.PeriodicResult) -> Schedule | None:
    """The schedule of all microbatches that follows a pattern."""
    instance = build(stage_view)
    orders = squeezed(instance, moments_at(instance, result.period_ns, result.starts_ns), result.period_ns)
    return None if orders is None else with_mirrors(instance, orders.lists())


def assert_valid(stage_view: StageView, schedule: Schedule) -> int:
    """The makespan of a schedule that evaluates and keeps the memory."""
    compiled, evaluation = evaluate(stage_view, schedule)
    jobs = job_shop(stage_view, compiled.actions)
    for rank, (peak, room) in enumerate(zip(peak_memory(jobs, evaluation.starts), jobs.capacity, strict=True)):
        assert peak <= room, f"rank {rank}"
    return evaluation.makespan_ns


@pytest.mark.parametrize("activations", [3, 4, 6])
def test_chain_is_paced_at_its_load(activations):
    """With 1F1B's memory the chain runs without idle time in steady state; with less the pattern is still valid."""
    problem = uniform_problem(ranks=4, microbatches=6, f=1, i=1, w=1, layers=4, activations=activations)
    result = periodic.pace(chain_view(problem), time_limit_s=20, seed=0)
    assert result.outcome.termination is SolverStatus.OPTIMAL
    if activations >= 4:
        assert result.period_ns == 3 * problem.unit_ns
    assert result.span_ns >= (4 + 4 + 1 - 1e-3) * problem.unit_ns  # one microbatch alone: 4 F, 4 I, a W
    assert_valid(chain_view(problem), unrolled(chain_view(problem), result))


def test_one_activation_takes_a_whole_microbatch_per_period():
    """Rank 0 holds its only activation from F to W: no period is shorter than that."""
    problem = uniform_problem(ranks=3, microbatches=4, f=1, i=1, w=1, layers=3, activations=1)
    stage_view = chain_view(problem)
    alone = 3 + 3 + 1
    assert periodic.pace(stage_view, alone * problem.unit_ns * 99 // 100, time_limit_s=20,
                         seed=0).outcome.termination is SolverStatus.INFEASIBLE
    result = periodic.pace(stage_view, alone * problem.unit_ns, time_limit_s=20, seed=0)
    assert result.outcome.termination is SolverStatus.OPTIMAL


def test_two_directions_share_a_pattern():
    problem = uniform_problem(ranks=4, microbatches=8, f=2, i=2, w=1, layers=4, activations=5)
    stage_view = two_way_view(problem)
    pattern = pattern_of(stage_view)
    assert {pattern.alias[key][2] for key in pattern.keys} == {0}
    result = periodic.pace(stage_view, time_limit_s=30, seed=0)
    assert result.period_ns == 10 * problem.unit_ns  # both directions once: two stages of 5
    for stage, kind, name in pattern.keys:
        assert result.starts_ns[stage, kind, name] == result.starts_ns[stage, kind, 0]
    assert assert_valid(stage_view, unrolled(stage_view, result)) >= 42 * problem.unit_ns


def test_greedy_patterns_keep_every_rule():
    """Data, machines in every period and memory, checked here by hand; refused where the memory is too small."""
    problem = uniform_problem(ranks=4, microbatches=8, f=3, i=4, w=2, comm=1, layers=8, activations=6, copies=1)
    pattern = pattern_of(v_view(problem))
    period = pattern.load * 5 // 4
    times = greedy(pattern, period)
    assert times is not None
    for a, b, lag in pattern.arcs:
        assert times[b] >= times[a] + pattern.duration[a] + lag
    for machine in set(pattern.machine.values()):
        spans = [(times[key] % period, pattern.duration[key]) for key, where in pattern.machine.items()
                 if where == machine]
        for k, (begin, size) in enumerate(spans):
            for other, length in spans[k + 1:]:
                assert (other - begin) % period >= size and (begin - other) % period >= length
    limits = type(problem.limits)(problem.limits.resident_bytes, problem.limits.activation_bytes // 4)
    assert greedy(pattern_of(v_view(problem.replace(limits=limits))), period) is None


def test_stages_on_many_ranks_rove():
    """A head spread over all ranks belongs to no machine's pattern; its work counts in the period."""
    problem = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4, last="0.4", copies=2, activations=6)
    stages = (*(Stage((s,), (s,)) for s in range(4)), Stage((4,), (0, 1, 2, 3)))
    routes = (*((s,) * 8 for s in range(4)), tuple(m % 4 for m in range(8)))
    stage_view = view(problem, Placement(stages, routes))
    result = periodic.pace(stage_view, time_limit_s=20, seed=0)
    assert result.period_ns == pytest.approx(3.3 * problem.unit_ns)
    assert_valid(stage_view, unrolled(stage_view, result))


def test_two_streams_are_paced():
    """MoE chunks: the period is the larger of the two streams' loads, which overlap."""
    problem = two_stream_problem(ranks=2, microbatches=6, activations=4, copies=1)
    stages = [tuple(range(8))[k] for k in range(8)]
    stage_view = at(problem, tuple(g // 4 for g in stages))
    result = periodic.pace(stage_view, time_limit_s=30, seed=0)
    assert result.period_ns is not None and result.period_ns >= 60 * problem.unit_ns
    assert_valid(stage_view, unrolled(stage_view, result))


@SLOW
@given(problems(max_microbatches=3, max_jobs=18))
def test_unrolled_patterns_are_valid(problem):
    for stage_view in placements(problem)[-1:]:
        result = periodic.pace(stage_view, time_limit_s=5, seed=0)
        assume(result.starts_ns is not None)
        schedule = unrolled(stage_view, result)
        assert schedule is not None
        assert assert_valid(stage_view, schedule) >= placement_bound(stage_view).ns


def test_following_a_pattern_never_blocks_on_memory():
    """Priorities that ask for all forwards first still keep the memory and finish."""
    problem = uniform_problem(ranks=2, microbatches=6, f=1, i=1, w=1, layers=4, activations=2, copies=1)
    stage_view = v_view(problem)
    result = periodic.pace(stage_view, time_limit_s=20, seed=0)
    instance = build(stage_view)
    moments = moments_at(instance, result.period_ns, result.starts_ns)
    orders = followed(instance, moments, moments - 1e12 * (instance.kind == 0), 0)
    assert orders is not None
    schedule = with_mirrors(instance, orders.lists())
    assert sum(len(order.compute) for order in schedule.ranks) == instance.size
    assert_valid(stage_view, schedule)


@SLOW
@given(problems(max_microbatches=3, max_jobs=14))
def test_windows_are_never_worse_and_reach_small_optima(problem):
    """A window over everything is the exact order problem."""
    stage_view = placements(problem)[-1]
    best = optimum(stage_view)
    assume(best < 1 << 60)
    start = one_by_one(stage_view)
    before = assert_valid(stage_view, start)
    schedule, makespan, count = windows.improve_by_windows(stage_view, start, window=5, time_limit_s=10, seed=0)
    assert assert_valid(stage_view, schedule) == makespan <= before
    assert (count > 0) == (makespan < before)
    _, all_free, _ = windows.improve_by_windows(stage_view, start, window=100, time_limit_s=20, seed=0)
    assert all_free == best


def test_windows_stop_at_the_target():
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, layers=2, activations=2)
    start = one_by_one(chain_view(problem))
    _, makespan, count = windows.improve_by_windows(chain_view(problem), start, window=50, time_limit_s=20, seed=0,
                                                    target_ns=10**12)
    assert count == 0 and makespan == evaluate(chain_view(problem), start)[1].makespan_ns


@SLOW
@given(problems(max_microbatches=3, max_jobs=14))
def test_time_indexed_proves_small_optima(problem):
    stage_view = placements(problem)[-1]
    best = optimum(stage_view)
    assume(best < 1 << 60)
    start = evaluate(stage_view, one_by_one(stage_view))[1].makespan_ns
    result = time_indexed.bound(stage_view, makespan_ns=start, time_limit_s=20, seed=0)
    assert result.bound_ns <= best
    if not may_queue(problem):  # queues on channels are left out of the model
        assert result.bound_ns == best == (start if result.makespan_ns is None else result.makespan_ns)
    if result.schedule is not None:
        assert assert_valid(stage_view, result.schedule) == result.makespan_ns


def test_time_indexed_proves_27():
    """F = I = W = 1, 4 ranks, 8 microbatches, 4 activations: 27, found and proven from a poor start."""
    problem = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4, activations=4)
    result = time_indexed.bound(chain_view(problem), makespan_ns=30 * problem.unit_ns, time_limit_s=60, seed=0)
    assert (result.bound_ns, result.makespan_ns) == (27 * problem.unit_ns, 27 * problem.unit_ns)


def test_time_indexed_relaxation_beats_the_combinatorial_bound_on_any_grid():
    """V of 4 half-stages on 2 ranks with one activation: memory binds both stages together."""
    problem = uniform_problem(ranks=2, microbatches=4, f=2, i=2, w=2, layers=4, activations=1, copies=1)
    stage_view = v_view(problem)
    exact = solve_order(stage_view, time_limit_s=60, seed=0)
    assert exact.outcome.termination is SolverStatus.OPTIMAL
    fine = time_indexed.bound(stage_view, makespan_ns=exact.makespan_ns, time_limit_s=20, seed=0)
    assert fine.bound_ns == exact.makespan_ns
    coarse = time_indexed.bound(stage_view, makespan_ns=exact.makespan_ns, time_limit_s=2, seed=0, max_columns=200)
    assert placement_bound(stage_view).ns <= coarse.bound_ns <= exact.makespan_ns


@SLOW
@given(problems(max_groups=3, max_jobs=12))
def test_placement_bound_holds_over_all_placements(problem):
    best = min(optimum(stage_view) for stage_view in placements(problem))
    assume(best < 1 << 60)
    found, outcome = placement.free_bound(problem, time_limit_s=20, seed=0)
    assert outcome.termination is SolverStatus.OPTIMAL
    assert found <= best


def test_placement_balances_and_orders_heads():
    """Four equal stages on four devices, one copy: one each; the last starts three forwards late."""
    problem = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4, copies=1, activations=100)
    found = placement.propose_by_mip(problem, time_limit_s=20, seed=0)
    assert found[0].estimate_ns == pytest.approx(27 * problem.unit_ns, rel=1e-4)
    assert sorted(rank for stage in found[0].placement.stages for rank in stage.ranks) == [0, 1, 2, 3]
    bounds = [proposal.bound_ns for proposal in found if proposal.bound_ns is not None]
    assert bounds and max(bounds) <= 27 * problem.unit_ns


def test_replicas_share_the_work():
    """Three equal layers on two devices: one replica each leaves loads 2 : 1, a replica of one layer evens them."""
    problem = uniform_problem(ranks=2, microbatches=8, f=1, i=1, w=1, layers=3, copies=2, activations=100)
    alone = placement.propose_by_mip(problem, time_limit_s=10, seed=0, count=1)[0]
    shared = placement.propose_by_mip(problem, time_limit_s=10, seed=0, count=1, max_replicas=2)[0]
    assert shared.estimate_ns < alone.estimate_ns
    assert any(len(stage.ranks) == 2 for stage in shared.placement.stages)
    stage_view = view(problem, shared.placement)
    loads = [0, 0]
    for action in elementary_actions(stage_view):
        loads[stage_view.rank(action.stage, action.microbatch)] += stage_view.duration_ns(
            action.kind, action.stage, action.microbatch)
    assert max(loads) - min(loads) <= 3 * problem.unit_ns


def test_contiguous_pieces_follow_the_devices():
    problem = uniform_problem(ranks=3, microbatches=6, f=1, i=1, w=1, layers=7, copies=3)
    found = placement.propose_by_mip(problem, time_limit_s=10, seed=0, count=2, contiguous=True)
    for proposal in found:
        ranks = [stage.ranks[0] for stage in proposal.placement.stages]
        assert ranks == sorted(ranks)


def test_memory_keeps_units_apart():
    """What does not fit one device is spread, and where nothing fits the MIP says so."""
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, layers=4, copies=1)
    for proposal in placement.propose_by_mip(problem, time_limit_s=10, seed=0):
        held = view(problem, proposal.placement).resident_bytes
        assert max(held) <= problem.limits.resident_bytes
    limits = type(problem.limits)(problem.limits.resident_bytes // 2, None)
    found, outcome = placement.free_bound(problem.replace(limits=limits), time_limit_s=10, seed=0)
    assert outcome.termination is SolverStatus.INFEASIBLE and found is None
    assert placement.propose_by_mip(problem.replace(limits=limits), time_limit_s=10, seed=0) == []


def test_colocated_groups_share_routes():
    problem = two_stream_problem(ranks=2, microbatches=4, copies=2, activations=6)
    for proposal in placement.propose_by_mip(problem, time_limit_s=10, seed=0, max_replicas=2, count=2):
        stage_view = view(problem, proposal.placement)
        route = {}
        for stage, members in enumerate(proposal.placement.stages):
            for group in members.groups:
                route[group] = proposal.placement.routes[stage]
        for members in problem.colocate:
            assert len({route[group] for group in members}) == 1
        assert_valid(stage_view, one_by_one_streams(stage_view))
        assert math.isfinite(proposal.estimate_ns)
        assert proposal.estimate_ns >= problem_bound(problem).ns * 0.5


def one_by_one_streams(stage_view: StageView) -> Schedule:
    """`one_by_one` with each action on its stage's stream."""
    from mipipe.planner.actions import Stream
    plain = one_by_one(stage_view)
    return Schedule(tuple(RankOrder(
        tuple(a for a in order.compute if stage_view.streams[a.stage] is Stream.COMPUTE),
        tuple(a for a in order.compute if stage_view.streams[a.stage] is Stream.COLLECTIVE)) for order in plain.ranks))


def test_order_of_a_schedule_that_deadlocks_is_refused():
    problem = uniform_problem(ranks=2, microbatches=1, f=1, i=1, w=1, layers=2)
    stage_view = chain_view(problem)
    good = one_by_one(stage_view)
    backwards = Schedule(tuple(RankOrder(tuple(reversed(order.compute))) for order in good.ranks))
    with pytest.raises(PlanError, match="deadlock"):
        evaluate(stage_view, backwards)
