"""Whole pieces on ranks: the bound by packing against trying all; list orders against the checker and the bounds."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from team_machine import machine

from mipipe.planner.check import check_plan
from mipipe.planner.teams.bounds.of_degrees import bound_of, packed
from mipipe.planner.teams.bounds.packing import TOLERANCE, least_busiest
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.orders import pair_guesses, paired
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams
from mipipe.planner.teams.space import DegreeSpace
from mipipe.planner.teams.waves import wave, wave_shape


def busiest(seconds: list[float], counts: list[int], ranks: int) -> float:
    """By every assignment of pieces to ranks."""
    sizes = [size for size, count in zip(seconds, counts, strict=True) for _ in range(count)]
    return min(max(sum(size for size, home in zip(sizes, homes, strict=True) if home == rank) for rank in range(ranks))
               for homes in product(range(ranks), repeat=len(sizes)))


@pytest.mark.parametrize("seed", range(12))
def test_packing_equals_every_assignment(seed):
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(3, 5)), *(int(count) for count in rng.integers(1, 3, size=2))]
    seconds = [float(size) for size in rng.uniform(0.1, 2.0, size=3)]
    for ranks in (2, 3):
        found, best = least_busiest(seconds, counts, ranks), busiest(seconds, counts, ranks)
        assert best * (1 - 2 * TOLERANCE) <= found <= best * (1 + 1e-9)


def test_packing_of_a_known_model():
    """80 layers and a head of 0.73 layers on 8 ranks: some rank has 10 and the head; replicas aside, no rank less."""
    assert least_busiest([1.0, 0.73], [80, 1], 8) == pytest.approx(10.73, rel=TOLERANCE)
    assert least_busiest([1.0, 2.1], [80, 1], 8) == pytest.approx(11.0, rel=TOLERANCE)


@pytest.mark.parametrize("degrees", [Degrees(ranks=2, tensor=4, sequence=True), Degrees(ranks=2, copies=4),
                                     Degrees(ranks=2, tensor=2, copies=2)])
def test_orders_by_lists_fit_and_stay_above_the_bounds(pieces, degrees):
    """In a little more memory than 1F1B needs (inputs stay for weight gradients): checked by the rules of plans, no
    faster than the busiest rank."""
    pricer = Pricer(pieces, machine())
    usual = evaluate_teams(pricer, degrees, 16)
    pricer = Pricer(pieces, machine(round(1.3 * max(item.peak for item in usual.memory))))
    bound = bound_of(pricer, degrees, 16, None)
    assert bound is not None
    for chunks, turns in ((1, False), (2, True), (3, True)):
        found = wave(pricer, degrees, 16, wave_shape(2, chunks, turns=turns), ["none"] * len(pieces.pieces), 0.05)
        assert found is not None and not found.shortage
        assert sum(found.layers) == 6 and found.times.total == pytest.approx(found.seconds)
        check_plan(found.plan)
        assert found.seconds >= max(bound[0], packed(pricer, degrees, 16, "none")[0])
        plain, paired = packed(pricer, degrees, 16, None, bound[2])
        assert plain >= paired


def test_pairs_are_tried_where_they_may_gain(pieces):
    """On slow links, some layers run again where the memory asks for it; nothing that does not fit or is far slower."""
    pricer = Pricer(pieces, machine(40 * 10**6, host=4, inside=10**9, outside=10**8))
    points = DegreeSpace(pricer, 8, 32, {}, None, None).all()
    guesses = pair_guesses(pricer, points, 32, float("inf"))
    assert guesses[0][0] == min(guess for guess, _ in guesses)
    for ranks in {degrees.ranks for _, degrees in guesses}:
        own = [guess for guess, degrees in guesses if degrees.ranks == ranks]
        assert own == sorted(own)
    found = list(paired(pricer, points, 32, float("inf"), time.monotonic() + 60, set()))
    assert found and all(item.plan.schedule.has_pairs and not item.shortage for item in found)
    assert all(item.seconds < EFFORT.near * min(before.seconds for before in found[:number + 1])
               for number, item in enumerate(found))
    assert any("full" in item.recompute for item in found)
    assert not list(paired(pricer, points, 32, found[-1].seconds, time.monotonic() - 1, set()))
    assert not pair_guesses(pricer, points, 32, guesses[0][0])


def test_a_search_tells_its_bounds(pieces):
    found = search_teams(Pricer(pieces, machine()), 8, 16, TeamOptions({"ranks": 4}, time_limit_s=3.0))
    assert found.bound <= found.whole_bound <= found.best.seconds
    assert found.whole_bound <= found.plain_bound <= found.best.seconds
    one = all(len(stage.ranks) == 1 for stage in found.best.plan.placement.stages)  # as fast as the machine was
    assert found.whole_gap is None if not one else 0 <= found.whole_gap <= found.gap
    assert found.plain_gap is None or 0 <= found.plain_gap <= (found.whole_gap or 0.0)
    data = found.data(lambda result: {})
    assert data["whole_bound_s"] == found.whole_bound and data["plain_bound_s"] == found.plain_bound
    chain = evaluate_teams(Pricer(pieces, machine()), Degrees(ranks=4, copies=2), 16)
    told = replace(found, best=chain, bound=0.8 * chain.seconds, whole_bound=0.9 * chain.seconds,
                   plain_bound=0.95 * chain.seconds)
    text = f"with every layer on one rank {told.whole_bound:.4g} s (gap 11.1%)"
    assert told.bound_text().endswith(f"{text}; and no overlapped pairs {told.plain_bound:.4g} s (gap 5.3%)")
    assert replace(told, plain_bound=told.whole_bound).bound_text().endswith(text)
    less = replace(told, whole_bound=told.bound)  # no more than the other bound says
    assert less.bound_text().endswith("; with every layer on one rank and no overlapped pairs"
                                      f" {told.plain_bound:.4g} s (gap 5.3%)")
    assert "one rank" not in replace(less, plain_bound=told.bound).bound_text()
