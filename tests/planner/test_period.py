"""Steps without a barrier: the period of published schedules, of concatenated orders, and of plans made for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.check import check_plan
from mipipe.planner.execution.steps import period_of, step_ends
from mipipe.planner.jobs.arrays import build, with_mirrors
from mipipe.planner.jobs.rank_clocks import offsets, on_rank_clocks
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder.period import _job, _repeat, climb, period_bound
from mipipe.planner.ladder.period_entry import enter_period, orders_of_schedule
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.search.best_list import best_list
from mipipe.planner.solve import Termination, plan


def _named(name: str, problem: PlanningProblem, split: bool = True) -> Plan:
    return next(baseline for baseline in BASELINES if baseline.name == name).plan(problem, split=split)


def _busiest(found: Plan) -> int:
    instance = build(view(found.problem, found.placement))
    return int(np.bincount(instance.machine, weights=instance.dur).max())


def test_zero_bubble_has_none_from_step_to_step() -> None:
    """ZB-H2 with F = I = W: no rank idles between its first action and its last, though the makespan has a bubble."""
    problem = uniform_problem(ranks=4, microbatches=12, f=1, i=1, w=1, layers=4, activations=8, copies=1)
    found = _named("ZB-H2", problem)
    assert period_of(found) == 36 * problem.unit_ns < (found.makespan_ns or 0)


@pytest.mark.parametrize(("name", "printed"), [("ZB-H1", 0.1585), ("ZB-H2", 0.1083)])
def test_the_papers_printed_bubbles_are_periods(name: str, printed: float) -> None:
    """1.5B on 8 stages, 24 microbatches (arXiv 2401.10241, table 4), to all four decimals."""
    problem = uniform_problem(ranks=8, microbatches=24, f="18.522", i="18.086", w="9.337", comm="0.601", layers=8,
                              activations=16, copies=1)
    work = 24 * (18.522 + 18.086 + 9.337) * problem.unit_ns
    assert round(1 - work / period_of(_named(name, problem)), 4) == printed


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "ZB-H1", "ZB-V", "V-Half", "DualPipe"])
def test_a_step_takes_what_the_same_orders_behind_each_other_take(name: str) -> None:
    """Three steps are one step of three times the microbatches in which every rank's order is written thrice."""
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=3)
    found = _named(name, problem)
    times, count = 3, problem.num_microbatches
    orders = tuple(RankOrder(tuple(replace(action, microbatch=action.microbatch + turn * count,
                                           partner=action.partner and (action.partner[0],
                                                                       action.partner[1] + turn * count))
                                   for turn in range(times) for action in order.compute))
                   for order in found.schedule.ranks)
    placement = replace(found.placement, routes=tuple(route * times for route in found.placement.routes))
    long = view(problem.replace(num_microbatches=times * count), placement)
    compiled, evaluation = evaluate(long, Schedule(orders))
    ends = step_ends(view(problem, found.placement), found.schedule, times)
    for turn in range(len(ends)):
        last = [max(evaluation.starts[node] + compiled.durations[node] for node, action in enumerate(compiled.actions)
                    if compiled.ranks[node] == rank and turn * count <= action.microbatch < (turn + 1) * count)
                for rank in range(4)]
        assert ends[turn] == last
    assert _busiest(found) <= period_of(found) <= (found.makespan_ns or 0)


@pytest.mark.parametrize("name", ["1F1B", "ZB-H2", "ZB-V", "DualPipe", "Interleaved 1F1B"])
def test_the_makespan_on_the_ranks_clocks_is_no_shorter_than_the_period(name: str) -> None:
    """Nothing begins before what it reads, on any clock; on them a schedule's makespan bounds its period."""
    problem = uniform_problem(ranks=4, microbatches=12, f=3, i=4, w=2, comm=1, activations=50)
    found = _named(name, problem)
    instance = build(view(problem, found.placement))
    shifted = on_rank_clocks(instance)
    source = np.repeat(np.arange(instance.size), np.diff(instance.succ_ptr))
    assert (shifted.lag + instance.dur[source] >= 0).all()
    assert (np.sort(shifted.lag) == np.sort(shifted.pred_lag)).all()
    assert offsets(instance).min() == 0
    orders = orders_of_schedule(shifted, found.schedule)
    assert orders is not None and period_of(found) <= orders.makespan_ns


def test_a_plan_for_the_period_beats_zb_h2_within_its_memory() -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=1, activations=8, copies=1)
    rival = period_of(_named("ZB-H2", problem))
    result = plan(problem, PlanOptions(time_limit_s=1, objective="period", use_baselines=False))
    assert result.plan is not None and result.period_ns is not None and result.period_bound_ns is not None
    check_plan(result.plan)
    assert result.period_ns == period_of(result.plan) < rival
    assert period_bound(problem).ns == result.period_bound_ns == 8 * 30 * problem.unit_ns <= result.period_ns
    assert result.plan.provenance["period"] == {"period_ns": result.period_ns, "bound_ns": result.period_bound_ns}
    assert (result.termination is Termination.OPTIMAL) == (result.period_ns == result.period_bound_ns)
    assert result.how.highs_part == () and result.makespan_ns >= result.period_ns  # type: ignore[operator]


def test_a_short_step_with_its_middle_repeated_is_a_step_of_all_microbatches() -> None:
    """Valid, within memory, and where the short step has no idle time the long one has hardly any."""
    problem = uniform_problem(ranks=2, microbatches=18, f=10, i=12, w=7, comm=1, activations=4, copies=1, layers=4)
    run = Run(problem, PlanOptions(time_limit_s=20, objective="period"))
    entry = enter_period(run, view(problem, next(propose_shapes(problem, "v"))))
    assert entry is not None
    for turn in range(2):  # steps of 5 and 6 microbatches
        orders = _repeat(run, entry, 0.05, turn)
        assert orders is not None
        found = Plan("long", problem, entry.candidate.placement, with_mirrors(entry.candidate.instance, orders.lists()))
        check_plan(found)
        assert period_of(found) <= orders.makespan_ns
    assert sorted(entry.shorts) == [5, 6]
    assert period_of(found) <= 1.05 * period_bound(problem).ns
    assert _repeat(Run(problem.replace(num_microbatches=4), run.options), entry, 0.05, 0) is None


def test_work_in_threads_ends_with_the_solve() -> None:
    """Repeating a middle takes seconds on a large problem: a thread that does it asks the clock of its solve."""
    problem = uniform_problem(ranks=4, microbatches=32, f=1, i=1, w=1, layers=8, copies=1)
    run = Run(problem, PlanOptions(placement="v", time_limit_s=60))
    entry = enter_period(run, view(problem, next(iter(propose_shapes(problem, "v")))))
    assert entry is not None
    with ThreadPoolExecutor(1) as pool, clock.watched(lambda: -1.0), pytest.raises(clock.OutOfTimeError):
        _job(pool, _repeat, run, entry, 0.0, 0).result()


@pytest.mark.parametrize("planned", [False, True])
def test_work_in_threads_ends_with_ctrl_c(planned: bool) -> None:
    """Whether there is a plan already or not."""
    problem = uniform_problem(ranks=4, microbatches=32, f=1, i=1, w=1, layers=8, copies=1)
    run = Run(problem, PlanOptions(placement="v", time_limit_s=60))
    entry = enter_period(run, view(problem, next(iter(propose_shapes(problem, "v")))))
    assert entry is not None and run.best is not None
    run.best, run.interrupted = run.best if planned else None, True
    with ThreadPoolExecutor(1) as pool, clock.watched(lambda: run.patience), pytest.raises(clock.OutOfTimeError):
        _job(pool, best_list, entry.candidate.instance, 0).result()


def test_what_fits_nowhere_is_infeasible_for_the_period_as_well() -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1, activations="0.1", copies=1)
    result = plan(problem, PlanOptions(time_limit_s=2, objective="period"))
    assert result.termination is Termination.INFEASIBLE and result.reason


def test_reductions_of_replicas_end_a_rank_s_step() -> None:
    """Two ranks that each hold the whole model: the period is a rank's work and the sum of the gradients."""
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, comm=1, layers=2)
    reduced = problem.replace(groups=tuple(replace(group, gradient_bytes=1000) for group in problem.groups))
    placement = Placement((Stage((0, 1), (0, 1)),), ((0, 1, 0, 1),))
    orders = tuple(RankOrder(tuple(Action(0, kind, m) for m in range(rank, 4, 2)
                                   for kind in (ActionKind.F, ActionKind.I, ActionKind.W))) for rank in range(2))
    reduction = view(reduced, placement).reduce_ns(0)
    assert reduction > 0
    assert period_of(Plan("copies", reduced, placement, Schedule(orders))) == 12 * problem.unit_ns + reduction


def test_no_period_is_longer_than_that_of_the_makespan_plan_s_own_order() -> None:
    """A plan that lists at the known shapes do not reach is the first to compare with."""
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=3, layers=8, activations=4, copies=2)
    known = _named("ZB-V", problem)
    options = PlanOptions(time_limit_s=5.0, objective="period", placement="chain", use_search=False,
                          use_baselines=False)
    alone, run = Run(problem, options), Run(problem, options)
    climb(alone)
    climb(run, known)
    assert run.period_ns <= period_of(known) < alone.period_ns
    assert run.best is not None and run.best.proposer == ("plan for the makespan",)
