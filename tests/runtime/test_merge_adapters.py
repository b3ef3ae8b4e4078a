"""LoRA adapters as models: merged into their base, or kept low-rank."""

import json

import pytest
import torch
from merge_fixtures import read, trio
from safetensors.torch import save_file

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, merge


def run(data, out, **options):
    return merge([parse_recipe(data, "recipe")], out, MergeOptions(**options))


def adapter(folder, seed, rank=2, alpha=4, **config):
    """A LoRA folder on two weights; returns the deltas by weight name."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    factors, deltas = {}, {}
    modules = {"model.layers.0.mlp.up_proj": (16, 8), "model.layers.1.self_attn.q_proj": (8, 8)}
    for module, (rows, columns) in modules.items():
        down, up = (torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
        factors[f"base_model.model.{module}.lora_A.weight"] = down
        factors[f"base_model.model.{module}.lora_B.weight"] = up
        scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
        deltas[f"{module}.weight"] = scale * up @ down
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(factors, folder / "adapter_model.safetensors")
    return deltas


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_are_models(tmp_path, rslora):
    base = trio(tmp_path)["base"]
    one, two = (adapter(tmp_path / f"lora{seed}", seed, rank=seed + 1, use_rslora=rslora) for seed in (1, 2))
    (tmp_path / "lora1" / "README.md").write_text("---\nlicense: mit\n---\n")
    run({"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base", "models": [
        {"model": f"{tmp_path}/lora1", "parameters": {"weight": 0.5}},
        {"model": f"{tmp_path}/base+{tmp_path}/lora2", "parameters": {"weight": 2.0}}]}, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lora1 | apache-2.0 + mit |" in card and "license: other" in card
    found = read(tmp_path / "out")
    for name, value in base.items():
        expected = value + 0.5 * one[name] + 2.0 * two[name] if name in one else value
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("method", "parameters", "rank"), [
    ("task_arithmetic", {"lambda": 0.5, "weight": 0.8}, None), ("linear", {"weight": 1.0}, None),
    ("ties", {"density": 0.5}, 8), ("task_arithmetic", {}, 2)])
def test_adapters_kept_low_rank_are_the_merge_of_their_task_vectors(tmp_path, method, parameters, rank):
    """The adapter on the base is the model that merging into the base gives; cut, it is the best of its rank."""
    base = trio(tmp_path)["base"]
    for seed in (1, 2):
        adapter(tmp_path / f"lora{seed}", seed, rank=seed + 1)
    data = {"merge_method": method, "base_model": f"{tmp_path}/base", "parameters": parameters,
            "models": [{"model": f"{tmp_path}/lora1"}, {"model": f"{tmp_path}/lora2"}]}
    run(data, tmp_path / "whole")
    made = run({**data, "adapter": {"rank": rank}}, tmp_path / "kept").adapter
    run({"merge_method": "passthrough", "base_model": f"{tmp_path}/base", "models": [
        {"model": f"{tmp_path}/base+{tmp_path}/kept"}]}, tmp_path / "applied")
    whole, applied = read(tmp_path / "whole"), read(tmp_path / "applied")
    assert set(made.ranks.values()) == {rank or 5}
    lost = total = 0.0
    for name, value in base.items():
        delta = (whole[name] - value).double()
        if rank == 2 and delta.dim() == 2:
            values = torch.linalg.svdvals(delta)
            error = (applied[name].double() - whole[name]).norm()
            torch.testing.assert_close(error, values[2:].square().sum().sqrt(), rtol=0, atol=1e-5)
            lost, total = lost + float(error) ** 2, total + float(delta.norm()) ** 2
        else:
            torch.testing.assert_close(applied[name], whole[name], rtol=0, atol=1e-5)
    assert made.kept == pytest.approx(1 - lost / total if total else 1.0, abs=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"merge_method": "ties"}, "give adapter a rank"),
    ({"merge_method": "widen", "adapter": {"rank": 2}}, "widen does not merge tensor by tensor"),
    ({"models": [{"model": "base+lora"}, {"model": "expert1"}]}, "change of whole models has full rank"),
    ({"models": [{"model": "base"}], "merge_method": "linear"}, "none of the models is a LoRA adapter"),
    ({"adapter": {"rank": 0}}, "rank: found 0, expected at least 1"),
    ({"base_model": None}, "adapter needs a base_model"),
    ({"merge_method": "linear", "parameters": {"normalize": False}}, "do not add up to 1"),
])
def test_what_cannot_be_kept_low_rank(tmp_path, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trio(tmp_path)
    for name in ("lora", "other"):
        adapter(tmp_path / name, 1)
    data = {"merge_method": "task_arithmetic", "base_model": "base", "adapter": {},
            "models": [{"model": "lora"}, {"model": "other"}], **changes}
    with pytest.raises(InputError, match=message):
        run(data, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_options_that_an_adapter_would_ignore(tmp_path):
    trio(tmp_path)
    adapter(tmp_path / "lora", 1)
    data = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base", "adapter": {},
            "models": [{"model": f"{tmp_path}/lora"}]}
    for options in ({"num_ranks": 2}, {"dtype": "float16"}, {"timeline": "t.json"}, {"memory_cap": 10**9}):
        with pytest.raises(InputError, match="leave out --ranks, --device, --dtype, --memory and --timeline"):
            run(data, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
