"""What else is merged or made of models: state dicts in memory, files of torch.save, extracted adapters, tokenizers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from merge_fixtures import read, state, trio, write
from safetensors.torch import load_file, save_file

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge import MergeOptions, merge, merge_state_dicts
from mipipe.runtime.merge.programs.transplant import matching_pursuit, transplanted


def run(data, out, **options):
    lines = []
    merge([parse_recipe(data, "recipe")], out, MergeOptions(verify=False, **options), tell=lines.append)
    return lines


def task(root, *names, method="task_arithmetic", **more):
    return {"merge_method": method, "base_model": f"{root}/base", "models": [{"model": f"{root}/{name}"}
                                                                            for name in names], **more}


@pytest.mark.parametrize(("method", "parameters"), [
    ("task_arithmetic", {"weight": 0.5}), ("ties", {"density": 0.4}), ("slerp", {"t": 0.3}), ("tsvm", {}),
    ("ties", {"density": 0.4, "scope": "model"})])
def test_state_dicts_in_memory_are_merged_as_on_disk(tmp_path, method, parameters):
    weights = trio(tmp_path)
    data = task(tmp_path, "expert1", "expert2", method=method, parameters=parameters)
    if method == "slerp":
        data = {**data, "base_model": f"{tmp_path}/expert1"}
    run(data, tmp_path / "out")
    named = json.loads(json.dumps(data).replace(f"{tmp_path}/", ""))
    before = {label: {name: value.clone() for name, value in tensors.items()} for label, tensors in weights.items()}
    found = merge_state_dicts(named, weights)
    torch.testing.assert_close(found, read(tmp_path / "out"), rtol=0, atol=0)
    torch.testing.assert_close(weights, before, rtol=0, atol=0)


def test_recipes_that_need_files_are_refused_in_memory():
    with pytest.raises(InputError, match="no tokenizers"):
        merge_state_dicts({"merge_method": "linear", "models": [{"model": "a"}], "tokenizer_source": "base"},
                          {"a": {"x": torch.ones(2)}})


@pytest.mark.parametrize("wrapped", [False, True])
def test_files_of_torch_save_and_single_safetensors(tmp_path, wrapped):
    one, two = ({"net.0.weight": torch.full((3, 2), value), "steps": torch.tensor(7)} for value in (1.0, 4.0))
    torch.save({"state_dict": one, "epoch": 3} if wrapped else one, tmp_path / "a.pt")
    save_file(two, tmp_path / "b.safetensors")
    lines = run({"merge_method": "linear", "models": [
        {"model": f"{tmp_path}/a.pt", "parameters": {"weight": 2.0}}, {"model": f"{tmp_path}/b.safetensors"}]},
        tmp_path / "out")
    found = read(tmp_path / "out")
    assert torch.equal(found["net.0.weight"], torch.full((3, 2), 2.0)) and int(found["steps"]) == 7
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "mipipe_merge.json",
                                                                        "model.safetensors"]
    assert not list(tmp_path.glob("out.*")) and not lines


class Code:
    def __reduce__(self):
        return print, ("this ran",)


def test_code_in_a_pickle_does_not_run(tmp_path, capsys):
    torch.save({"a": torch.ones(2), "b": Code()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="cannot be read as weights alone"):
        run({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/a.pt"}]}, tmp_path / "out")
    assert "this ran" not in capsys.readouterr().out and not list(tmp_path.glob("out*"))


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.8}, {"rank": 2, "energy": 0.999}, {"energy": 1.0}])
def test_an_adapter_is_extracted_from_two_checkpoints(tmp_path, rule):
    weights = trio(tmp_path)
    lines = run(task(tmp_path, "expert1", adapter=rule), tmp_path / "lora")
    assert not lines
    adapter, config = load_file(tmp_path / "lora" / "adapter_model.safetensors"), json.loads(
        (tmp_path / "lora" / "adapter_config.json").read_text())
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        delta = (weights["expert1"][f"{name}.weight"].double() - weights["base"][f"{name}.weight"].double()).numpy()
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        share = np.cumsum(s**2) / np.sum(s**2)
        rank = min(rule.get("rank", len(s)), int(np.argmax(share >= rule.get("energy", 2) - 1e-6)) + 1
                   if "energy" in rule else len(s))
        up, down = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "BA")
        assert down.shape[0] == rank == config["rank_pattern"].get(name, config["r"])
        np.testing.assert_allclose(up @ down, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=0, atol=1e-6)
    assert torch.equal(adapter["base_model.model.model.norm.weight"], weights["expert1"]["model.norm.weight"])
    if rule == {"energy": 1.0}:  # nothing is lost: the base with the adapter is the model again
        run({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base+{tmp_path}/lora"}]},
            tmp_path / "again")
        for name, value in read(tmp_path / "again").items():
            torch.testing.assert_close(value, weights["expert1"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("model.layers.0.mlp.up_proj.weight", float("nan"), "up_proj.weight: comes out with values that are not finite"),
    ("model.norm.weight", float("inf"), "norm.weight: comes out with"),
    ("model.norm.weight", 70000.0, "norm.weight: has values up to 70000, which float16")])
def test_values_that_an_adapter_cannot_hold_are_refused(tmp_path, name, value, message):
    """Extracted of a model, as kept from adapters, and before anything is decomposed."""
    weights = trio(tmp_path)["expert1"]
    weights[name].view(-1)[1] = value
    write(tmp_path / "wrong", weights)
    with pytest.raises(RunError, match=message):
        run(task(tmp_path, "wrong", adapter={"rank": 2}, out_dtype="float16"), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    if "up_proj" in name:
        run(task(tmp_path, "expert2", adapter={"rank": 2}), tmp_path / "one")
        tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"][0] = value
        save_file({key: item for key, item in tensors.items() if "lora_" in key},
                  tmp_path / "one" / "adapter_model.safetensors")
        for method in ("task_arithmetic", "ties"):
            with pytest.raises(RunError, match="not finite"):
                run({"merge_method": method, "base_model": f"{tmp_path}/base", "models": [{"model": f"{tmp_path}/one"}],
                     "adapter": {"rank": 2}}, tmp_path / method)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [{"energy": 1.0}, {"energy": 0.7}])
def test_peft_loads_an_adapter_extracted_of_a_mixture(tmp_path, rule):
    """Whose blocks transformers joins and renames, so that all experts and routers have one rank; the others theirs."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(
        vocab_size=12, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2)).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.05 * torch.randn_like(value))
    model.save_pretrained(tmp_path / "tuned")
    run(task(tmp_path, "tuned", adapter=rule), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and not any("moe" in module for module in config["rank_pattern"])
    run({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base+{tmp_path}/lora"}]}, tmp_path / "again")
    loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
                                            tmp_path / "lora").eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        found, again = (item(ids).logits for item in (
            loaded, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()))
        torch.testing.assert_close(found, again, rtol=0, atol=1e-5)
        if rule["energy"] == 1.0:
            torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_extracted_of_a_tied_model_with_biases(tmp_path):
    """PEFT ties nothing that it saves, and has the bias of a module that it wraps inside the wrapper."""
    weights = {}
    for seed, name in enumerate(("base", "expert1")):
        weights[name] = {key: value for key, value in state(seed).items() if "lm_head" not in key}
        weights[name]["model.layers.0.self_attn.q_proj.bias"] = torch.full((8,), float(seed))
        write(tmp_path / name, weights[name], {"tie_word_embeddings": True})
    run(task(tmp_path, "expert1", adapter={"energy": 1.0}), tmp_path / "lora")
    adapter = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    saved = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["modules_to_save"]
    assert {"lm_head", "model.embed_tokens"} <= set(saved)
    for name in ("lm_head", "model.embed_tokens"):
        torch.testing.assert_close(adapter[f"base_model.model.{name}.weight"],
                                   weights["expert1"]["model.embed_tokens.weight"], rtol=0, atol=1e-6)
    assert torch.equal(adapter["base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"], torch.ones(8))
    assert "base_model.model.model.layers.0.self_attn.q_proj.bias" not in adapter
    run({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/base+{tmp_path}/lora"}]}, tmp_path / "again")
    for name, value in read(tmp_path / "again").items():
        torch.testing.assert_close(value, weights["expert1"][name.replace("lm_head", "model.embed_tokens")], rtol=0,
                                   atol=1e-5)


@pytest.mark.parametrize(("changes", "message"), [
    ({"adapter": {}}, "give adapter a rank, or an energy"), ({"adapter": {"energy": 1.5}}, "energy: found 1.5"),
    ({"adapter": {"rank": 2}, "merge_method": "linear"}, "linear does not work on task vectors"),
    ({"adapter": {"rank": 2}, "models": [{"model": "base"}, {"model": "copy"}]}, "changes no matrix")])
def test_adapters_that_cannot_be_extracted(tmp_path, changes, message):
    weights = trio(tmp_path)
    write(tmp_path / "copy", weights["base"])
    data = {**task(tmp_path, "expert1", "expert2"), **changes}
    data["models"] = [{"model": str(tmp_path / item["model"])} for item in data["models"]]
    with pytest.raises(InputError, match=message):
        run(data, tmp_path / "lora")


# Tokenizers -----------------------------------------------------------------------------------------------------------


def tokenizer(folder, tokens):
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))


def test_a_donors_tokenizer_is_transplanted(tmp_path):
    """Common tokens keep their rows; a token whose donor row is a sum of common ones gets the sum of the model's."""
    mine, donor = state(1, vocabulary=11), state(2, vocabulary=6)
    table = donor["model.embed_tokens.weight"]
    table[4] = 2 * table[0] - table[2]
    for name, tensors, rows in (("model", mine, 11), ("donor", donor, 6)):
        write(tmp_path / name, tensors, {"vocab_size": rows, "eos_token_id": rows - 1})
    tokenizer(tmp_path / "model", {token: row for row, token in enumerate("abcdefghijk")})
    tokenizer(tmp_path / "donor", {"c": 0, "a": 1, "k": 2, "d": 3, "new": 4, "b": 5})
    run({"merge_method": "passthrough", "models": [{"model": f"{tmp_path}/model"}],
         "tokenizer": {"source": f"{tmp_path}/donor"}}, tmp_path / "out")
    found, own = read(tmp_path / "out")["model.embed_tokens.weight"], mine["model.embed_tokens.weight"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 6 and config["eos_token_id"] == 5
    assert torch.equal(found[[0, 1, 2, 3, 5]], own[[2, 0, 10, 3, 1]])
    torch.testing.assert_close(found[4], 2 * own[2] - own[10], rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "donor" / "tokenizer.json").read_text()
    assert not list(tmp_path.glob("out.*"))


def test_matching_pursuit_finds_sparse_combinations():
    atoms = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    targets = torch.stack([3 * atoms[5] - 2 * atoms[17], atoms[9]])
    chosen, weights = matching_pursuit(targets, atoms, 6)
    torch.testing.assert_close((atoms[chosen] * weights[..., None]).sum(1), targets, rtol=0, atol=1e-3)
    assert int(chosen[1, 0]) == 9 and len(set(chosen[0].tolist())) == 6


def test_tokenizers_that_cannot_be_transplanted(tmp_path):
    with pytest.raises(InputError, match="no token in common"):
        transplanted(torch.ones(2, 3), torch.ones(2, 3), {"a": 0}, {"b": 0}, 2)
    trio(tmp_path)
    tokenizer(tmp_path / "base", {"a": 0})
    with pytest.raises(InputError, match="transplanted into one model"):
        run({"merge_method": "linear", "models": [{"model": f"{tmp_path}/expert{seed}"} for seed in (1, 2)],
             "tokenizer_source": f"{tmp_path}/base"}, tmp_path / "out")


# One merge at a time --------------------------------------------------------------------------------------------------


HOLD = """
import pathlib, sys
from mipipe.runtime.merge.output.lock import only_one
with only_one(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_merge_into_a_folder_says_so(tmp_path):
    trio(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=rf"out: another merge is writing it \(process {other.pid}\)"):
            run(task(tmp_path, "expert1"), tmp_path / "out")
        other.communicate("\n", timeout=60)
    run(task(tmp_path, "expert1"), tmp_path / "out")
    assert not (tmp_path / "out.lock").exists()


FAILING = """
import json, os, sys
from mipipe.graphs.errors import RunError
from mipipe.runtime.merge import worker
from mipipe.runtime.merge.launching.launch import MergeOptions, merge
work = worker.work

def fail(plan, out, ranks, *rest):
    if ranks.rank == 1:
        if sys.argv[3] == "dies":
            os._exit(3)
        raise RunError("the disk is gone")
    return work(plan, out, ranks, *rest)

worker.work = fail
try:
    merge(sys.argv[1], sys.argv[2], MergeOptions(num_ranks=2, verify=False))
except RunError as error:
    print(error)
"""


@pytest.mark.parametrize(("how", "text"), [
    ("raises", "the disk is gone"), pytest.param("dies", "rank 1 ended with status 3", marks=pytest.mark.slow)])
def test_a_rank_that_fails_ends_the_merge(tmp_path, how, text):
    """In a process of its own, which has no threads and forks its ranks."""
    trio(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(task(tmp_path, "expert1")))
    command = [sys.executable, "-c", FAILING, recipe, tmp_path / "out", how]
    assert text in subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=120, check=True).stdout
    run(task(tmp_path, "expert1"), tmp_path / "out")
    assert (tmp_path / "out").exists()
