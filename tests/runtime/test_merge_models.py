"""Merges of unlike models: slices, other vocabularies, tied heads, experts, multimodal models."""

import json

import numpy as np
import pytest
import torch
from merge_fixtures import CONFIG, HIDDEN, read, state, trio, write

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, merge
from mipipe.runtime.merge.methods.method import merge_tensors
from mipipe.runtime.merge.methods.registry import BY_METHOD


def run(data, out, **options):
    return merge([parse_recipe(data, "recipe")], out, MergeOptions(verify=False, **options))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_passthrough_stacks_layers_of_two_models(tmp_path):
    weights = {name: state(seed, layers=3) for seed, name in enumerate("ab")}
    for name, tensors in weights.items():
        write(tmp_path / name, tensors, {"num_hidden_layers": 3, "layer_types": [f"{name}{i}" for i in range(3)]})
    run({"merge_method": "passthrough", "slices": [
        {"sources": [{"model": f"{tmp_path}/a", "layer_range": [0, 2]}]},
        {"sources": [{"model": f"{tmp_path}/b", "layer_range": [1, 3], "parameters": {
            "scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}}]}]}, tmp_path / "out")
    found = read(tmp_path / "out")
    for layer, (name, source) in enumerate([("a", 0), ("a", 1), ("b", 1), ("b", 2)]):
        for part, scale in (("mlp.up_proj", 1.0), ("self_attn.o_proj", 0.5 if name == "b" else 1.0)):
            assert torch.equal(found[f"model.layers.{layer}.{part}.weight"],
                               weights[name][f"model.layers.{source}.{part}.weight"] * scale)
    assert torch.equal(found["model.embed_tokens.weight"], weights["a"]["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], weights["b"]["lm_head.weight"])
    config = config_of(tmp_path / "out")
    assert config["num_hidden_layers"] == 4 and config["layer_types"] == ["a0", "a1", "b1", "b2"]


def test_layer_swapping_equals_its_slices(tmp_path):
    for seed, name in enumerate(("language", "task")):
        write(tmp_path / name, state(seed, layers=6), {"num_hidden_layers": 6})
    both = [{"model": f"{tmp_path}/language"}, {"model": f"{tmp_path}/task"}]
    run({"merge_method": "layer_swapping", "models": both,
         "parameters": {"bottom": 2, "top": 1, "transition": 1}}, tmp_path / "swapped")

    def piece(first, last, share):
        return {"sources": [{**both[0], "layer_range": [first, last], "parameters": {"weight": 1 - share}},
                            {**both[1], "layer_range": [first, last], "parameters": {"weight": share}}]}

    run({"merge_method": "linear", "slices": [piece(0, 2, 0.0), piece(2, 3, 0.5), piece(3, 4, 1.0), piece(4, 5, 0.5),
                                              piece(5, 6, 0.0)]}, tmp_path / "sliced")
    swapped, sliced = read(tmp_path / "swapped"), read(tmp_path / "sliced")
    for name, value in swapped.items():
        torch.testing.assert_close(value, sliced[name], rtol=0, atol=1e-6)


def test_a_base_spelt_otherwise_is_still_the_base(tmp_path, monkeypatch):
    """Among the models, a base under another spelling would count as a task vector of zeros."""
    trio(tmp_path)
    monkeypatch.chdir(tmp_path)
    for number, listed in enumerate(([], [{"model": "./base/"}])):
        run({"merge_method": "ties", "base_model": "base", "models": [*listed, {"model": "expert1"},
                                                                     {"model": "expert2"}]}, tmp_path / f"out{number}")
    one, other = (read(tmp_path / f"out{number}") for number in range(2))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_gradients_filters_and_levels_reach_the_right_tensors(tmp_path):
    trio(tmp_path, layers=5)
    graph = build(parse_recipe({
        "merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base",
        "models": [{"model": f"{tmp_path}/expert1", "parameters": {"weight": [0.0, 1.0]}},
                   {"model": f"{tmp_path}/expert2", "parameters": {
                       "weight": [{"filter": "mlp", "value": [1, 0, 1]},
                                  {"filter": "re:norm\\.weight$", "value": 7}]}}],
        "parameters": {"weight": 0.25, "lambda": [{"filter": "lm_head", "value": 2.0}]}}, "recipe"))
    values = {unit.name: unit.parameters for unit in graph.units}
    at = "model.layers.{}.{}.weight".format
    assert values[at(0, "mlp.up_proj")]["weight"] == [0.0, 1]
    assert values[at(1, "mlp.up_proj")]["weight"] == [0.25, 0.5]
    assert values[at(2, "mlp.up_proj")]["weight"] == [0.5, 0]
    assert values[at(4, "self_attn.q_proj")]["weight"] == [1.0, 0.25]
    assert values["model.norm.weight"]["weight"] == [0.0, 7]  # outside the layers: the gradient's first value
    assert values["model.embed_tokens.weight"]["weight"] == [0.0, 0.25]
    assert values["lm_head.weight"]["lambda"] == 2.0 and values["model.norm.weight"]["lambda"] == 1.0


def test_gradients_in_slices_run_over_each_slice(tmp_path):
    """Slices of 3, 1 and 2 of 6 layers: numpy's interpolation over the slice's own layers, the first value outside."""
    trio(tmp_path, layers=6)

    def piece(first, last):
        return {"sources": [{"model": f"{tmp_path}/{name}", "layer_range": [first, last]}
                            for name in ("base", "expert1")]}

    values = [0.0, 1.0, 0.4, 0.8]
    graph = build(parse_recipe({"merge_method": "slerp", "base_model": f"{tmp_path}/base", "parameters": {"t": values},
                                "slices": [piece(0, 3), piece(5, 6), piece(1, 3)]}, "recipe"))
    found = {unit.name: unit.parameters["t"] for unit in graph.units if unit.method != "copy"}
    places = [0, 0.5, 1, 1, 0, 1]  # an only layer is its slice's last
    for layer, place in enumerate(places):
        expected = np.interp(place, np.linspace(0, 1, len(values)), values)
        assert found[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx(expected), layer
    assert {found[name] for name in found if ".layers." not in name} == {0.0}


def test_layers_beyond_the_configs_count_in_no_stack(tmp_path):
    """As DeepSeek-V3's that predicts a further token is numbered on from the last of the stack."""
    weights = trio(tmp_path, layers=3)["base"]
    for name in ("a", "b"):
        write(tmp_path / name, weights, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2})
    recipe = {"merge_method": "slerp", "base_model": f"{tmp_path}/a", "parameters": {"t": [0.0, 0.5]}}
    graph = build(parse_recipe({**recipe, "models": [{"model": f"{tmp_path}/b"}]}, "recipe"))
    found = {unit.name: unit.parameters["t"] for unit in graph.units if unit.method != "copy"}
    assert [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)] == [0.0, 0.5, 0.5]
    sources = [{"model": f"{tmp_path}/{name}", "layer_range": [0, 3]} for name in "ab"]
    with pytest.raises(InputError, match="which has 2 layers"):
        build(parse_recipe({**recipe, "slices": [{"sources": sources}]}, "recipe"))


# Vocabularies ---------------------------------------------------------------------------------------------------------


def tokenizer(folder, tokens, added=()):
    data = {"version": "1.0", "added_tokens": [{"id": index, "content": token, "special": True, "single_word": False,
                                                "lstrip": False, "rstrip": False, "normalized": False}
                                               for token, index in added],
            "model": {"type": "WordLevel", "vocab": tokens, "unk_token": "a"}}
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_submatrix_rule_crops_to_the_base(tmp_path):
    base = state(0, vocabulary=8)
    expert = state(1, vocabulary=10)
    write(tmp_path / "base", base, {"vocab_size": 8})
    write(tmp_path / "expert", expert, {"vocab_size": 10})
    run({"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base", "mismatch": "submatrix",
         "models": [{"model": f"{tmp_path}/expert"}], "parameters": {"weight": 0.5}}, tmp_path / "out")
    found = read(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = merge_tensors(BY_METHOD["task_arithmetic"], base[name], [expert[name][:8]], {"weight": 0.5})
        assert torch.equal(found[name], expected)


def test_union_of_vocabularies(tmp_path):
    """Base: a b c and padding; first model: c a d; second: b e d and its own padding."""
    vocabularies = {"base": {"a": 0, "b": 1, "c": 2}, "one": {"c": 0, "a": 1, "d": 2}, "two": {"b": 0, "e": 1, "d": 2}}
    rows = {"base": 4, "one": 3, "two": 5}
    weights = {}
    for seed, (name, tokens) in enumerate(vocabularies.items()):
        weights[name] = state(seed, vocabulary=rows[name])
        write(tmp_path / name, weights[name], {"vocab_size": rows[name]})
        tokenizer(tmp_path / name, tokens)
    run({"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base", "tokenizer_source": "union",
         "models": [{"model": f"{tmp_path}/one"}, {"model": f"{tmp_path}/two"}]}, tmp_path / "out")
    found = read(tmp_path / "out")
    order = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4}
    assert config_of(tmp_path / "out")["vocab_size"] == 5
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        one, two = (weights[name][key] for name in ("one", "two"))
        assert found[key].shape == (5, HIDDEN)
        expected = {"a": one[1], "b": two[0], "c": one[0]}  # only one model moves each of these: base + its tau
        d = (one[2] + two[2]) / 2  # not in the base: its row is the mean, tau_i = row_i - mean
        expected |= {"d": d + (one[2] - d) + (two[2] - d), "e": two[1]}
        for token, row in expected.items():
            torch.testing.assert_close(found[key][order[token]], row, rtol=0, atol=1e-6)
    joined = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert joined["added_tokens"] == []  # ordinary tokens of others must not be found before the base's own rules


def test_union_keeps_the_bases_text_and_the_flags_of_added_tokens(tmp_path):
    """As the tokenizers library reads it: "concatenate" as in the base, the other's special token skipped."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {letter: index for index, letter in enumerate("aceont")}
    words = {"base": {**letters, "co": 6, "con": 7, "conc": 8}, "other": {**letters, "ca": 6, "cat": 7}}
    merges = {"base": [("c", "o"), ("co", "n"), ("con", "c")], "other": [("c", "a"), ("ca", "t")]}
    for seed, name in enumerate(words):
        write(tmp_path / name, state(seed, vocabulary=10), {"vocab_size": 10})
        made = tokenizers.Tokenizer(tokenizers.models.BPE(words[name], merges[name]))
        if name == "other":
            made.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True, rstrip=True)])
            made.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True, normalized=False)])
        made.save(str(tmp_path / name / "tokenizer.json"))
    run({"merge_method": "linear", "tokenizer_source": "union",
         "models": [{"model": f"{tmp_path}/{name}"} for name in words]}, tmp_path / "out")
    base, joined = (tokenizers.Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("base", "out"))
    assert joined.encode("concatenate").ids == base.encode("concatenate").ids
    ids = joined.encode("cat<|end|>").ids
    assert ids[:-1] == base.encode("cat").ids and joined.decode(ids, skip_special_tokens=True).replace(" ", "") == "cat"
    found = read(tmp_path / "out")["model.embed_tokens.weight"]
    other = read(tmp_path / "other")["model.embed_tokens.weight"]
    for token in ("<|end|>", "<tool>"):  # only the other has them: its rows
        source = tokenizers.Tokenizer.from_file(str(tmp_path / "other" / "tokenizer.json")).token_to_id(token)
        torch.testing.assert_close(found[joined.token_to_id(token)], other[source])
    flags = {entry["content"]: entry for entry in json.loads(joined.to_str())["added_tokens"]}
    assert flags["<|end|>"]["special"] and flags["<|end|>"]["rstrip"] and flags["<tool>"]["lstrip"]


def test_union_with_the_same_vocabulary_changes_nothing(tmp_path):
    trio(tmp_path)
    for name in ("base", "expert1", "expert2"):
        tokenizer(tmp_path / name, {f"t{index}": index for index in range(9)}, [("<s>", 9)])
    data = {"merge_method": "linear", "models": [{"model": f"{tmp_path}/{name}"} for name in ("expert1", "expert2")]}
    run(data, tmp_path / "plain")
    run({**data, "tokenizer": {"source": "union", "pad_to_multiple_of": 8}}, tmp_path / "union")
    plain, union = read(tmp_path / "plain"), read(tmp_path / "union")
    assert union["lm_head.weight"].shape == (16, HIDDEN)
    first = read(tmp_path / "expert1")
    for name, value in plain.items():
        table = name.startswith(("lm_head", "model.embed"))
        torch.testing.assert_close(union[name][:10] if table else union[name], value[:10] if table else value,
                                   rtol=0, atol=1e-7)
        if table:  # a padding row is nobody's token: it is the main model's
            assert torch.equal(union[name][10], first[name][10])


# Heads ----------------------------------------------------------------------------------------------------------------


def test_tied_heads_stay_tied_and_mixed_ones_are_untied(tmp_path):
    base = state(0)
    tied = {name: value for name, value in state(1, base).items() if name != "lm_head.weight"}
    other = {name: value for name, value in state(2, base).items() if name != "lm_head.weight"}
    write(tmp_path / "tied", tied, {"tie_word_embeddings": True})
    write(tmp_path / "other", other, {"tie_word_embeddings": True})
    write(tmp_path / "untied", state(3, base))
    pair = {"merge_method": "linear", "models": [{"model": f"{tmp_path}/tied"}, {"model": f"{tmp_path}/other"}]}
    run(pair, tmp_path / "both")
    assert "lm_head.weight" not in read(tmp_path / "both")
    pair["models"][1]["model"] = f"{tmp_path}/untied"
    run(pair, tmp_path / "mixed")
    found, untied = read(tmp_path / "mixed"), read(tmp_path / "untied")
    expected = (tied["model.embed_tokens.weight"] + untied["lm_head.weight"]) / 2
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=0, atol=1e-6)
    assert config_of(tmp_path / "mixed")["tie_word_embeddings"] is False


# Experts --------------------------------------------------------------------------------------------------------------


def test_experts_of_a_stacked_bank_are_merged_one_by_one(tmp_path):
    weights = trio(tmp_path, experts=4)
    data = {"merge_method": "ties", "base_model": f"{tmp_path}/base", "parameters": {"density": 0.3},
            "models": [{"model": f"{tmp_path}/expert1"}, {"model": f"{tmp_path}/expert2"}]}
    run(data, tmp_path / "out")
    found = read(tmp_path / "out")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for expert in range(4):
        for half in (slice(0, 16), slice(16, 32)):
            expected = merge_tensors(BY_METHOD["ties"], weights["base"][name][expert, half],
                                     [weights[f"expert{seed}"][name][expert, half] for seed in (1, 2)],
                                     {"density": 0.3})
            assert torch.equal(found[name][expert, half], expected)


def unstack(weights):
    """The same model with one tensor per expert and projection, as older checkpoints store them."""
    found = {}
    for name, value in weights.items():
        if name.endswith("experts.gate_up_proj"):
            for expert, bank in enumerate(value):
                for part, rows in zip(("gate_proj", "up_proj"), bank.chunk(2), strict=True):
                    found[f"{name.removesuffix('gate_up_proj')}{expert}.{part}.weight"] = rows.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, bank in enumerate(value):
                found[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = bank.contiguous()
        else:
            found[name] = value
    return found


def shuffled(weights, order, units=None):
    """The model with its experts (and their hidden units) in another order: the same function."""
    found = dict(weights)
    for name, value in weights.items():
        if name.endswith("experts.gate_up_proj"):
            bank = value[order]
            if units is not None:
                bank = torch.cat([half[:, units] for half in bank.chunk(2, 1)], 1)
            found[name] = bank.contiguous()
        elif name.endswith("experts.down_proj"):
            bank = value[order]
            found[name] = (bank[:, :, units] if units is not None else bank).contiguous()
        elif name.endswith("mlp.gate.weight"):
            found[name] = value[order].contiguous()
    return found


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_experts_in_another_order_are_matched_first(tmp_path, single, hidden):
    """A shuffled copy merged with the original gives the original."""
    weights = trio(tmp_path / "models", experts=4)["expert1"]
    order = torch.tensor([2, 0, 3, 1])
    units = torch.randperm(16, generator=torch.Generator().manual_seed(5)) if hidden else None
    other = shuffled(weights, order, units)
    shape = unstack if single else dict
    config = {"num_experts": 4, "model_type": "qwen3_moe"}
    write(tmp_path / "first", shape(weights), config)
    write(tmp_path / "other", shape(other), config)
    data = {"merge_method": "linear", "models": [{"model": f"{tmp_path}/first"}, {"model": f"{tmp_path}/other"}]}
    run({**data, "align": {"experts": True, "hidden_units": hidden}}, tmp_path / "aligned")
    found = read(tmp_path / "aligned")
    for name, value in shape(weights).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
    run(data, tmp_path / "mixed")
    mixed = read(tmp_path / "mixed")
    assert any(not torch.allclose(mixed[name], value) for name, value in shape(weights).items() if "experts" in name)


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["widen", "optmerge", "tsvm"])
def test_matrices_stored_transposed_are_turned_where_it_matters(tmp_path, method):
    """GPT-2 keeps [in, out]: merging it is merging the transposed matrices and turning back."""
    name = "h.0.mlp.c_fc.weight"
    values = [state(seed, vocabulary=16)["model.embed_tokens.weight"] for seed in range(3)]  # [16, 8]
    for label, value in zip(("base", "a", "b"), values, strict=True):
        write(tmp_path / label, {name: value, "wte.weight": torch.ones(4, 8)}, {"model_type": "gpt2"})
    run({"merge_method": method, "base_model": f"{tmp_path}/base",
         "models": [{"model": f"{tmp_path}/a"}, {"model": f"{tmp_path}/b"}]}, tmp_path / "out")
    base, *models = (value.T.contiguous() for value in values)
    expected = merge_tensors(BY_METHOD[method], base, models, key=name).T
    torch.testing.assert_close(read(tmp_path / "out")[name], expected, rtol=0, atol=1e-5)


def test_fused_projections_are_merged_block_by_block(tmp_path):
    """qkv and gate_up: a trimmed share of each block, not of the whole."""
    names = {"model.layers.0.self_attn.qkv_proj.weight": [slice(0, 8), slice(8, 12), slice(12, 16)],
             "model.layers.0.mlp.gate_up_proj.weight": [slice(0, 8), slice(8, 16)]}
    weights = {}
    for seed, label in enumerate(("base", "a")):
        generator = torch.Generator().manual_seed(seed)
        weights[label] = {name: torch.randn(16, 8, generator=generator) for name in names}
        write(tmp_path / label, weights[label])
    run({"merge_method": "ties", "base_model": f"{tmp_path}/base", "models": [{"model": f"{tmp_path}/a"}],
         "parameters": {"density": 0.25}}, tmp_path / "out")
    for name, blocks in names.items():
        for rows in blocks:
            expected = merge_tensors(BY_METHOD["ties"], weights["base"][name][rows], [weights["a"][name][rows]],
                                     {"density": 0.25})
            assert torch.equal(read(tmp_path / "out")[name][rows], expected)


# Multimodal -----------------------------------------------------------------------------------------------------------


def vision(seed):
    generator = torch.Generator().manual_seed(seed)
    names = {"model.vision_tower.layers.0.mlp.fc1.weight": (6, 4),
             "model.multi_modal_projector.linear_1.weight": (8, 6)}
    return {name: torch.randn(shape, generator=generator) for name, shape in names.items()}


def wrap(weights, seed):
    text = {name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()}
    return {**text, **vision(seed)}


def test_branches_and_name_maps_of_a_multimodal_pair(tmp_path):
    """Vision tower from one model, projector averaged, language model merged with a text-only expert."""
    weights = trio(tmp_path / "text")
    wrapped = {"model_type": "llava", "text_config": dict(CONFIG)}
    write(tmp_path / "images", wrap(weights["expert1"], 1), wrapped)
    write(tmp_path / "charts", wrap(weights["expert2"], 2), wrapped)
    text = f"{tmp_path}/text"
    to_wrapped = [{"from": r"^model\.(?!language)", "to": "model.language_model."}]
    run({"merge_method": "task_arithmetic", "architecture": f"{tmp_path}/images", "base_model": f"{text}/base",
         "base_names": "auto", "parameters": {"weight": 0.5},
         "models": [{"model": f"{tmp_path}/images"}, {"model": f"{tmp_path}/charts"},
                    {"model": f"{text}/expert3", "names": to_wrapped}],
         "branches": [
             {"name": "tower", "tensors": "vision_tower", "merge_method": "passthrough",
              "models": [{"model": f"{tmp_path}/images"}]},
             {"name": "projector", "tensors": "multi_modal_projector", "merge_method": "linear",
              "models": [{"model": f"{tmp_path}/images"}, {"model": f"{tmp_path}/charts"}]}]}, tmp_path / "out")
    found = read(tmp_path / "out")
    assert set(found) == set(wrap(weights["base"], 1))
    assert torch.equal(found["model.vision_tower.layers.0.mlp.fc1.weight"],
                       vision(1)["model.vision_tower.layers.0.mlp.fc1.weight"])
    name = "model.multi_modal_projector.linear_1.weight"
    torch.testing.assert_close(found[name], (vision(1)[name] + vision(2)[name]) / 2, rtol=0, atol=1e-6)
    for key, base in weights["base"].items():
        if not base.is_floating_point():
            continue
        expected = base + 0.5 * sum(weights[f"expert{seed}"][key] - base for seed in (1, 2, 3))
        wrapped_key = key.replace("model.", "model.language_model.", 1)
        torch.testing.assert_close(found[wrapped_key], expected, rtol=0, atol=1e-6)
    assert config_of(tmp_path / "out")["model_type"] == "llava"


def test_dropped_tensors(tmp_path):
    weights = trio(tmp_path / "text")
    write(tmp_path / "images", wrap(weights["expert1"], 1))
    run({"merge_method": "linear", "architecture": f"{tmp_path}/text/base", "models": [
        {"model": f"{tmp_path}/images", "names": "auto"}, {"model": f"{tmp_path}/text/base"}],
        "branches": [{"tensors": "vision_tower|projector", "merge_method": "drop"}]}, tmp_path / "out")
    assert set(read(tmp_path / "out")) == set(weights["base"])
