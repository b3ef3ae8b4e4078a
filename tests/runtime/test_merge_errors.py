"""Bad input to a merge: one clear line that says where, what and what to do, and nothing that looks whole."""

import errno
import os
import struct
import tempfile

import pytest
import torch
import yaml
from merge_fixtures import read, state, trio, write
from safetensors.torch import save_file
from typer.testing import CliRunner

from mipipe.cli.main import app
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import merge
from mipipe.runtime.weights import writer as output


@pytest.fixture
def root(tmp_path):
    trio(tmp_path)
    return tmp_path


def recipe(root, **changes):
    data = {"merge_method": "task_arithmetic", "base_model": f"{root}/base",
            "models": [{"model": f"{root}/expert1"}, {"model": f"{root}/expert2"}]}
    return {key: value for key, value in {**data, **changes}.items() if value is not None}


def fails(root, data, *words):
    """The merge ends with one line that holds the words, and leaves no result."""
    file = root / "recipe.yaml"
    file.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    with pytest.raises(MipipeError) as caught:
        merge(file, root / "out")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not (root / "out").exists()
    return message


def cut(file, num_bytes):
    file.write_bytes(file.read_bytes()[:-num_bytes])


@pytest.mark.parametrize(("changes", "words"), [
    ({"merge_methd": "ties"}, ["recipe.yaml", "merge_methd", "unknown key"]),
    ({"merge_method": "tiess"}, ["merge_method: found 'tiess'", "task_arithmetic"]),
    ({"parameters": {"densty": 0.5}}, ["no parameter 'densty'", "weight, lambda"]),
    ({"parameters": {"lambda": "much"}}, ["lambda: found 'much', expected a number"]),
    ({"parameters": {"normalize": 2}}, ["normalize: found 2, expected true or false"]),
    ({"merge_method": "ties", "parameters": {"density": 0}}, ["density: found 0, expected more than 0"]),
    ({"merge_method": "ties", "parameters": {"density": 1.5}}, ["density: found 1.5, expected at most 1"]),
    ({"merge_method": "linear", "parameters": {"weight": 0}}, ["weight: found 0, 0, 0, which add up to 0"]),
    ({"merge_method": "linear", "models": [{"model": "./expert1", "parameters": {"weight": 1}},
                                           {"model": "./expert2", "parameters": {"weight": -1}}]},
     ["weight: found 1, -1, which add up to 0", "(tensor "]),
    ({"merge_method": "linear", "parameters": {"weight": 0, "normalize": False}}, ["found 0, 0", "no model is left"]),
    ({"merge_method": "karcher", "parameters": {"weight": 0}}, ["found 0, 0, 0, which add up to 0"]),
    ({"merge_method": "multislerp", "parameters": {"weight": 0}}, ["found 0, 0, which add up to 0"]),
    ({"merge_method": "onebit", "parameters": {"route": 2}}, ["route: found 2, expected less than 2"]),
    ({"merge_method": "ties", "parameters": {"combine": "median"}}, ["found 'median', expected one of mean, max"]),
    ({"parameters": {"weight": []}}, ["weight: is an empty list"]),
    ({"parameters": {"weight": [{"filter": "mlp", "value": 0.5}, 1]}}, ["weight: mixes filters with plain values"]),
    ({"parameters": {"weight": [{"filtr": "mlp", "value": 1.0}]}}, ["unknown key 'filtr'"]),
    ({"parameters": {"weight": [{"filter": "no_such_module", "value": 1.0}, {"value": 0.5}]}},
     ["filter 'no_such_module' matches no tensor"]),
    ({"parameters": {"weight": [{"filter": "re:mlp(", "value": 1.0}, {"value": 0.5}]}},
     ["weight: filter: 'mlp(' is no regular expression"]),
    ({"models": ["./expert1"]}, ["models[0]: expected a mapping (found './expert1')"]),
    ({"branches": [{"tensors": ".", "merge_method": "drop"}]}, ["its branches drop every tensor"]),
    ({"base_names": [{"from": "model.(", "to": "x"}]}, ["names: from 'model.(' to 'x' is no substitution"]),
    ({"models": [{"model": "a", "names": [{"from": "(a)", "to": r"\2"}]}]}, ["names: from '(a)'", "invalid group"]),
    ({"models": {"model": "./expert1"}}, ["models: expected a list"]),
    ({"merge_method": "passthrough"}, ["passthrough merges 1 model, found 2"]),
    ({"chat_template": "chatmlx"}, ["chat_template: found 'chatmlx', expected auto", "Jinja"]),
    ({"base_model": None}, ["task_arithmetic works on task vectors and needs a base_model"]),
    ({"merge_method": "slerp", "base_model": None, "parameters": {"t": 0.5}, "models": [{"model": "a"}]},
     ["slerp merges 2 models, found 1"]),
    ({"merge_method": "slerp", "base_model": None}, ["slerp needs the parameter t"]),
    ({"models": None}, ["neither models nor slices"]),
    ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}, ["both models and slices"]),
    ({"dtype": "fp8"}, ["dtype: found 'fp8', expected one of float32"]),
    ({"branches": [{"tensors": "^vision", "merge_method": "linear"}]}, ["branch '^vision' matches no tensor"]),
    ({"branches": [{"tensors": "(", "merge_method": "linear"}]}, ["'(' is no regular expression"]),
    ({"tokenizer": {"pad_to_multiple_of": 0}}, ["pad_to_multiple_of: found 0, expected at least 1"]),
    ({"tokenizer_source": "union"}, ["has no tokenizer.json"]),
    ({"align": {"experts": True}}, ["recipe.yaml: align: the models have no experts to match"]),
    ({"models": None, "slices": [{"sources": []}]}, ["slices[0]: has no sources"]),
    ({"parameters": {"weight": float("nan")}}, ["weight: found nan, expected a finite number"]),
])
def test_recipes(root, changes, words):
    fails(root, recipe(root, **changes), *words)
    assert not list(root.glob("out*"))  # nothing was begun


@pytest.mark.parametrize(("text", "words"), [
    ("", ["is empty"]),
    ("- a\n- b\n", ["found a list, expected a mapping"]),
    ("merge_method: linear\nmodels: [", ["recipe.yaml, line 2: not readable as YAML"]),
    ("merge_method: linear\nmodels: [{model: a}]\nmodels: [{model: b}]\n", ["line 3", "'models' is given twice"]),
    ("base_model: a\nexperts: []\nexperts: []\n", ["line 3", "the key 'experts' is given twice"]),
    ("merge_method: linear\nmodels: [{model: a}]\n---\nmerge_method: linear\nmodels: [{model: b}]\n",
     ["recipe 1: has no name"]),
    ("name: a\nmerge_method: linear\nmodels: [{model: b}]\n---\n" * 2, ["two recipes have the name a"]),
    ("name: ../a\nmerge_method: linear\nmodels: [{model: b}]\n", ["found '../a', expected letters"]),
])
def test_files_that_are_no_recipe(root, text, words):
    fails(root, text, *words)


def test_a_later_recipe_is_checked_before_the_first_runs(root):
    first = {"name": "soup", "merge_method": "linear", "models": [{"model": f"{root}/expert1"}]}
    second = {"merge_method": "linear", "models": [{"model": "soup"}, {"model": "suop"}]}
    fails(root, "---\n".join(map(yaml.safe_dump, (first, second))), "suop: no such folder")
    assert not (root / "out.steps").exists()


def test_a_parameter_of_all_models_on_one_model(root):
    data = recipe(root)
    data["models"][0]["parameters"] = {"lambda": 0.5}
    fails(root, data, "lambda of task_arithmetic is one value for all models")


def test_missing_folder_config_and_weights(root):
    fails(root, recipe(root, base_model=f"{root}/nowhere"), "nowhere: no such folder")
    (root / "expert1" / "config.json").unlink()
    fails(root, recipe(root), "expert1: has no config.json")
    for file in (root / "expert2").glob("*.safetensors"):
        file.unlink()
    (root / "expert2" / "model.safetensors.index.json").unlink()
    (root / "expert2" / "pytorch_model.bin").write_bytes(b"")
    fails(root, recipe(root, models=[{"model": f"{root}/expert2"}]),
          "has no .safetensors file; found pytorch_model.bin")


def test_missing_tensor_and_surplus_tensors(root):
    weights = read(root / "expert1")
    del weights["model.layers.1.mlp.up_proj.weight"]
    write(root / "lacking", weights)
    message = fails(root, recipe(root, models=[{"model": f"{root}/lacking"}]), "lacking",
                    "has no tensor model.layers.1.mlp.up_proj.weight, which the merge needs")
    assert "names" not in message  # another layer's weight is no other name of it
    weights = {**read(root / "expert1"), "vision.proj.weight": torch.ones(2, 2)}
    write(root / "more", weights)
    fails(root, recipe(root, models=[{"model": f"{root}/more"}]), "more has 1 tensor that",
          "first vision.proj.weight", "drop leaves them out")


def test_wrapped_names_are_suggested(root):
    write(root / "wrapped", {f"language_model.{name}": value for name, value in read(root / "expert1").items()})
    fails(root, recipe(root, models=[{"model": f"{root}/wrapped"}]), "names: auto")


def test_shape_and_vocabulary_mismatch(root):
    weights = read(root / "expert1")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(4, 4)
    write(root / "odd", weights)
    fails(root, recipe(root, models=[{"model": f"{root}/odd"}]), "has shape [16, 8] in", "but [4, 4] in")
    write(root / "wide", state(9, vocabulary=13), {"vocab_size": 13})
    fails(root, recipe(root, models=[{"model": f"{root}/wide"}]), "has shape [11, 8]", "but [13, 8]",
          "choose tokenizer_source: union, or mismatch: submatrix")
    fails(root, recipe(root, base_model=f"{root}/wide", models=[{"model": f"{root}/base"}], mismatch="submatrix"),
          "smaller than the base's")


def test_truncated_and_damaged_safetensors(root):
    file = root / "expert1" / "model-00001-of-00002.safetensors"
    whole = file.read_bytes()
    cut(file, 10)
    fails(root, recipe(root), "model-00001-of-00002.safetensors: truncated: has")
    file.write_bytes(whole + b"xx")
    fails(root, recipe(root), "damaged: has")
    file.write_bytes(whole[:5])
    fails(root, recipe(root), "no safetensors file, or truncated within its header (5 bytes)")
    file.write_bytes(struct.pack("<Q", 10**12) + whole[8:])
    fails(root, recipe(root), "no safetensors file, or truncated within its header")


def test_an_index_that_disagrees(root):
    (root / "expert1" / "model-00002-of-00002.safetensors").unlink()
    fails(root, recipe(root), "the index names model-00002-of-00002.safetensors, which is not there")


def test_a_tensor_stored_twice(root):
    (root / "expert1" / "model.safetensors.index.json").unlink()
    save_file({"model.norm.weight": torch.ones(8)}, root / "expert1" / "model-00003-of-00002.safetensors")
    fails(root, recipe(root), "tensor model.norm.weight is in")


def test_quantised_models(root):
    write(root / "q", read(root / "expert1"), {"quantization_config": {"bits": 4}})
    fails(root, recipe(root, models=[{"model": f"{root}/q"}]), "is quantised", "merge the dequantised model")
    weights = read(root / "expert1")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    write(root / "f8", weights)
    fails(root, recipe(root, models=[{"model": f"{root}/f8"}]), "is stored in F8_E4M3; dequantise")
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(16, 8, dtype=torch.int8)
    write(root / "i8", weights)
    fails(root, recipe(root, models=[{"model": f"{root}/i8"}]), "i8: is quantised", "integers of dtype I8 in place of")
    for name, dtype in (("f", torch.float32), ("i", torch.int8)):
        write(root / name, {**read(root / "expert1"), "model.layers.0.gate": torch.ones(16, 8, dtype=dtype)})
    fails(root, recipe(root, base_model=f"{root}/f", models=[{"model": f"{root}/i"}]),
          "layers.0.gate is stored as F32 in", "but I8 in", "/i; dequantise")


def test_values_that_are_no_numbers(root):
    weights = read(root / "expert1")
    weights["model.norm.weight"][3] = float("nan")
    write(root / "nan", weights)
    fails(root, recipe(root, models=[{"model": f"{root}/nan"}]), "nan: tensor model.norm.weight holds values that are"
          " not finite numbers")


def test_no_space_left(root, monkeypatch):
    def full(handle, start, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    fails(root, recipe(root), "out: no space left: the merged model needs 7.61 kB", "are free")
    assert not (root / "out.partial").exists()


def test_a_disk_too_full_for_a_sample_says_what_is_needed(root, monkeypatch):
    """The rates are measured with a scratch file; that it finds no room is no error of its own."""
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(os, "posix_fallocate", full)
    fails(root, recipe(root), "no space left: the merged model needs")


def test_a_disk_that_fills_up_while_writing(root, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(output, "JOURNAL_BYTES", 1)
    count = 0

    def limited(handle, data, offset):
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", limited)
    fails(root, recipe(root), "model.safetensors: cannot be written: No space left on device")
    monkeypatch.setattr(os, "pwrite", real)
    (report,) = merge([parse_recipe(recipe(root), "recipe")], root / "out").reports
    assert report["resumed"] > 0


def test_a_source_that_changes_meanwhile(root):
    def disturb(done, total):
        file = root / "expert2" / "model-00001-of-00002.safetensors"
        os.utime(file, (1, 1))

    with pytest.raises(MipipeError, match="expert2: has changed since the merge began"):
        merge([parse_recipe(recipe(root), "recipe")], root / "out", progress=disturb)
    assert not (root / "out").exists()


def test_slices_beyond_the_model(root):
    slices = [{"sources": [{"model": f"{root}/base", "layer_range": [0, 3]}]}]
    data = {"merge_method": "passthrough", "slices": slices}
    fails(root, data, "layer_range [0, 3] of", "which has 2 layers")
    slices[0]["sources"][0] = {"model": f"{root}/base"}
    fails(root, data, "has no layer_range")
    slices[0]["sources"] = [{"model": f"{root}/base", "layer_range": [0, 2]},
                            {"model": f"{root}/expert1", "layer_range": [0, 1]}]
    fails(root, {**data, "merge_method": "linear"}, "its sources have 1 and 2 layers; expected equal numbers")


def test_adapters_that_do_not_fit(root):
    adapter = root / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    save_file({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(2, 8),
               "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": torch.ones(16, 2)},
              adapter / "adapter_model.safetensors")
    fails(root, recipe(root, models=[{"model": str(adapter)}]), "adapts model.layers.9.mlp.up_proj, which")
    fails(root, {"merge_method": "linear", "models": [{"model": str(adapter)}]}, "is a LoRA adapter")


@pytest.mark.parametrize(("options", "code", "words"), [
    (["--memory", "1kB"], 3, "memory cap 1.00 kB per rank"),
    (["--memory", "lots"], 1, "--memory: found 'lots'"),
    (["--dtype", "int4"], 2, "int4"),
    (["--ranks", "0"], 2, "--ranks"),
    (["--device", "tpu"], 2, "neither cpu nor cuda"),
    (["--store", "--route", "0,1"], 2, "rebuilds what --store"),
    (["--timeline", "nowhere/t.json"], 1, "the folder nowhere does not exist"),
])
def test_the_command_line(root, options, code, words):
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe(root)))
    result = CliRunner().invoke(app, ["merge", str(root / "recipe.yaml"), "-o", str(root / "out"), *options])
    assert result.exit_code == code and words in result.output
    assert not list(root.glob("out*"))


def test_ctrl_c_says_how_to_continue(root, monkeypatch):
    def interrupted(self, name):
        raise KeyboardInterrupt

    (root / "r.yaml").write_text(yaml.safe_dump(recipe(root)))
    command = ["merge", str(root / "r.yaml"), "-o", str(root / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(output.Writer, "finish", interrupted)
        stopped = CliRunner().invoke(app, command)
    assert stopped.exit_code != 0 and "out.partial keeps what is done; the same command continues" in stopped.output
    assert CliRunner().invoke(app, command).exit_code == 0 and (root / "out").is_dir()


def test_an_existing_output_is_left_alone(root):
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe(root)))
    (root / "out").mkdir()
    result = CliRunner().invoke(app, ["merge", str(root / "recipe.yaml"), "-o", str(root / "out")])
    assert result.exit_code == 1 and "exists already" in result.output
    assert list((root / "out").iterdir()) == []


def test_dry_run_reads_headers_only(root):
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe(root)))
    result = CliRunner().invoke(app, ["merge", str(root / "recipe.yaml"), "-o", str(root / "out"), "--dry-run",
                                      "--ranks", "2"])
    assert result.exit_code == 0 and "22 tensors of 3 models" in result.output and "peak memory" in result.output
    assert not (root / "out").exists() and not (root / "out.partial").exists()
