"""What estimates take a mode to be is what its members' programs are: parameters, flops, and what is sent, in every
family."""

from __future__ import annotations

from collections import Counter

import pytest
from test_families import CASES, MOE, TEXT, Case

from mipipe.graphs.capture.model import capture
from mipipe.graphs.coarse.totals import operator_flops
from mipipe.graphs.costs.estimate_modes import estimated_profile
from mipipe.graphs.costs.trace_facts import TeamSplit
from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.sharding.member import has_dynamic_rows
from mipipe.graphs.sharding.modes import with_modes
from mipipe.graphs.sharding.shares import TeamShares

WIDE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 64}
NUMBERS = 64
"""Bytes of a few numbers: sums of losses and of how many rows have a target."""
OWN = {
    "phi3": Case("Phi3ForCausalLM", {**WIDE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "olmo2": Case("Olmo2ForCausalLM", {**WIDE, "pad_token_id": 0, "eos_token_id": 2}),
    "cohere": Case("CohereForCausalLM", {**WIDE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "falcon_one_key": Case("FalconForCausalLM", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
                                                 "num_attention_heads": 8, "multi_query": True, "bos_token_id": 1,
                                                 "eos_token_id": 2}),
    "neox": Case("GPTNeoXForCausalLM", {**{key: WIDE[key] for key in WIDE if key != "num_key_value_heads"},
                                        "hidden_dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": 0,
                                        "eos_token_id": 0}),
    "gpt2": Case("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 8, "n_positions": 64,
                                     "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0,
                                     "eos_token_id": 0}),
    "tied": Case("llama", {**WIDE, "tie_word_embeddings": True}),
    "odd": Case("llama", {**TEXT, "intermediate_size": 30, "vocab_size": 63}),
    "shared_experts": Case("Qwen2MoeForCausalLM", {**WIDE, "moe_intermediate_size": 16, "num_experts": 4,
                                                   "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32}),
    "qwen3_moe_sent": Case("qwen3_moe", {**MOE, "head_dim": 8}, {"expert_parallel": 2}),
}
FAMILIES = {**OWN, **CASES}
QUICK = (("falcon_one_key", "tensor"), ("shared_experts", "sequence"), ("shared_experts", "context"))


def sends(work):
    """How many collectives of each kind and size a phase has, but of a few numbers."""
    found = Counter()
    for item in work.collectives:
        if item.num_bytes > NUMBERS:
            found[item.kind, item.num_bytes] += item.count
    return found


def flops(work, attention):
    """The flops of a phase's attention, or of all its other products."""
    return sum(item.flops * item.count for item in work.products if ("attention" in item.kind) is attention)


def halved(trace, phase):
    """What of the flops of a phase's attention estimates count: pairs that a query may see."""
    found = [item for item in trace.phase_operators(phase) if item.flops and "attention" in item.kind]
    return sum(operator_flops(trace, item) for item in found) / max(1, sum(item.flops for item in found))


@pytest.mark.parametrize("name, mode", [
    pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
    for name in FAMILIES for mode in ("tensor", "sequence", "context")])
def test_estimates_are_what_members_run(name, mode):
    """Bytes held, dense and of experts, that train and whose gradients are sums; flops of all products; collectives.
    Of W, what it gathers of F's values, or exchanges, is left out of estimates."""
    case = FAMILIES[name]
    graph = capture(case.source, overrides=case.overrides, dtype=case.dtype, verify=False,
                    **{"seq": 8, "batch": 2, **case.options})
    roles = {segment.trace: segment.tags.role for segment in graph.segments}
    for size in (4,) if (name, mode) in QUICK else (2, 4):
        shares, made = TeamShares(graph), with_modes(graph, [mode], [size]).modes
        for trace in graph.traces:
            if has_dynamic_rows(trace):
                continue
            traced, share = made.find(trace.digest, mode, size), shares.of(trace, mode, size)
            split = TeamSplit(context=size) if mode == "context" else TeamSplit(size, sequence=mode == "sequence")
            found = estimated_profile(trace, roles[trace.digest], split, fused=False, shares=[share])
            assert (found.resident, share.whole) == (traced.resident, traced.whole)
            for phase, work in traced.phases.items():
                own = found.phases[phase]
                assert flops(own, False) == pytest.approx(flops(work, False), rel=1e-9), (roles[trace.digest], phase)
                assert flops(own, True) == pytest.approx(flops(work, True) * halved(trace, phase), rel=1e-3)
                more = sends(work) - sends(own)
                if phase is Phase.W:
                    more = {key: count for key, count in more.items()
                            if key[0] not in (CollectiveKind.ALL_GATHER, CollectiveKind.ALL_TO_ALL)}
                assert not more and not sends(own) - sends(work), (roles[trace.digest], phase, sends(work), sends(own))
