"""Mixtures assembled from dense models: routers from transformers' own hidden states, targets that it opens."""

import json

import pytest
import torch
from merge_fixtures import read
from safetensors.torch import load_file

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.moe_recipe import parse_moe_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, assemble_moe
from mipipe.runtime.merge.programs.router import make_router

transformers = pytest.importorskip("transformers")

DENSE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": False}
KINDS = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
PROMPTS = [([[1, 2, 3, 4, 5], [7, 8]], [[20, 21, 22]]), ([[11, 12, 13]], [])]


def dense(folder, kind, seed):
    torch.manual_seed(seed)
    settings = getattr(transformers, KINDS[kind])(**DENSE)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, 1)
    model.save_pretrained(folder)
    return model


def recipe(root, prompted=True, **more):
    experts = [{"source_model": f"{root}/{name}"} for name in ("one", "two")]
    for expert, (good, bad) in zip(experts, PROMPTS if prompted else (), strict=False):
        expert |= {"positive_tokens": good, "negative_tokens": bad}
    return parse_moe_recipe({"base_model": f"{root}/base", "experts": experts, **more}, "recipe")


def three(root, kind="llama"):
    return [dense(root / name, kind, seed) for seed, name in enumerate(("base", "one", "two"))]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_routers_are_the_states_that_transformers_has(tmp_path, mode, kind):
    """The residual stream before each layer, at the last token or on average over tokens, mean over prompts."""
    base = three(tmp_path, kind)[0]
    shared = [{"source_model": f"{tmp_path}/one", "positive_tokens": [[3]]}]
    more = {"shared_experts": shared} if kind == "qwen2" else {}
    found = make_router(recipe(tmp_path, gate_mode=mode, **more), tmp_path / "router")
    rows = load_file(tmp_path / "router" / "model.safetensors")
    assert set(found.tensors) >= {"layers.0", "layers.1"}

    def state(tokens):
        if mode == "cheap_embed":
            return base.model.embed_tokens(torch.tensor(tokens)).sum(0).expand(2, -1)
        states = torch.stack(base(torch.tensor([tokens]), output_hidden_states=True).hidden_states[:-1])[:, 0]
        return states.mean(1) if mode == "hidden_avg" else states[:, -1]

    for expert, (good, bad) in enumerate(PROMPTS):
        with torch.no_grad():
            sides = [torch.stack([state(tokens) for tokens in side]) for side in (good, bad) if side]
        sides = [torch.nn.functional.normalize(side.sum(0), dim=-1) if mode == "cheap_embed" else side.mean(0)
                 for side in sides]
        expected = torch.nn.functional.normalize(sides[0] - sides[1] if bad else sides[0], dim=-1)
        for layer in range(2):
            torch.testing.assert_close(rows[f"layers.{layer}"][expert], expected[layer], rtol=1e-4, atol=1e-5)


def test_random_routers(tmp_path):
    three(tmp_path)
    for mode, spread in (("random", 1.0), ("uniform_random", (1 / 3 / 16)**0.5)):
        make_router(recipe(tmp_path, prompted=False, gate_mode=mode), tmp_path / mode)
        rows = torch.cat(list(load_file(tmp_path / mode / "model.safetensors").values()))
        assert 0.6 * spread < float(rows.std()) < 1.5 * spread
        assert mode == "random" or float(rows.abs().max()) <= 0.25


@pytest.mark.parametrize(("kind", "architecture", "shared", "made"), [
    ("llama", None, 0, "MixtralForCausalLM"), ("mistral", "Mixtral", 0, "MixtralForCausalLM"),
    ("qwen3", None, 0, "Qwen3MoeForCausalLM"), ("qwen2", "qwen", 1, "Qwen2MoeForCausalLM"),
    ("llama", "qwen2", 1, "Qwen2MoeForCausalLM"), ("llama", "deepseek", 1, "DeepseekForCausalLM"),
    ("llama", None, 1, "DeepseekForCausalLM")])
def test_targets(tmp_path, kind, architecture, shared, made):
    """Every tensor is where the target's model looks for it; residual_scale reaches down_proj alone."""
    _, one, two = three(tmp_path, kind)
    data = {"gate_mode": "random", "architecture": architecture,
            "shared_experts": [{"source_model": f"{tmp_path}/two", "residual_scale": 0.5}] * shared}
    lines = []
    assemble_moe(recipe(tmp_path, prompted=False, **data), tmp_path / "out", MergeOptions(), tell=lines.append)
    config, found = json.loads((tmp_path / "out" / "config.json").read_text()), read(tmp_path / "out")
    assert config["architectures"] == [made]
    if made == "DeepseekForCausalLM":  # its code is on the Hub
        assert "no architecture" in lines[0] and config["n_shared_experts"] == 1 and config["n_routed_experts"] == 2
        assert torch.equal(found["model.layers.1.mlp.shared_experts.down_proj.weight"],
                           two.model.layers[1].mlp.down_proj.weight * 0.5)
        assert torch.equal(found["model.layers.0.mlp.experts.0.up_proj.weight"], one.model.layers[0].mlp.up_proj.weight)
        return
    assert not lines
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    if shared:
        assert torch.equal(found["model.layers.0.mlp.shared_expert.down_proj.weight"],
                           two.model.layers[0].mlp.down_proj.weight * 0.5)
        assert found["model.layers.1.mlp.shared_expert_gate.weight"].shape == (1, 16)
        if kind == "llama":
            assert not found["model.layers.0.self_attn.q_proj.bias"].any()


@pytest.mark.parametrize(("kind", "changes", "message"), [
    ("llama", {"architecture": "gpt"}, "architecture: found 'gpt', expected one of mixtral"),
    ("qwen3", {"architecture": "mixtral"}, "cannot be made mixtral; expected one of llama, mistral"),
    ("qwen2", {}, "qwen2 has one shared expert, found 0"),
    ("llama", {"architecture": "mixtral", "shared_experts": [{"source_model": "x"}]}, "mixtral has no shared experts"),
    ("qwen2", {"gate_mode": "cheap_embed", "shared_experts": [{"source_model": "x"}]},
     "has a gate, so it needs prompts"),
    ("llama", {"architecture": "deepseek", "shared_experts": [{"source_model": "x", "positive_tokens": [[1]]}]},
     "has no gate, so no prompts"),
    ("llama", {"gate_mod": "hidden", "expert": []}, "gate_mod, expert: unknown keys")])
def test_assemblies_that_no_target_can_hold(tmp_path, kind, changes, message):
    three(tmp_path, kind)
    with pytest.raises(InputError, match=message):
        assemble_moe(recipe(tmp_path, **{"gate_mode": "random", **changes}), tmp_path / "out", MergeOptions())
