"""Plans of teams whose experts are over devices of a rank: all-to-alls between copies, which divide all other state,
and between members of a team."""

from __future__ import annotations

import functools
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import runtime_equal as equal
import runtime_experts as ex
import torch
from safetensors.torch import load_file
from test_elastic_teams import MACHINE

from mipipe.graphs.coarse.totals import num_sequences
from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.serialize import digest
from mipipe.graphs.sharding.gathered import EXPERT_COPIES
from mipipe.graphs.tracing.dynamic_rows import DIRECT
from mipipe.planner.execution.lower import lower
from mipipe.planner.team import Team, TeamMode
from mipipe.planner.teams.as_team import team_of
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.refusal import refusal
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.checkpoints.own_pieces import divided_names, divided_shapes
from mipipe.runtime.checkpoints.save import Target, save_weights
from mipipe.runtime.engine.compiling.compile import divided_alike
from mipipe.runtime.engine.compiling.team import member_graph, member_pieces
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.layers import expert_layers
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.ranks.processes import gather
from mipipe.runtime.train.clip import gradient_norm
from mipipe.runtime.train.config import CheckpointConfig, ElasticExperts, ExpertsConfig, OptimizerConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.launching.elastic import Supervisor
from mipipe.runtime.train.launching.prepare import PreparedRun, check_copies, check_team, zero_of
from mipipe.runtime.train.optim import takes_parts, whole_beside_experts
from mipipe.runtime.train.training import Trainer

pytestmark = pytest.mark.distributed

STEPS = 3
reference = functools.cache(ex.alone)


def plan_of(graph, degrees, turns=None):
    """1F1B on even stages, as `mipipe plan` evaluates them; ``turns``: for the batches of so many copies."""
    batch = equal.ROWS * ex.COUNT * (turns or degrees.copies)
    plan = evaluate_teams(Pricer(model_pieces(graph), MACHINE), replace(degrees, microbatch=equal.ROWS), batch).plan
    return replace(plan, problem=plan.problem.replace(graph_digest=digest(graph)))


def steps_of(plan, graph, state, zero, moves, steps=STEPS):
    """What a process does: Adam steps (``moves``: experts move after the first); losses, norms and the last gradients,
    experts by name, pieces of all others."""
    engine = Engine(plan, graph, state, options=EngineOptions(zero=zero))
    mesh = engine.mesh
    optimizer = torch.optim.Adam(engine.parameters(), lr=1e-2, foreach=False)
    losses, norms = [], []
    for step in range(steps):
        losses.append(engine.step(ex.batch_of(step, mesh.copy, mesh.num_copies)))
        norms.append(gradient_norm(engine))
        if step < steps - 1:
            optimizer.step()
            optimizer.zero_grad()
        if moves and not step:
            engine.place_experts(ex.replicated_map(engine.compiled.experts.size), optimizer)
    rows = engine.compiled.experts.rows() if engine.compiled.experts is not None else {}
    pieces, found = member_pieces(engine.compiled, graph, mesh), []
    for name, item in engine.named_parameters():
        for slot, expert in enumerate(rows.get(name, [])):
            found.append((name, expert, pieces.get(name), item.grad[slot]))
        if name not in rows:
            found.append((name, None, pieces.get(name), item.grad))
    return losses, norms, found


def check_steps(answers, wanted, tolerance=1e-12):
    """Losses, norms and gradients of every process are one process's; which experts there are, and of what there are
    parts: experts (True), all else (False)."""
    experts, divided = set(), set()
    for losses, norms, gradients in answers:
        assert losses == pytest.approx(wanted["losses"], rel=tolerance)
        assert norms == pytest.approx(wanted["norms"], rel=10 * tolerance)
        for name, expert, piece, gradient in gradients:
            whole = wanted["gradients"][name]
            expected = whole if piece is None else piece.cut(whole)
            expected = expected if expert is None else expected[expert]
            difference = torch.linalg.vector_norm(gradient - expected)
            assert difference <= tolerance * torch.linalg.vector_norm(whole) + 1e-30, name
            experts |= set() if expert is None else {(name, expert)}
            divided |= set() if piece is None else {expert is not None}
    return experts, divided


@pytest.mark.slow
@pytest.mark.parametrize("ranks, copies, sharing, zero, moves", [
    (1, 2, 2, 0, False), (1, 2, 2, 1, False), (1, 2, 2, 2, False), (1, 2, 2, 3, True), (2, 2, 2, 1, True),
    (1, 4, 2, 0, True), (1, 4, 2, 1, True), (1, 4, 2, 2, False), (1, 4, 2, 3, True), (2, 2, 1, 1, False)])
def test_experts_over_copies_equal_one_process(pool, ranks, copies, sharing, zero, moves):
    """Losses, norms and gradients to 1e-12, whatever copies divide, of experts those that hold the same ones; also
    after experts with their optimizer state have moved to a map with replicas; over all copies, over groups of them,
    and whole."""
    degrees = Degrees(ranks, copies=copies, expert=sharing)
    module, graph = ex.captured()
    answers = pool.run(degrees.devices, __file__, "steps_of", plan_of(graph, degrees), graph, ex.state_of(module), zero,
                       moves)
    experts, divided = check_steps(answers, reference(STEPS, degrees.copies))
    assert len(experts) == (ex.LAYERS * 2 * ex.EXPERTS if sharing > 1 else 0)
    assert (False in divided, True in divided) == (zero > 0, zero > 0 and 1 < sharing < copies)


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [Degrees(tensor=2, sequence=True, copies=2, expert=4),
                                     Degrees(context=2, tensor=2, expert=2)], ids=Degrees.text)
def test_balancing_losses_look_at_all_tokens(pool, degrees):
    """transformers' load-balancing loss, which is no sum over tokens, and its gradients are those of one process; to
    1e-6, as it is made in float32."""
    module, graph = ex.captured(balanced=True)
    answers = pool.run(4, __file__, "steps_of", plan_of(graph, degrees), graph, ex.state_of(module), 0, False)
    wanted = reference(STEPS, degrees.copies, balanced=True)
    assert wanted["losses"][0] > 1.05 * reference(STEPS, degrees.copies)["losses"][0]
    check_steps(answers, wanted, 1e-6)


TEAMS = [
    (Degrees(tensor=2, sequence=True, copies=2, expert=4), 0, True), (Degrees(tensor=2, copies=2, expert=2), 0, False),
    (Degrees(context=2, copies=2, expert=2), 1, True), (Degrees(tensor=2, sequence=True, copies=2, expert=2), 3, False),
    (Degrees(context=2, copies=2, expert=4), 2, False), (Degrees(tensor=2, copies=2, expert=1), 1, False),
    (Degrees(ranks=2, tensor=2, sequence=True, expert=2), 0, True), (Degrees(context=2, tensor=2, expert=4), 0, False),
    (Degrees(ranks=2, context=2, expert=1), 0, False), (Degrees(tensor=2, copies=2, expert=4), 1, True),
    (Degrees(tensor=2, sequence=True, context=2, expert=2), 1, True)]


def test_experts_over_the_members_of_a_team_equal_one_process(pool):
    """One step of two members that divide the sequence, with half of the experts each."""
    module, graph = ex.captured()
    degrees = Degrees(tensor=2, sequence=True, expert=2)
    answers = pool.run(2, __file__, "steps_of", plan_of(graph, degrees), graph, ex.state_of(module), 0, False, 1)
    experts, _ = check_steps(answers, reference(1, 1))
    assert len(experts) == ex.LAYERS * 2 * ex.EXPERTS


@pytest.mark.slow
@pytest.mark.parametrize("degrees, zero, moves", TEAMS, ids=lambda item: item.text() if isinstance(item, Degrees)
                         else str(int(item)))
def test_experts_over_members_and_copies_equal_one_process(pool, degrees, zero, moves):
    """Each member of a team sends its part of the tokens, along the sequence in every mode: over the members of a
    team, over neighbouring copies of them, over all, and whole; losses, norms and gradients to 1e-12, whatever copies
    divide, also after experts have moved."""
    module, graph = ex.captured()
    answers = pool.run(degrees.devices, __file__, "steps_of", plan_of(graph, degrees), graph, ex.state_of(module), zero,
                       moves)
    experts, divided = check_steps(answers, reference(STEPS, degrees.copies))
    assert len(experts) == (ex.LAYERS * 2 * ex.EXPERTS if degrees.expert > 1 else 0)
    assert (True in divided) == (zero > 0 and 1 < degrees.expert < degrees.team * degrees.copies)


def config_of(folder, steps, name="adam"):
    return TrainConfig(steps, optimizer=OptimizerConfig(name, 1e-2), clip=0.1,
                       checkpoint=CheckpointConfig(str(folder), every=1))


TURNS = 4
"""Copies for which a run's batches are made, whatever copies take them."""


def share_of(step, copy, copies):
    """One copy's part of a step's batch of `TURNS` copies."""
    each = TURNS // copies
    parts = [ex.batch_of(step, turn, TURNS) for turn in range(copy * each, copy * each + each)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def train(plan, graph, state, config, saved=None):
    """What a process does: the losses of a run, from its checkpoint if there is one; its weights are saved."""
    engine = Engine(plan, graph, state, options=EngineOptions(zero=zero_of(config, plan, graph)))
    copy, copies = engine.mesh.copy, engine.mesh.num_copies
    batches = Batches((share_of(step, copy, copies) for step in range(9)), equal.ROWS * ex.COUNT * TURNS // copies,
                      in_turn=True)
    trainer = Trainer(engine, config, batches)
    losses = trainer.run(trainer.begin(Start.RESUME_IF_ANY))
    if saved is not None:
        pieces = gather(list(divided_shapes(engine, divided_names(engine))))
        assert len({piece for own in pieces for piece in own}) == sum(map(len, pieces)), "written once"
        save_weights(engine, torch.nn.Module(), Target(saved, 10**9))
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("begun", [
    Degrees(1, copies=4, expert=2), Degrees(tensor=2, sequence=True, copies=2, expert=2),
    Degrees(1, copies=4, expert=2, zero=2), Degrees(1, copies=4, expert=2, zero=3)],
    ids=lambda degrees: f"{degrees.text()},zero={degrees.zero}")
def test_a_run_with_experts_over_copies_goes_on(pool, tmp_path, begun):
    """ZeRO as the plan says, clipped; saved after two steps with experts over two of four copies, or over the
    members of two teams, and resumed with them over all, whole, over two copies of two ranks, over members that divide
    the sequence, and over two teams in a pipeline: all losses, and the weights at the end, are those of one process
    that never stopped."""
    module, graph = ex.captured()
    alone, first, *others = (plan_of(graph, degrees, TURNS) for degrees in (
        Degrees(1), begun, Degrees(1, copies=4, expert=4), Degrees(1, copies=4, expert=1),
        Degrees(2, copies=2, expert=2), Degrees(1, copies=4, expert=2, zero=3), Degrees(context=2, copies=2, expert=2),
        Degrees(2, tensor=2, sequence=True, expert=2)))
    state = ex.state_of(module)
    assert zero_of(config_of(tmp_path, 2), first, graph) == begun.zero
    calm, = pool.run(1, __file__, "train", alone, graph, state, config_of(tmp_path / "calm", STEPS + 1),
                     tmp_path / "whole")
    saved_by = pool.run(4, __file__, "train", first, graph, state, config_of(tmp_path / "kept", 2))
    for losses in saved_by:
        assert losses == pytest.approx(calm[:2], rel=1e-12)
    wanted = load_file(tmp_path / "whole" / "model.safetensors")
    for number, plan in enumerate(others):
        kept, saved = tmp_path / f"kept{number}", tmp_path / f"whole{number}"
        shutil.copytree(tmp_path / "kept", kept)
        for losses in pool.run(4, __file__, "train", plan, graph, state, config_of(kept, STEPS + 1), saved):
            assert losses == pytest.approx(calm[2:], rel=1e-12)
        found = load_file(saved / "model.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-12), name


@pytest.mark.slow
def test_matrices_of_experts_in_parts_are_put_together(pool, tmp_path):
    """Muon, which orthogonalises whole matrices, where copies with the same experts have parts of them."""
    module, graph = ex.captured()
    alone, groups = (plan_of(graph, degrees, TURNS) for degrees in (Degrees(1), Degrees(1, copies=4, expert=2)))
    config = replace(config_of(tmp_path, STEPS), optimizer=OptimizerConfig("muon", 1e-2, shard="gradients"),
                     checkpoint=None)
    wanted, = pool.run(1, __file__, "train", alone, graph, ex.state_of(module), config)
    for losses in pool.run(4, __file__, "train", groups, graph, ex.state_of(module), config):
        assert losses == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_devices_with_the_same_experts_send_their_parts(zero):
    """ZeRO-3 gathers a part of every expert before F and again before the backward, ZeRO-2 and 3 scatter what W makes,
    both along the second dimension; ZeRO-1 does neither in a microbatch."""
    _, graph = ex.captured()
    made = divided_alike(member_graph(Team({}), graph), zero, Team({}), 4, 2, 2).graph
    banks = {bank for layer in expert_layers(graph) for bank in layer.banks}
    sent = [(op.kind.split(".")[1], op.phase, *op.args[1:]) for segment in made.segments
            if banks & set(segment.parameters) for op in made.trace(segment).operators
            if op.args and op.args[-1] == EXPERT_COPIES]
    scatters, gathers = (sent.count((kind, phase, 1, 1, 2, EXPERT_COPIES)) for kind, phase in (
        ("reduce_scatter", Phase.W), ("all_gather", Phase.F)))
    assert (scatters, gathers) == (len(banks) * (zero > 1), len(banks) * (zero == 3))
    assert bool(sent) == (zero > 1) and all(item[2:] == (1, 1, 2, EXPERT_COPIES) for item in sent)


@pytest.mark.parametrize("name, hint", [("muon", True), ("reg", True), ("adafactor", False)])
def test_a_way_out_is_named_where_there_is_one(name, hint):
    assert ("plan with --degrees zero=2" in str(whole_beside_experts(name))) == hint == takes_parts(name, 2)


@pytest.mark.parametrize("parallel, team, text", [
    (True, Team({}, 2, expert=2), None), (False, Team({}, 2), None), (False, Team({"tensor": 2}, expert=2), None),
    (True, Team({}, 4, expert=2), None), (True, Team({}, 2), None),
    (True, Team({}, 4, expert=3), "shared by 3 copies of the plan, but the run has 4; start it with --copies 3, or a"),
    (True, Team({"tensor": 2}), None), (True, Team({"context": 2, "tensor": 2}, 3, expert=6), None),
    (True, Team({"tensor": 2}, 2, expert=3), "shared by 3 devices of a rank, but the run has 4, 2 copies of tensor 2;"),
    (True, Team({"tensor": 5}, expert=5), "tokens of a microbatch do not divide among the 5 members of its teams"),
    (False, Team({}, 2, expert=2), "expert-parallel 2 and plan that graph, or plan with --degrees expert=1 or with"),
    (False, Team({"tensor": 2}, 2, expert=4), "expert-parallel 4 and plan that graph, or plan with --degrees exp")])
def test_which_experts_are_trained(tmp_path, parallel, team, text):
    """Whole, over all devices of a rank or over groups of them, where the graph was captured with tokens that travel;
    whole or over the tensor axis, where it was not."""
    _, graph = ex.captured(parallel)
    plan = replace(ex.plan_for(graph, 1), team=team)
    if text is None:
        check_team(plan, graph, config_of(tmp_path, 1))
        return
    with pytest.raises(InputError, match=text):
        check_team(plan, graph, config_of(tmp_path, 1))


@pytest.mark.parametrize("captured, sharing, copies, optimizer, zero, text", [
    (4, 4, 4, "adam", 1, None), (1, 2, 2, "adam", 1, None), (2, 2, 2, "muon", 0, None), (2, 2, 2, "muon", 2, None),
    (4, 2, 2, "adam", 0, None), (4, 2, 6, "adam", 1, None), (4, None, 8, "adam", 0, None),
    (1, None, 3, "adam", 0, None), (2, 1, 2, "muon", 1, None),
    (4, None, 2, "adam", 0, "captured to be shared by 4 copies of the plan, but the run has 2; start it with"
     " --copies 4, or a multiple of it, or capture with another --expert-parallel"),
    (4, 2, 3, "adam", 0, "planned to be shared by 2 copies of the plan, but the run has 3; .* another --degrees"),
    (2, 2, 2, "adafactor", 1, "optimizer adafactor: copies that share its state update some whole parameters each"),
    (2, 2, 4, "muon", 1, "optimizer muon: copies that share its state update some whole parameters each")])
def test_what_copies_that_share_experts_do_not_do_is_refused_before_they_start(tmp_path, captured, sharing, copies,
                                                                               optimizer, zero, text):
    """Groups of as many copies as a plan of teams says, or the graph of one of single devices; optimizers that look at
    whole tensors have whole state."""
    _, graph = ex.captured()
    graph = replace(graph, source={**graph.source, "expert_parallel": captured})
    team = None if sharing is None else Team({}, copies, expert=sharing, zero=zero)
    plan, config = replace(ex.plan_for(graph, 1), team=team), config_of(tmp_path, 1, optimizer)
    if text is None:
        check_copies(plan, graph, config, copies)
        return
    with pytest.raises(InputError, match=text):
        check_copies(plan, graph, config, copies)


SEQUENCE = (TeamMode("tensor", "sequence"),)


@pytest.mark.parametrize("team, fits", [
    (Team({}, 2), True), (Team({"tensor": 2}), True), (Team({"tensor": 2}, modes=SEQUENCE), False),
    (Team({"context": 2, "tensor": 2}), False), (Team({"tensor": 2}, modes=(TeamMode("tensor", "batch"),)), False)])
def test_choices_are_drawn_for_all_tokens(tmp_path, team, fits):
    """Members that route other tokens with one generator would draw what their neighbours draw."""
    _, graph = ex.captured()
    plan, config = replace(ex.plan_for(graph, 1), team=team), config_of(tmp_path, 1)
    check_team(plan, graph, config)
    with nullcontext() if fits else pytest.raises(InputError, match=r"for which experts\.elastic would draw alike;"):
        check_team(plan, graph, replace(config, experts=ExpertsConfig(elastic=ElasticExperts(4, 0.5))))


@pytest.mark.parametrize("team", [Team({"tensor": 2}, modes=SEQUENCE), Team({"context": 3}), *(
    pytest.param(team, marks=pytest.mark.slow) for team in (
        Team({"tensor": 2}), Team({"context": 2, "tensor": 3}, modes=SEQUENCE), Team({"tensor": 4})))],
                         ids=lambda team: f"{team.text()} {'sequence' if team.modes else ''}")
def test_members_send_their_part_of_the_tokens(team):
    """Every member has all experts of a device, of whose gradients it has a part of the sum, and its part of the rows,
    in the same way on the way there, at the experts, and back; nothing on this way is gathered."""
    _, graph = ex.captured()
    made = member_graph(team, graph)
    banks = {bank for layer in expert_layers(graph) for bank in layer.banks}
    assert banks and banks.isdisjoint(made.divisions)
    assert all(made.sums[bank] == tuple(team.axes) for bank in banks)
    shapes = {value.name: value.spec.shape for value in made.graph.values}
    rows, segments = 2 * equal.ROWS * equal.LENGTH // team.members, {item.name: item for item in made.graph.segments}
    for layer in expert_layers(made.graph):
        dispatch, experts, combine = (segments[name] for name in layer.segments)
        order, arrive, offsets, splits, sent, weights = (shapes[name] for name in dispatch.outputs)
        assert (order, arrive, offsets, splits) == ((rows,), (rows,), (ex.EXPERTS,), (2, 1))
        assert sent == shapes[combine.outputs[0]] == (rows, 16) and weights == (rows, 1)
        for segment in (experts, combine):
            assert not any("gather" in op.kind or "reduce" in op.kind for op in made.graph.trace(segment).operators)


@pytest.mark.parametrize("parallel, modes", [(True, ()), (False, ("expert",))])
def test_the_mode_of_experts_is_that_of_graphs_whose_tokens_stay(parallel, modes):
    """Where they travel, `Team.expert` alone says who has which experts."""
    _, graph = ex.captured(parallel)
    team = team_of(model_pieces(graph), Degrees(tensor=2, copies=2, expert=2), "cpu")
    assert tuple(item.mode for item in team.modes) == modes and team.expert == 2


def test_tokens_that_do_not_divide_are_refused():
    _, graph = ex.captured()
    with pytest.raises(InputError, match=r"mlp.dispatch: 24 tokens do not divide among 5 members, each of which sends"):
        member_graph(Team({"tensor": 5}), graph)
    five = Team({"tensor": 5}, microbatch=5 * num_sequences(graph))  # of a graph that is captured again for the plan
    assert refusal(five, graph, five.microbatch) is None
    assert "but the graph was captured with" in (refusal(five, graph) or "")


def test_rows_picked_by_data_are_not_for_teams(tmp_path):
    """Before any member's graph is made: a plan that is made again for teams is passed over, too."""
    _, graph = ex.captured(False)
    first, *others = graph.traces
    kind = replace(first.operators[0], kind=next(iter(DIRECT)))
    picking = replace(graph, traces=(replace(first, operators=(kind, *first.operators[1:])), *others))
    for axes, fits in (({}, True), ({"tensor": 2}, False)):
        plan = replace(ex.plan_for(graph, 1), team=Team(axes, 2))
        check_team(plan, graph, config_of(tmp_path, 1))
        if fits:
            check_team(plan, picking, config_of(tmp_path, 1))
            continue
        for item, divides in ((graph, True), (picking, False)):
            job = PreparedRun(plan, lower(plan), item, config_of(tmp_path, 1))
            assert Supervisor(job, "", lambda problem: pytest.fail("planned"), None, 1, str).divides(plan) is divides
        with pytest.raises(InputError, match=r"its ranks are teams \(tensor 2\), but segment .* picks rows by data"):
            check_team(plan, picking, config_of(tmp_path, 1))
