"""Up-projections of latents that run again: offered where there are any, priced, chosen, planned and exported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from team_machine import machine

from mipipe.graphs.errors import InputError, PlanError
from mipipe.graphs.operator_graph import Role
from mipipe.graphs.serialize import digest, from_data, to_data
from mipipe.planner.check.graph import check_graph
from mipipe.planner.plan import Plan
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.export import bridge_config, megatron_flags, torchtitan_config
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams

TOKENS, HEADS = 512, 8
QUERIES, KEYS = (64, 48 * HEADS), (32, 64 * HEADS)
"""Widths of latents and of what is made of them: queries, keys and values."""


def test_offered_where_there_are_latents(pieces, latent_pieces):
    assert pieces.recompute == ("none", "selective", "full")
    assert latent_pieces.recompute == ("none", "latents", "selective", "full")
    roles = [latent_pieces.graph.segments[member].tags.role for member in latent_pieces.latents]
    assert roles == [Role.ATTENTION] * 6


@pytest.mark.parametrize("tensor", [1, 2])
def test_what_they_cost(latent_pieces, tensor):
    """Queries, keys and values are not kept, but there while the backward runs; the two products run twice, and what
    norms, rotates and moves their results."""
    pricer = Pricer(latent_pieces, machine(product=1.0, half=0.0))
    once, again = (pricer.costs(Degrees(tensor=tensor, recompute=way))[1] for way in ("none", "latents"))
    made = 2 * TOKENS * (QUERIES[1] + KEYS[1]) // tensor
    assert once.kept - again.kept == again.rerun == pytest.approx(made, rel=0.02)
    assert again.while_running == once.while_running + again.rerun and again.w == once.w
    assert again.f.compute == pytest.approx(once.f.compute, rel=0.01)  # the rotated part that heads share is written
    products = sum(2 * TOKENS * width * size for width, size in (QUERIES, KEYS)) / tensor
    assert again.i.compute - once.i.compute > products / 10**13
    assert again.i.talk == once.i.talk and again.late == once.late and again.resident == once.resident


def test_chosen_where_memory_asks_for_it(latent_pieces):
    """With room for what stays with latents but not without, a search takes them, and is faster than without them."""
    given = {"ranks": 2, "copies": 4, "zero": 1, "chunks": 1}
    degrees = Degrees(ranks=2, copies=4)
    pricer = Pricer(latent_pieces, machine(10**12))
    peaks = [max(item.peak for item in evaluate_teams(pricer, replace(degrees, recompute=way), 16).memory)
             for way in ("none", "latents")]
    assert peaks[1] < peaks[0]
    tight = pricer.on(replace(pricer.machine, memory_bytes=(peaks[0] + peaks[1]) // 2))
    found = search_teams(tight, 8, 16, TeamOptions(given, 1, None, 20.0, order=False))
    assert "latents" in found.best.recompute and "full" not in found.best.recompute
    assert found.bound <= found.best.seconds
    for way in ("selective", "full"):
        other = evaluate_teams(tight, replace(degrees, recompute=way), 16)
        assert other.shortage or other.seconds >= found.best.seconds
    team = found.best.plan.team
    own = [latent_pieces.graph.segments[member].name for member in latent_pieces.latents]
    assert team.latents_again and set(team.latents_again) <= set(own) and not team.again
    only = search_teams(tight, 8, 16, TeamOptions(given, 1, "latents", 20.0, order=False))
    assert set(only.best.plan.team.latents_again) == set(own) and only.bound <= only.best.seconds


def test_said_in_the_plan_and_to_other_engines(latent_pieces):
    """The file has the segments by name, and names that the graph does not have are refused; Megatron's module is
    ``mla_up_proj``; torchtitan has none."""
    pricer, degrees = Pricer(latent_pieces, machine()), Degrees(ranks=2, copies=4, recompute="latents")
    plan = evaluate_teams(pricer, degrees, 32).plan
    assert from_data(to_data(plan), Plan, "plan").team == plan.team and len(plan.team.latents_again) == 6
    assert "--recompute-granularity selective\n--recompute-modules mla_up_proj\n" in megatron_flags(plan)
    assert json.loads(bridge_config(plan))["model"]["recompute_modules"] == ["mla_up_proj"]
    with pytest.raises(InputError, match="torchtitan takes recomputation of all layers or of none"):
        torchtitan_config(plan, "order.csv")
    some = evaluate_teams(pricer, degrees, 32, recompute=["none", "latents", *["none"] * 6]).plan
    with pytest.raises(InputError, match="in all layers or in none; here they do in 1 of 6"):
        megatron_flags(some)
    both = evaluate_teams(pricer, degrees, 32, recompute=["none", "latents", *["full"] * 5, "none"]).plan
    with pytest.raises(InputError, match="this plan has layers and up-projections that run again"):
        megatron_flags(both)
    plan = replace(plan, problem=plan.problem.replace(graph_digest=digest(latent_pieces.graph)))
    check_graph(plan, latent_pieces.graph)
    for names, message in ((("nowhere",), "'nowhere' run again, which the graph does not have"),
                           (both.team.again[0][:1], "runs again twice")):
        wrong = replace(both, team=replace(both.team, latents_again=names), problem=plan.problem)
        with pytest.raises(PlanError, match=message):
            check_graph(wrong, latent_pieces.graph)
    mlp = next(segment.name for segment in latent_pieces.graph.segments if segment.name.endswith("mlp"))
    for field in ("attention_again", "latents_again"):
        wrong = replace(plan, team=replace(plan.team, **{"latents_again": (), field: (mlp,)}))
        with pytest.raises(PlanError, match=f"{mlp}' run again, which has none"):
            check_graph(wrong, latent_pieces.graph)
    with pytest.raises(PlanError, match="zero is 9; expected 0 to 3"):
        replace(plan.team, zero=9)
