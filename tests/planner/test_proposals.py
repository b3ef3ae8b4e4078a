"""Placement shapes: what they promise about ranks, cuts, copies and balance."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from mipipe.graphs.errors import PlanError
from mipipe.planner.check.facts import check_placement
from mipipe.planner.jobs.stages import view
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.cuts import fit_cuts, loads, units
from mipipe.planner.placements.feasible import why_infeasible
from mipipe.planner.placements.shapes import light_ends, propose_shapes, resident_bytes, resident_fits, shapes
from mipipe.planner.plan import Plan, Schedule
from mipipe.planner.problems.uniform import two_stream_problem, uniform_problem
from mipipe.planner.solve import plan


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_proposal_is_a_valid_placement_within_the_copies(ranks: int) -> None:
    for copies in (1, 2):
        problem = uniform_problem(ranks=ranks, microbatches=4, f=1, i=2, w=1, copies=copies, layers=4 * ranks,
                                  first=0.2, last=0.6)
        found = list(propose_shapes(problem))
        assert found
        for placement in found:
            view(problem, placement)
            assert resident_fits(problem, placement)
            if "two-way" in placement.name:
                assert copies == 2 or ranks == 1


def test_the_two_ways_of_a_two_way_pipeline_are_mirror_images() -> None:
    problem = uniform_problem(ranks=4, microbatches=6, f=1, i=1, w=1)
    placement = next(propose_shapes(problem, "two-way"))
    for route in placement.routes:
        assert [route[m] + route[m + 1] for m in range(0, 6, 2)] == [3, 3, 3]
    assert len(set(resident_bytes(problem, placement))) == 1


@pytest.mark.parametrize(("name", "layers"), [("twin-chain", 4), ("twin-v", 8), ("twin-wave", 16)])
def test_twins_are_two_equal_pipelines_on_half_of_the_ranks_each(name: str, layers: int) -> None:
    problem = uniform_problem(ranks=8, microbatches=6, f=1, i=1, w=1, layers=layers)
    placement = next(propose_shapes(problem, name))  # type: ignore[arg-type]
    assert len(placement.stages) == layers
    for route in placement.routes:
        assert all((rank < 4) == (m % 2 == 0) for m, rank in enumerate(route))
        assert [route[m] + route[m + 1] for m in range(0, 6, 2)] == [7, 7, 7]
    assert len(set(resident_bytes(problem, placement))) == 1
    alone = uniform_problem(ranks=8, microbatches=6, f=1, i=1, w=1, layers=layers, copies=1)
    assert not list(propose_shapes(alone, name))  # type: ignore[arg-type]


def test_two_ranks_with_a_copy_each_are_data_parallel() -> None:
    """No transfer, no bubble."""
    problem = uniform_problem(ranks=2, microbatches=4, f=10, i=12, w=8, comm=1, layers=4)
    found = plan(problem, PlanOptions(time_limit_s=5))
    assert found.makespan_ns == found.bound_ns == 4 * 30 * problem.unit_ns


def test_even_models_are_cut_evenly() -> None:
    problem = uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, layers=16)
    for shape in shapes(4):
        sizes = {len(part) for part in fit_cuts(problem, shape)}
        assert len(sizes) == 1 or 16 % shape.num_stages


def test_spread_ends_balance_an_uneven_model() -> None:
    problem = uniform_problem(ranks=4, microbatches=16, f=1, i=1, w=1, layers=16, first=0.2, last=0.6, copies=1)
    assert light_ends(problem) == [0, len(problem.groups) - 1]
    work = loads(problem)
    worst = {}
    for placement in itertools.takewhile(lambda placement: placement.name.startswith("chain"), propose_shapes(problem)):
        load = [0] * 4
        for stage, route in zip(placement.stages, placement.routes, strict=True):
            for rank in route:
                load[rank] += sum(work[group][rank] for group in stage.groups)
        worst[placement.name] = max(load)
    assert worst["chain+spread"] < 0.9 * worst["chain"]
    assert {placement.name for placement in propose_shapes(problem, "chain")} == {"chain"}


def test_heavy_ends_are_not_spread() -> None:
    problem = uniform_problem(ranks=4, microbatches=4, f=1, i=1, w=1, copies=1)
    assert light_ends(problem) == []


def test_colocated_groups_stay_together() -> None:
    problem = two_stream_problem(ranks=2, microbatches=4, layers=4)
    assert [len(block) for block in units(problem)] == [4, 4, 4, 4]
    for placement in propose_shapes(problem):
        rank_of = {group: route for stage, route in zip(placement.stages, placement.routes, strict=True)
                   for group in stage.groups}
        for members in problem.colocate:
            assert len({rank_of[group] for group in members}) == 1


def test_groups_that_move_buffers_have_one_replica() -> None:
    """Batch statistics follow one microbatch after the other: two ranks would each see half of them."""
    problem = uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1, copies=2, layers=8)
    twice = next(propose_shapes(problem, "two-way"))
    single = problem.replace(groups=tuple(dataclasses.replace(group, single=number == 3)
                                          for number, group in enumerate(problem.groups)))
    assert {placement.name for placement in propose_shapes(single)} < {placement.name
                                                                       for placement in propose_shapes(problem)}
    assert all(len(stage.ranks) == 1 for placement in propose_shapes(single) for stage in placement.stages
               if 3 in stage.groups)
    assert not list(propose_shapes(single, "two-way")) and "may have one replica only" in why_infeasible(single,
                                                                                                         "two-way")
    with pytest.raises(PlanError, match="may have one replica only: it changes buffers in F"):
        check_placement(Plan("by hand", single, twice, Schedule(())))


@pytest.mark.parametrize(("name", "layers"), [("ring", 8), ("ring-v", 16)])
def test_rings_share_every_stage_among_neighbours_and_give_later_ranks_more(name: str, layers: int) -> None:
    problem = two_stream_problem(ranks=8, microbatches=20, activations=9, layers=layers)
    placement = next(propose_shapes(problem, name))
    work, load, latest = loads(problem), [0] * 8, [0] * 8
    partners: list[set[int]] = [set() for _ in range(8)]
    for number, (stage, route) in enumerate(zip(placement.stages, placement.routes, strict=True)):
        assert len(stage.ranks) == 2 and set(route) == set(stage.ranks)
        for rank in stage.ranks:
            latest[rank] = number
            partners[rank] |= set(stage.ranks) - {rank}
        for rank in route:
            load[rank] += sum(work[group][rank] for group in stage.groups)
    assert all(len(found) == 2 for found in partners)  # the ranks form one cycle, not pairs
    seen = {0}
    for _ in range(8):
        seen |= {partner for rank in seen for partner in partners[rank]}
    assert seen == set(range(8))
    order = sorted(range(8), key=lambda rank: latest[rank])
    assert load[order[0]] < sum(load) / 8 < load[order[-1]]
    assert len(set(resident_bytes(problem, placement))) == 1


def test_no_ring_where_ranks_are_odd_or_one_copy_is_allowed() -> None:
    assert not list(propose_shapes(uniform_problem(ranks=5, microbatches=8, f=1, i=1, w=1), "ring"))
    assert not list(propose_shapes(uniform_problem(ranks=4, microbatches=8, f=1, i=1, w=1, copies=1), "ring"))


@pytest.mark.parametrize("name", ["chain", "v", "interleaved", "two-way"])
def test_ranks_that_start_late_get_less_where_that_ends_sooner(name: str) -> None:
    """Head and load of the rank that ends last, with the cuts that look at heads and with those that do not."""
    problem = uniform_problem(ranks=4, microbatches=6, f=1, i=1, w=1, layers=32, first="0.2", last="0.6")
    shape = shapes(4, name)[0]
    ends = {}
    for by_head in (False, True):
        parts = fit_cuts(problem, shape, by_head=by_head)
        assert [group for part in parts for group in part] == list(range(len(problem.groups)))
        ends[by_head] = _last_end(problem, shape, parts)
    assert ends[True] <= ends[False]
    assert name != "chain" or ends[True] < ends[False]


def _last_end(problem, shape, parts) -> float:
    """The largest over ranks of head and load, as the cuts estimate it."""
    work = loads(problem)
    forwards = [group.times["device"].f_ns for group in problem.groups]
    load, head = [0.0] * 4, [float("inf")] * 4
    for rank, part in zip(shape.rank_of, parts, strict=True):
        for where in {rank, 3 - rank} if shape.two_way else {rank}:
            load[where] += sum(work[g][where] for g in part) * (0.5 if shape.two_way else 1.0)
            if part:
                head[where] = min(head[where], sum(forwards[:part[0]]))
    return max(problem.num_microbatches * busy + begin for busy, begin in zip(load, head, strict=True))


@pytest.mark.parametrize(("ranks", "layers", "name", "advice"), [
    (3, 6, "twin-v", "use 4 ranks or choose"), (2, 4, "twin-wave", "use 4 ranks or choose"),
    (1, 2, "v", "1 rank and 2 groups; use 2 ranks"), (4, 8, "wave", "it has 16 stages; split the model"),
    (4, 8, "apart", "8 groups; choose another placement")])
def test_a_shape_that_does_not_exist_says_what_it_needs(ranks: int, layers: int, name: str, advice: str) -> None:
    problem = uniform_problem(ranks=ranks, microbatches=4, f=1, i=1, w=1, layers=layers)
    assert advice in why_infeasible(problem, name)
