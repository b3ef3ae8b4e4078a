"""Ctrl-C in a search of degrees: the best so far, with bounds that hold; before any is found it raises."""

from __future__ import annotations

import contextlib
import signal
from dataclasses import replace

import pytest
from team_machine import machine

from mipipe.planner.check import check_plan
from mipipe.planner.milp import highs
from mipipe.planner.teams import again, search
from mipipe.planner.teams.effort import EFFORT
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams

OPTIONS = TeamOptions({"ranks": 2, "context": 1, "zero": 1}, time_limit_s=20.0)


@pytest.fixture(scope="module")
def pricer(pieces):
    return Pricer(pieces, machine())


@pytest.fixture(scope="module")
def least(pricer):
    """A bound over all degrees, from a search to its end."""
    return search_teams(pricer, 8, 16, replace(OPTIONS, order=False)).bound


def pressing(text, number=1):
    """What is told, with Ctrl-C at the so many that begins so."""
    heard = []

    def tell(said):
        heard.extend([said] if said.startswith(text) else [])
        if heard and len(heard) == number:
            heard.append("done")
            signal.raise_signal(signal.SIGINT)
    return tell


@pytest.mark.parametrize("moment", ["1 of", "ordering", "pricing what may be faster", *(
    pytest.param(moment, marks=pytest.mark.slow) for moment in ("overlapped pairs", "polishing", "zb-v on"))])
def test_the_best_so_far_is_the_result(pricer, least, moment):
    usual = signal.getsignal(signal.SIGINT)
    options = replace(OPTIONS, time_limit_s=2.0) if moment.startswith("pricing") else OPTIONS
    found = search_teams(pricer, 8, 16, options, pressing(moment))
    assert found.interrupted and found.how().endswith(", interrupted") and found.data(lambda item: {})["interrupted"]
    check_plan(found.best.plan)
    assert not found.best.shortage
    assert found.bound <= least * (1 + 1e-9)
    assert found.bound <= found.whole_bound <= found.plain_bound <= found.best.seconds
    assert signal.getsignal(signal.SIGINT) is usual


def test_before_any_was_found_it_ends(pricer):
    with pytest.raises(KeyboardInterrupt):
        search_teams(pricer, 8, 16, OPTIONS, pressing("0 of"))


@pytest.mark.parametrize("swallowed", [True, False])
def test_a_solve_inside_ends_the_search(pricer, monkeypatch, swallowed):
    """HiGHS ends its solve at Ctrl-C with what it has, or not even that: no other solve begins."""
    calls, solve = [], highs.solve

    def interrupted(*args, **more):
        calls.append(1)
        outcome = solve(*args, **more)
        if len(calls) > 3:
            assert len(calls) == 4 or swallowed
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            return outcome if swallowed else replace(outcome, termination=highs.SolverStatus.INTERRUPTED)
        return outcome

    monkeypatch.setattr(highs, "solve", interrupted)
    found = search_teams(pricer, 8, 16, OPTIONS)
    assert found.interrupted and len(calls) < 12


def test_nothing_is_priced_after_it(pricer, monkeypatch):
    """Where combinations are priced as time goes on, what is not priced yet keeps its floor."""
    monkeypatch.setattr(search, "EFFORT", replace(EFFORT, priced=0, until_priced=0.0))
    found = search_teams(pricer, 8, 16, replace(OPTIONS, order=False), pressing("pricing what may be faster", 2))
    assert found.interrupted and 0 < found.bound <= found.best.seconds


def test_planning_again_for_fewer_devices_ends(pricer, monkeypatch):
    """A run that plans for what is left does not go on with half a search."""
    whole = search.search_teams
    monkeypatch.setattr(again, "search_teams", lambda *given, **more: whole(*given, pressing("polishing"), **more))
    with pytest.raises(KeyboardInterrupt):
        again.best_of_fewer(pricer, 4, 16, OPTIONS)
