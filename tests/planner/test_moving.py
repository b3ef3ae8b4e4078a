"""Placements a move away: they stay whole, and moves judged by their orders find what all placements hold."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.topology import Device, Link, Topology
from mipipe.planner.actions import Stream
from mipipe.planner.check import check_plan
from mipipe.planner.how import by_highs
from mipipe.planner.jobs.arrays import build, mirror
from mipipe.planner.jobs.stages import view
from mipipe.planner.ladder.activities import Indexing, Pacing, Polishing, Proving
from mipipe.planner.ladder.admission import admit_placement
from mipipe.planner.ladder.candidate import candidate
from mipipe.planner.ladder.inherit import inherited, moments_of
from mipipe.planner.ladder.moving import DEVIATION, MOVING, Line, Moving, key_of
from mipipe.planner.ladder.state import Run
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.cuts import colocated
from mipipe.planner.placements.moves import MOVED, UnitHosts, drawn, is_movable, neighbour, rerouted
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.plan import Placement, Plan, Stage
from mipipe.planner.problem import Group, GroupEdge, PhaseTimes, PlanningProblem
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.search import lists
from mipipe.planner.solve import _activities


def uneven_chain(durations: list[int], ranks: int, microbatches: int) -> PlanningProblem:
    """A chain of layers with one replica each whose F, I and W take so many units."""
    groups = tuple(Group(f"layer{n}", {"device": PhaseTimes(time, time, time)}, resident_bytes=1, saved_fw_bytes=1,
                         single=True) for n, time in enumerate(durations))
    edges = tuple(GroupEdge(n, (n + 1,), value=f"layer{n}.out") for n in range(len(groups) - 1))
    return PlanningProblem("uneven", groups, edges, Topology.uniform(ranks, latency_ns=1, kind="device"), microbatches)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["chain", "v", "wave", "two-way", "twin-v"]),
       st.sampled_from([0, 0.5]), st.booleans())
def test_moves_keep_every_group_once_its_units_whole_and_copies_images(seed: int, shape: str, ends: float,
                                                                       streams: bool) -> None:
    rng = random.Random(seed)
    problem = (two_stream_problem(ranks=4, microbatches=4, layers=16) if streams else
               uniform_problem(ranks=4, microbatches=4, f=1, i=1, w=1, layers=16, first=ends, last=ends))
    placement = next(propose_shapes(problem, shape))
    halved = mirror(view(problem, placement)) is not None
    hosts = {(stage.ranks, route) for stage, route in zip(placement.stages, placement.routes, strict=True)}
    for _ in range(6):
        made = neighbour(problem, placement, rng)
        if made is None:
            continue
        placement = made
        assert placement.name.count(MOVED) == 1
        assert [g for stage in placement.stages for g in stage.groups] == list(range(len(problem.groups)))
        assert {(stage.ranks, route) for stage, route in zip(placement.stages, placement.routes, strict=True)} <= hosts
        where = {g: route for stage, route in zip(placement.stages, placement.routes, strict=True)
                 for g in stage.groups}
        assert all(len({where[g] for g in block}) == 1 for block in colocated(problem))
        assert (mirror(view(problem, placement)) is not None) == halved


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["chain", "v", "two-way"]))
def test_a_reroute_changes_microbatches_of_one_stage_and_replicas_follow(seed: int, shape: str) -> None:
    """One microbatch goes elsewhere or two change places; all other groups run where they ran."""
    rng = random.Random(seed)
    problem = uniform_problem(ranks=3, microbatches=4, f=1, i=1, w=1, layers=6)
    problem = problem.replace(groups=tuple(dataclasses.replace(group, single=g % 4 == 0)
                                           for g, group in enumerate(problem.groups)))
    placement, made = next(propose_shapes(problem.replace(groups=tuple(
        dataclasses.replace(group, single=False) for group in problem.groups)), shape)), 0
    for _ in range(30):
        found = rerouted(problem, placement, rng)
        if found is None:
            continue
        made += 1
        before, after = _ranks(placement), _ranks(found)
        changed = {g for g in range(len(problem.groups)) if before[g] != after[g]}
        assert changed and not any(problem.groups[g].single for g in changed)
        assert max(changed) - min(changed) < len(changed) <= 2  # of one stage
        for g in changed:
            moved = [m for m in range(4) if before[g][m] != after[g][m]]
            assert len(moved) == 1 or (len(moved) == 2 and sorted(before[g]) == sorted(after[g]))
        assert all(set(route) == set(stage.ranks) for stage, route in zip(found.stages, found.routes, strict=True))
        view(problem, found)
    assert made


def _ranks(placement: Placement) -> dict[int, tuple[int, ...]]:
    """Every group's rank of every microbatch."""
    return {g: route for stage, route in zip(placement.stages, placement.routes, strict=True) for g in stage.groups}


@settings(max_examples=3, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["chain", "v", "two-way", "wave"]), st.sampled_from([2, 3]))
def test_orders_of_rerouted_placements_are_paced_polished_and_proven(seed: int, shape: str, ranks: int) -> None:
    """No replicas are too odd for any activity that orders the placements it is given."""
    rng = random.Random(seed)
    problem = uniform_problem(ranks=ranks, microbatches=3, f=1, i=1, w=1, layers=4 * ranks)
    problem = problem.replace(groups=tuple(dataclasses.replace(group, single=False) for group in problem.groups))
    run = Run(problem, PlanOptions(time_limit_s=1000, threads=1, seed=seed))
    placement: Placement | None = next(propose_shapes(problem, shape))
    for _ in range(4):
        placement = drawn(problem, placement, rng) or placement
        if admit_placement(run, placement) is not None:
            break
    for activity in (Pacing(run), Polishing(run), Proving(run), Indexing(run), Moving(run)):
        for _ in range(2):
            activity.step(0.1)
    if run.best is not None:
        check_plan(Plan("", problem, run.best.placement, run.best.best.schedule, run.makespan_ns))
        assert run.best.bound.ns <= run.makespan_ns


def test_a_stage_on_all_ranks_between_others_is_ordered() -> None:
    """Its actions are at no moment of the pattern that the ranks of the others share."""
    problem = uniform_problem(ranks=3, microbatches=4, f=1, i=1, w=1, layers=5)
    problem = problem.replace(groups=tuple(dataclasses.replace(group, single=False) for group in problem.groups))
    stages = (Stage((0, 1), (0,)), Stage((2,), (0, 1, 2)), Stage((3,), (1,)), Stage((4,), (2,)))
    run = Run(problem, PlanOptions(time_limit_s=1000, threads=1))
    found = admit_placement(run, Placement(stages, ((0,) * 4, (0, 1, 2, 1), (1,) * 4, (2,) * 4)))
    assert found is not None and Pacing(run).step(1.0)


def test_a_microbatch_on_another_replica_is_found() -> None:
    """Two layers, one three times as long, three microbatches on two ranks: only where one of three microbatches of the
    long layer runs beside the short one is a step of 3 x (3 + 1) = 12 units shared as 6 and 6."""
    durations = (3, 1)
    groups = tuple(Group(f"layer{n}", {"device": PhaseTimes(time, None, None)}, resident_bytes=1)
                   for n, time in enumerate(durations))
    problem = PlanningProblem("two", groups, (GroupEdge(0, (1,), value="x"),),
                              Topology.uniform(2, latency_ns=0, kind="device"), 3)
    run = Run(problem, PlanOptions(time_limit_s=1000, threads=1))
    admit_placement(run, Placement((Stage((0,), (0,)), Stage((1,), (1,))), ((0,) * 3, (1,) * 3)))
    assert run.makespan_ns == 10
    moving = Moving(run)
    for _ in range(50):
        if run.makespan_ns <= 7:
            break
        moving.step(0.1)
    assert run.makespan_ns <= 7


def test_no_neighbour_comes_again_before_all_have_been_tried() -> None:
    run = Run(uneven_chain([3, 1, 4], ranks=2, microbatches=1), PlanOptions(time_limit_s=1000, threads=1))
    admit_placement(run, next(propose_shapes(run.problem, "chain")))
    run.best.bound = dataclasses.replace(run.best.bound, ns=0)
    moving = Moving(run)
    moving._begin_lines()
    rounds: list[list[tuple[object, ...]]] = [[]]
    moving.heads = [0] * 3
    while len(rounds) < 3:
        found = moving._neighbour(moving.lines[0], float("inf"))
        if found is None:
            rounds.append([])
        else:
            rounds[-1].append((found.placement.stages, found.placement.routes))
    assert all(len(set(found)) == len(found) > 1 for found in rounds[:2]) and set(rounds[0]) & set(rounds[1])


def test_frozen_groups_never_run_their_forward_again() -> None:
    """A stage that runs F again is moved to groups that cannot: they do not, and the plan passes its check."""
    frozen = [Group(f"e{n}", {"d": PhaseTimes(time, None, None)}, resident_bytes=1) for n, time in enumerate((5, 9, 9))]
    trained = [Group(f"l{n}", {"d": PhaseTimes(3, 3, 3)}, resident_bytes=1, saved_fw_bytes=10, recompute_bytes=1)
               for n in range(3)]
    edges = tuple(GroupEdge(n, (n + 1,), 0, None if n < 3 else 0, f"v{n}") for n in range(5))
    problem = PlanningProblem("frozen", (*frozen, *trained), edges, Topology.uniform(3, latency_ns=0, kind="d"), 2)
    placement = Placement((Stage((0,), (0,)), Stage((1, 2), (1,)), Stage((3, 4, 5), (2,), True)),
                          ((0, 0), (1, 1), (2, 2)))
    rng, moved = random.Random(1), 0
    for _ in range(60):
        made = neighbour(problem, placement, rng)
        if made is None:
            continue
        assert not any(stage.recompute and min(stage.groups) < 3 for stage in made.stages)
        moved += any(stage.recompute for stage in made.stages)
        view(problem, made)
    assert moved


def test_moves_are_judged_by_the_clock_of_the_plan() -> None:
    """Updates that the search's clock does not see: lines get shorter by the plan's clock, and only then are moved."""
    problem = uneven_chain([3, 1, 4, 1, 5, 9, 2, 6], ranks=2, microbatches=4)
    problem = problem.replace(groups=tuple(dataclasses.replace(group, update_ns=20) for group in problem.groups))
    run = Run(problem, PlanOptions(time_limit_s=1000, threads=1))
    first = admit_placement(run, next(propose_shapes(problem, "chain")))
    assert first is not None and not first.exact
    moving, lengths = Moving(run), [run.makespan_ns]
    for _ in range(40):
        moving.step(0.02)
        lengths.append(moving.lines[0].record_ns if moving.lines else lengths[-1])
    assert lengths == sorted(lengths, reverse=True) and moving.gained >= 0


def test_what_divides_a_unit_or_has_one_host_is_left_alone() -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1, layers=4)
    together = problem.replace(colocate=((0, 1),))
    apart = Placement((Stage((0,), (0,)), Stage((1, 2), (1,)), Stage((3,), (0,))), ((0, 0), (1, 1), (0, 0)))
    one = Placement((Stage((0, 1, 2, 3), (0,)),), ((0, 0),))
    assert is_movable(problem, apart) and not is_movable(together, apart)
    assert neighbour(together, apart, random.Random(0)) is None is neighbour(problem, one, random.Random(0))
    with pytest.raises(ValueError, match="several hosts"):
        UnitHosts(together, apart)


def test_all_on_one_rank_is_a_neighbour_as_well() -> None:
    """Of two layers on two ranks a move leaves none on one of them."""
    run = Run(uneven_chain([9, 1], ranks=2, microbatches=1), PlanOptions(time_limit_s=1000, threads=1))
    admit_placement(run, next(propose_shapes(run.problem, "chain")))
    moving = Moving(run)
    met: set[int] = set()
    for _ in range(100):
        moving.step(0.02)
        met |= {len({rank for stage in line.found.placement.stages for rank in stage.ranks}) for line in moving.lines}
        if 1 in met:
            break
    assert 1 in met


@pytest.mark.parametrize(("durations", "threads"), [
    ([3, 1, 4, 1, 5, 9], 1), ([3, 1, 4, 1, 5, 9], 2),
    pytest.param([1, 8, 1, 1, 7, 1, 5, 2], 1, marks=pytest.mark.slow)])
def test_moves_find_what_the_best_list_of_all_placements_is(durations: list[int], threads: int) -> None:
    """Six and eight layers on two ranks: 31 and 127 placements, each by three rules."""
    problem = uneven_chain(durations, ranks=2, microbatches=4)
    placements = itertools.product((0, 1), repeat=len(durations))
    least = min(_list(problem, hosts) for hosts in placements if len({*hosts}) > 1)
    run = Run(problem, PlanOptions(time_limit_s=1000, threads=1))
    admit_placement(run, next(propose_shapes(problem, "chain")))
    before, shapes = run.makespan_ns, list(run.candidates)
    moving = Moving(run)
    for _ in range(100):
        if run.makespan_ns <= least:
            break
        moving.step(0.2, threads)
    assert run.makespan_ns <= least < before
    assert run.best is not None and run.best not in shapes and run.best.lineage[-1] == MOVING
    for found in run.candidates[len(shapes):]:
        assert found.proposer[-1] == MOVING and found.placement.name.endswith(MOVED) and found.makespan_ns < before
        check_plan(Plan("", problem, found.placement, found.best.schedule, found.makespan_ns))
    assert not by_highs(MOVING)


def _list(problem: PlanningProblem, hosts: tuple[int, ...]) -> int:
    stages = [Stage(tuple(g for g, _ in part), (rank,))
              for rank, part in itertools.groupby(enumerate(hosts), key=lambda item: item[1])]
    routes = tuple(stage.ranks * problem.num_microbatches for stage in stages)
    instance = build(view(problem, Placement(tuple(stages), routes)))
    made = [lists.schedule(instance, rule) for rule in lists.RULES[:3]]
    return min(orders.makespan_ns for orders in made if orders is not None)


def test_a_named_shape_is_not_moved() -> None:
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, layers=8, copies=1)
    run = Run(problem, PlanOptions(time_limit_s=1000, placement="chain"))
    for shape in propose_shapes(problem, "chain"):
        admit_placement(run, shape)
    assert not Moving(run).step(1.0)


def diamond(streams: tuple[Stream, ...], times: tuple[int, ...]) -> PlanningProblem:
    """A group, two that read it side by side, and one that joins them; forwards alone, on two ranks."""
    groups = tuple(Group(f"g{n}", {"a": PhaseTimes(time, None, None)}, stream, resident_bytes=1)
                   for n, (time, stream) in enumerate(zip(times, streams, strict=True)))
    edges = (GroupEdge(0, (1, 2), 0, None, "x"), GroupEdge(1, (3,), 0, None, "y"), GroupEdge(2, (3,), 0, None, "z"))
    return PlanningProblem("diamond", groups, edges, Topology.uniform(2, latency_ns=0, kind="a"), 2)


COMPUTE, BOTH = (Stream.COMPUTE,) * 4, (Stream.COMPUTE, Stream.COLLECTIVE, Stream.COMPUTE, Stream.COMPUTE)


@pytest.mark.parametrize("streams", [COMPUTE, BOTH], ids=["branches", "collectives"])
def test_moves_of_branches_and_collectives_are_placements(streams: tuple[Stream, ...]) -> None:
    """Stages of groups that are no run by number are moved as well; what comes of it has stages of one stream, in
    topological order, and all ways to share four groups between two ranks are met."""
    problem, rng = diamond(streams, (3, 1, 4, 1)), random.Random(0)
    begin = placement = Placement((Stage((0,), (0,)), Stage((1,), (1,)), Stage((2, 3), (0,))),
                                  ((0, 0), (1, 1), (0, 0)))
    assert is_movable(problem, Placement((Stage((0, 2), (0,)), Stage((1,), (1,)), Stage((3,), (0,))),
                                         ((0, 0), (1, 1), (0, 0))))
    hosts, joined = set(), set()
    for turn in range(3000):
        placement = drawn(problem, placement if turn % 8 else begin, rng) or placement
        view(problem, placement)
        ranks = _ranks(placement)
        hosts.add(tuple(ranks[g] for g in range(4)))
        joined |= {stage.groups for stage in placement.stages}
    single = set(itertools.product(((0, 0), (1, 1)), repeat=4))
    assert single <= hosts and len(hosts) > len(single)
    assert ((0, 2) in joined) and ((0, 1) in joined) == (streams is COMPUTE)


@pytest.mark.parametrize(("streams", "times", "least"), [(COMPUTE, (4, 8, 8, 4), 24), (BOTH, (4, 8, 8, 4), 16)])
def test_moves_find_the_best_of_branches_and_of_collectives(streams: tuple[Stream, ...], times: tuple[int, ...],
                                                            least: int) -> None:
    """From all groups but one on a rank to the shortest step there is, by replicas or by the two streams."""
    problem = diamond(streams, times)
    run = Run(problem, PlanOptions(time_limit_s=1000, threads=1))
    admit_placement(run, Placement((Stage((0,), (0,)), Stage((1,), (0,)), Stage((2,), (0,)), Stage((3,), (1,))),
                                   ((0, 0), (0, 0), (0, 0), (1, 1))))
    before, moving = run.makespan_ns, Moving(run)
    for _ in range(100):
        if run.makespan_ns <= least or not moving.step(0.05):
            break
    assert run.makespan_ns == least < before
    check_plan(Plan("", problem, run.best.placement, run.best.best.schedule, run.makespan_ns))


def test_a_line_goes_on_to_what_is_as_short_as_its_record_however_short() -> None:
    """Of a step of ten units a share of 0.2 % is none; what ties may lead to what is shorter."""
    run = Run(uneven_chain([9, 1], ranks=2, microbatches=1), PlanOptions(time_limit_s=1000, threads=1))
    line = Line(admit_placement(run, next(propose_shapes(run.problem, "chain"))))
    assert line.record_ns < line.allowed_ns <= line.record_ns + 1


def test_moves_have_their_turn_before_the_solver_takes_the_time() -> None:
    run = Run(uneven_chain([9, 1], ranks=2, microbatches=1), PlanOptions(time_limit_s=1))
    assert [activity.name for activity in _activities(run, None)[:2]] == ["moving", "exact"]


def test_forwards_that_run_again_inherit_an_order() -> None:
    """A stage that runs F again does so before its gradients; the other actions stay in their order."""
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1, layers=2)
    problem = problem.replace(groups=tuple(dataclasses.replace(group, recompute_bytes=0) for group in problem.groups))
    run = Run(problem, PlanOptions(time_limit_s=1000))
    plain = admit_placement(run, next(propose_shapes(problem, "chain")))
    stages = tuple(dataclasses.replace(stage, recompute=True) for stage in plain.placement.stages)
    again = candidate(problem, dataclasses.replace(plain.placement, stages=stages))
    orders = inherited(moments_of(plain.view, plain.best.schedule), again.instance, lambda: False)
    assert orders is not None and orders.makespan_ns >= run.makespan_ns


def test_whole_copies_are_proposed_where_they_fit_on_every_rank() -> None:
    """Three ranks, one twice as fast: of four microbatches it takes two, and nothing is sent."""
    groups = tuple(Group(f"g{n}", {"a": PhaseTimes(4, None, None), "b": PhaseTimes(8, None, None)}, stream,
                         resident_bytes=1) for n, stream in enumerate(BOTH[:3]))
    edges = tuple(GroupEdge(n, (n + 1,), 9, None, f"v{n}") for n in range(2))
    devices = tuple(Device(f"d{n}", kind, 3, local_rank=n) for n, kind in enumerate("abb"))
    problem = PlanningProblem("copies", groups, edges, Topology(devices, Link(50), Link(50)), 4)
    found = next(shape for shape in propose_shapes(problem) if shape.name.startswith("copies"))
    assert {stage.groups for stage in found.stages} == {(0,), (1,), (2,)} and len(set(found.routes)) == 1
    assert sorted(found.routes[0]) == [0, 0, 1, 2]
    less = problem.replace(topology=Topology((*devices[:2], dataclasses.replace(devices[2], memory_bytes=2)),
                                             Link(50), Link(50)))
    assert not any(shape.name.startswith("copies") for shape in propose_shapes(less))


def test_where_no_neighbour_may_be_better_what_is_farther_is_drawn() -> None:
    """A line whose neighbours all have bounds too high is not over: it draws several moves at once, then more, then
    begins again, and may pass bounds that are higher and higher."""
    run = Run(uneven_chain([9, 1, 1], ranks=2, microbatches=1), PlanOptions(time_limit_s=1000, threads=1))
    admit_placement(run, next(propose_shapes(run.problem, "chain")))
    moving = Moving(run)
    moving._begin_lines()
    moving.heads = [2 * run.makespan_ns] * 3  # nothing ends before that
    line = moving.lines[0]
    for farther in (1, 2, 3, 0, 1):
        assert moving._neighbour(line, float("inf")) is None and line.farther == farther and not line.over
    assert line.deviation > 10 * DEVIATION
    moving.heads = [0] * 3
    for _ in range(50):
        found = moving._neighbour(line, float("inf"))
        if found is not None and run.makespan_ns <= found.bound.ns:
            break
    assert found is not None and run.makespan_ns <= found.bound.ns < line.allowed_ns


@pytest.mark.parametrize("loads", [(), (1.0, 2.0)])
def test_equal_microbatches_count_once_others_apart(loads: tuple[float, ...]) -> None:
    problem = uniform_problem(ranks=2, microbatches=2, f=1, i=1, w=1, layers=1)
    problem = problem.replace(groups=tuple(dataclasses.replace(group, loads=loads) for group in problem.groups))
    one, other = (Placement((Stage((0,), (0, 1)),), (route,), name) for route, name in (((0, 1), "a"), ((1, 0), "b")))
    assert (key_of(problem, one) == key_of(problem, other)) == (not loads)

