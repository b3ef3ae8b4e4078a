"""LoRA adapters as PEFT means them: scales by pattern, DoRA, whole tensors, prefixes; merged values from its rules."""

import json
import re

import numpy as np
import pytest
import torch
from merge_fixtures import CONFIG, read, state, trio, write
from safetensors.torch import load_file, save_file

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, merge

MODULES = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.1.self_attn.q_proj": (8, 8),
           "model.layers.0.mlp.up_proj": (16, 8), "model.layers.1.mlp.down_proj": (8, 16)}


def write_adapter(folder, ranks=2, prefix="base_model.model.", more=(), **config):
    """A LoRA folder on four weights; returns the factors (A, B) by module."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    factors, tensors = {}, dict(more)
    for module, (rows, columns) in MODULES.items():
        rank = ranks.get(module, 2) if isinstance(ranks, dict) else ranks
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
        factors[module] = down, up
        tensors |= {f"{prefix}{module}.lora_A.weight": down, f"{prefix}{module}.lora_B.weight": up}
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return factors


def merged(root, **changes):
    """The base with the adapter, written out and read."""
    merge([parse_recipe({"merge_method": "passthrough", "base_model": f"{root}/base",
                         "models": [{"model": f"{root}/base+{root}/lora"}], **changes}, "recipe")], root / "out",
          MergeOptions(verify=False))
    return read(root / "out")


def peft_scale(module, config, r=2, alpha=4):
    """PEFT's LoraModel: the first pattern that the name ends with gives rank or alpha, else the config's own."""
    def first(patterns, default):
        return next((value for key, value in patterns.items() if re.match(rf".*\.{key}$", module)), default)

    rank, alpha = first(config.get("rank_pattern", {}), r), first(config.get("alpha_pattern", {}), alpha)
    return alpha / np.sqrt(rank) if config.get("use_rslora") else alpha / rank


@pytest.mark.parametrize("config", [
    {"alpha_pattern": {"q_proj": 16}},
    {"alpha_pattern": {"layers.1.self_attn.q_proj": 16, "q_proj": 6}},
    {"alpha_pattern": {r"layers\.[0-9]\.mlp\..*": 10}, "use_rslora": True},
    {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 2, "down_proj": 1}}])
def test_scales_follow_pefts_patterns(tmp_path, config):
    base = trio(tmp_path)["base"]
    ranks = {module: 4 for module in MODULES if "up_proj" in module} if "rank_pattern" in config else 2
    factors = write_adapter(tmp_path / "lora", ranks, **config)
    found = merged(tmp_path)
    if config == {"alpha_pattern": {"q_proj": 16}}:
        assert peft_scale("model.layers.0.self_attn.q_proj", config) == 8.0
    for module, (down, up) in factors.items():
        delta = peft_scale(module, config) * up.double().numpy() @ down.double().numpy()
        np.testing.assert_allclose(found[f"{module}.weight"], base[f"{module}.weight"].double().numpy() + delta,
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "message"), [
    ({"alpha_pattern": {"k_proj": 16}}, "alpha_pattern: 'k_proj' matches none"),
    ({"alpha_pattern": {"roj": 16}}, "alpha_pattern: 'roj' matches none"),
    ({"rank_pattern": {"gate_proj": 8}}, "rank_pattern: 'gate_proj' matches none"),
    ({"rank_pattern": {"up_proj": 8}}, "up_proj has rank 2, but rank_pattern 'up_proj' .* says 8"),
    ({"r": 4}, "has rank 2, but r .* says 4"),
    ({"alpha_pattern": {"(": 8}}, "no regular expression"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4', which changes the base"),
    ({"init_lora_weights": "pissa", "use_dora": True}, "'pissa', which changes the base"),
    ({"init_lora_weights": "corda"}, "corda"), ({"init_lora_weights": "loftq"}, "loftq"),
    ({"use_dora": True}, "use_dora is True .* no magnitude vector"),
    ({"peft_type": "LOHA"}, "type 'LOHA'; only LORA"), ({"layer_replication": [[0, 2]]}, "layer_replication"),
])
def test_adapters_that_cannot_be_added(tmp_path, config, message):
    trio(tmp_path)
    write_adapter(tmp_path / "lora", **config)
    with pytest.raises(InputError, match=message):
        merged(tmp_path)


@pytest.mark.parametrize(("name", "config", "message"), [
    ("model.layers.0.mlp.up_proj.lora_B.bias", {"lora_bias": True}, "lora_B.bias is no LoRA factor"),
    ("model.layers.0.mlp.experts.base_layer.lora_A.weight", {"target_parameters": ["mlp.experts.down_proj"]},
     "experts.base_layer, which .* target_parameters are no matrices")])
def test_factors_of_other_things_than_matrices(tmp_path, name, config, message):
    """A bias beside lora_B, and stacked experts: PEFT adds them, so leaving them out would be another model."""
    trio(tmp_path)
    write_adapter(tmp_path / "lora", **config)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.{name}": torch.ones(16)}, file)
    with pytest.raises(InputError, match=message):
        merged(tmp_path)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_the_base_has_lost_are_found_in_it_again(tmp_path, init):
    """PEFT: PiSSA's base keeps W less its r leading singular triplets, OLoRA's W - s Q_r R_r; the factors are added."""
    base = trio(tmp_path)["base"]
    factors = write_adapter(tmp_path / "lora", init_lora_weights=init)
    found = merged(tmp_path)
    for module, (down, up) in factors.items():
        weight = base[f"{module}.weight"].double().numpy()
        if init == "pissa":
            u, s, v = np.linalg.svd(weight, full_matrices=False)
            lost = (u[:, :2] * s[:2]) @ v[:2]
        else:
            q, r = np.linalg.qr(weight)
            lost = 2 * q[:, :2] @ r[:2]
        expected = weight - lost + 2 * up.double().numpy() @ down.double().numpy()
        np.testing.assert_allclose(found[f"{module}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_with_what_it_started_as(tmp_path):
    """CorDA: W' = W - s B0 A0 + s B A, with the first factors in a folder inside the adapter's."""
    base = trio(tmp_path)["base"]
    factors = write_adapter(tmp_path / "lora", init_lora_weights="corda")
    first = write_adapter(tmp_path / "lora" / "corda_init", init_lora_weights=True)
    save_file({name: value * 0.3 for name, value in load_file(tmp_path / "lora" / "corda_init" /
               "adapter_model.safetensors").items()}, tmp_path / "lora" / "corda_init" / "adapter_model.safetensors")
    found = merged(tmp_path)
    for module, (down, up) in factors.items():
        start = 0.09 * first[module][1].double().numpy() @ first[module][0].double().numpy()
        delta = 2 * (up.double().numpy() @ down.double().numpy() - start)
        np.testing.assert_allclose(found[f"{module}.weight"], base[f"{module}.weight"].double().numpy() + delta,
                                   rtol=1e-5, atol=1e-5)


def test_dora_scales_rows_to_its_magnitudes(tmp_path):
    """PEFT: W' = m (W + s B A) / ||W + s B A||, norms of rows."""
    base = trio(tmp_path)["base"]
    generator = np.random.default_rng(1)
    magnitudes = {module: generator.uniform(0.5, 2, rows).astype(np.float32) for module, (rows, _) in MODULES.items()}
    more = {f"base_model.model.{module}.lora_magnitude_vector": torch.from_numpy(value)
            for module, value in magnitudes.items()}
    factors = write_adapter(tmp_path / "lora", more=more, use_dora=True)
    found = merged(tmp_path)
    for module, (down, up) in factors.items():
        whole = base[f"{module}.weight"].double().numpy() + 2 * up.double().numpy() @ down.double().numpy()
        expected = magnitudes[module][:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)
        np.testing.assert_allclose(found[f"{module}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_whole_tensors_of_an_adapter_replace_the_models(tmp_path):
    """modules_to_save, with tables for two more tokens: values, shapes and the config's vocabulary."""
    trio(tmp_path)
    rows = CONFIG["vocab_size"] + 2
    table, head, norm = torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(8)
    write_adapter(tmp_path / "lora", modules_to_save=["lm_head"], more={
        "base_model.model.model.embed_tokens.weight": table,
        "base_model.model.lm_head.modules_to_save.default.weight": head, "base_model.model.model.norm.weight": norm})
    found = merged(tmp_path)
    for name, value in (("model.embed_tokens.weight", table), ("lm_head.weight", head), ("model.norm.weight", norm)):
        assert torch.equal(found[name], value), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == rows


def test_a_saved_head_unties_a_tied_model(tmp_path):
    tied = {name: value for name, value in state(0).items() if name != "lm_head.weight"}
    write(tmp_path / "base", tied, {"tie_word_embeddings": True})
    head = torch.randn(CONFIG["vocab_size"], 8)
    write_adapter(tmp_path / "lora", more={"base_model.model.lm_head.weight": head})
    merge([parse_recipe({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base+{tmp_path}/lora"}]},
                        "recipe")], tmp_path / "out", MergeOptions(verify=False))
    found = read(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], head)
    assert torch.equal(found["model.embed_tokens.weight"], tied["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("names", ["auto", [{"from": r"^model\.", "to": "model.language_model."}]])
def test_names_reach_adapters(tmp_path, names):
    """An adapter trained on the text model, merged into the multimodal one that holds it under another prefix."""
    text = state(0)
    wrapped = {re.sub(r"^model\.", "model.language_model.", name): value for name, value in text.items()}
    write(tmp_path / "base", wrapped)
    factors = write_adapter(tmp_path / "lora")
    merge([parse_recipe({"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base",
                         "models": [{"model": f"{tmp_path}/lora", "names": names}]}, "recipe")], tmp_path / "out",
          MergeOptions(verify=False))
    found = read(tmp_path / "out")
    for module, (down, up) in factors.items():
        name = f"{module}.weight".replace("model.", "model.language_model.", 1)
        np.testing.assert_allclose(found[name], text[f"{module}.weight"] + 2 * up @ down, rtol=1e-5, atol=1e-5)


def lora(rows, columns, seed, rank=2):
    """Factors A ``[r, columns]`` and B ``[rows, r]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def save_adapter(folder, tensors, **config):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}))
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()},
              folder / "adapter_model.safetensors")


TABLE, HEAD = "model.embed_tokens", "lm_head"


@pytest.mark.parametrize(("on", "config", "untied"), [
    ("embedding", {}, True), ("embedding", {"ensure_weight_tying": True}, False), ("head", {}, True),
    ("saved", {"modules_to_save": ["embed_tokens"]}, True), ("saved", {}, False),
    ("saved", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False), ("both", {}, True)])
def test_of_tied_tables_only_what_was_trained_changes(tmp_path, on, config, untied):
    """PEFT trains a copy of one of two tied modules, unless told to tie; a resized table is stored and not trained."""
    weights = {name: tensor for name, tensor in state(0).items() if "lm_head" not in name}
    write(tmp_path / "base", weights, {"tie_word_embeddings": True})
    old = weights[f"{TABLE}.weight"].double()
    down, up = lora(8, 11, 1)  # an embedding is stored [tokens, hidden]: A is [r, tokens], B [hidden, r]
    head_down, head_up = lora(11, 8, 2)
    tensors = {}
    if on in ("embedding", "both"):
        tensors |= {f"{TABLE}.lora_embedding_A": down, f"{TABLE}.lora_embedding_B": up}
    if on in ("head", "both"):
        tensors |= {f"{HEAD}.lora_A.weight": head_down, f"{HEAD}.lora_B.weight": head_up}
    if on == "saved":
        tensors[f"{TABLE}.weight"] = 2 * old.float()
    save_adapter(tmp_path / "lora", tensors, **config)
    found = merged(tmp_path)
    table = 2 * old if on == "saved" else old + 3 * (up.double() @ down.double()).T if on != "head" else old
    head = old + 3 * head_up.double() @ head_down.double() if on in ("head", "both") else old
    torch.testing.assert_close(found[f"{TABLE}.weight"].double(), table, rtol=1e-5, atol=1e-5)
    assert (f"{HEAD}.weight" in found) == untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is not untied
    if untied:
        torch.testing.assert_close(found[f"{HEAD}.weight"].double(), head, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("told", [True, False])
def test_weights_that_a_model_stores_transposed_get_the_change_transposed(tmp_path, told):
    """GPT-2's Conv1D is [in, out], square or not, whatever fan_in_fan_out says: PEFT goes by the module."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"h.0.attn.c_attn": (8, 24), "h.0.attn.c_proj": (8, 8), "wte": (11, 8)}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    write(tmp_path / "base", weights, {"model_type": "gpt2", "n_layer": 1, "tie_word_embeddings": True})
    factors = {name: lora(columns, rows, seed) for seed, (name, (rows, columns)) in enumerate(shapes.items())
               if name != "wte"}
    save_adapter(tmp_path / "lora", {f"{name}.lora_{part}.weight": factor for name, pair in factors.items()
                                     for part, factor in zip("AB", pair, strict=True)}, fan_in_fan_out=told)
    found = merged(tmp_path)
    for name, (down, up) in factors.items():
        torch.testing.assert_close(found[f"{name}.weight"], weights[f"{name}.weight"] + 3 * (up @ down).T,
                                   rtol=1e-5, atol=1e-5)


def test_what_transposed_weights_cannot_have(tmp_path):
    trio(tmp_path)
    down, up = lora(8, 11, 1)
    table = {f"{TABLE}.lora_embedding_A": down, f"{TABLE}.lora_embedding_B": up}
    save_adapter(tmp_path / "lora", {**table, f"{TABLE}.lora_magnitude_vector": torch.ones(8)}, use_dora=True)
    with pytest.raises(InputError, match="embed_tokens is stored transposed, for which DoRA is not supported"):
        merged(tmp_path)
    save_adapter(tmp_path / "plain", table)
    recipe = {"merge_method": "linear", "base_model": f"{tmp_path}/base", "models": [{"model": f"{tmp_path}/plain"}],
              "adapter": {}}
    with pytest.raises(InputError, match=r"adapts model\.embed_tokens\.weight, which is stored"):
        merge([parse_recipe(recipe, "recipe")], tmp_path / "out")
