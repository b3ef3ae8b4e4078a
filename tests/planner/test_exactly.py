"""`plan --exact`: the literal MIP as a solve equals exhaustive search, passes the check, and refuses with a reason."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from mipipe.graphs.errors import InputError, ProblemError
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.actions import Stream
from mipipe.planner.check import check_plan
from mipipe.planner.jobs.memory import carries_bytes
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder import exactly
from mipipe.planner.ladder.admission import admit_placement
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp import highs
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.order.exact import ExactResult, solve_exact
from mipipe.planner.milp.order.exact_parts import num_jobs
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes, proposes_all
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import uniform_problem
from mipipe.planner.solve import SolveResult, Termination, plan

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import optimum, placements, problems


def _exactly(problem: PlanningProblem, seconds: float = 20.0) -> SolveResult:
    return plan(problem, PlanOptions(time_limit_s=seconds, exact=True))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problems(max_jobs=12))
def test_the_exact_plan_equals_exhaustive_search(problem: PlanningProblem) -> None:
    """Values in flight are the check's business alone: with some, a plan may be longer than the search's."""
    views = placements(problem)
    least = min(optimum(view) for view in views)
    result = _exactly(problem)
    assert result.bound_ns is not None and result.bound_ns <= least
    if result.plan is None:
        assert any(map(carries_bytes, views))
        return
    check_plan(result.plan)
    assert result.makespan_ns is not None and result.makespan_ns >= least
    if not any(map(carries_bytes, views)):
        assert result.makespan_ns == least == result.bound_ns and result.termination is Termination.OPTIMAL


def test_it_proves_what_no_bound_without_a_solver_does() -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=2, i=2, w=1, comm=1, layers=4)
    assert num_jobs(problem) == 24
    result = _exactly(problem)
    assert result.makespan_ns == result.bound_ns == 14.5 * problem.unit_ns
    assert result.termination is Termination.OPTIMAL and "bound" in result.how.highs_part
    assert [row.formulation for row in result.how.highs] == ["exact MIP"]
    assert all(len(stage.ranks) == 1 for stage in result.plan.placement.stages)  # type: ignore[union-attr]


def test_what_fits_nowhere_is_proven_infeasible() -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=2, i=2, w=1, layers=4)
    starved = problem.replace(limits=Limits(activation_bytes=2000))  # one layer's, alone
    result = _exactly(starved, 5)
    assert result.termination is Termination.INFEASIBLE and "one replica of each group" in result.reason
    assert "2000 bytes lack" in result.reason and "raise the activation limit to" in result.reason


def _in_flight(cap: int) -> PlanningProblem:
    """Two groups that save 4 bytes and exchange 2: the model may plan up to the last byte, and values need more."""
    groups = tuple(Group(f"g{n}", {"device": PhaseTimes(2, 2, 1)}, saved_fi_bytes=4, resident_bytes=1)
                   for n in range(2))
    return PlanningProblem("flight", groups, (GroupEdge(0, (1,), 2, 2, "v"),),
                           Topology.uniform(2, latency_ns=1, bytes_per_s=10**9), 3, limits=Limits(activation_bytes=cap))


def test_values_in_flight_take_memory_and_the_bound_stays() -> None:
    result = _exactly(_in_flight(12))
    assert result.plan is not None and result.bound_ns is not None and result.makespan_ns is not None
    check_plan(result.plan)
    assert result.bound_ns == 23 < result.makespan_ns
    none = _exactly(_in_flight(7))
    assert none.plan is None and "leaves out values in flight" in none.reason and none.bound_ns == 43


def _held(problem: PlanningProblem) -> PlanningProblem:
    return problem.replace(groups=tuple(replace(group, stream=Stream.COLLECTIVE, saved_fi_bytes=1) if n == 1 else group
                                        for n, group in enumerate(problem.groups)))


SMALL = uniform_problem(ranks=2, microbatches=2, f=2, i=2, w=1, layers=2)
AGAIN = SMALL.replace(groups=tuple(replace(group, recompute_bytes=1) for group in SMALL.groups))


@pytest.mark.parametrize(("problem", "words"), [
    (uniform_problem(ranks=8, microbatches=20, f=2, i=2, w=1, layers=8), "480 jobs .* at most 100 and proves about 40"),
    (uniform_problem(ranks=16, microbatches=1, f=1, i=1, w=1, layers=32), "126,976 products .* at most 20,000"),
    (AGAIN, "does not run forwards again"),
    (_held(SMALL), "no memory for groups of the collective stream"),
])
def test_it_refuses_with_the_reason(problem: PlanningProblem, words: str) -> None:
    with pytest.raises(ProblemError, match=words):
        _exactly(problem, 2)


@pytest.mark.parametrize("options", [{"placement": "v"}, {"use_milp": False}])
def test_it_decides_the_placement_itself(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="exact: it decides the placement itself"):
        plan(SMALL, PlanOptions(exact=True, **options))  # type: ignore[arg-type]


def test_recomputation_may_be_switched_off() -> None:
    result = plan(AGAIN, PlanOptions(time_limit_s=10, exact=True, recompute=False))
    assert result.plan is not None and not any(stage.recompute for stage in result.plan.placement.stages)


def _far_apart(times: list[tuple[int, int | None, int | None]], edges: list[tuple[int, tuple[int, ...], int]],
               ranks: int, microbatches: int, links: dict[str, int]) -> PlanningProblem:
    """Durations from nanoseconds to days; ``edges``: (source, targets, bytes), a million take a millisecond."""
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(*of)}, saved_fi_bytes=3) for n, of in enumerate(times))
    link = Link(0, 10**9)
    topology = Topology(tuple(Device(f"d{rank}", "d", 1 << 50, local_rank=rank) for rank in range(ranks)), link, link,
                        {key: Link(value) for key, value in links.items()})
    made = tuple(GroupEdge(source, targets, size, 1, f"v{n}") for n, (source, targets, size) in enumerate(edges))
    return PlanningProblem("far apart", groups, made, topology, microbatches)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("times", [[(3, 7, 10), (10**9, 0, 0), (0, 7, None)], [(10, 10, 10), (10, 10, 10)]])
def test_times_are_far_apart(times: list[tuple[int, int | None, int | None]], seed: int) -> None:
    """A link of 10^15 ns makes 10^9 ns one unit of the model: no bound is rounded up to a whole one, and jobs shorter
    than the solver's tolerances have an order that runs."""
    edges = [(n, (n + 1,), 10**6 * (n == 0)) for n in range(len(times) - 1)]
    problem = _far_apart(times, edges, 4, 3, {"0->1": 10**15, "1->2": 10**12, "2->1": 10**12})
    result = solve_exact(problem, time_limit_s=5.0, seed=seed)
    assert result.bound_ns <= 3 * sum(phase or 0 for of in times for phase in of)  # all on one device
    assert result.placement is not None and result.schedule is not None
    assert evaluate(view(problem, result.placement), result.schedule)[1].makespan_ns == result.makespan_ns


def _alone(problem: PlanningProblem) -> PlanningProblem:
    """The problem with no room for a second replica of any group, and without bytes that joining groups may save."""
    return problem.replace(groups=tuple(replace(group, single=True) for group in problem.groups),
                           edges=tuple(replace(edge, num_bytes=0, grad_bytes=None if edge.grad_bytes is None else 0)
                                       for edge in problem.edges))


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problems(max_jobs=12))
def test_a_solve_of_a_small_problem_ends_with_the_proof(problem: PlanningProblem) -> None:
    """Where one replica of each group is all there can be, the loop's plan is the shortest, and known to be."""
    problem = _alone(problem)
    result = plan(problem, PlanOptions(time_limit_s=20))
    assert result.makespan_ns == result.bound_ns == min(optimum(view) for view in placements(problem))
    assert result.termination is Termination.OPTIMAL and result.seconds < 15


def test_with_replicas_the_exact_bound_is_not_taken_by_the_loop() -> None:
    """Three copies of the model, a microbatch each, are shorter than anything with one replica of each group."""
    problem = uniform_problem(ranks=3, microbatches=3, f=2, i=2, w=1, comm=1, layers=3, copies=3, activations=9)
    alone = _exactly(problem)
    result = plan(problem, PlanOptions(time_limit_s=2))
    assert alone.bound_ns is not None and result.makespan_ns is not None and result.bound_ns is not None
    assert result.bound_ns <= result.makespan_ns == 15 * problem.unit_ns < alone.bound_ns


@pytest.mark.parametrize(("own", "large"), [((1, None, None), (20, None, None)), ((1, 1, 1), (20, 20, 10))])
def test_where_a_joined_stage_lets_a_value_pass_the_bound_is_not_taken(
        own: tuple[int, int | None, int | None], large: tuple[int, int | None, int | None]) -> None:
    """Apart, the small reader's large value holds the channel first; a stage of both makers may send it last."""
    names, times = ("g1", "g2", "big", "small"), (own, own, large, own)
    groups = tuple(Group(name, {"d": PhaseTimes(*of)}, resident_bytes=10)
                   for name, of in zip(names, times, strict=True))
    back = None if own[1] is None else 1
    edges = (GroupEdge(0, (1,), 0, back and 0, "a"), GroupEdge(0, (3,), 10, back, "b"),
             GroupEdge(1, (2,), 1, back, "c"))
    problem = PlanningProblem("passing", groups, edges, Topology.uniform(2, bytes_per_s=10**9, kind="d"), 1,
                              limits=Limits(resident_bytes=20), colocate=((0, 1), (2, 3)))
    stages = (Stage((0, 1), (0,)), Stage((2,), (1,)), Stage((3,), (1,)))
    passing = optimum(view(problem, Placement(stages, ((0,), (1,), (1,)))))
    assert solve_exact(problem, time_limit_s=10, seed=0).bound_ns > passing
    for options in (PlanOptions(time_limit_s=1), PlanOptions(time_limit_s=1, exact=True)):
        result = plan(problem, options)
        assert result.bound_ns is not None and result.bound_ns <= passing


@pytest.mark.parametrize(("sizes", "room", "limit"), [
    ((40 * 10**9, 40 * 10**9 + 1), 80 * 10**9, None), ((40 * 10**9, 40 * 10**9 + 1000), 80 * 10**9, None),
    ((3 * 10**12, 1), 10**13, 3 * 10**12), ((0, 1), 1, None)])
def test_weights_fit_to_the_byte(sizes: tuple[int, ...], room: int, limit: int | None) -> None:
    """Both groups on one device would be shorter, and lack less than a solver's tolerance."""
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(5, 5, 5)}, resident_bytes=size) for n, size in enumerate(sizes))
    topology = Topology((Device("a", "d", room), Device("b", "d", room, local_rank=1)), Link(50), Link(50))
    problem = PlanningProblem("bytes", groups, (GroupEdge(0, (1,), 0, 0, "v"),), topology, 2,
                              limits=Limits(resident_bytes=limit))
    together = sum(sizes) <= min(room, limit or room)
    for options in (PlanOptions(time_limit_s=3), PlanOptions(time_limit_s=5, exact=True)):
        result = plan(problem, options)
        assert result.plan is not None
        check_plan(result.plan)
        assert together or len({rank for stage in result.plan.placement.stages for rank in stage.ranks}) == 2


UNEVEN = ((9, 6, 3), (9, 4, 6), (5, 8, 6), (6, 8, 1), (4, 3, 1), (9, 6, 1))
HALVES = ((8, 4, 6), (8, 8, 1), (3, 8, 1), (5, 9, 1), (4, 8, 3), (7, 7, 3))
"""Both halves take as long; no two layers are equal."""


@pytest.mark.parametrize("times, shape, ranks", [
    (UNEVEN, "chain", (0, 1)), (UNEVEN, "v", (0, 1, 1, 0)), (HALVES, "chain", (0, 1))])
def test_a_shape_that_can_be_cut_in_several_ways_is_not_proven_by_some(
        times: tuple[tuple[int, int, int], ...], shape: str, ranks: tuple[int, ...]) -> None:
    """No cut is below the bound of a solve for the shape, and the best is found; of six uneven layers."""
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(*of)}, resident_bytes=1) for n, of in enumerate(times))
    problem = PlanningProblem("cuts", groups, tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(5)),
                              Topology.uniform(2, latency_ns=1, kind="d"), 1)
    best = min(optimum(view(problem, Placement(tuple(Stage(tuple(range(low, high)), (rank,)) for low, high, rank in zip(
        (0, *cut), (*cut, 6), ranks, strict=True)), tuple((rank,) for rank in ranks))))
        for cut in itertools.combinations(range(1, 6), len(ranks) - 1))
    result = plan(problem, PlanOptions(time_limit_s=2, placement=shape))  # type: ignore[arg-type]
    assert result.bound_ns is not None and result.bound_ns <= best == result.makespan_ns
    assert result.plan is not None and result.plan.placement.name == shape


def test_equal_layers_on_unequal_devices_can_be_cut_in_several_ways() -> None:
    """The published cut is even; where one device is slower others may be shorter, and there is no bound over them."""
    problem = uniform_problem(ranks=4, microbatches=64, f=1, i=1, w=1, layers=8)
    devices = tuple(replace(device, kind="slow" if n else device.kind) for n, device in enumerate(
        problem.topology.devices))
    groups = tuple(replace(group, times={**group.times, "slow": PhaseTimes(2, 2, 2)}) for group in problem.groups)
    mixed = problem.replace(groups=groups, topology=replace(problem.topology, devices=devices))
    assert proposes_all(problem, "chain") and not proposes_all(mixed, "chain") and not proposes_all(problem, "free")


def test_a_stopped_solve_of_an_overfull_plan_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(5, 5, 5)}, resident_bytes=size)
                   for n, size in enumerate((40 * 10**9, 40 * 10**9 + 1)))
    problem = PlanningProblem("bytes", groups, (GroupEdge(0, (1,), 0, 0, "v"),),
                              Topology.uniform(2, latency_ns=50, kind="d", memory_bytes=80 * 10**9), 2)
    assert solve_exact(problem, time_limit_s=10, seed=0).placement is not None
    calls, usual = [], highs.solve

    def stopped(*args: Any, **options: Any) -> SolverOutcome:
        calls.append(usual(*args, **options))
        return replace(calls[-1], termination=SolverStatus.INTERRUPTED)

    monkeypatch.setattr(highs, "solve", stopped)
    result = solve_exact(problem, time_limit_s=10, seed=0)
    assert len(calls) == 1 and result.placement is None and result.outcome.termination is SolverStatus.INTERRUPTED


def test_what_others_found_meanwhile_begins_no_search_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annealing goes on beside the model: a shorter plan need not be the model's."""
    run = Run(_alone(SMALL), PlanOptions(time_limit_s=100, threads=1))
    found = admit_placement(run, next(propose_shapes(run.problem, "chain")))
    assert found is not None and found.best is not None

    def beside(*args: Any, **options: Any) -> ExactResult:
        found.best = replace(found.best, makespan_ns=found.makespan_ns - 1)
        outcome = SolverOutcome(SolverStatus.TIME_LIMIT, None, None, 0.1, 1, 1)
        return ExactResult(None, None, None, 1, outcome)

    monkeypatch.setattr(exactly, "solve_exact", beside)
    monkeypatch.setattr(exactly.order_rungs, "seed", lambda *_: pytest.fail("seeded"))
    deciding, before = exactly.Deciding(run, run.problem), run.makespan_ns
    assert deciding.step(1.0) and run.makespan_ns == before - 1 and deciding.open

