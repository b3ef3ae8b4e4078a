"""Searched degrees against trying everything, and the bound against everything that was tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
from team_brute import all_of, everything
from team_machine import machine

from mipipe.graphs.errors import InfeasibleError, InputError, TimeUpError
from mipipe.planner.milp.placement.degrees import ChainTask, ModeCost, stage_counts
from mipipe.planner.teams import search
from mipipe.planner.teams.bounds.of_degrees import bound_of, packed
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams
from mipipe.planner.teams.space import DegreeSpace, all_degrees, least_seconds, roughly_fits


@pytest.mark.slow
@pytest.mark.parametrize("memory", [10**9, 45 * 10**6, 28 * 10**6])
def test_searched_degrees_equal_those_of_trying_all(pieces, memory):
    """8 devices, 6 layers: the same degrees, and a step at most as long (a stage may run single layers again)."""
    pricer = Pricer(pieces, machine(memory))
    given = {"context": 1, "zero": 1, "chunks": 1}
    best = min(everything(pricer, 8, 16, given, 1), key=lambda found: found.seconds)
    found = search_teams(pricer, 8, 16, TeamOptions(given, 1, None, 60.0, order=False))
    assert found.best.seconds <= best.seconds * 1.001
    assert replace(found.best.degrees, recompute="none") == replace(best.degrees, recompute="none")
    assert found.bound <= found.best.seconds
    assert found.best.shortage == 0


@pytest.mark.slow
@pytest.mark.parametrize("memory", [10**9, 40 * 10**6, 24 * 10**6])
def test_all_degrees_of_eight_devices(pieces, memory):
    """As above with every degree free but chunks."""
    pricer = Pricer(pieces, machine(memory))
    given = {"chunks": 1}
    best = min(everything(pricer, 8, 8, given, None), key=lambda found: found.seconds)
    found = search_teams(pricer, 8, 8, TeamOptions(given, None, None, 300.0, order=False))
    assert found.best.seconds <= best.seconds * 1.001


def test_no_evaluated_step_is_below_its_bound(pieces):
    """A bound holds for every cut, schedule and recomputation of its degrees."""
    pricer = Pricer(pieces, machine(60 * 10**6))
    for number, degrees in enumerate(all_of(pricer, 8, 16, {}, None)):
        if number % 7:
            continue
        bound = bound_of(pricer, degrees, 16, None)
        for mode in pieces.recompute:
            found = evaluate_teams(pricer, replace(degrees, recompute=mode), 16)
            if not found.shortage:
                assert bound is not None and found.seconds >= bound[0] >= bound[1], degrees.text()
                assert found.seconds >= packed(pricer, degrees, 16, None)[0]
                assert roughly_fits(pricer, degrees) and found.seconds >= least_seconds(pricer) * 16 / 8


def test_what_is_fixed_stays_fixed(pieces):
    pricer = Pricer(pieces, machine())
    space = DegreeSpace(pricer, 8, 16, {"sequence": 2, "ranks": 2}, 2, "full")
    waiting = space.all()
    assert waiting and space.left() == (float("inf"), float("inf"))
    assert all((point.degrees.tensor, point.degrees.sequence, point.degrees.ranks, point.degrees.microbatch)
               == (2, True, 2, 2) for point in waiting)
    assert [point.bound for point in waiting] == sorted(point.bound for point in waiting)


@pytest.mark.slow
def test_what_cannot_be_faster_is_not_priced(pieces, monkeypatch):
    """Where there are too many combinations to price all first: the same best and the same bound over all degrees, from
    fewer that are priced. Where none fits, or none was solved in time, the search says so."""
    pricer = Pricer(pieces, machine(45 * 10**6, host=4))
    options = TeamOptions({"context": 1, "zero": 1}, time_limit_s=60.0, order=False)
    every = search_teams(pricer, 8, 16, options)
    monkeypatch.setattr(search, "EFFORT", replace(EFFORT, priced=0))
    few = search_teams(pricer, 8, 16, options)
    assert few.best.degrees == every.best.degrees and few.best.seconds <= every.best.seconds * 1.001
    assert few.bound == every.bound and few.combinations == every.combinations
    monkeypatch.setattr(search, "EFFORT", replace(EFFORT, priced=0, until_priced=0.0, until_more_priced=0.0))
    short = search_teams(pricer, 8, 16, options)
    assert 0 < short.fitting < every.fitting and short.bound == every.bound
    monkeypatch.setattr(search, "EFFORT", replace(EFFORT, priced=0, until_priced=0.0, until_more_priced=0.0,
                                                  until_bounded=0.0))
    loose = search_teams(pricer, 8, 16, options)
    assert loose.fitting < 4 and 0 < loose.bound <= every.bound
    assert loose.bound <= loose.whole_bound <= loose.plain_bound <= loose.best.seconds
    with pytest.raises(InfeasibleError, match=r"none of .* combinations of degrees fits"):
        search_teams(Pricer(pieces, machine(10**6)), 8, 16, options)
    with pytest.raises(TimeUpError, match="no degrees evaluated within 1e-09 s"):
        search_teams(pricer, 8, 16, replace(options, time_limit_s=1e-9))


def test_what_may_be_faster_is_priced_before_orders_are_made(pieces, monkeypatch):
    """Few combinations are priced at first: of those below the best of these all are, and DualPipeV is tried on them,
    before lists and searches make orders. (1F1B stands for all masters.)"""
    spaces, told = [], []

    class Noted(DegreeSpace):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            spaces.append(self)

    def step_of(name):
        def note(pricer, ranked, *others):
            best, waiting = (others[1], ranked) if name == "paired" else (ranked[0].seconds, others[0])
            told.append((name, len(spaces[0].points), spaces[0].left()[0] >= best, waiting is spaces[0].points))
            return iter(())
        return note

    def solved(pricer, degrees, global_batch, options, below, how):
        try:
            made = evaluate_teams(pricer, degrees, global_batch,
                                  schedule="interleaved" if degrees.chunks > 1 else "1F1B")
        except InputError:
            return None
        return None if made.shortage else made

    monkeypatch.setattr(search, "DegreeSpace", Noted)
    monkeypatch.setattr(search, "solved_master", solved)
    monkeypatch.setattr(search, "EFFORT", replace(EFFORT, priced=0, until_priced=0.0, until_more_priced=0.0))
    for name in ("paired", "_waved", "ordered"):
        monkeypatch.setattr(search, name, step_of(name))
    options = TeamOptions({"context": 1, "zero": 1}, time_limit_s=60.0)
    search_teams(Pricer(pieces, machine(10**9, host=4)), 8, 16, options)
    (first, few, *_), (second, many, priced, all_of_them) = told[:2]
    assert first == second == "paired" and few < many and priced and all_of_them
    assert [name for name, *_ in told[2:]] == ["_waved", "ordered"]
    assert all(priced and count == many for _, count, priced, _ in told[2:])


@pytest.mark.parametrize("given, memory, error, message", [
    ({"tensor": 3}, 10**9, InputError, "tensor 3 = 3 devices, which does not divide the 8 there are"),
    ({"copies": 8, "context": 1, "expert": 3}, 10**9, InfeasibleError, "expert=3 does not divide the 8 devices"),
    ({}, 10**6, InfeasibleError, "none of .* combinations of degrees fits 1.00 MB")])
def test_where_nothing_is_left(pieces, given, memory, error, message):
    with pytest.raises(error, match=message):
        search_teams(Pricer(pieces, machine(memory)), 8, 16, TeamOptions(given, time_limit_s=10.0))


def test_where_no_degrees_divide_a_batch_that_would_is_named(pieces):
    """Eleven devices, eight pieces and a batch of 16 sequences: 22 are two for each of eleven copies."""
    pricer = Pricer(pieces, machine())
    with pytest.raises(InfeasibleError, match="--global-batch 22 would, with copies=11"):
        search_teams(pricer, 11, 16, TeamOptions(time_limit_s=10.0))
    assert list(all_degrees(pieces, 11, 22, {})) == [Degrees(copies=11)]


def test_a_pipeline_that_does_not_pay_loses_and_the_plan_says_so(pieces):
    """Few microbatches and quick links: copies with sharded state beat every chain."""
    found = search_teams(Pricer(pieces, machine()), 4, 8, TeamOptions({"tensor": 1, "context": 1}, time_limit_s=20.0,
                                                                      order=False))
    assert found.best.degrees.ranks == 1
    assert found.notes and "no pipeline: the best one tried" in found.notes[0] and "bubble" in found.notes[0]
    assert all(why for _, why in found.runners)


def test_counts_of_stages_by_hand():
    """Six equal layers, a head as heavy as one, two ranks, no memory to mind: 4 and 2 and the head, or 3 and 3."""
    layer, head = ModeCost(1, 2, 0, 1, 1, 0), ModeCost(2, 4, 0, 1, 1, 0)
    task = ChainTask(((6, (layer,)), (1, (head,))), 2, 1, 8, 0.0, 0.0, 1000)
    found = stage_counts(task, time_limit_s=10, gap=1e-6)
    assert found is not None
    assert [sum(sum(run) for run in stage) for stage in found.counts] == [4, 3]
    assert found.seconds == pytest.approx(8 * 12 + 4 + 8)
    tight = replace(task, memory=9)
    less = stage_counts(tight, time_limit_s=10, gap=1e-6)
    assert less is not None and less.counts[0][0][0] == 3  # 2 alive and resident: 3 bytes a layer on rank 0
    assert stage_counts(replace(task, memory=5), time_limit_s=10) is None


def test_layers_run_again_only_where_memory_is_short():
    """Rank 0 holds two microbatches, rank 1 one: so many layers of rank 0 run again as its memory asks for."""
    once, again = ModeCost(1, 2, 0, 0, 10, 0), ModeCost(1, 3, 0, 0, 1, 0)
    task = ChainTask(((8, (once, again)),), 2, 1, 8, 0.0, 0.0, 45)
    found = stage_counts(task, time_limit_s=10, gap=1e-6)
    assert found is not None
    kept = [alive * (10 * stage[0][0] + stage[0][1]) for alive, stage in zip((2, 1), found.counts, strict=True)]
    assert max(kept) <= 45
    assert sum(stage[0][1] for stage in found.counts) >= 2


def test_degrees_of_one_device(pieces):
    pricer = Pricer(pieces, machine())
    assert {point.degrees for point in DegreeSpace(pricer, 1, 4, {}, None, None).all()} == {
        Degrees(microbatch=size) for size in (1, 2, 4)}


@pytest.mark.parametrize("degrees", [Degrees(ranks=2, tensor=4, sequence=True), Degrees(ranks=4, tensor=2),
                                     Degrees(ranks=2, context=4)])
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_overlapped_pairs_stay_above_the_floor(pieces, degrees, schedule):
    """Pairs hide collectives; the longer of kernels and collectives stays."""
    pricer = Pricer(pieces, machine())
    found = evaluate_teams(pricer, degrees, 16, schedule=schedule)
    bound = bound_of(pricer, degrees, 16, None)
    assert bound is not None and found.seconds >= bound[1]
    if schedule == "dualpipev":  # every layer on one rank
        assert found.seconds >= packed(pricer, degrees, 16, None, bound[2])[1]
