"""Bounds over all placements where the warm-up decides: never above what is scheduled anywhere, and known values."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mipipe.graphs.errors import PlanError
from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner import clock
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.bounds import over_placements
from mipipe.planner.bounds.first_gradients import (
    ChainUnit,
    chain_units,
    colocated,
    common_room,
    fewest_holders,
    least_first_gradients,
    moments_of,
)
from mipipe.planner.bounds.over_placements import cheapest_hop, facts_of, problem_bound, resident_room
from mipipe.planner.how import by_highs
from mipipe.planner.jobs.arrays import with_mirrors
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.ladder.candidate import Candidate, candidate, first_orders
from mipipe.planner.milp.placement.cells import CellBound, cases_of
from mipipe.planner.milp.placement.configurations import configuration_bound
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import Group, GroupEdge, Limits, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.solve import plan

sys.path.insert(0, str(Path(__file__).parent))
from milp_cases import optimum, placements, problems


def random_chain(random: Random, unit: int = 1) -> PlanningProblem:
    """A chain of a few units, some with a collective inside, with room for replicas and little for activations; times
    are multiples of ``unit``."""
    ranks, microbatches = random.choice([2, 3, 4]), random.randint(1, 6)
    groups: list[Group] = []
    colocate = []
    for unit in range(random.randint(2, 5)):
        times = {"d": PhaseTimes(*(unit * random.randint(0, 4) for _ in range(3)))}
        size, saved = random.choice([0, 1, 1, 1, 2]), random.choice([0, 1, 1, 2])
        groups.append(Group(f"a{unit}", times, resident_bytes=size, saved_fw_bytes=saved))
        if random.random() < 0.3:
            colocate.append(tuple(range(len(groups) - 1, len(groups) + 2)))
            times = {"d": PhaseTimes(unit * random.randint(0, 3), unit * random.randint(0, 3), None)}
            groups += [Group(f"c{unit}", times, stream=Stream.COLLECTIVE),
                       Group(f"e{unit}", groups[-1].times, resident_bytes=size, saved_fi_bytes=saved)]
    total = sum(group.resident_bytes for group in groups)
    one = sum(group.saved_fi_bytes + group.saved_fw_bytes for group in groups)
    limits = Limits(resident_bytes=random.randint(-(-total // ranks), total + 1),
                    activation_bytes=random.choice([None, random.randint(max(1, one // 2), 2 * one + 2)]))
    topology = Topology.uniform(ranks, latency_ns=unit * random.choice([0, 0, 1, 2]), kind="d")
    return PlanningProblem("random", tuple(groups), tuple(GroupEdge(n, (n + 1,)) for n in range(len(groups) - 1)),
                           topology, microbatches, limits=limits, colocate=tuple(colocate))


def random_placement(random: Random, problem: PlanningProblem) -> Placement | None:
    """Units on random devices with room for them, replicas where there is more, the last units more often."""
    units, limit = colocated(problem), problem.limits.resident_bytes or 0
    used = [0] * problem.num_ranks
    owners: list[list[int]] = [[] for _ in units]
    replicas = [*[len(units) - 1] * 4, *random.choices(range(len(units)), k=5)]
    for turn, u in enumerate([*random.sample(range(len(units)), len(units)), *replicas]):
        size = sum(problem.groups[g].resident_bytes for g in units[u])
        open_to = [d for d in range(problem.num_ranks) if used[d] + size <= limit and d not in owners[u]]
        if open_to and (turn < len(units) or random.random() < 0.5):
            owners[u].append(random.choice(open_to))
            used[owners[u][-1]] += size
    if not all(owners):
        return None
    stages, routes = [], []
    for u, unit in enumerate(units):
        turn = random.randrange(4)
        route = tuple(owners[u][(m + turn) % len(owners[u])] for m in range(problem.num_microbatches))
        stages += [Stage((g,), tuple(sorted(owners[u]))) for g in unit]
        routes += [route] * len(unit)
    return Placement(tuple(stages), tuple(routes))


def first_gradients(found: Candidate, problem: PlanningProblem) -> tuple[int, int] | None:
    """The sum over devices of their first gradients on the compute stream in a list schedule, and its makespan."""
    orders = first_orders(found, compiled=True)
    if orders is None:
        return None
    actions, ran = evaluate(found.view, with_mirrors(found.instance, orders.lists()))
    first = [ran.makespan_ns] * problem.num_ranks
    for action, rank, stream, start in zip(actions.actions, actions.ranks, actions.streams, ran.starts, strict=True):
        if action.kind is not ActionKind.F and stream is Stream.COMPUTE:
            first[rank] = min(first[rank], start)
    return sum(first), ran.makespan_ns


def test_no_schedule_has_earlier_first_gradients():
    """Lists at random placements with replicas keep the sum of first gradients and every bound."""
    random, cases = Random(0), 0
    for _ in range(16):
        problem = random_chain(random)
        facts, bound = facts_of(problem), problem_bound(problem).ns
        units = chain_units(problem, durations=[facts.f, facts.i], heads=facts.head,
                            gradient_heads=facts.gradient_head, hop=cheapest_hop(problem), solid=False)
        assert units is not None
        rooms = [resident_room(problem, rank) for rank in range(problem.num_ranks)]
        least, _ = least_first_gradients(units, devices=problem.num_ranks, microbatches=problem.num_microbatches,
                                         room=common_room([unit.size for unit in units], rooms),
                                         slack=cheapest_hop(problem))
        for _ in range(3):
            placement = random_placement(random, problem)
            try:
                ran = placement and first_gradients(candidate(problem, placement), problem)
            except PlanError:
                continue  # some activations never fit
            if ran:
                assert ran[0] >= least
                assert ran[1] >= bound
                cases += 1
    assert cases > 10


def test_the_second_microbatch_waits_for_the_first():
    """Two devices, two units of which only the last fits both: its second holder sees a gradient one F of 10 later."""
    units = [ChainUnit(1, 35, ((10, 10),)), ChainUnit(1, 20, ((10, 10),))]
    assert least_first_gradients(units, devices=2, microbatches=4, room=3, slack=0)[0] == 20 + 30
    assert least_first_gradients(units, devices=2, microbatches=4, room=4, slack=0)[0] == 20 + 20
    assert least_first_gradients(units, devices=2, microbatches=4, room=2, slack=0)[0] == 20 + 35


@pytest.mark.parametrize("activations", [2, 50])
def test_groups_that_have_a_single_replica_are_bounded_as_by_memory_for_one(activations):
    """Without transfers it does not matter what keeps replicas away; with room for them the bound is lower."""
    tight = uniform_problem(ranks=4, microbatches=6, f=10, i=12, w=8, layers=8, copies=1, activations=activations)
    roomy = tight.replace(limits=replace(tight.limits, resident_bytes=4 * (tight.limits.resident_bytes or 0)))
    single = roomy.replace(groups=tuple(replace(group, single=True) for group in roomy.groups))
    assert problem_bound(single).ns == problem_bound(tight).ns > problem_bound(roomy).ns
    found = plan(single, PlanOptions(time_limit_s=1.0))
    assert found.makespan_ns is not None and found.bound_ns is not None
    assert problem_bound(single).ns <= found.bound_ns <= found.makespan_ns


def test_two_streams_with_two_copies():
    """8 x 20: with two copies of each layer a device's first gradient comes 343 after the start on average, and 180 of
    its forwards are done by then."""
    bound = problem_bound(two_stream_problem(ranks=8, microbatches=20, activations=9))
    assert bound.ns == 1362_375_000
    assert "gradients" in bound.what


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problems())
def test_configurations_are_below_the_optimum(problem):
    best = min(optimum(stage_view) for stage_view in placements(problem))
    assume(best < 1 << 60)
    assert problem_bound(problem).ns <= configuration_bound(problem, time_limit_s=2.0)[0].ns <= best


@pytest.mark.slow
def test_configurations_are_below_what_is_scheduled():
    """Random chains with replicas, collectives and little memory."""
    random = Random(1)
    for _ in range(40):
        problem = random_chain(random)
        bound = configuration_bound(problem, time_limit_s=3.0)[0].ns
        assert bound >= problem_bound(problem).ns
        for _ in range(4):
            placement = random_placement(random, problem)
            try:
                ran = placement and first_gradients(candidate(problem, placement), problem)
            except PlanError:
                continue
            assert not ran or ran[1] >= bound


def test_a_layer_for_each_device():
    """One copy, as many layers as devices: the first layer's device waits for its gradients, and W's end the step."""
    problem = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=4, copies=1, activations=2)
    bound, outcome = configuration_bound(problem, time_limit_s=10.0)
    assert bound.ns > problem_bound(problem).ns
    assert "devices" in bound.what
    assert outcome.num_variables > 0


def test_a_solve_takes_the_configurations_bound():
    """One layer a device, two streams: the plan's bound is the configuration MIP's, and says so."""
    result = plan(two_stream_problem(ranks=3, microbatches=4, copies=1, activations=2),
                  PlanOptions(time_limit_s=4.0, gap=0.0))
    assert any(row["rung"] == "configuration MIP bound" for row in result.ablation)
    assert result.plan is not None
    assert result.makespan_ns >= result.bound_ns


def refuted_below(problem: PlanningProblem, seconds: float) -> int:
    """The bound by devices' own cells, at least the one without a solver."""
    least = problem_bound(problem).ns
    found = CellBound(problem).improve(least, seconds, 0)
    assert found is None or (found.ns > least and by_highs(found.what))
    return least if found is None else found.ns


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(problems())
def test_cells_are_below_the_optimum(problem):
    best = min(optimum(stage_view) for stage_view in placements(problem))
    assume(best < 1 << 60)
    assert refuted_below(problem, 0.5) <= best


@pytest.mark.slow
def test_cells_are_below_what_is_scheduled():
    """Random chains with replicas, collectives, units without bytes and little memory."""
    random, raised = Random(2), 0
    for _ in range(16):
        problem = random_chain(random, 1000)
        bound = refuted_below(problem, 1.0)
        raised += bound > problem_bound(problem).ns
        for _ in range(4):
            placement = random_placement(random, problem)
            try:
                ran = placement and first_gradients(candidate(problem, placement), problem)
            except PlanError:
                continue
            assert not ran or ran[1] >= bound
    assert raised > 0


def test_moments_of_gradients_are_those_of_the_least_sum():
    """Two units of one byte each, four devices, six bytes: with one holder of the fewest up to four of the other."""
    units = [ChainUnit(1, 35, ((10, 10),)), ChainUnit(1, 20, ((10, 10),))]
    assert list(fewest_holders(units, devices=4, room=6)) == [1, 2, 3]
    found = moments_of(units, 1, devices=4, microbatches=9, room=6, slack=0)
    assert found == [[35, 45, 55, 65], [20, 30, 40, 50]]
    assert moments_of(units, 3, devices=4, microbatches=9, room=6, slack=0) == [[35, 35, 35], [20, 20, 20]]
    assert moments_of([ChainUnit(0, 5, ())], 1, devices=3, microbatches=2, room=0, slack=0) == [[5, 5]]


def test_branches_and_other_devices_have_no_cells():
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1, layers=2)
    assert cases_of(problem)[1]
    devices = problem.topology.devices
    other = replace(devices[1], memory_bytes=devices[1].memory_bytes // 2)
    uneven = problem.replace(topology=replace(problem.topology, devices=(devices[0], other)))
    bound = CellBound(uneven)
    assert cases_of(uneven)[1] == [] and bound.improve(1, 1.0, 0) is None and bound.ended


def test_a_bound_on_moments_takes_few_passes_and_asks_the_clock(monkeypatch):
    """Where each pass gains a small share only (one group a device, slow links): halved, and ended with the solve."""
    passes = []

    def counted(*args, **named):
        passes.append(named.get("most"))
        return least_first_gradients(*args, **named)

    monkeypatch.setattr(over_placements, "least_first_gradients", counted)
    count = 32
    groups = tuple(Group(f"l{n}", {"d": PhaseTimes(10**6, 10**6, 10**6)}, resident_bytes=10, saved_fw_bytes=1,
                         single=True) for n in range(count))
    edges = tuple(GroupEdge(n, (n + 1,), 0, 0, f"v{n}") for n in range(count - 1))
    topology = Topology(tuple(Device(f"d{n}", "d", 2**40) for n in range(count)), Link(10**10), Link(10**10))
    problem = PlanningProblem("slow links", groups, edges, topology, 16, limits=Limits(activation_bytes=count))
    assert problem_bound(problem).ns == 543_999_998
    assert len(passes) < 2 * 40  # units with resident bytes and all units
    with pytest.raises(clock.OutOfTimeError), clock.watched(lambda: -1.0):
        problem_bound(problem)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(problems(max_jobs=10), st.lists(st.integers(0, 1), min_size=3, max_size=3),
       st.lists(st.sampled_from([0, 0, 2, 9]), min_size=3, max_size=3))
def test_groups_that_can_be_everywhere_and_updates(problem: PlanningProblem, sizes: list[int],
                                                   updates: list[int]) -> None:
    """What has no resident bytes fills idle time with all its phases; a device's updates follow its work."""
    groups = tuple(replace(group, resident_bytes=size, update_ns=update)
                   for group, size, update in zip(problem.groups, sizes, updates, strict=False))
    problem = problem.replace(groups=groups)
    assert problem_bound(problem).ns <= min(map(optimum, placements(problem)))


def test_a_backward_without_resident_bytes_fills_the_wait_for_a_group_that_has_some() -> None:
    """F of a, then of b, on a device each; the other group's ten fill the wait for b."""
    groups = (Group("a", {"d": PhaseTimes(10, None, None)}, resident_bytes=5),
              Group("x", {"d": PhaseTimes(1, 9, None)}),
              Group("b", {"d": PhaseTimes(1, None, None)}, resident_bytes=5))
    problem = PlanningProblem("idle", groups, (GroupEdge(0, (2,), 0, None, "v"),), Topology.uniform(2, kind="d"), 1,
                              limits=Limits(resident_bytes=5))
    assert problem_bound(problem).ns == 11
    result = plan(problem, PlanOptions(time_limit_s=3))
    assert result.makespan_ns == result.bound_ns == 11


@pytest.mark.parametrize("phases", [(3, 1, 4), (3, None, None), (2, 5, None)])
def test_one_device_is_proven_with_its_updates(phases: tuple[int, int | None, int | None]) -> None:
    groups = tuple(Group(f"g{n}", {"d": PhaseTimes(*phases)}, update_ns=2 + n) for n in range(2))
    problem = PlanningProblem("one", groups, (GroupEdge(0, (1,), 0, None if phases[1] is None else 0, "v"),),
                              Topology.uniform(1, kind="d"), 3)
    result = plan(problem, PlanOptions(time_limit_s=5))
    assert result.makespan_ns == result.bound_ns == 6 * sum(filter(None, phases)) + 5 and result.seconds < 4
