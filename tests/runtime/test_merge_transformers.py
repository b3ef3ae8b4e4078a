"""Merged models as transformers loads them: mixtures of experts, a multimodal pair, and assembled experts."""

import json
import logging

import pytest
import torch
import yaml

from mipipe.graphs.merging.moe_recipe import parse_moe_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, merge

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

DENSE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
         "tie_word_embeddings": False}
TOKENS = torch.arange(12).reshape(2, 6)


def make(cls, config, seed, base=None, scale=0.05):
    """A small model: random, or the base plus noise."""
    torch.manual_seed(seed)
    model = cls(config).eval()
    if base is not None:
        with torch.no_grad():
            for value, origin in zip(model.parameters(), base.parameters(), strict=True):
                value.copy_(origin + scale * torch.randn_like(value))
    return model


def merge_recipe(data, folder, **options):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    return merge(file, folder / "out", MergeOptions(**options))


def logits(model, **inputs):
    with torch.no_grad():
        return model(input_ids=TOKENS, **inputs).logits


def test_two_qwen3_moe_checkpoints(tmp_path):
    """The linear merge, as from_pretrained loads it, is the model whose parameters are averaged in memory."""
    config = transformers.Qwen3MoeConfig(**DENSE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
                                         decoder_sparse_step=1, mlp_only_layers=[])
    base = make(transformers.Qwen3MoeForCausalLM, config, 0)
    models = [make(transformers.Qwen3MoeForCausalLM, config, seed, base) for seed in (1, 2)]
    for name, model in zip(("base", "a", "b"), (base, *models), strict=True):
        model.save_pretrained(tmp_path / name, max_shard_size="20KB")
    merge_recipe({"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in "ab"],
                  "parameters": {"weight": 1.0}}, tmp_path, shard_bytes=15_000)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        for value, *parts in zip(base.parameters(), *(model.parameters() for model in models), strict=True):
            value.copy_(sum(parts) / 2)
    torch.testing.assert_close(logits(found.eval()), logits(base), rtol=0, atol=1e-5)


def llava(seed, base=None):
    vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                           num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16)
    config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.LlamaConfig(**DENSE),
                                      image_token_index=31, image_seq_length=4,
                                      vision_feature_select_strategy="default", vision_feature_layer=-1)
    return make(transformers.LlavaForConditionalGeneration, config, seed, base)


def test_a_multimodal_pair(tmp_path):
    """Vision side from the model tuned on images, language merged: loads, and images still go through its tower."""
    base = llava(0)
    images, text = llava(1, base), llava(2, base)
    for name, model in (("base", base), ("images", images), ("text", text)):
        model.save_pretrained(tmp_path / name)
    merge_recipe({
        "merge_method": "ties", "base_model": str(tmp_path / "base"), "parameters": {"density": 0.6},
        "models": [{"model": str(tmp_path / "images")}, {"model": str(tmp_path / "text")}],
        "branches": [{"name": "eyes", "tensors": "vision_tower|multi_modal_projector", "merge_method": "passthrough",
                      "models": [{"model": str(tmp_path / "images")}]}]}, tmp_path)
    found, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    found.eval()
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixels = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(found.model.get_image_features(pixels).pooler_output[0],
                           images.model.get_image_features(pixels).pooler_output[0])
        ids = torch.tensor([[1, 31, 31, 31, 31, 5]])
        assert found(input_ids=ids, pixel_values=pixels).logits.isfinite().all()
    theirs = dict(found.model.language_model.named_parameters())
    for name, value in base.model.language_model.named_parameters():
        moved = theirs[name] - value
        assert 0 < int(moved.count_nonzero()) <= moved.numel()


def test_a_language_expert_joins_a_multimodal_model(tmp_path):
    """A text-only Llama merged into the language part of a LLaVA by name map."""
    base = llava(0)
    base.save_pretrained(tmp_path / "images")
    expert = make(transformers.LlamaForCausalLM, transformers.LlamaConfig(**DENSE), 3)
    expert.save_pretrained(tmp_path / "expert")
    merge_recipe({
        "merge_method": "linear", "architecture": str(tmp_path / "images"),
        "models": [{"model": str(tmp_path / "images")}, {"model": str(tmp_path / "expert"), "names": "auto"}],
        "branches": [{"tensors": "vision_tower|multi_modal_projector", "merge_method": "passthrough",
                      "models": [{"model": str(tmp_path / "images")}]}]}, tmp_path)
    found = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    ours = dict(found.model.language_model.named_parameters())
    theirs = dict(expert.model.named_parameters())
    for name, value in base.model.language_model.named_parameters():
        torch.testing.assert_close(ours[name], (value + theirs[name]) / 2, rtol=0, atol=1e-6)


FAMILIES = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
            "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM)}


@pytest.mark.parametrize("family", FAMILIES)
def test_identical_dense_models_make_a_mixture_that_equals_them(family, tmp_path):
    """Gates sum to one, so a mixture of equal experts is the dense model, whatever the router."""
    config_class, model_class = FAMILIES[family]
    dense = make(model_class, config_class(**DENSE), 0)
    dense.save_pretrained(tmp_path / "dense")
    data = {"base_model": str(tmp_path / "dense"), "gate_mode": "random", "experts_per_token": 2,
            "experts": [{"source_model": str(tmp_path / "dense")} for _ in range(4)]}
    merge_recipe(data, tmp_path, num_ranks=1)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(found.eval()), logits(dense), rtol=0, atol=1e-5)
    assert not (tmp_path / "out.steps").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from dense models, one per expert" in card and "| router | made here |" in card
    assert parse_moe_recipe(yaml.safe_load(card.split("```yaml")[1].split("```")[0]), "card").experts_per_token == 2


def test_the_router_sends_prompts_to_their_experts(tmp_path):
    """gate_mode hidden_avg: tokens of an expert's prompts choose that expert in the first layer."""
    config_class, model_class = FAMILIES["llama"]
    dense = make(model_class, config_class(**DENSE), 0)
    with torch.no_grad():
        dense.model.embed_tokens.weight.normal_(0, 1)
    for name in ("base", "one", "two"):
        dense.save_pretrained(tmp_path / name)
    prompts = [[[1, 2, 3, 4]], [[20, 21, 22, 23]]]
    data = {"base_model": str(tmp_path / "base"), "gate_mode": "hidden_avg", "experts_per_token": 1,
            "experts": [{"source_model": str(tmp_path / name), "positive_tokens": tokens, "negative_tokens": others}
                        for name, tokens, others in zip(("one", "two"), prompts, prompts[::-1], strict=True)]}
    merge_recipe(data, tmp_path)
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    chosen = []
    with torch.no_grad():
        for tokens in prompts:
            result = found(input_ids=torch.tensor(tokens), output_router_logits=True)
            chosen.append([float((layer.argmax(-1) == expert).float().mean())
                           for expert in (0, 1) for layer in result.router_logits[:1]])
    assert chosen[0][0] >= 0.75 and chosen[1][1] >= 0.75


@pytest.mark.parametrize(("changes", "message"), [
    ({"experts": []}, "has no experts"),
    ({"experts_per_token": 3}, "found 3, expected 1 to 2"),
    ({"gate_mode": "hidden"}, "needs positive_prompts"),
    ({"gate_mode": "guess"}, "gate_mode"),
    ({"gate_mode": "hidden", "tokens": [[1, 32]]}, r"experts\[1\]: found the tokens \[1, 32\], expected one or more"),
    ({"gate_mode": "cheap_embed", "tokens": [[]]}, r"experts\[1\]: found the tokens \[\], expected one or more"),
    ({"other": "wide"}, "experts must have the base's sizes"),
    ({"base_model": "gpt"}, "model_type 'gpt2' cannot be made a mixture of experts"),
    ({"base_model": "wide"}, "experts must have the base's sizes"),
])
def test_assemblies_that_cannot_be(changes, message, tmp_path):
    config_class, model_class = FAMILIES["llama"]
    make(model_class, config_class(**DENSE), 0).save_pretrained(tmp_path / "dense")
    make(model_class, config_class(**{**DENSE, "intermediate_size": 8}), 0).save_pretrained(tmp_path / "wide")
    (tmp_path / "gpt").mkdir()
    for file in (tmp_path / "dense").iterdir():
        (tmp_path / "gpt" / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "gpt" / "config.json").read_text())
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({**settings, "model_type": "gpt2"}))
    data = {"base_model": "dense", "gate_mode": "random", "experts_per_token": 1,
            "experts": [{"source_model": str(tmp_path / "dense")} for _ in range(2)], **changes}
    if "tokens" in changes:
        for expert, tokens in zip(data["experts"], ([[1]], data.pop("tokens")), strict=True):
            expert["positive_tokens"] = tokens
    if "other" in changes:
        data["experts"][1]["source_model"] = str(tmp_path / data.pop("other"))
    data["base_model"] = str(tmp_path / data["base_model"])
    with pytest.raises(Exception, match=message) as caught:
        merge_recipe(data, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.glob("out*"))
