"""What a config says by layer follows the layers that a merge picks; models are built by transformers to compare."""

import pytest

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.layer_config import Picked, differences, numbered_note, picked_layers

PICKED = [0, 1, 2, 3, 2, 3, 4, 5]


def test_lists_counts_and_numbers_of_layers():
    config = {"num_hidden_layers": 6, "mlp_only_layers": [0, 3], "layer_types": list("abcdef"),
              "no_rope_layers": [1, 1, 0, 1, 1, 0], "architectures": ["A"], "first_k_dense_replace": 2,
              "max_window_layers": 4, "use_sliding_window": False, "eos_token_id": [1, 2]}
    found = picked_layers(config, PICKED, "recipe")
    assert found == {**config, "num_hidden_layers": 8, "mlp_only_layers": [0, 3, 5], "layer_types": list("abcdcdef"),
                     "no_rope_layers": [1, 1, 0, 1, 0, 1, 1, 0], "max_window_layers": 6}


@pytest.mark.parametrize(("entry", "picked", "message"), [
    ({"first_k_dense_replace": 1}, [0, 1, 0, 1], "first_k_dense_replace 1"),
    ({"decoder_sparse_step": 2}, [0, 1, 1, 2], "decoder_sparse_step 2"),
    ({"sliding_window_pattern": 3}, [0, 1, 2, 2], "sliding_window_pattern 3"),
    ({"max_window_layers": 2, "use_sliding_window": True}, [0, 1, 2, 0], "max_window_layers 2"),
    ({"attn_layer_period": 2, "attn_layer_offset": 1}, [1, 2], "attn_layer_period 2"),
    ({"num_kv_shared_layers": 2}, [0, 1, 2, 3, 0, 1], "num_kv_shared_layers 2"),
    ({"moe_layer_end_index": 2}, [0, 3, 1], "moe_layer_end_index 2"),
    ({"moe_layer_interval": 2}, [0, 1, 1], "moe_layer_interval 2"),
    ({"kv_source_layers": [0, 0, 2, 2]}, [0, 1, 2], "kv_source_layers"),
    ({"linear_attn_config": {"kda_layers": [1, 2]}}, [0, 1, 1], "linear_attn_config"),
    ({"encoder_layers": 4, "decoder_layers": 4}, [0, 1, 1], "decoder_layers 4"),
    ({"num_decoder_layers": 4}, [0, 0], "4"),
    ({"layer_types": ["s", "f", "s"]}, [0, 1], "layer_types")])
def test_what_a_config_cannot_say_is_refused(entry, picked, message):
    with pytest.raises(InputError, match=message):
        picked_layers({"num_hidden_layers": 4, **entry}, picked, "recipe")


def test_patterns_that_go_on_and_lists_that_replace_them():
    config = {"num_hidden_layers": 4, "decoder_sparse_step": 2, "sliding_window_pattern": 2,
              "layer_types": ["s", "f", "s", "f"], "attn_layer_period": 2, "attn_layer_offset": 1}
    found = picked_layers(config, [0, 1, 0, 1, 2, 3], "recipe")
    assert found["layer_types"] == ["s", "f"] * 3 and found["decoder_sparse_step"] == 2
    assert picked_layers({"num_hidden_layers": 4, "sliding_window_pattern": 2, "layer_types": list("abcd")}, [1, 2],
                         "recipe")["layer_types"] == ["b", "c"]


@pytest.mark.parametrize(("before", "after"), [
    ({"hybrid_layer_ids": [1, 3]}, {"hybrid_layer_ids": [1, 2, 4]}),
    ({"moe_layers_enum": "1,2"}, {"moe_layers_enum": "1,2,3"}),
    ({"rope_scaling_layers": [0, 1, 2, 3]}, {"rope_scaling_layers": [0, 1, 2, 3, 4]}),  # as many as layers, and numbers
    ({"hybrid_override_pattern": "M*-M"}, {"hybrid_override_pattern": "M**-M"}),
    ({"block_types": ["r", "r", "a"]}, {"block_types": ["r", "r", "r", "a", "r"]}),
    ({"attention_types": [[["g", "l"], 2]]}, {"attention_types": [[["g", "l", "l", "g", "l"], 1]]}),
    ({"num_kv_shared_layers": 2}, {"num_kv_shared_layers": 2}),
    ({"moe_layer_end_index": 2}, {"moe_layer_end_index": 3}),
    ({"global_attn_every_n_layers": 2, "layer_types": list("sfsf")},
     {"global_attn_every_n_layers": 2, "layer_types": list("sffsf")}),
    ({"eos_token_id": [5, 6, 7, 8]}, {"eos_token_id": [5, 6, 7, 8]}),
    ({"per_layer_config": {"1": {"head_dim": 8}, "3": {"head_dim": 4}}},
     {"per_layer_config": {"1": {"head_dim": 8}, "2": {"head_dim": 8}, "4": {"head_dim": 4}}}),
    ({"attn_layer_period": 3, "layers_block_type": list("mmam")},
     {"attn_layer_period": 3, "layers_block_type": list("mmmam")}),
    ({"first_k_dense_replace": 2, "mlp_layer_types": list("ddss")},
     {"first_k_dense_replace": 3, "mlp_layer_types": list("dddss")}),
    ({"num_nextn_predict_layers": 1, "layer_types": list("abcde")},
     {"num_nextn_predict_layers": 1, "layer_types": list("abbcde")}),
    ({"kv_source_layers": None}, {"kv_source_layers": None})])
def test_every_way_of_naming_layers_follows(before, after):
    found = picked_layers({"num_hidden_layers": 4, **before}, [0, 1, 1, 2, 3], "recipe")
    assert found == {"num_hidden_layers": 5, **after}


def test_counts_by_other_names():
    assert picked_layers({"n_layers": 4}, [0, 1, 1], "recipe") == {"n_layers": 3}
    assert picked_layers({"num_layers": 4, "num_hidden_layers": 8}, [0, 1, 1], "recipe") == {
        "num_layers": 3, "num_hidden_layers": 6}  # two attentions in a layer
    kept = {"num_hidden_layers": 4, "num_layers_per_stack": 2, "kv_source_layers": [0, 0, 2, 2]}
    assert picked_layers(kept, [0, 1, 2, 3], "recipe") == kept


def test_a_list_of_kinds_is_the_count_where_there_is_no_other():
    assert picked_layers({"layers_block_type": ["m", "a", "e"]}, [0, 1, 1, 2], "recipe") == {
        "layers_block_type": ["m", "a", "a", "e"]}  # Nemotron-H
    assert picked_layers({}, [0, 1, 1], "recipe") == {}


def test_a_layer_is_what_its_own_model_says():
    """Of a deeper model with other kinds, and of one saved by a transformers that says less."""
    full = "full_attention"
    mine = {"num_hidden_layers": 2, "layer_types": [full, full], "mlp_only_layers": [], "first_k_dense_replace": 1}
    other = {"num_hidden_layers": 4, "layer_types": list("sfsf"), "mlp_only_layers": [2], "first_k_dense_replace": 0}
    picked = [Picked(0, mine), Picked(1, mine), Picked(2, other), Picked(3, other)]
    assert picked_layers(mine, picked, "recipe") == {
        "num_hidden_layers": 4, "layer_types": [full, full, "s", "f"], "mlp_only_layers": [2],
        "first_k_dense_replace": 1}
    with pytest.raises(InputError, match="first_k_dense_replace"):
        picked_layers(mine, [Picked(2, other), Picked(0, mine)], "recipe")
    bare = {"num_hidden_layers": 4, "first_k_dense_replace": 0}
    found = picked_layers(mine, [Picked(0, mine), Picked(3, bare)], "recipe")
    assert found == mine
    for config, layers in ((bare, [Picked(0, bare), Picked(0, other)]), (other, [Picked(0, other), Picked(3, bare)]),
                           ({"num_hidden_layers": 2}, [Picked(0, mine)])):
        with pytest.raises(InputError, match="cannot say"):
            picked_layers(config, layers, "recipe")


def test_a_count_that_is_somewhere_else_is_refused():
    """As in thinker_config, or in llm_config of models with code of their own."""
    with pytest.raises(InputError, match="says how many layers there are in llm_config"):
        picked_layers({"llm_config": {"num_hidden_layers": 4}, "hidden_size": 3}, [0, 1], "recipe")
    assert picked_layers({"hidden_size": 8}, [0, 1, 1], "recipe") == {"hidden_size": 8, "num_hidden_layers": 3}


def test_models_that_compute_by_number_are_said():
    config = {"model_type": "diffllama", "num_hidden_layers": 2}
    assert "diffllama weighs" in numbered_note(config, [Picked(0, config), Picked(0, config)], "recipe")
    assert numbered_note(config, [Picked(0, config), Picked(1, config)], "recipe") == ""
    gpt = {"model_type": "gpt2", "n_layer": 2, "scale_attn_by_inverse_layer_idx": True}
    assert "divides attention" in numbered_note(gpt, [Picked(1, gpt)], "recipe")


def test_differences_have_both_values():
    line = differences("./a", {"rope_theta": 1e4, "rms_norm_eps": 1e-6, "head_dim": 64},
                       "./b", {"text_config": {"rope_theta": 1e6, "rms_norm_eps": 1e-6}})
    assert line == "./a and ./b differ in rope_theta 10000.0 and 1000000.0; the result has those of ./b"
    assert differences("a", {"hidden_act": "silu"}, "b", {"hidden_act": "silu"}) == ""


def test_rotary_settings_are_compared_in_whatever_spelling():
    old, new = {"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert differences("a", old, "b", new) == differences("a", new, "b", old) == ""
    assert "rope_theta 10000.0 and 500.0;" in differences("a", new, "b", {"rope_theta": 500.0})
    yarn = {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    newer = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}
    assert differences("a", yarn, "b", newer) == ""
    assert "rope_scaling {'rope_type': 'default'} and {'rope_type': 'yarn', 'factor': 4.0};" in differences(
        "a", old, "b", yarn)
    layers = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}
    assert differences("a", layers, "b", layers) == ""


DENSE = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 4, "num_hidden_layers": 6, "pad_token_id": 0}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}


@pytest.mark.parametrize(("name", "settings", "picked"), [
    ("Qwen3MoeConfig", {**MOE, "mlp_only_layers": [0, 3]}, PICKED),
    ("Qwen3MoeConfig", {**MOE, "decoder_sparse_step": 2}, [0, 1, 2, 3, 2, 3, 4, 5]),
    ("Qwen2MoeConfig", {**MOE, "mlp_only_layers": [5], "shared_expert_intermediate_size": 4}, [5, 0, 5]),
    ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 4}, PICKED),
    ("Gemma2Config", {"sliding_window": 4}, [0, 1, 4, 5]), ("Gemma3TextConfig", {"sliding_window": 4}, PICKED),
    ("DeepseekV3Config", {"first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                          "num_experts_per_tok": 2, "moe_intermediate_size": 4, "q_lora_rank": 4, "kv_lora_rank": 4,
                          "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}, [0, 1, 0, 2, 3]),
    ("SmolLM3Config", {"no_rope_layer_interval": 3}, PICKED),
    ("Ernie4_5_MoeConfig", {"moe_num_experts": 2, "moe_k": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 4,
                            "moe_intermediate_size": 4}, PICKED),
    ("NemotronHConfig", {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "linear_attention",
                                               "full_attention"], "mamba_num_heads": 2, "mamba_head_dim": 4,
                         "n_groups": 1, "ssm_state_size": 4}, PICKED),
    ("Gemma4TextConfig", {"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 0,
                          "global_head_dim": 8, "hidden_size_per_layer_input": 0}, [0, 1, 3, 2, 5])])
def test_transformers_builds_each_layer_of_its_kind(name, settings, picked):
    """The stacked config's model has, layer by layer, the modules and attention of the layers that were picked."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config = getattr(transformers, name)(**{**DENSE, **settings})
    data = config.to_dict()
    stacked = type(config).from_dict(picked_layers(data, picked, "recipe"))

    def kinds(settings):
        with torch.device("meta"):
            layers = transformers.AutoModel.from_config(settings).layers
        return [(*map(type, layer.modules()), getattr(layer, "attention_type", None),
                 *(getattr(getattr(layer, "self_attn", None), key, None)
                   for key in ("sliding_window", "use_rope", "head_dim"))) for layer in layers]

    before = kinds(config)
    assert len(set(before)) >= 2  # else the test could not fail
    assert kinds(stacked) == [before[old] for old in picked]
