"""Plans whose ranks are teams: losses and every member's part of every gradient equal one process."""

import random
from dataclasses import replace

import pytest
import runtime_cases as cases
import runtime_dags as dags
import runtime_equal as equal
import runtime_models as models
import runtime_teams as teams
import torch
from runtime_pool import Pool

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.costs.collectives import Fabric, Level
from mipipe.graphs.errors import PlanError
from mipipe.graphs.models.loss import sum_over
from mipipe.graphs.operator_graph import Role
from mipipe.graphs.serialize import digest
from mipipe.graphs.sharding.team_graph import MemberGraph
from mipipe.graphs.topology import Link
from mipipe.planner.team import Team, TeamMode
from mipipe.planner.teams.options import TeamOptions
from mipipe.planner.teams.prices.machine import Machine
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.search import search_teams
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions

pytestmark = pytest.mark.distributed

MODELS = ("llama", "moe", "vlm", "vlm-frozen", "vlm-lora", "skip")
MICROBATCHES = 3


def plans_of(graph, ranks, team, seeds=(3,)):
    """Random placements, routes and orders of a graph on teams."""
    return [replace(dags.random_plan(random.Random(seed), graph, ranks, MICROBATCHES), team=team) for seed in seeds]


def one_mode(mode, size=2, copies=1):
    """All segments in one mode."""
    axis = "context" if mode == "context" else "tensor"
    return Team({axis: size}, copies, (TeamMode(axis, mode),))


def by_branch(graph, size=2, copies=1):
    """The vision tower by samples, the language model divided, activations between its blocks too."""
    tower = tuple(segment.name for segment in graph.segments if segment.tags.branch == "vision")
    assert 0 < len(tower) < len(graph.segments)
    return Team({"tensor": size}, copies, (TeamMode("tensor", "sequence"), TeamMode("tensor", "batch", tower)))


def by_expert(graph, size=2, copies=1):
    """Banks of experts by expert, all else by columns and rows."""
    experts = tuple(segment.name for segment in graph.segments if segment.tags.role is Role.EXPERTS)
    assert experts
    return Team({"tensor": size}, copies, (TeamMode("tensor", "expert", experts),))


TWO_AXES = Team({"context": 2, "tensor": 2})


def test_a_mode_for_each_branch_on_two_teams_of_two(pool):
    """Values change their layout between the tower and the language model, on one rank or on the way to another."""
    made = equal.case("vlm")
    teams.compare(pool, made, plans_of(made.graph, 2, by_branch(made.graph)))


def test_a_mode_that_a_search_chose(pool):
    """Where every collective waits, the tower's members have samples each: as with modes that are given."""
    made = equal.case("vlm")
    machine = Machine(DeviceKind("slow", {"float64": 10**9}, 10**9, 10**9, 0, "made up"),
                      Fabric((Level("host", 8, Link(10**5, 10**9)),)), 10**9, "float64")
    options = TeamOptions({"tensor": 2, "ranks": 2}, equal.ROWS, time_limit_s=6.0, order=False)
    plan = search_teams(Pricer(model_pieces(made.graph), machine), 4, MICROBATCHES * equal.ROWS, options).best.plan
    assert plan.team.modes[-1] == by_branch(made.graph).modes[-1]
    teams.compare(pool, made, [replace(plan, problem=plan.problem.replace(graph_digest=digest(made.graph)))])


@pytest.mark.parametrize("name", ["llama", pytest.param("llama-cut", marks=pytest.mark.slow)])
def test_two_axes_and_tied_tables(pool, name):
    """Also where rows of logits do not divide along the context axis: then all are gathered."""
    made = equal.case(name)
    teams.compare(pool, made, plans_of(made.graph, 1, TWO_AXES))


@pytest.mark.slow
def test_experts_beside_tensor_parallel_layers_in_two_copies(pool):
    made = equal.case("moe")
    teams.compare(pool, made, plans_of(made.graph, 1, by_expert(made.graph, copies=2)))


@pytest.mark.slow
def test_a_parameter_of_segments_in_two_modes(pool):
    """The gate is read by every layer: in one mode its gradients are sums over members, in the other all have them."""
    made = equal.case("skip")
    names = [segment.name for segment in made.graph.segments]
    team = Team({"tensor": 2}, modes=(TeamMode("tensor", "batch", tuple(names[::2])),))
    made_graph = MemberGraph(made.graph).divided("tensor", 2, team.modes_along("tensor", names)).graph
    assert any(op.name.endswith("_share") for trace in made_graph.traces for op in trace.operators)
    teams.compare(pool, made, plans_of(made.graph, 2, team))


@pytest.mark.slow
def test_dropout_and_float32(pool):
    """Random operators draw what one process draws; float32 to 1e-5."""
    module = models.skip_module(dropout=0.5)
    graph = capture_module(module, models.token_batch(equal.ROWS, equal.LENGTH, 11), granularity="module",
                           loss_info=sum_over("labels"))
    batch, state = models.token_batch(equal.ROWS * MICROBATCHES, equal.LENGTH, 11), dict(module.state_dict())
    alone = Engine(plans_of(graph, 1, None)[0], graph, state)
    loss = alone.step(batch)
    for mode in ("tensor", "sequence"):
        for own, mine in (answer[0] for answer in pool.run(2, teams.__file__, "run_team", plans_of(
                graph, 1, one_mode(mode)), graph, state, [batch])):
            assert own == pytest.approx(loss, rel=1e-12)
            for name, (gradient, piece) in mine.items():
                wanted = alone.weights.parameters[name].grad
                torch.testing.assert_close(gradient, wanted if piece is None else piece.cut(wanted), rtol=1e-10,
                                           atol=1e-12)
    for name in ("llama", "vlm"):
        made = equal.case(name, torch.float32)
        teams.compare(pool, made, plans_of(made.graph, 2, one_mode("sequence")), 1e-5)


@pytest.mark.parametrize("name", [
    "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vlm", "deepseek"))])
def test_what_runs_again_changes_nothing_but_memory(name):
    """Whole layers, attention alone, and up-projections of latents, in split and whole backwards."""
    made = equal.case(name)
    graph = made.graph
    layers = {}
    for segment in graph.segments:
        if segment.tags.layer is not None:
            layers.setdefault((segment.tags.branch, segment.tags.layer), []).append(segment.name)
    attention = tuple(segment.name for segment in graph.segments if segment.tags.role is Role.ATTENTION)
    whole = tuple(map(tuple, layers.values()))
    ways = [Team({}), Team({}, again=whole), Team({}, attention_again=attention)]
    ways += [Team({}, latents_again=attention)] if name == "deepseek" else []
    options = EngineOptions(track_memory=True)
    for orders in ("0F0 0I0 0W0", "0F0 0B0"):
        plan = cases.plan_of(cases.problem_of(graph, 1, 1, [[segment.name for segment in graph.segments]]),
                             [([0], [0])], [[0]], [orders])
        found = []
        for team in ways:
            engine = Engine(replace(plan, team=team), graph, made.state(), options=options)
            loss = engine.step(made.batch(1))
            found.append((loss, {key: item.grad for key, item in engine.named_parameters()},
                          max(size for _, size in engine.record.memory)))
        for loss, gradients, peak in found[1:]:
            assert loss == found[0][0] and peak < found[0][2]
            assert gradients.keys() == found[0][1].keys()
            assert all(torch.equal(item, found[0][1][key]) for key, item in gradients.items())


@pytest.mark.parametrize(("name", "team"), [
    ("deepseek", one_mode("tensor")),
    *(pytest.param("deepseek-dense", team, marks=pytest.mark.slow) for team in (
        one_mode("sequence"), one_mode("context"), Team({}, 2, zero=3)))],
    ids=["tensor", "sequence", "context", "zero3"])
def test_latents_made_again_on_teams_and_copies_that_share_parameters(pool, name, team):
    """Members make their part again; where copies hold parts of parameters, from gathered ones."""
    made = equal.case(name)
    own = tuple(segment.name for segment in made.graph.segments if segment.tags.role is Role.ATTENTION)
    teams.compare(pool, made, plans_of(made.graph, 1, replace(team, latents_again=own)))


def test_a_model_without_latents_makes_none_again():
    other = equal.case("llama")
    names = [segment.name for segment in other.graph.segments if segment.tags.role is Role.ATTENTION]
    plan = plans_of(other.graph, 1, Team({}, latents_again=tuple(names)))[0]
    with pytest.raises(PlanError, match=f"up-projections of segment '{names[0]}' run again, which has none"):
        Engine(plan, other.graph, other.state())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tensor", "sequence", "batch", "expert", "context"])
@pytest.mark.parametrize("name", MODELS)
def test_each_mode_on_two_teams_of_two(pool, name, mode):
    made = equal.case(name)
    teams.compare(pool, made, plans_of(made.graph, 2, one_mode(mode), (3, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_team_of_four_and_two_axes(pool, name):
    made = equal.case(name)
    for team in (one_mode("tensor", 4), one_mode("sequence", 4), TWO_AXES,
                 Team({"context": 2, "tensor": 2}, modes=(TeamMode("tensor", "sequence"),))):
        teams.compare(pool, made, plans_of(made.graph, 1, team))


@pytest.fixture(scope="module")
def eight():
    """Eight workers."""
    made = Pool(8)
    yield made
    made.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_of_two_members_in_two_copies(eight, name):
    made = equal.case(name)
    found = [one_mode("tensor", copies=2), one_mode("sequence", copies=2)]
    found += [by_branch(made.graph, copies=2)] if name.startswith("vlm") else []
    found += [by_expert(made.graph, copies=2)] if name == "moe" else []
    for team in found:
        teams.compare(eight, made, plans_of(made.graph, 2, team))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "vlm"])
def test_two_axes_in_two_ranks(eight, name):
    made = equal.case(name)
    teams.compare(eight, made, plans_of(made.graph, 2, TWO_AXES))
