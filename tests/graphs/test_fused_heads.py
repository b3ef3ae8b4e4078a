"""Queries, keys and values in one tensor, as transformers' models have them: each member has its heads of all three."""

import functools

import pytest

from mipipe.graphs.capture.model import capture
from mipipe.graphs.coarse.mode_rows import undivided
from mipipe.graphs.modes import GraphModes
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import load, save
from mipipe.graphs.sharding.blocks import blocks_of
from mipipe.graphs.sharding.modes import member_program, with_modes
from mipipe.graphs.sharding.parts import PARTIAL, divided, fits, side_by_side, within

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 8}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 8, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
       "embd_pdrop": 0.0}
FUSED = {
    "phi3": ("Phi3ForCausalLM", {**SIZES, "num_key_value_heads": 4, "intermediate_size": 64, "pad_token_id": 0,
                                 "max_position_embeddings": 64}, (0, (2, 1, 1))),
    "falcon": ("FalconForCausalLM", {**SIZES, "num_kv_heads": 4, "new_decoder_architecture": True}, (0, 1)),
    "falcon-heads": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": False, "multi_query": False}, (0, 1)),
    "neox": ("GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 64}, (0, 1)),
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 8}, (0, 1)),
    "gpt2": ("GPT2LMHeadModel", GPT, (1, 3)),
    "bigcode-heads": ("GPTBigCodeForCausalLM", {**GPT, "multi_query": False}, (0, 1)),
}
"""Source, config, and along which dimension and in which sections the tensor is divided: 8 heads, 4 key heads where
they are fewer."""
ONE_KEY_HEAD = {
    "falcon": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": False, "multi_query": True}),
    "bigcode": ("GPTBigCodeForCausalLM", GPT),
}


@functools.cache
def captured(source, *overrides):
    return capture(source, seq=8, batch=2, dtype="float64", overrides=dict(overrides), verify=False)


_FUSED = ("qkv_proj_weight", "query_key_value_weight", "c_attn_weight")


def attention(graph):
    """The trace that computes attention."""
    return next(trace for trace in graph.traces if any(name.endswith(_FUSED) for name in trace.parameters))


@pytest.mark.parametrize("name, mode", [("phi3", "sequence"), ("falcon", "tensor"), ("gpt2", "tensor"), *(
    pytest.param(name, mode, marks=pytest.mark.slow) for name in FUSED for mode in ("tensor", "sequence")
    if (name, mode) not in (("phi3", "sequence"), ("falcon", "tensor"), ("gpt2", "tensor")))])
def test_attention_is_divided(name, mode):
    """Every product, of projections, scores and values, forward and backward, is a T-th of the whole."""
    source, overrides, (dim, sections) = FUSED[name]
    graph = captured(source, *overrides.items())
    trace = attention(graph)
    for size in (2, 4):
        made = member_program(graph, trace, mode, size)
        assert sum(op.flops for op in made.trace.operators) * size == sum(op.flops for op in trace.operators) > 0
        fused = next(item for item in trace.parameters if item.endswith(_FUSED))
        assert made.given[fused] == divided(dim, sections)
        grad = trace.parameter_grads[trace.parameters.index(fused)]
        assert made.ends[grad] == made.given[fused]  # no sum is left to make
        assert not any(line.startswith(("attention", "keys and values")) for line in made.whole)


@pytest.mark.parametrize("name", ONE_KEY_HEAD)
def test_one_key_head_in_the_tensor_is_said(name):
    """It would have to be on every member, whose parts of the tensor would overlap: attention stays whole."""
    source, overrides = ONE_KEY_HEAD[name]
    graph = captured(source, *overrides.items())
    made = member_program(graph, attention(graph), "tensor", 2)
    assert made.whole == ("attention: its 1 key heads do not divide by 2 members, and what makes its queries does not"
                          " divide without them",)
    assert made.whole[0] in str(undivided(with_modes(graph, ["tensor"], [2]), 2))


def test_key_heads_that_do_not_divide_are_said():
    source, overrides, _ = FUSED["phi3"]
    graph = captured(source, *overrides.items())
    made = member_program(graph, attention(graph), "tensor", 8)
    assert made.whole == ("attention: its 4 key heads do not divide by 8 members, and what makes its queries does not"
                          " divide without them",)


def test_profiles_say_what_lies_side_by_side(tmp_path):
    """A member has a T-th of the tensor's bytes; the file is read as it was written."""
    source, overrides, _ = FUSED["phi3"]
    graph = with_modes(captured(source, *overrides.items()), ["tensor"], [2])
    trace = attention(graph)
    profile = graph.modes.find(trace.digest, "tensor", 2)
    part = profile.parts[[*trace.parameters, *trace.buffers].index("p_qkv_proj_weight")]
    assert (part.degree, part.dim, part.sections, part.sum_gradient) == (2, 0, (2, 1, 1), ())
    assert profile.resident.trainable_dense == sum(
        trace.specs[name].num_bytes // (2 if name in ("p_qkv_proj_weight", "p_o_proj_weight") else 1)
        for name in trace.parameters)
    save(graph, tmp_path / "graph.json")
    assert load(tmp_path / "graph.json", OperatorGraph) == graph and isinstance(graph.modes, GraphModes)


def test_where_a_trace_cuts():
    """Slices that make up the whole, and splits; not the halves of a head that rotary positions swap."""
    source, overrides, _ = FUSED["phi3"]
    found = blocks_of(attention(captured(source, *overrides.items())))
    assert found[64] == ((2, 1, 1),)
    assert blocks_of(attention(captured("GPT2LMHeadModel", *GPT.items())))[96] == (3,)


def test_sections_of_a_range():
    """8, 4 and 4 elements: whole blocks have sections of their own, anything else none."""
    part = divided(1, side_by_side([8, 4, 4]))
    assert part.sections == (2, 1, 1) and side_by_side([5, 5]) == 2 and side_by_side([7]) == 1
    assert [within(16, part, *ends) for ends in ((0, 8), (8, 12), (8, 16), (0, 12), (0, 16))] == [
        divided(1), divided(1), divided(1, 2), divided(1, (2, 1)), part]
    assert within(16, part, 0, 4) is within(16, part, 4, 8) is within(16, part, 8, 8) is None
    assert [fits((1, 16), part, size) for size in (2, 4, 8)] == [True, True, False] and part != PARTIAL
