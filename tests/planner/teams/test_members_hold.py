"""What plans say that members hold is what the runtime gives them: weights, gradients and optimizer state."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
from team_config import CONFIG
from team_machine import machine

from mipipe.graphs.capture.model import capture
from mipipe.graphs.costs.mode_profile import all_work
from mipipe.graphs.operator_graph import DTYPE_BYTES, Phase
from mipipe.planner.teams.as_team import team_of
from mipipe.planner.teams.outside import undivided
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.pieces import model_pieces
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.runtime.engine.compiling.compile import divided_alike
from mipipe.runtime.engine.compiling.team import member_graph
from mipipe.runtime.experts.layers import expert_layers

DEGREES = [Degrees(tensor=2, sequence=True, copies=2), Degrees(tensor=2, context=2, copies=2), Degrees(copies=3), *(
    pytest.param(degrees, marks=pytest.mark.slow) for degrees in (
        Degrees(tensor=4), Degrees(context=2), Degrees(context=4), Degrees(context=2, copies=2), Degrees(copies=4),
        Degrees(copies=24), Degrees(tensor=2, copies=5), Degrees(context=2, copies=3)))]
SENT = [Degrees(copies=4, expert=2), Degrees(copies=6, expert=2), Degrees(tensor=2, sequence=True, copies=6, expert=4),
        Degrees(context=2, copies=5, expert=2)]
FAMILIES = {
    "llama": {}, "tied": {"tie_word_embeddings": True}, "fewer keys": {"num_key_value_heads": 2},
    "fused": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0},
    "experts": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4,
                "num_experts_per_tok": 2},
    "latents": {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_key_value_heads": 8,
                "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
                "v_head_dim": 32, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
                "moe_intermediate_size": 64, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}}


@pytest.fixture(scope="module", params=[pytest.param(name, marks=() if name in ("experts",) else pytest.mark.slow)
                                        for name in FAMILIES])
def pieces(request, tmp_path_factory):
    return pieces_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """A model whose tokens are sent to experts."""
    return pieces_of("experts", tmp_path_factory.mktemp("sent"), expert_parallel=2)


def pieces_of(family, folder, **options):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2, **FAMILIES[family]}))
    return model_pieces(capture(str(folder), seq=64, dtype="bfloat16", verify=False, **options))


def check_held(pieces, degrees, banks=()):
    """Weights, gradients and optimizer state, for every stage of ZeRO; ``banks``: parameters of which a device has the
    rows of its experts."""
    graph, team = pieces.graph, team_of(pieces, degrees, "h100")
    member, alike = member_graph(team, graph), degrees.alike_experts if banks else 1

    def held(made, each=None):
        """Bytes of parameters; ``each``: so many of every element that trains."""
        return sum(math.prod(item.spec.shape) // (degrees.expert if item.fqn in banks else 1)
                   * (each or DTYPE_BYTES[item.spec.dtype]) for item in made.graph.parameters
                   if not item.buffer and item.tied_to is None and (item.trainable or each is None))

    buffers = sum(math.prod(item.spec.shape) * DTYPE_BYTES[item.spec.dtype] for item in graph.parameters if item.buffer)
    for zero in range(4):
        shared = divided_alike(member, zero, team, degrees.copies, degrees.expert if banks else 1, alike)
        costs = Pricer(pieces, machine()).costs(replace(degrees, zero=zero))
        told = [sum(getattr(cost, name) for cost in costs) for name in ("weights", "gradients", "state")]
        kept = [held(shared if zero == 3 else member),
                held(shared if zero > 1 else member, machine().gradient_bytes),
                held(shared, machine().state_bytes)]
        assert told[0] == pytest.approx(kept[0], abs=buffers * len(costs) + 64)
        assert told[1:] == pytest.approx(kept[1:], rel=5e-3)  # a float32 router counts as two of its elements


@pytest.mark.parametrize("degrees", DEGREES, ids=Degrees.text)
def test_plans_say_what_members_hold(pieces, degrees):
    """Whatever the axes: copies and their members along the context axis share what they have alike, as far as it
    divides among them, and each has a part of what its part of the tables, experts, heads and columns is."""
    check_held(pieces, degrees)


@pytest.mark.parametrize("degrees", [Degrees(tensor=4, expert=4, copies=2),
                                     Degrees(tensor=2, sequence=True, expert=2, copies=2)], ids=Degrees.text)
def test_experts_that_a_team_divides_are_priced_as_members_run_them(pieces, degrees):
    """They add up what their experts make of all tokens: what they hold, what they send, in which phase; whatever was
    priced before."""
    if not pieces.has_experts:
        pytest.skip("no experts")
    check_held(pieces, degrees)
    made, pricer = member_graph(team_of(pieces, degrees, "h100"), pieces.graph).graph, Pricer(pieces, machine())
    pricer.costs(replace(degrees, expert=1))
    for number, segment in enumerate(made.segments):
        work, told = all_work(made.trace(segment)), pricer.profile(number, degrees).phases
        for phase in {Phase.F, Phase.I} & set(work):  # estimates leave out what W gathers of F's values
            assert Counter({(item.kind, item.axis, item.num_bytes): item.count for item in work[phase].collectives}) \
                == Counter((item.kind, item.axis, item.num_bytes) for item in told[phase].collectives), segment.name


def test_experts_of_graphs_captured_without_sending_are_priced_as_with(sent, tmp_path):
    """But for those that the tensor axis divides, which a run has so."""
    stay = pieces_of("experts", tmp_path)
    for degrees in (*SENT, *(replace(degrees, zero=3) for degrees in SENT)):
        told, known = ([(cost.weights, cost.gradients, cost.state) for cost in Pricer(model, machine()).costs(
            degrees)] for model in (stay, sent))
        assert [sum(sizes) for sizes in zip(*told, strict=True)] == pytest.approx(
            [sum(sizes) for sizes in zip(*known, strict=True)], rel=1e-3)


@pytest.mark.parametrize("degrees", [Degrees(tensor=2, copies=2), Degrees(tensor=2, sequence=True, context=2)],
                         ids=Degrees.text)
def test_experts_that_every_device_has_are_held_and_added_up_by_all(sent, degrees):
    """Copies and context members divide their state, those along the tensor axis do not; each has its part of the
    tokens, so gradients are sums over it, which take time."""
    check_held(sent, degrees)
    summed = {fqn for fqn, axes in member_graph(team_of(sent, degrees, "h100"), sent.graph).sums.items()
              if "tensor" in axes and ".experts." in fqn}
    pricer = Pricer(sent, machine())
    told = sum(item.summed for piece in sent.pieces for member in piece.members
               for item in pricer.lengths(member, degrees) if item.experts)
    assert summed and told == sum(item.spec.num_bytes for item in sent.graph.parameters if item.fqn in summed)
    assert sum(cost.reduce for cost in pricer.costs(replace(degrees, context=1, copies=1))) > 0


@pytest.mark.parametrize("degrees", SENT, ids=Degrees.text)
def test_plans_say_what_devices_with_the_same_experts_hold(sent, degrees):
    """They divide what they have of these as others do, along the second dimension."""
    check_held(sent, degrees, {bank for layer in expert_layers(sent.graph) for bank in layer.banks})


def test_what_does_not_divide_is_told(pieces):
    """24 devices that hold the same have most matrices of 256, 688 and 1,024 rows whole; four divide them all."""
    told = undivided(Pricer(pieces, machine()), Degrees(copies=24, zero=3))
    assert len(told) == 1 + pieces.has_experts
    assert all("whose first dimension does not divide among the 24 devices that hold the same; zero=3 leaves" in line
               for line in told)
    assert not undivided(Pricer(pieces, machine()), Degrees(copies=4, zero=3))
    assert not undivided(Pricer(pieces, machine()), Degrees(copies=24, zero=0))


def test_what_of_experts_does_not_divide_is_told(sent):
    """Of the second dimensions, 256 and 1,376, three devices with the same experts divide none."""
    told = undivided(Pricer(sent, machine()), Degrees(copies=6, expert=2, zero=3))
    assert [line.partition(" of experts, ")[2][:79] for line in told if " of experts, " in line] == [
        "whose second dimension does not divide among the 3 devices that hold the same; z"[:79]]
