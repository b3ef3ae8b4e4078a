"""Profiles estimated from shapes against those traced, and against what sizes say."""

from __future__ import annotations

import dataclasses
import json

import pytest
from team_config import CONFIG

from mipipe.graphs.capture.model import capture
from mipipe.graphs.costs.estimate_modes import estimated_profile, forward_alive
from mipipe.graphs.costs.fusion import kept
from mipipe.graphs.costs.trace_facts import TeamSplit, trace_facts
from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.operator_graph import Phase, Role
from mipipe.graphs.sharding.modes import with_modes
from mipipe.graphs.sharding.shares import TeamShares
from mipipe.planner.teams.prices.degrees import Degrees
from mipipe.planner.teams.prices.misfit import indivisible_of
from mipipe.planner.teams.prices.pieces import model_pieces


def traces(graph):
    """The distinct traces with a role of one of their segments."""
    found = {segment.trace: segment for segment in graph.segments}
    return [(graph.trace(segment), segment.tags.role) for segment in found.values()]


def test_columns_then_rows(llama):
    shares = TeamShares(llama)
    dims = {role: shares.of(trace, "tensor", 4).dims for trace, role in traces(llama)}
    own = {name.removeprefix("p_").removesuffix("_weight"): dim for name, dim in dims[Role.ATTENTION].items()}
    assert own == {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1}
    assert sorted(dims[Role.MLP].values()) == [0, 0, 1]
    assert dims[Role.HEAD] == {"p_weight": 0} and set(dims[Role.EMBEDDING].values()) == {0}


@pytest.mark.parametrize("mode", ["tensor", "sequence"])
def test_estimates_equal_what_is_traced(llama, mode):
    """Flops other than attention's (there the estimate halves a causal mask's), parameters and collectives of blocks
    are the same."""
    graph, shares = with_modes(llama, (mode,), (4,)), TeamShares(llama)
    for trace, role in traces(graph):
        traced = graph.modes.find(trace.digest, mode, 4)
        estimate = estimated_profile(trace, role, TeamSplit(4, sequence=mode == "sequence"), fused=False,
                                     shares=[shares.of(trace, mode, 4)])
        assert estimate.resident == traced.resident
        for phase, work in traced.phases.items():
            own = estimate.phases[phase]
            plain = [sum(item.flops * item.count for item in one.products if "attention" not in item.kind)
                     for one in (work, own)]
            assert plain[0] == plain[1]
            big = [sorted((item.kind.value, item.num_bytes) for item in one.collectives if item.num_bytes > 10_000)
                   for one in (work, own)]
            if phase is not Phase.W:  # the second gather of the sequence runs beside I's products
                assert big[0] == big[1]


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A layer with two key heads, an inner size of 690 and a vocabulary of 1,023: what four members cannot divide."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 1, "num_key_value_heads": 2,
                                                    "intermediate_size": 690, "vocab_size": 1023}))
    return capture(str(folder), seq=512, dtype="bfloat16", verify=False)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_does_not_divide_is_whole_as_when_traced(odd, size):
    """Odd sizes and fewer key heads than members: the estimate divides what the runtime divides, and says the rest."""
    graph, shares = with_modes(odd, ("tensor",), (size,)), TeamShares(odd)
    for trace, role in traces(graph):
        traced = graph.modes.find(trace.digest, "tensor", size)
        estimate = estimated_profile(trace, role, TeamSplit(size), fused=False,
                                     shares=[shares.of(trace, "tensor", size)])
        assert estimate.resident == traced.resident, role
        for phase, work in traced.phases.items():
            assert [sum(item.flops * item.count for item in one.products if "attention" not in item.kind)
                    for one in (work, estimate.phases[phase])] == [work.flops - sum(
                        item.flops * item.count for item in work.products if "attention" in item.kind)] * 2
    said = [line.partition(": ")[2] for line in indivisible_of(model_pieces(odd), Degrees(tensor=size))]
    matrices = [f"p_{name}_proj_weight: 690 of {shape} does not divide by 4 members"
                for name, shape in (("gate", [690, 256]), ("up", [690, 256]), ("down", [256, 690]))]
    table = f"p_weight: 1023 of [1023, 256] does not divide by {size} members"
    assert sorted(said) == sorted([table] if size == 2 else [
        table, "keys and values: 2 heads do not divide by 4 members", *matrices])


def test_a_team_of_one_does_all_and_says_nothing(llama):
    for trace, role in traces(llama):
        found = estimated_profile(trace, role, TeamSplit(), fused=False)
        assert not any(work.collectives for work in found.phases.values())
        saved = sum(item.num_bytes for item in trace.saved)
        assert found.kept.fi + found.kept.fw + found.kept.iw == saved


def test_what_fused_kernels_keep(llama):
    """Per token of a dense Llama block: its input, q, k, v and the attention's result; its input, gate and up."""
    tokens, hidden, wide = 512, 256, 688
    sizes = {role: estimated_profile(trace, role, TeamSplit()).kept for trace, role in traces(llama)}
    attention, mlp = sizes[Role.ATTENTION], sizes[Role.MLP]
    kv = hidden * 4 // 8
    statistics = 4 * 8 * tokens
    assert attention.fi + attention.fw == pytest.approx(2 * tokens * (3 * hidden + 2 * kv) + statistics, rel=0.01)
    assert mlp.fi + mlp.fw == 2 * tokens * (hidden + 2 * wide)
    assert sizes[Role.HEAD].fi == pytest.approx(4 * tokens * 1024, rel=0.02)  # log-probabilities in float32


def test_what_the_forward_holds_for_a_while(llama):
    """Of eager operators as capture counted it; of fused kernels in an MLP gate, up and their product at once, divided
    over tensor members, of which gate and up stay for the backward."""
    for trace, role in traces(llama):
        facts = trace_facts(trace, fused=False)
        alive = forward_alive(trace, role, TeamSplit(), facts, facts.stays | set(trace.outputs))
        assert alive == trace.workspace_bytes[Phase.F]
    trace, role = next(item for item in traces(llama) if item[1] is Role.MLP)
    facts, inner, rows = trace_facts(trace), 512 * 688 * 2, 512 * 256 * 2
    assert forward_alive(trace, role, TeamSplit(), facts) == 3 * inner
    share = TeamShares(llama).of(trace, "tensor", 2)
    assert forward_alive(trace, role, TeamSplit(2), facts, shares=[share]) == 3 * inner // 2
    assert forward_alive(trace, role, TeamSplit(), facts, facts.stays) == inner + rows  # the product, and the result


def test_attention_that_runs_again_is_not_kept(llama):
    trace = next(trace for trace, role in traces(llama) if role is Role.ATTENTION)
    once, again = (estimated_profile(trace, Role.ATTENTION, TeamSplit(), attention_again=flag)
                   for flag in (False, True))
    assert again.kept.fi + again.kept.fw < once.kept.fi + once.kept.fw
    assert again.phases[Phase.I].flops == once.phases[Phase.I].flops + next(
        item.flops for item in once.phases[Phase.F].products if item.kind == "mipipe.attention")


def test_kept_tensors_are_enough_for_the_backward(llama):
    """Everything the backward reads can be made from what is kept, parameters and buffers by elementwise operators."""
    for trace, _ in traces(llama):
        there = {item.name for item in kept(trace)} | {*trace.parameters, *trace.buffers}
        makers = {operator.name: operator for operator in trace.operators}
        for saved in trace.saved:
            pending = [saved.name] if saved.source is Phase.F else []
            while pending:
                name = pending.pop()
                if name in there:
                    continue
                assert name in makers and not makers[name].flops, f"{name} can neither be read nor made again"
                pending += makers[name].inputs


def test_context_gathers_keys_and_values(llama):
    trace = next(trace for trace, role in traces(llama) if role is Role.ATTENTION)
    found = estimated_profile(trace, Role.ATTENTION, TeamSplit(context=2))
    gathered = [item for item in found.phases[Phase.F].collectives if item.axis == "context"]
    assert [item.kind for item in gathered] == [CollectiveKind.ALL_GATHER]
    assert gathered[0].num_bytes == 2 * 2 * 512 * 256 * 4 // 8
    whole = estimated_profile(trace, Role.ATTENTION, TeamSplit())
    assert found.phases[Phase.F].flops * 2 == whole.phases[Phase.F].flops
    assert dataclasses.replace(found.resident) == whole.resident


def test_scores_of_unfused_attention_go_through_memory(llama):
    """Products of the whole square, 13 and 19 bytes moved of every score, 5 kept (Korthikanti et al., 5 a s^2 b)."""
    trace = next(trace for trace, role in traces(llama) if role is Role.ATTENTION)
    share = TeamShares(llama).of(trace, "tensor", 2)
    flash, eager = (estimated_profile(trace, Role.ATTENTION, TeamSplit(2), flash=flag, shares=[share])
                    for flag in (True, False))
    scores, width = 8 * 512 * 512 // 2, 256 // 8
    products = [item for item in eager.phases[Phase.F].products if item.kind == "aten.bmm"]
    assert [item.flops for item in products] == [4 * scores * width]
    assert eager.phases[Phase.F].bytes_moved - flash.phases[Phase.F].bytes_moved == pytest.approx(13 * scores)
    assert eager.phases[Phase.I].bytes_moved - flash.phases[Phase.I].bytes_moved == pytest.approx(19 * scores)
    assert eager.kept.fi + eager.kept.fw - flash.kept.fi - flash.kept.fw == 5 * scores
    again = estimated_profile(trace, Role.ATTENTION, TeamSplit(2), flash=False, attention_again=True,
                              shares=[share])
    assert again.kept.fi + again.kept.fw < flash.kept.fi + flash.kept.fw
    assert again.phases[Phase.I].flops == eager.phases[Phase.I].flops + products[0].flops


@pytest.mark.parametrize("mode", [pytest.param("tensor", marks=pytest.mark.slow), "sequence"])
def test_tokens_that_travel_are_a_members_part(tmp_path, mode):
    """Of a graph whose tokens travel to their experts: in ``tensor`` mode what a layer gathers is its tokens, once in F
    and once in I, and in both modes a member has its part of the rows, where the trace is divided and where it is
    estimated; the banks are whole to a team."""
    own = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "head_dim": 32,
           "num_experts_per_tok": 2, "moe_intermediate_size": 344, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **own}))
    graph = capture(str(tmp_path), seq=512, dtype="bfloat16", expert_parallel=2, verify=False)
    graph, shares = with_modes(graph, (mode,), (4,)), TeamShares(graph)
    talk = {source: {phase: [] for phase in Phase} for source in ("traced", "estimated")}
    for trace, role in traces(graph):
        if role in (Role.ATTENTION, Role.EMBEDDING, Role.HEAD):
            continue
        traced = graph.modes.find(trace.digest, mode, 4)
        estimate = estimated_profile(trace, role, TeamSplit(4, sequence=mode == "sequence"), fused=False,
                                     shares=[shares.of(trace, mode, 4)])
        for source, profile in (("traced", traced), ("estimated", estimate)):
            for phase, work in profile.phases.items():
                talk[source][phase] += [(item.kind, item.num_bytes) for item in work.collectives
                                        if item.num_bytes > 10_000]
        if role in (Role.DISPATCH, Role.EXPERTS, Role.COMBINE):
            assert estimate.resident.experts == traced.resident.experts == sum(
                trace.specs[name].num_bytes for name in trace.parameters)
            assert estimate.phases[Phase.F].flops == traced.phases[Phase.F].flops
            rows = [profile.kept.fi + profile.kept.fw for profile in (traced, estimate)]
            assert rows[0] == pytest.approx(rows[1], rel=0.01), role
            assert traced.resident.summed == traced.resident.experts  # by the sum over all that hold the same ones
    gathered = [(CollectiveKind.ALL_GATHER, 512 * CONFIG["hidden_size"] * 2)] if mode == "tensor" else []
    assert talk["traced"] == talk["estimated"] == {Phase.F: gathered, Phase.I: gathered, Phase.W: []}
