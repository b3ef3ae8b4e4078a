"""Modes of encoders that a search chooses: never worse than any that are fixed, with bounds below all of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from team_brute import everything
from team_machine import machine

from mipipe.graphs.coarse.graph_index import index_graph
from mipipe.graphs.errors import InfeasibleError
from mipipe.planner.teams.again import TeamTask, made_again, task_of, with_task
from mipipe.planner.teams.bounds.of_degrees import bound_of, packed
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices import branches
from mipipe.planner.teams.prices.branches import encoders_of
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams
from mipipe.planner.teams.space import DegreeSpace, floor_of

TOWER = ("vision",)
FIXED = {(): {}, TOWER: {"vision": "batch"}}
"""The modes that a search may choose for the small model, as they are given."""
ONE = {"tensor": 2, "context": 1, "zero": 1}


def small(**options):
    """Devices for models in float32."""
    return replace(machine(**options), dtype="float32")


def tagged(graph, **branches):
    """The graph with other branches."""
    return replace(graph, segments=tuple(replace(item, tags=replace(item.tags, branch=branches.get(
        item.tags.branch, item.tags.branch))) for item in graph.segments))


def test_encoders_are_what_others_read_and_tokens_do_not_reach(llava, llama, monkeypatch):
    """No text, no projector that mixes it with images, and not the whole of a model; none where modes are given, or
    where an operator looks at several samples at once."""
    def found(graph):
        return encoders_of(graph, index_graph(graph))

    assert found(llava) == model_pieces(llava).encoders == TOWER and found(llama) == model_pieces(llama).encoders == ()
    assert found(tagged(llava, vision="audio")) == ("audio",)
    assert found(tagged(llava, projector="vision")) == found(tagged(llava, projector="one", text="one",
                                                                    vision="one")) == ()
    assert model_pieces(llava, {}).encoders == model_pieces(llava, {"vision": "tensor"}).encoders == ()
    monkeypatch.setattr(branches, "TOKENS", ("pixel_values",))
    assert found(llava) == ()


@pytest.mark.parametrize("given, devices", [({"zero": 1}, 2), ({"sequence": 2, "ranks": 1}, 4), pytest.param(
    {"zero": 1}, 4, marks=pytest.mark.slow)], ids=str)
def test_every_combination_is_there_in_each_mode_at_its_price(llava, given, devices):
    """Points and bounds are those of both searches with fixed modes, and no others; one mode has one price, chosen or
    given."""
    machine = small()
    free, *fixed = (DegreeSpace(Pricer(model_pieces(llava, modes), machine), devices, 8, given, None, None)
                    for modes in (None, *FIXED.values()))
    points = {point.degrees: point for point in free.all()}
    assert {degrees.batch_branches for degrees in points} == set(FIXED)
    assert not any(degrees.microbatch % degrees.tensor for degrees in points if degrees.batch_branches)
    expected = {}
    for chosen, space in zip(FIXED, fixed, strict=True):
        for point in space.all():
            degrees = replace(point.degrees, batch_branches=chosen if point.degrees.tensor > 1 else ())
            expected[degrees] = replace(point, degrees=degrees)
    assert points == expected and free.combinations == len(expected)


def test_layers_that_are_alike_have_the_price_of_their_own_mode(llava):
    """One layer of two is an encoder's."""
    graph = replace(llava, segments=tuple(replace(item, tags=replace(item.tags, branch="front")) if item.tags.layer in (
        None, 0) and item.tags.branch == "vision" else item for item in llava.segments))
    chosen, given, plain = (Pricer(model_pieces(graph, modes), small()) for modes in (None, {"front": "batch"}, {}))
    degrees = Degrees(1, 2, copies=2, microbatch=4)
    assert chosen.model.encoders == ("front",)
    assert chosen.costs(replace(degrees, batch_branches=("front",))) == given.costs(degrees) != plain.costs(degrees)
    assert chosen.costs(degrees) == plain.costs(degrees)


def searched(pricer, options):
    """Seconds of the best on four devices; infinite where nothing fits."""
    try:
        return search_teams(pricer, 4, 8, options).best.seconds
    except InfeasibleError:
        return math.inf


@pytest.mark.parametrize("inside, memory, wins, given", [
    (10**11, 10**9, TOWER, ONE), pytest.param(10**8, 10**9, (), ONE, marks=pytest.mark.slow),
    pytest.param(10**11, 400_000, (), ONE, marks=pytest.mark.slow),
    pytest.param(10**11, 10**9, TOWER, {"sequence": 2}, marks=pytest.mark.slow),
    pytest.param(10**8, 10**9, (), {"sequence": 2}, marks=pytest.mark.slow)], ids=str)
def test_modes_free_are_never_worse_than_fixed(llava, inside, memory, wins, given):
    """Samples of their own pay where collectives wait, not where links are narrow or the tower's state does not fit.
    Four devices, every cut of every combination in both modes: the search takes the best, which is the better of
    both searches with fixed modes, and no bound is above anything that was evaluated."""
    options = TeamOptions({**given, "chunks": 1}, None, None, 60.0, order=False)
    free, *fixed = (Pricer(model_pieces(llava, modes), small(inside=inside, memory=memory))
                    for modes in (None, *FIXED.values()))
    found = search_teams(free, 4, 8, options)
    others = [searched(pricer, options) for pricer in fixed]
    items = list(everything(free, 4, 8, options.given, None))
    assert found.best.degrees.batch_branches == wins
    plain, batch = others
    assert (batch < plain) == bool(wins)
    assert found.best.seconds <= 1.001 * min(*others, *(item.seconds for item in items))
    assert found.bound <= found.whole_bound <= found.plain_bound <= min(item.seconds for item in items) * (1 + 1e-9)
    for item in items:
        bound = bound_of(free, item.degrees, 8, None)
        least = max(bound[0], packed(free, item.degrees, 8, None)[0], floor_of(free, item.degrees, 8)[1])
        assert least <= item.seconds * (1 + 1e-9), item.degrees


def test_a_plan_has_the_modes_that_were_chosen(llava):
    """As one for which they were given, but for its task: for fewer devices they are chosen again, once each."""
    spec, options = small(inside=10**11), TeamOptions({**ONE, "ranks": 1}, 2, time_limit_s=20.0, order=False)
    found, given = (search_teams(Pricer(model_pieces(llava, modes), spec), 4, 8, options)
                    for modes in (None, FIXED[TOWER]))
    plan = found.best.plan
    assert plan.team == given.best.plan.team and plan.team.modes[-1].mode == "batch"
    assert plan.provenance["team"] == given.best.plan.provenance["team"]
    assert any(note.startswith("with one mode for all branches the best one tried (") for note in found.notes)
    assert not any("mode" in note for note in given.notes)
    again = made_again(with_task(plan, TeamTask(spec, options)), llava, 2, copies=plan.team.copies)
    assert again.team.modes == plan.team.modes and task_of(again).modes is None
    slow = with_task(plan, TeamTask(small(product=1e-3), options))
    assert made_again(slow, llava, 2, copies=plan.team.copies).team.modes == ()


def test_degrees_given_in_full_have_one_mode(llava):
    plain, none = (evaluate_teams(Pricer(model_pieces(llava, modes), small()), Degrees(1, 2, copies=2, microbatch=2), 8)
                   for modes in (None, {}))
    assert plain.seconds == none.seconds and plain.plan.team == none.plan.team and plain.plan.team.modes == ()
