"""The parts of a bubble: they add up to what is printed, and closed forms say what each must be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mipipe.cli.printing.explained import told_what_if
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.explain.bubble import bubble_parts
from mipipe.planner.explain.what_if import WhatIf, what_if
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan, RankOrder, Schedule
from mipipe.planner.problem import PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import SolveResult, plan


def _named(name: str, problem: PlanningProblem, **how: object) -> Plan:
    return next(baseline for baseline in BASELINES if baseline.name == name).plan(problem, **how)  # type: ignore[arg-type]


def _assert_whole(found: Plan) -> None:
    """The parts of every rank add up to the simulated bubble; only what runs again may be below 0."""
    parts = bubble_parts(found)
    assert tuple(part.bubble_ns for part in parts) == simulate(found, lower(found)).bubbles_ns()
    for part in parts:
        causes = (part.warm_up_ns, part.imbalance_ns, part.transfers_ns, part.memory_ns)
        assert min(causes) >= 0 and sum(causes) + part.recomputation_ns == part.bubble_ns


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("baseline", BASELINES, ids=lambda baseline: baseline.name)
def test_the_parts_add_up_for_every_published_schedule(baseline, split: bool) -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=10, i=12, w=8, comm=3, fb=27, first="0.5", last="0.25")
    _assert_whole(baseline.plan(problem, split=split))


def test_the_parts_add_up_on_two_streams_and_for_our_own_plans() -> None:
    streams = two_stream_problem(ranks=4, microbatches=8)
    _assert_whole(_named("1F1B", streams, split=True))
    found = plan(uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, comm="0.5", activations=2, copies=1),
                 PlanOptions(time_limit_s=0.5, use_milp=False)).plan
    assert found is not None
    _assert_whole(found)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 16)])
def test_the_bubble_of_1f1b_is_all_warm_up(ranks: int, microbatches: int) -> None:
    """(P - 1) (F + B) on every rank, and nothing else."""
    problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=2, i=3, w=1, activations=100, copies=1)
    for part in bubble_parts(_named("1F1B", problem, split=False)):
        assert part.bubble_ns == part.warm_up_ns == (ranks - 1) * 6 * problem.unit_ns


def test_a_slow_last_stage_is_imbalance() -> None:
    """Its ranks wait for M times what it takes longer; the way there and back stays warm-up."""
    ranks, microbatches = 4, 8
    problem = uniform_problem(ranks=ranks, microbatches=microbatches, f=2, i=3, w=1, layers=4, activations=9, copies=1)
    slow = replace(problem.groups[-1], times={"device": PhaseTimes(*(2 * n * problem.unit_ns for n in (2, 3, 1)))})
    uneven = problem.replace(groups=(*problem.groups[:-1], slow))
    parts = bubble_parts(_named("1F1B", uneven, split=False))
    for rank, part in enumerate(parts):
        assert part.warm_up_ns == (ranks - 1) * 6 * problem.unit_ns
        assert part.imbalance_ns == (0 if rank == ranks - 1 else microbatches * 6 * problem.unit_ns)
        assert part.transfers_ns == part.memory_ns == part.recomputation_ns == 0


def test_transfers_are_what_the_same_order_takes_longer_with_them() -> None:
    near, far = (uniform_problem(ranks=4, microbatches=8, f=2, i=3, w=1, comm=comm, activations=100, copies=1)
                 for comm in (0, "0.5"))
    with_them, without = (_named("1F1B", problem, split=True) for problem in (far, near))
    assert with_them.schedule == without.schedule
    longer = (with_them.makespan_ns or 0) * near.unit_ns // far.unit_ns - (without.makespan_ns or 0)
    assert longer > 0
    assert {part.transfers_ns * near.unit_ns // far.unit_ns for part in bubble_parts(with_them)} == {longer}


def test_memory_waits_need_memory_that_is_full() -> None:
    """The same order of a chain waits for memory where that is capped; without a cap it does not."""
    tight = uniform_problem(ranks=4, microbatches=12, f=1, i=1, w=1, layers=4, activations=2, copies=1)
    found = plan(tight, PlanOptions(time_limit_s=0.4, placement="chain", use_milp=False)).plan
    assert found is not None
    parts = bubble_parts(found)
    assert min(part.memory_ns for part in parts) > 0
    ample = uniform_problem(ranks=4, microbatches=12, f=1, i=1, w=1, layers=4, activations=100, copies=1)
    loose = bubble_parts(replace(found, problem=ample))
    assert all(part.memory_ns == 0 for part in loose)
    assert [part.bubble_ns for part in loose] == [part.bubble_ns for part in parts]


def test_what_a_little_more_would_give() -> None:
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, layers=4, activations=1, copies=1)
    asked: list[PlanningProblem] = []

    def solve(changed: PlanningProblem, options: PlanOptions) -> SolveResult:
        asked.append(changed)
        return plan(changed, options)

    found = plan(problem, PlanOptions(time_limit_s=0.4, use_milp=False))
    assert found.makespan_ns is not None
    more = what_if(problem, PlanOptions(use_milp=False), found.makespan_ns, solve, seconds=0.3)
    assert [item.what for item in more] == ["one more activation", "one more device", "one more microbatch"]
    cap = problem.limits.activation_bytes or 0
    assert [changed.limits.activation_bytes for changed in asked] == [2 * cap, cap, cap]
    assert asked[1].num_ranks == 3 and asked[2].num_microbatches == 5
    assert more[0].gain is not None and more[0].gain > 0.1  # one activation at a time lets one rank work at once
    assert all(item.makespan_ns is not None and item.makespan_ns <= found.makespan_ns for item in more[:2])
    assert all(item.gain is not None and item.most is not None and item.gain <= item.most for item in more)


def test_what_was_not_found_is_not_said_to_take_longer() -> None:
    none = "nothing shorter a microbatch found in 0.5 s"
    for took, least, words in ((90, 80, "makespan 45, 10.0% less a microbatch (solved again for 0.5 s; by the bound at"
                                        " most 20.0% less)"),
                               (130, 80, f"{none}; by the bound at most 20.0% less"),
                               (None, None, none),
                               (130, 101, "no plan is shorter, by the bound")):
        item = WhatIf("one more device", took, 100.0, took, least, 0.5)
        assert told_what_if(item, 2) == f"with one more device: {words}"


def test_forwards_that_run_again_on_one_rank_are_what_the_others_wait_for() -> None:
    problem = uniform_problem(ranks=2, microbatches=6, f=2, i=3, w=1, layers=2, activations=100, copies=1)
    again = problem.replace(groups=tuple(replace(group, recompute_bytes=1) for group in problem.groups))
    plain = _named("1F1B", again, split=True)
    stages = (plain.placement.stages[0], replace(plain.placement.stages[1], recompute=True))
    placement = replace(plain.placement, stages=stages)
    order = []
    for action in plain.schedule.ranks[1].compute:
        if action.kind is ActionKind.I:
            order.append(Action(1, ActionKind.RECOMPUTE, action.microbatch))
        order.append(action)
    found = replace(plain, placement=placement,
                    schedule=Schedule((plain.schedule.ranks[0], RankOrder(tuple(order)))), makespan_ns=None)
    _assert_whole(found)
    first, last = bubble_parts(found)
    assert first.recomputation_ns == 6 * 2 * problem.unit_ns and last.recomputation_ns == 0
