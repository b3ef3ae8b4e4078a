"""Fused queries, keys and values on teams: losses and gradients of transformers' models are those of one process."""

import itertools

import pytest
from runtime_modes import __file__ as WORKER

from mipipe.graphs.capture.model import capture
from mipipe.graphs.serialize import save

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 8, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
       "embd_pdrop": 0.0}
PHI3 = {**SIZES, "intermediate_size": 64, "pad_token_id": 0, "max_position_embeddings": 64}
MODELS = {
    "phi3": ("Phi3ForCausalLM", {**PHI3, "num_key_value_heads": 4}),
    "falcon": ("FalconForCausalLM", {**SIZES, "num_kv_heads": 4, "new_decoder_architecture": True}),
    "falcon-one": ("FalconForCausalLM", {**SIZES, "new_decoder_architecture": False, "multi_query": True}),
    "neox": ("GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 64}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 8,
                                   "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "bigcode": ("GPTBigCodeForCausalLM", GPT),
}


@pytest.mark.parametrize("name, members", list(itertools.product(MODELS, (2, 4))))
def test_one_process_and_a_team_agree(pool, tmp_path, name, members):
    """Every segment's results, and the loss and all gradients of a whole step, to 1e-12 in float64."""
    source, overrides = MODELS[name]
    graph = tmp_path / "graph.json"
    save(capture(source, seq=8, batch=2, dtype="float64", overrides=overrides, verify=False), graph)
    for task in ("compare_modes", "compare_step"):
        answers = pool.run(members, WORKER, task, str(graph), ("tensor", "sequence"), timeout=240)
        wrong = {key: error for answer in answers for key, error in answer.items() if not error <= 1e-12}
        assert answers[0] and not wrong
