"""Recipes in mergekit's spellings: modules, slices with bases, token rules, cached names, folders with a plus."""

import json

import numpy as np
import pytest
import torch
import yaml
from merge_fixtures import read, state, trio, write

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.checkpoints.hub_cache import cached_model, split_label
from mipipe.graphs.merging.recipes.read import parse_recipe, read_recipes
from mipipe.graphs.merging.tokens.chat_templates import NAMED
from mipipe.runtime.merge.launching.launch import MergeOptions, merge


def run(data, out, **options):
    merge([parse_recipe(data, "recipe")], out, MergeOptions(verify=False, **options))
    return read(out)


def models(root, *names, **values):
    return [{"model": f"{root}/{name}", "parameters": {key: value[place] for key, value in values.items()}}
            for place, name in enumerate(names)]


def test_one_module_is_the_model(tmp_path):
    weights = trio(tmp_path)
    found = run({"merge_method": "linear", "parameters": {"normalize": False}, "modules": {"default": {
        "models": models(tmp_path, "expert1", "expert2", weight=[0.5, 2.0]), "parameters": {"normalize": True}}}},
        tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(found[name], (0.5 * weights["expert1"][name] + 2 * weights["expert2"][name]) / 2.5,
                               rtol=1e-6)


def test_modules_of_a_multimodal_model(tmp_path):
    """The text decoder in slices, the tower averaged, the projector of one model."""
    weights = []
    for seed, name in enumerate("ab"):
        tensors = state(seed)
        tensors |= {"vision_tower.patch.weight": torch.full((2, 2), float(seed)),
                    "multi_modal_projector.linear.weight": torch.full((2, 2), 10.0 + seed)}
        weights.append(tensors)
        write(tmp_path / name, tensors)
    pieces = [{"sources": [{"model": f"{tmp_path}/{name}", "layer_range": [layer, layer + 1]}]}
              for name, layer in (("a", 0), ("b", 1), ("a", 1))]
    found = run({"merge_method": "passthrough", "modules": {
        "vision_tower": {"models": models(tmp_path, "b")},
        "multi_modal_projector": {"models": models(tmp_path, "a"), "parameters": {"scale": 2.0}},
        "text_decoder": {"slices": pieces}}}, tmp_path / "out")
    assert float(found["vision_tower.patch.weight"][0, 0]) == 1.0
    assert float(found["multi_modal_projector.linear.weight"][0, 0]) == 20.0
    for layer, (owner, source) in enumerate(((0, 0), (1, 1), (0, 1))):
        assert torch.equal(found[f"model.layers.{layer}.mlp.up_proj.weight"],
                           weights[owner][f"model.layers.{source}.mlp.up_proj.weight"])


def test_a_slice_has_a_base_of_its_own(tmp_path):
    weights = trio(tmp_path)
    pieces = [{"base_model": f"{tmp_path}/{base}", "residual_weight": 0.5, "sources": [
        {"model": f"{tmp_path}/{name}", "layer_range": [layer, layer + 1]} for name in (base, "expert3")]}
        for layer, base in enumerate(("base", "expert1"))]
    data = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.5}, "slices": pieces}
    found = run(data, tmp_path / "out")
    for layer, base in enumerate(("base", "expert1")):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        np.testing.assert_allclose(found[name], (weights[base][name] + weights["expert3"][name]) / 2, rtol=1e-5,
                                   atol=1e-6)
    notes = build(parse_recipe(data, "recipe")).notes
    assert "recipe: slices[1]: residual_weight does nothing, as in mergekit" in notes


@pytest.mark.parametrize(("modules", "message"), [
    ({}, "modules: found no module"), ({"default": {"models": [], "slices": []}}, "expected models or slices, one"),
    ({"default": {"models": [{"model": "a"}], "kind": 1, "size": 2}}, "kind, size: unknown key"),
    ({"default": {"models": [{"model": "a"}]}, "ears": {"models": [{"model": "a"}]}}, "'ears' is not known"),
    ({"default": {"models": [{"model": "a"}]}, "vision_tower": {"slices": [{"sources": []}]}}, "layers can be picked")])
def test_modules_that_cannot_be(modules, message):
    with pytest.raises(InputError, match=message):
        parse_recipe({"merge_method": "linear", "modules": modules}, "recipe")


def test_models_may_be_spelt_out_as_in_model_cards(tmp_path):
    """mergekit once wrote models as mappings, and truth values as numbers, into the cards of its results."""
    data = {"merge_method": "ties", "base_model": {"model": {"path": "org/base", "revision": None}},
            "parameters": {"normalize": 1.0, "int8_mask": 0},
            "slices": [{"sources": [{"layer_range": [0, 2], "model": {"model": {"path": "org/a", "revision": "v2"}}},
                                    {"layer_range": [0, 2], "model": {"model": {"path": "here"}, "lora": {
                                        "path": "org/lora"}, "override_architecture": None}}]}]}
    recipe = parse_recipe(data, "recipe")
    assert recipe.base_model == "org/base"
    assert [source.model for source in recipe.slices[0].sources] == ["org/a@v2", "here+org/lora"]
    (tmp_path / "here").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    assert read_recipes(tmp_path / "recipe.yaml")[0].slices[0].sources[1].model == f"{tmp_path}/here+org/lora"
    for wrong in ({"model": {"path": "a", "branch": "b"}}, {"path": 3}, {"lora": {"path": "a"}}):
        with pytest.raises(InputError, match="base_model"):
            parse_recipe({**data, "base_model": wrong}, "recipe")


def test_numbers_for_truth_values_mean_the_same(tmp_path):
    trio(tmp_path)
    data = {"merge_method": "ties", "base_model": f"{tmp_path}/base", "models": [{"model": f"{tmp_path}/expert1"}]}
    for number in (0, 1.0):
        graph = build(parse_recipe({**data, "parameters": {"normalize": number}}, "recipe"))
        assert all(unit.parameters["normalize"] is bool(number) for unit in graph.units if unit.method == "ties")
    for wrong in (0.5, 2, [0, 1]):
        with pytest.raises(InputError, match="normalize: found"):
            parse_recipe({**data, "parameters": {"normalize": wrong}}, "recipe")


def test_all_unknown_keys_and_parameters_are_named():
    with pytest.raises(InputError, match=r"recipe: merge_methd, modles: unknown keys$"):
        parse_recipe({"merge_methd": "ties", "modles": []}, "recipe")
    with pytest.raises(InputError, match="no parameters 'wieght', 'densty'; it has weight"):
        parse_recipe({"merge_method": "linear", "models": [{"model": "a"}],
                      "parameters": {"wieght": 1, "densty": 0.5}}, "recipe")


def test_parameters_left_empty_are_none():
    """As where all of them are commented out."""
    models = [{"model": "a", "parameters": None}, {"model": "b"}]
    empty = parse_recipe({"merge_method": "linear", "models": models, "parameters": None}, "recipe")
    assert empty == parse_recipe({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}, "recipe")


def test_a_single_filter_is_a_list_of_one(tmp_path):
    weights = trio(tmp_path)
    found = run({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base"}],
                 "parameters": {"scale": {"filter": "up_proj", "value": 2.0}}}, tmp_path / "out")
    for part, scale in (("up_proj", 2.0), ("down_proj", 1.0)):
        name = f"model.layers.0.mlp.{part}.weight"
        assert torch.equal(found[name], weights["base"][name] * scale)


# Names of models ------------------------------------------------------------------------------------------------------


def test_models_are_found_in_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / "models--org--tiny"
    commits = {"main": "a" * 40, "v1.0": "b" * 40}
    (home / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(commits.items()):
        (home / "refs" / name).write_text(commit)
        write(home / "snapshots" / commit, state(seed))
    assert cached_model("org/tiny") == home / "snapshots" / commits["main"]
    assert cached_model("org/tiny@v1.0") == cached_model("org/tiny@bbbbbbbb") == home / "snapshots" / commits["v1.0"]
    assert cached_model("org/tiny@v2") is None and cached_model("org/../tiny") is None
    found = run({"merge_method": "linear", "models": [{"model": "org/tiny"}, {"model": "org/tiny@v1.0"}]},
                tmp_path / "out")
    name = "model.norm.weight"
    torch.testing.assert_close(found[name], (state(0)[name] + state(1)[name]) / 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model:\n- org/tiny\n- org/tiny@v1.0\n" in card.split("---")[1]
    with pytest.raises(InputError, match="no such folder, and no such model in the cache"):
        run({"merge_method": "linear", "models": [{"model": "org/other"}]}, tmp_path / "out2")
    (home / "snapshots" / ("c" * 40)).mkdir()
    with pytest.raises(InputError, match=f"@v2: .* other revisions of this model: main, v1.0, {'c' * 40}"):
        run({"merge_method": "linear", "models": [{"model": "org/tiny@v2"}]}, tmp_path / "out2")


@pytest.mark.parametrize(("label", "parts"), [
    ("a", ["a"]), ("a+b", ["a", "b"]), ("c++", ["c++"]), ("c+++b", ["c++", "b"]), ("a+c++", ["a", "c++"]),
    ("x+y", ["x+y"]), ("x+y+a", ["x+y", "a"]), ("q+r", ["q", "r"])])
def test_names_may_have_a_plus(label, parts):
    assert split_label(label, {"a", "b", "c++", "x+y"}.__contains__) == parts


def test_a_folder_with_a_plus_beside_the_recipe(tmp_path):
    for seed, name in enumerate(("one+two", "c++")):
        write(tmp_path / name, state(seed))
    (tmp_path / "r.yaml").write_text("merge_method: linear\nmodels: [{model: one+two}, {model: c++}]\n")
    recipe = read_recipes(tmp_path / "r.yaml")[0]
    assert [model.model for model in recipe.models] == [f"{tmp_path}/one+two", f"{tmp_path}/c++"]
    assert len(build(recipe).models) == 2


def test_advice_only_where_it_helps(tmp_path):
    wrapped = {name.replace("model.", "model.language_model.", 1): value for name, value in state(0).items()}
    write(tmp_path / "vision", {**wrapped, "model.visual.patch.weight": torch.ones(2, 2)})
    write(tmp_path / "text", state(1))
    write(tmp_path / "plain", {**state(2), "model.odd.weight": torch.ones(2, 2)})

    def message(base, *names, **more):
        with pytest.raises(InputError) as caught:
            build(parse_recipe({"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/{base}",
                                "models": [{"model": f"{tmp_path}/{name}", **more} for name in names]}, "recipe"))
        return str(caught.value)

    assert "map its names (names: auto" in message("vision", "text")
    assert "it is a text model, without visual: give that part a branch" in message("vision", "text", names="auto")
    assert "names: auto" not in message("text", "plain") and "give them a branch" in message("text", "plain")


# Tokens ---------------------------------------------------------------------------------------------------------------


def tokenizer(folder, tokens, added=()):
    (folder / "tokenizer.json").write_text(json.dumps({
        "model": {"vocab": tokens}, "added_tokens": [{"content": token, "id": row} for token, row in added]}))


@pytest.mark.parametrize("source", ["union", "base"])
def test_rows_of_single_tokens(tmp_path, source):
    """The row of another token, of zeros, of one model by force; tokens that nobody has are added."""
    one, two = state(1, vocabulary=4), state(2, vocabulary=4)
    for name, tensors in (("one", one), ("two", two)):
        write(tmp_path / name, tensors, {"vocab_size": 4})
    tokenizer(tmp_path / "one", {"a": 0, "b": 1, "c": 2})
    tokenizer(tmp_path / "two", {"c": 0, "a": 1, "b": 3})
    two_, one_ = f"{tmp_path}/two", f"{tmp_path}/one"
    found = run({"merge_method": "linear", "base_model": one_, "models": [{"model": one_}, {"model": two_}],
                 "tokenizer": {"source": source, "pad_to_multiple_of": 8, "tokens": {
                     "a": {"source": two_, "force": True}, "b": {"source": {"kind": "zero"}, "force": True},
                     "x": {"source": {"kind": "model_token", "model": two_, "token": "c"}},
                     "y": {"source": {"kind": "model_token", "model": one_, "token_id": 2}}}}}, tmp_path / "out")
    mine, other, table = (item["model.embed_tokens.weight"] for item in (one, two, found))
    made = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    rows = {entry["content"]: entry["id"] for entry in made["added_tokens"]}
    assert rows == {"x": 3, "y": 4} and table.shape[0] == 8
    torch.testing.assert_close(table[0], other[1])
    assert not table[1].any()
    torch.testing.assert_close(table[2], (mine[2] + other[0]) / 2)
    torch.testing.assert_close(table[3], other[0])
    torch.testing.assert_close(table[4], mine[2])
    torch.testing.assert_close(table[7], (mine.mean(0) + other.mean(0)) / 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 8


@pytest.mark.parametrize(("entry", "message"), [
    ({}, "has no source"), ({"source": {"kind": "model_token", "model": "two"}}, "needs a model, and either token"),
    ({"source": {"kind": "model_token", "model": "two", "token": "z"}}, "the row of the token 'z' of .*two, which"),
    ({"source": {"kind": "model_token", "model": "two", "token_id": 99}}, "the row of row 99 of .*two, which"),
    ({"source": "two"}, "the row of the token 'new' of .*two, which does not have it")])
def test_token_rules_that_cannot_be(tmp_path, entry, message):
    for seed, name in enumerate(("one", "two")):
        write(tmp_path / name, state(seed, vocabulary=4), {"vocab_size": 4})
        tokenizer(tmp_path / name, {"a": 0, "b": 1})
    text = json.dumps(entry).replace('"two"', json.dumps(f"{tmp_path}/two"))
    with pytest.raises(InputError, match=message):
        build(parse_recipe({"merge_method": "linear", "models": models(tmp_path, "one", "two"),
                            "tokenizer": {"tokens": {"new": json.loads(text)}}}, "recipe"))


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
              "Hello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello\n\n### Instruction:\nBye\n\n### Response:\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
              "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
              "\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n[|user|]Bye\n"
              "[|assistant|]"}


@pytest.mark.parametrize("name", NAMED)
def test_named_chat_templates(tmp_path, name):
    jinja2 = pytest.importorskip("jinja2")
    trio(tmp_path)
    run({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base"}], "chat_template": name},
        tmp_path / "out")
    text = (tmp_path / "out" / "chat_template.jinja").read_text()
    made = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text).render(
        messages=CHAT, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert made == RENDERED[name]
