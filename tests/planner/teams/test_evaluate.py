"""Evaluated configurations: closed forms of times and memory, and every way in which one does not divide."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from team_config import CONFIG
from team_machine import machine

from mipipe.graphs.capture.model import capture
from mipipe.graphs.efficiency import Evidence
from mipipe.graphs.errors import InputError, MipipeError, PlanError
from mipipe.graphs.modes import Collective, CollectiveKind
from mipipe.graphs.operator_graph import Role
from mipipe.graphs.serialize import digest
from mipipe.planner.check import check_plan
from mipipe.planner.check.graph import check_graph
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.problems.from_layers import LayerTimes
from mipipe.planner.team import Team
from mipipe.planner.teams.evaluate import evaluate_teams
from mipipe.planner.teams.outside import otherwise, outside
from mipipe.planner.teams.prices.degrees import Degrees, completed, parse_degrees
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.remedies import remedy
from mipipe.planner.teams.stages import (
    cut_pieces,
    even_layers,
    exposed_gather,
    exposed_reduction,
    kept_apart,
    stage_cost,
)


@pytest.fixture(scope="module")
def pricer(pieces) -> Pricer:
    return Pricer(pieces, machine())


def test_one_rank_takes_its_work_and_its_update(pricer):
    """Nothing to wait for: microbatches times the pieces' phases and two actions' overhead, then the update."""
    degrees = Degrees(copies=8, microbatch=2)
    found = evaluate_teams(pricer, degrees, 64)
    costs = pricer.costs(degrees)
    work = 4 * (sum(cost.f.total + cost.backward for cost in costs) + 2e-6)
    update = sum(cost.optimizer for cost in costs) + exposed_reduction(costs) + exposed_gather(costs)
    assert found.seconds == pytest.approx(work + update, rel=1e-6)
    assert found.times.bubble == pytest.approx(0, abs=1e-8)
    assert found.times.total == pytest.approx(found.seconds)


def test_a_chain_of_1f1b_by_its_closed_form(pricer):
    """Where one stage is the slowest and links are quick, the last microbatch leaves it after (M - 1) of its loads, and
    what is before and behind adds one forward and backward each."""
    degrees = Degrees(ranks=2, copies=4)
    found = evaluate_teams(pricer, degrees, 32, layers=(4, 2))
    costs = pricer.costs(degrees)
    first, last = (stage_cost(costs, members, pricer.machine, split=False)
                   for members in cut_pieces(pricer.model, (4, 2)))
    assert first.load > last.load
    link = found.plan.problem.topology.between_hosts.transfer_ns(2 * 512 * 256) / 1e9
    slowest = 8 * first.load + last.load + 2 * link - first.phases[0].total
    assert found.seconds == pytest.approx(slowest + first.optimizer + first.exposed_data, rel=0.02)
    assert found.times.total == pytest.approx(found.seconds)


@pytest.mark.parametrize("degrees, layers, schedule", [
    (Degrees(ranks=2, tensor=2, sequence=True, copies=2), None, "1F1B"),
    (Degrees(ranks=4, tensor=2), (1, 2, 2, 1), "gpipe"),
    (Degrees(ranks=2, tensor=4, sequence=True), None, "zb-h1"), (Degrees(ranks=2, context=2, copies=2), None, "1f1b"),
    (Degrees(ranks=2, copies=4, chunks=2), None, "interleaved"), (Degrees(ranks=2, copies=4, zero=3), None, "zb-v"),
    (Degrees(tensor=8, recompute="full"), None, "1f1b")])
def test_every_evaluated_plan_is_one(pricer, degrees, layers, schedule):
    """The checker, which shares no code with all this, finds every rule kept and the makespan right."""
    found = evaluate_teams(pricer, degrees, 32, layers=layers, schedule=schedule)
    check_plan(found.plan)
    timeline = simulate(found.plan, lower(found.plan))
    assert timeline.makespan_ns == found.plan.makespan_ns
    assert found.times.total == pytest.approx(found.seconds)
    assert [item.tensors for item in found.memory] == [timeline.peak_bytes(rank) for rank in range(degrees.ranks)]
    assert sum(found.layers) == 6


def test_memory_is_divided_by_what_divides_it(pricer, pieces):
    """2 bytes of weights and 4 of gradient per parameter over tensor members and ranks; 12 of state over copies too."""
    count = pieces.parameters()
    one = evaluate_teams(pricer, Degrees(), 8).memory[0]
    assert (one.gradients, one.state) == (4 * count, 12 * count)
    assert one.weights == pytest.approx(2 * count, abs=64 * 8)
    shared = {stage: evaluate_teams(pricer, Degrees(copies=8, zero=stage), 8).memory[0] for stage in range(4)}
    assert [shared[stage].state for stage in range(4)] == [12 * count] + 3 * [pytest.approx(12 * count / 8, rel=1e-3)]
    assert shared[2].gradients == pytest.approx(one.gradients / 8, rel=1e-3)
    assert shared[3].weights == pytest.approx(one.weights / 8, rel=1e-3)
    teams = evaluate_teams(pricer, Degrees(tensor=4), 8).memory[0]
    norms = 13 * 256
    assert teams.gradients == pytest.approx(4 * ((count - norms) / 4 + norms), rel=1e-6)


def test_split_backwards_keep_what_weight_gradients_read(pricer, pieces):
    """Of a stage's bytes from F to I, F to W and I to W: before I all that is kept, after it the inputs of products and
    the gradients of their results; I makes room for these as it goes, and never needs more than its worst moment."""
    costs = pricer.costs(Degrees())
    to_i, to_w, late = kept_apart(costs)
    read, gradients = (sum(getattr(cost, name) for cost in costs) for name in ("until_w", "late"))
    assert to_i + to_w == sum(cost.kept for cost in costs) and to_w + late == read + gradients
    assert 0 < read < to_i + to_w and 0 <= late < gradients
    clock, worst = sum(cost.kept for cost in costs), 0
    for cost in reversed(costs):
        worst = max(worst, clock + cost.late)
        clock += cost.late + cost.until_w - cost.kept
    assert to_i + to_w + late == worst
    again = pricer.costs(Degrees(recompute="full"))
    assert sum(kept_apart(again)[1:]) >= sum(cost.until_w + cost.late for cost in again if cost.again)


def test_forwards_have_a_workspace_of_their_own(pieces):
    """Of a layer: parameters of two layers where they are sharded, no gradients; what attention or the MLP has in
    memory at once; with teams the sums of the forward. Where layers run again nothing stays: the MLP is the most."""
    pricer = Pricer(pieces, machine())

    def layer(**degrees):
        return pricer.costs(Degrees(copies=4, **degrees))[1]

    plain, sharded = layer(), layer(zero=3)
    inner, rows = 512 * 688 * 2, 512 * 256 * 2
    weights = 2 * (256 * (2 * 256 + 2 * 128 + 3 * 688) + 2 * 256)
    assert plain.forward_space == inner + rows  # what attention gives the MLP stays
    assert sharded.forward_space == plain.forward_space + 2 * weights
    assert layer(zero=2).forward_space == plain.forward_space < layer(zero=2).while_running
    assert layer(recompute="full").forward_space == 3 * inner + rows
    assert layer(tensor=2).forward_space == inner // 2 + rows + rows
    result = evaluate_teams(pricer, Degrees(ranks=2, zero=3, copies=2), 8)
    for group, stage in zip(result.plan.problem.groups, result.stages, strict=True):
        assert group.forward_workspace_bytes == stage.forward_workspace + rows
        assert group.workspace_bytes == stage.workspace + 2 * rows
        assert stage.forward_workspace == max(pricer.costs(result.degrees)[piece].forward_space
                                              for piece in stage.pieces)


def test_recomputation_and_sequence_keep_less_and_take_longer(pricer):
    base = Degrees(ranks=2, tensor=4)
    plain, again, parts = (evaluate_teams(pricer, degrees, 32) for degrees in (
        base, replace(base, recompute="full"), replace(base, sequence=True)))
    assert again.memory[0].activations < parts.memory[0].activations < plain.memory[0].activations
    assert again.times.kernels > 1.2 * plain.times.kernels
    assert plain.times.axes["tensor"] > 0 and plain.times.axes["expert"] == 0


def test_reductions_hide_behind_backwards(pricer):
    """A piece's reduction starts when its backward ends; long ones queue up, short ones leave only the last."""
    cost = pricer.costs(Degrees(copies=2))[1]
    quick, slow = (replace(cost, reduce=factor * cost.backward, gather=factor * cost.f.total) for factor in (0.5, 3.0))
    assert exposed_reduction([quick] * 4) == pytest.approx(0.5 * cost.backward)
    assert exposed_reduction([slow] * 4) == pytest.approx((4 * 3 + 1 - 4) * cost.backward)
    assert exposed_gather([quick] * 4) == pytest.approx(0.5 * cost.f.total)
    assert exposed_gather([slow] * 4) == pytest.approx((4 * 3 - 3) * cost.f.total)


@pytest.mark.parametrize("layers, stages, expected", [
    (6, 2, [3, 3]), (6, 4, [1, 2, 2, 1]), (80, 16, [5] * 16), (126, 64, [1, *[2] * 62, 1])])
def test_even_stages_give_the_ends_fewer(layers, stages, expected):
    assert even_layers(layers, stages) == expected


@pytest.mark.parametrize("text, message", [
    ("tensor", "expected name=number"), ("tensors=8", "expected name=number with a name of ranks, tensor"),
    ("tensor=0", "expected a number from 1"), ("zero=4", "expected a number from 0 to 3"),
    ("tensor=2,tensor=4", "tensor is given twice"), ("tensor=2,sequence=2", "are one axis")])
def test_degrees_that_are_none(text, message):
    with pytest.raises(InputError, match=message):
        parse_degrees(text)


@pytest.mark.parametrize("text, devices, message", [
    ("tensor=4,ranks=2,copies=2", 8, "ranks 2 x tensor 4 x copies 2 = 16 devices, but there are 8; copies=1 would"),
    ("tensor=3", 8, "ranks 1 x tensor 3 x copies 2 = 6 devices, but there are 8; .* = 3 does not divide 8")])
def test_degrees_that_do_not_multiply_to_the_devices(text, devices, message):
    with pytest.raises(InputError, match=message):
        completed(parse_degrees(text), devices, 1, "none")


@pytest.mark.parametrize("degrees, batch, message", [
    (Degrees(tensor=3), 8, r"tensor=3 does not divide the 8 heads of model.layers.0.self_attn; 1, 2, 4, 8 would"),
    (Degrees(ranks=16), 16, "ranks=16 stages, but the model has 8 pieces"),
    (Degrees(copies=3), 8, "global-batch 8 does not divide into copies=3 x --microbatch 1 sequences; 6 or 9 would"),
    (Degrees(context=3), 8, "sequences of 512 tokens do not divide into context=3 parts"),
    (Degrees(copies=8, expert=4), 8, "expert=4, but the model has no experts"),
    (Degrees(copies=2, expert=4), 8, "expert=4 does not divide the 2 devices of a rank over all copies")])
def test_models_that_do_not_divide(pricer, degrees, batch, message):
    with pytest.raises(InputError, match=message):
        evaluate_teams(pricer, degrees, batch)


@pytest.mark.parametrize("layers, schedule, message", [
    ((3, 2), "1f1b", "5 layers in 2 stages, but the model has 6"), ((2, 2, 2), "1f1b", "has 2 stages"),
    (None, "2f2b", "unknown; expected one of"), (None, "zb-h3", "unknown")])
def test_stages_and_schedules_that_are_none(pricer, layers, schedule, message):
    with pytest.raises(MipipeError, match=message):
        evaluate_teams(pricer, Degrees(ranks=2, copies=4), 32, layers=layers, schedule=schedule)


def test_too_little_memory_names_a_degree_that_would_do(pieces):
    """The change that is promised is one that fits."""
    small = Pricer(pieces, machine(memory=68 * 10**6))
    found = evaluate_teams(small, Degrees(ranks=1, copies=8, microbatch=2, zero=1), 32)
    assert found.shortage > 0
    assert remedy(small, found) == "--microbatch 1 would fit"
    tight = Pricer(pieces, machine(memory=33 * 10**6))
    told = remedy(tight, evaluate_teams(tight, Degrees(copies=8), 32))
    assert told.endswith("would fit")
    degrees = completed(parse_degrees(",".join(part for part in told.replace(" with ", ",").removesuffix(
        " would fit").split(","))), 8, 1, "none")
    assert evaluate_teams(tight, degrees, 32).shortage == 0


def test_measured_layers_take_the_place_of_estimates(pieces):
    """Two ranks of 4 ms of F and 8 of B each, by hand: 4 microbatches take (4 + 1) x 12 ms, then the update."""
    layers = [LayerTimes(1e-3, 2e-3, 5e-4)] * len(pieces.pieces)
    own = Pricer(pieces, machine(action_ns=0), layers)
    found = evaluate_teams(own, Degrees(ranks=2, zero=0), 4, schedule="1f1b")
    assert found.measured
    assert found.seconds == pytest.approx(5 * 12e-3 + 4 * 5e-4, rel=0.01)
    held = evaluate_teams(own, Degrees(ranks=2, zero=0), 4, schedule="1f1b", held=True)
    assert held.seconds > found.seconds
    with pytest.raises(InputError, match="divides backwards, which measured times of layers do not"):
        evaluate_teams(own, Degrees(ranks=2), 4, schedule="zb-h1")
    with pytest.raises(InputError, match=r"times of 3 layers, but the model has 8 pieces \(6 layers"):
        Pricer(pieces, machine(), layers[:3])


def test_what_is_far_from_what_was_validated_is_told(pieces):
    known = Evidence(12, 0.05, (8, 64), (10**9, 10**10), (512, 8192), ("16 bits",), ("experts",))
    here = machine(evidence=known)
    told = outside(Pricer(pieces, replace(here, low="float8")), Degrees(ranks=2, copies=256))
    for text in ("512 devices, the runs behind the efficiencies had 8 to 64", "parameters, the runs behind",
                 "products in float8", "a model without experts"):
        assert any(text in line for line in told), text
    assert len(told) == 4
    assert "no published run of small" in outside(Pricer(pieces, machine()), Degrees())[0]
    within = replace(known, parameters=(10**6, 10**9), models=("dense", "experts"))
    assert outside(Pricer(pieces, machine(evidence=within)), Degrees(copies=8)) == []


NEAR = Evidence(12, 0.05, (8, 64), (10**6, 10**9), (512, 8192), ("16 bits", "float8"), ("dense",), ("float8",))
"""Runs that the small model lies among."""


@pytest.mark.parametrize("known, low, model, devices, told", [
    ({}, None, {}, 8, None), ({}, None, {}, 2, None),
    ({}, None, {}, 1, "1 devices, the runs behind the efficiencies had 8 to 64"),
    ({}, None, {}, 256, None), ({}, None, {}, 512, "512 devices, the runs"),
    ({"parameters": (10**9, 10**10)}, None, {}, 8, "parameters, the runs behind the efficiencies had 1,000,000,000 to"),
    ({"parameters": (10**4, 10**5)}, None, {}, 8, "parameters, the runs behind the efficiencies had 10,000 to 100,000"),
    ({"tokens": (8192, 8192)}, None, {}, 8, "512 tokens a sequence, the runs behind the efficiencies had 8,192 to"),
    ({"tokens": (16, 32)}, None, {}, 8, "512 tokens a sequence, the runs behind the efficiencies had 16 to 32"),
    ({}, "float4", {}, 8, "products in float4, the runs behind the efficiencies had 16 bits and float8"),
    ({}, "float8", {}, 8, "products in float8, which runs of one model alone stand for on this device kind"),
    ({"thin": ("16 bits",)}, None, {}, 8, "products in 16 bits, which runs of one model alone stand for"),
    ({"models": ("experts",)}, None, {}, 8, "a model without experts, the runs behind the efficiencies were experts"),
    ({}, None, {"experts": True}, 8, "a model with experts, the runs behind the efficiencies were dense"),
    ({}, None, {"tokens": None}, 8, "a model without tokens, the runs behind the efficiencies were language models")])
def test_every_reason_to_doubt_a_prediction_is_told_alone(pieces, known, low, model, devices, told):
    """Hardware's number, the model's size and kind, sequences, precision: one line for the one thing that is far off,
    none at the edge of a factor of four."""
    own = replace(pieces, tokens=model.get("tokens", pieces.tokens))
    if "experts" in model:
        segments = [replace(segment, tags=replace(segment.tags, role=Role.EXPERTS)) for segment in own.graph.segments]
        own = replace(own, graph=replace(own.graph, segments=tuple(segments)))
    there = machine(evidence=replace(NEAR, **known), origin="fitted")
    found = outside(Pricer(own, replace(there, low=low)), Degrees(copies=devices))
    assert found == [] if told is None else len(found) == 1 and told in found[0], found


def test_tokens_that_are_priced_as_sent_once_to_a_host_are_told(pieces, tmp_path):
    """Where a token's experts are on several hosts, and nowhere else."""
    own = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "head_dim": 32,
           "num_experts_per_tok": 2, "moe_intermediate_size": 344, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | own))
    experts = model_pieces(capture(str(tmp_path), seq=512, dtype="bfloat16", verify=False))
    hosts = machine(host=4)
    assert otherwise(Pricer(experts, hosts), Degrees(copies=8, expert=4)) == []
    told = otherwise(Pricer(experts, hosts), Degrees(copies=8, expert=8))
    assert len(told) == 1 and "a host that has several of its 2 experts" in told[0]
    assert otherwise(Pricer(pieces, hosts), Degrees(copies=8)) == []


def test_layers_of_experts_cost_the_host(pieces):
    """Dense models have none."""
    one, two = (evaluate_teams(Pricer(pieces, machine(expert_ns=cost)), Degrees(), 2) for cost in (0, 10**6))
    assert one.seconds == two.seconds


def test_what_an_overlapping_run_hides_of_collectives(pieces):
    """Of the tensor axis's collectives and of experts' all-to-alls each its own share; of the context axis's nothing;
    and where a run does not overlap, nothing at all."""
    talk = tuple(Collective(kind, axis, 2**20) for kind, axis in (
        (CollectiveKind.ALL_REDUCE, "tensor"), (CollectiveKind.ALL_TO_ALL, "expert"),
        (CollectiveKind.ALL_GATHER, "context")))
    degrees = Degrees(tensor=2, context=2, expert=2, copies=2)
    shown, hidden = (Pricer(pieces, replace(machine(hidden=0.6, hidden_experts=0.25), overlap=overlap))._talk(
        talk, degrees, 1.0, 1.0) for overlap in (False, True))
    assert all(shown.values()) and set(shown) == {"tensor", "expert", "context"}
    assert {axis: hidden[axis] / shown[axis] for axis in shown} == pytest.approx(
        {"tensor": 0.4, "expert": 0.75, "context": 1.0})


def test_the_same_model_on_another_machine(pieces):
    slow = Pricer(pieces, machine())
    slow.costs(Degrees(tensor=2))
    fast = slow.on(machine(product=1.0))
    assert fast.costs(Degrees(tensor=2)) == Pricer(pieces, machine(product=1.0)).costs(Degrees(tensor=2))


def test_what_runs_again_is_checked_against_the_graph(pieces, llama):
    """Segments that nobody has, or that are named twice, of whatever runs again."""
    plan = evaluate_teams(Pricer(pieces, machine()), Degrees(ranks=2, copies=4), 32).plan
    problem = plan.problem.replace(graph_digest=digest(llama))
    one, other = (next(name for name in group.segments if name.endswith("attn")) for group in problem.groups)
    for team, fault in (
            (Team({}, 4, attention_again=(problem.groups[0].segments[0],)), "run again, which has none"),
            (Team({}, 4, attention_again=(one, other)), None), (Team({}, 4, again=((one,), (other,))), None),
            (Team({}, 4, again=((one, other),)), "run again together, but are not all in one group"),
            (Team({}, 4, again=((one,), (one,))), "runs again twice"),
            (Team({}, 4, again=((one,),), attention_again=(one,)), "runs again twice"),
            (Team({}, 4, attention_again=(one, one)), "runs again twice"),
            (Team({}, 4, latents_again=("nobody",)), "up-projections of segment 'nobody' run again, which the graph")):
        made = replace(plan, problem=problem, team=team)
        if fault is None:
            check_graph(made, llama)
        else:
            with pytest.raises(PlanError, match=fault):
                check_graph(made, llama)
