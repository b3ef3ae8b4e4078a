"""Stored parts: small on disk, and each expert comes back as its method promises."""

import dataclasses
import json

import pytest
import torch
import yaml
from merge_fixtures import in_threads, read, trio, write
from typer.testing import CliRunner

from mipipe.cli.main import app
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.graphs.serialize import load
from mipipe.planner.timeline import Timeline
from mipipe.runtime.merge.launching.launch import MergeOptions, merge, run_plan
from mipipe.runtime.merge.launching.store import plan_rebuild, plan_store, rebuild, store
from mipipe.runtime.merge.methods import parts as parts_module


def recipe(root, method, **parameters):
    return parse_recipe({"merge_method": method, "base_model": f"{root}/base", "parameters": parameters,
                         "models": [{"model": f"{root}/expert{seed}"} for seed in (1, 2, 3)]}, "recipe")


def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


@pytest.mark.parametrize(("method", "parameters"), [
    ("onebit", {"route": 1}), ("onebit", {"route": 1, "full_precision": [{"filter": "mlp", "value": True}]}),
    ("twin", {"shared_scale": 0.3, "density": 0.5}), ("rmm", {"num_basis": 1, "rank": 4}),
])
def test_a_rebuilt_expert_is_what_the_method_merges_for_its_route(tmp_path, method, parameters):
    trio(tmp_path)
    made = recipe(tmp_path, method, **parameters)
    parts = store(made, tmp_path / "parts")
    assert len(parts.experts) == 3
    rebuild(tmp_path / "parts", tmp_path / "rebuilt", [0.0, 1.0, 0.0])
    if method != "onebit":
        models = tuple(dataclasses.replace(model, parameters={"route": float(index == 1)})
                       for index, model in enumerate(made.models))
        made = dataclasses.replace(made, models=models)
    merge([made], tmp_path / "merged")
    rebuilt, merged = read(tmp_path / "rebuilt"), read(tmp_path / "merged")
    for name, value in merged.items():
        torch.testing.assert_close(rebuilt[name], value, rtol=0, atol=2e-6)


def test_nothing_is_lost_without_compression(tmp_path):
    weights = trio(tmp_path)
    for method, parameters in (("twin", {"density": 1.0}), ("rmm", {"num_basis": 2, "rank": 16}),
                               ("onebit", {"route": 0, "full_precision": True})):
        store(recipe(tmp_path, method, **parameters), tmp_path / method)
        rebuild(tmp_path / method, tmp_path / f"{method}-two", [0.0, 0.0, 1.0])
        for name, value in read(tmp_path / f"{method}-two").items():
            torch.testing.assert_close(value, weights["expert3"][name], rtol=0, atol=5e-6)


def test_one_bit_parts_take_an_eighth_of_a_byte_per_entry(tmp_path):
    weights = trio(tmp_path)["base"]
    parts = store(recipe(tmp_path, "onebit", route=0), tmp_path / "parts")
    matrices = [value for name, value in weights.items() if "proj" in name]
    others = [value for name, value in weights.items() if "proj" not in name and value.is_floating_point()]
    expected = 3 * (sum(value.numel() // 8 + 4 for value in matrices) + sum(value.nbytes for value in others))
    assert parts.num_bytes == expected


def test_routes_and_methods_that_cannot_be(tmp_path):
    trio(tmp_path)
    with pytest.raises(Exception, match="ties leaves one model and no parts to store; expected one of onebit"):
        store(recipe(tmp_path, "ties"), tmp_path / "parts")
    store(recipe(tmp_path, "onebit", route=0), tmp_path / "parts")
    with pytest.raises(Exception, match="--route: found 2 weights, expected 3"):
        rebuild(tmp_path / "parts", tmp_path / "out", [1.0, 0.0])
    with pytest.raises(InputError, match=r"--route: found nan, 0\.0, 1\.0, expected finite"):
        rebuild(tmp_path / "parts", tmp_path / "out", [float("nan"), 0.0, 1.0])
    file = next((tmp_path / "parts").glob("parts-*.safetensors"))
    whole = file.read_bytes()
    for content, text in ((whole[:-4], "truncated"), (b"", "no safetensors file"), (None, "holds 0 bytes of parts")):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(InputError, match=text):
            rebuild(tmp_path / "parts", tmp_path / "out", [1.0, 0.0, 0.0])
    file.write_bytes(whole)
    (tmp_path / "base" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(Exception, match="base: has changed since the parts in"):
        rebuild(tmp_path / "parts", tmp_path / "out", [1.0, 0.0, 0.0])
    assert not (tmp_path / "out").exists()


def test_the_command_line_stores_and_rebuilds(tmp_path):
    trio(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({
        "merge_method": "onebit", "base_model": f"{tmp_path}/base", "parameters": {"route": 0},
        "models": [{"model": f"{tmp_path}/expert1"}, {"model": f"{tmp_path}/expert2"}]}))

    def run(*arguments):
        return CliRunner().invoke(app, ["merge", *map(str, arguments)])

    stored = run(tmp_path / "r.yaml", "-o", tmp_path / "parts", "--store", "--json", "--timeline", tmp_path / "t.json")
    assert load(tmp_path / "t.json", Timeline).origin == "measured"
    assert stored.exit_code == 0 and json.loads(stored.output)["experts"] == [f"{tmp_path}/expert{n}" for n in (1, 2)]
    assert run(tmp_path / "parts", "-o", tmp_path / "two", "--route", "0,1").exit_code == 0
    merge(tmp_path / "r.yaml", tmp_path / "one")
    assert set(read(tmp_path / "one")) == set(read(tmp_path / "two"))
    wrong = run(tmp_path / "r.yaml", "-o", tmp_path / "three", "--route", "0,1")
    assert wrong.exit_code == 1 and "holds no stored parts; --route rebuilds" in wrong.output
    wrong = run(tmp_path / "parts", "-o", tmp_path / "three", "--route", "first")
    assert wrong.exit_code == 1 and "expected numbers such as 0,1,0" in wrong.output


def test_parts_of_relative_folders_are_rebuilt_from_elsewhere(tmp_path, monkeypatch):
    trio(tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    store(parse_recipe({"merge_method": "onebit", "base_model": "./base", "parameters": {"route": 0},
                        "models": [{"model": "expert1"}, {"model": "expert2"}]}, "recipe"), tmp_path / "parts")
    monkeypatch.chdir(tmp_path)
    rebuild(tmp_path / "parts", tmp_path / "out", [0.0, 1.0])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_parts_of_a_shared_model_can_be_moved(tmp_path):
    trio(tmp_path)
    store(recipe(tmp_path, "twin"), tmp_path / "parts")
    (tmp_path / "parts").rename(tmp_path / "elsewhere")
    rebuild(tmp_path / "elsewhere", tmp_path / "out", [0.5, 0.5, 0.0])
    assert set(read(tmp_path / "out")) == set(read(tmp_path / "base"))
    assert size(tmp_path / "elsewhere") > 0


@pytest.mark.parametrize(("method", "parameters"), [("onebit", {"route": 0}), ("rmm", {"num_basis": 1, "rank": 4})])
def test_ranks_do_not_show_in_parts_or_in_what_is_rebuilt(tmp_path, method, parameters):
    trio(tmp_path)
    made = recipe(tmp_path, method, **parameters)
    rebuilt = set()
    for ranks in (1, 3):
        options = MergeOptions(num_ranks=ranks)
        parts, out = tmp_path / f"parts{ranks}", tmp_path / f"out{ranks}"
        (plan,) = plan_store(made, parts, "recipe", options)
        in_threads(plan, parts)
        in_threads(plan_rebuild(parts, out, [0.0, 1.0, 0.5], options), out)
        rebuilt.add((out / "model.safetensors").read_bytes())
    assert len(rebuilt) == 1
    one, three = read(tmp_path / "parts1"), read(tmp_path / "parts3")
    assert set(one) == set(three) and all(torch.equal(one[name], three[name]) for name in one)


def test_storing_continues_where_it_was_killed(tmp_path, monkeypatch):
    trio(tmp_path)
    monkeypatch.setattr(parts_module, "FILE_BYTES", 1)
    (plan,) = plan_store(recipe(tmp_path, "onebit", route=0), tmp_path / "parts", "recipe", MergeOptions())

    def crash(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "parts", MergeOptions(), crash)
    assert not (tmp_path / "parts").exists() and list((tmp_path / "parts.partial").glob("parts-*.safetensors"))
    run_plan(plan, tmp_path / "parts", MergeOptions())
    assert json.loads((tmp_path / "parts" / "mipipe_merge.json").read_text())["ranks"][0]["resumed"] > 5
    store(recipe(tmp_path, "onebit", route=0), tmp_path / "whole")
    one, other = read(tmp_path / "parts"), read(tmp_path / "whole")
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_shared_basis_of_matrices_stored_transposed(tmp_path):
    """RMM works on rows and columns, so GPT-2's matrices are turned before they are stored, and turned back."""
    generator = torch.Generator().manual_seed(0)
    for label in ("base", "expert1", "expert2", "expert3"):
        write(tmp_path / label, {"h.0.mlp.c_fc.weight": torch.randn(8, 16, generator=generator)},
              {"model_type": "gpt2"})
    made = recipe(tmp_path, "rmm", num_basis=1, rank=2)
    store(made, tmp_path / "parts")
    plain = MergeOptions(verify=False)
    rebuild(tmp_path / "parts", tmp_path / "rebuilt", [1.0, 0.0, 0.0], plain)
    models = tuple(dataclasses.replace(model, parameters={"route": float(index == 0)})
                   for index, model in enumerate(made.models))
    merge([dataclasses.replace(made, models=models)], tmp_path / "merged", plain)
    torch.testing.assert_close(read(tmp_path / "rebuilt"), read(tmp_path / "merged"), rtol=0, atol=2e-6)


def test_a_dry_run_of_parts_writes_nothing(tmp_path):
    trio(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({
        "merge_method": "twin", "base_model": f"{tmp_path}/base", "models": [{"model": f"{tmp_path}/expert1"}]}))
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "parts"), "--store",
                                    "--dry-run", "--json", "--ranks", "2"])
    assert done.exit_code == 0 and len(json.loads(done.output)["recipes"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert1", "expert2", "expert3", "r.yaml"]
