"""What of a folder is the model: which files, which copies, whose head; and what is no model to merge."""

import json

import pytest
import torch
from merge_fixtures import read, state, trio, write
from safetensors.torch import save_file

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.checkpoints.files import read_checkpoint
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, merge


def run(data, out):
    return merge([parse_recipe(data, "recipe")], out, MergeOptions(verify=False))


def average(root, *names):
    return {"merge_method": "linear", "models": [{"model": f"{root}/{name}"} for name in names]}


def test_only_the_model_of_a_folder_is_merged(tmp_path):
    """As transformers: model.safetensors alone, though an index, another layout and an optimizer lie beside it."""
    weights = [state(seed) for seed in (0, 1)]
    for name, tensors in zip("ab", weights, strict=True):
        write(tmp_path / name, tensors)
    folder = tmp_path / "a"
    save_file({"layers.0.attention.wq.weight": torch.ones(2, 2)}, folder / "consolidated.safetensors")
    save_file({"exp_avg.0": torch.ones(2), "model.norm.weight": torch.ones(8)}, folder / "optimizer.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    plan = run(average(tmp_path, "a", "b"), tmp_path / "out").plan
    found = read(tmp_path / "out")
    assert set(found) == set(weights[0])
    torch.testing.assert_close(found["model.norm.weight"], (weights[0]["model.norm.weight"]
                                                            + weights[1]["model.norm.weight"]) / 2)
    assert list(plan.graph.notes) == [
        f"{folder}: the model is model.safetensors; left out: consolidated.safetensors, optimizer.safetensors"]


def test_the_index_decides_which_tensors_and_copies_count(tmp_path):
    tensors = state(0)
    folder = write(tmp_path / "a", tensors, shards=2)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    second = {name: tensors[name] for name, file in index.items() if file.startswith("model-00002")}
    other = next(name for name, file in index.items() if file.startswith("model-00001"))
    save_file({**second, other: torch.full_like(tensors[other], 9), "old.bias": torch.ones(3)},
              folder / "model-00002-of-00002.safetensors")
    files = read_checkpoint(folder)
    assert set(files.tensors) == set(tensors) and files.tensors[other].file.startswith("model-00001")
    assert files.left_out == (f"{folder}: model-00002-of-00002.safetensors: 2 tensors that the index does not name"
                              f" there left out, first {min(other, 'old.bias')}",)
    run({"merge_method": "passthrough", "models": [{"model": str(folder)}]}, tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")[other], tensors[other])


# Heads ----------------------------------------------------------------------------------------------------------------


def tied_pair(root, same):
    """Two models whose configs say tied and whose files hold a head: the embedding again, or one of its own."""
    weights = []
    for seed, name in enumerate("ab"):
        tensors = state(seed)
        if same:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        write(root / name, tensors, {"tie_word_embeddings": True})
        weights.append(tensors)
    return weights


def test_a_stored_head_that_differs_is_the_head_whatever_the_config_says(tmp_path):
    """transformers loads both tensors of such a folder; so both are merged, and the result says untied."""
    transformers = pytest.importorskip("transformers")
    weights = tied_pair(tmp_path, same=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert torch.equal(loaded.lm_head.weight, weights[0]["lm_head.weight"])
    run(average(tmp_path, "a", "b"), tmp_path / "out")
    result = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in (("lm_head.weight", result.lm_head.weight),
                        ("model.embed_tokens.weight", result.model.embed_tokens.weight)):
        torch.testing.assert_close(value.detach(), (weights[0][name] + weights[1][name]) / 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_stored_copy_of_the_embedding_is_a_tied_head(tmp_path):
    tied_pair(tmp_path, same=True)
    run(average(tmp_path, "a", "b"), tmp_path / "out")
    assert "lm_head.weight" not in read(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


# Quantised models -----------------------------------------------------------------------------------------------------


def gptq(folder, tensors):
    (folder / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    return tensors


def packed(_folder, tensors):
    name = "model.layers.0.mlp.up_proj"
    tensors.pop(f"{name}.weight")
    return {**tensors, f"{name}.qweight": torch.ones(1, 16, dtype=torch.int32), f"{name}.scales": torch.ones(1, 16)}


def mlx(_folder, tensors):
    name = "model.layers.0.mlp.up_proj"
    return {**tensors, f"{name}.weight": torch.ones(16, 1, dtype=torch.int32), f"{name}.scales": torch.ones(16, 1)}


def pair(integers, beside):
    """Integers of these dimensions in place of a weight, and what is beside them: of HQQ, AQLM, quanto, and more."""
    def make(_folder, tensors):
        name = "model.layers.0.mlp.up_proj"
        tensors.pop(f"{name}.weight")
        return {**tensors, f"{name}.{integers}": torch.ones(8, 16, dtype=torch.uint8),
                **({f"{name}.{beside}": torch.ones(16, 1)} if beside else {})}
    return make


@pytest.mark.parametrize(("make", "config", "message"), [
    *((pair(*names), {}, "in place of weights") for names in (
        ("W_q", "scale"), ("codes", "codebooks"), ("weight._data", "weight._scale"), ("q_weight", "q_scale"),
        ("B", "s"), ("indices", "centroids.weight"), ("weight_qdata", "weight_scale"), ("weight", ""))),
    (gptq, {}, "quantize_config.json"), (packed, {}, "qweight holds packed weights"), (mlx, {}, "has scales beside it"),
    (None, {"quantization": {"bits": 4, "group_size": 64}}, "config.json has quantization"),
    (None, {"text_config": {"quantization_config": {"bits": 4}}}, "config.json has quantization_config")])
@pytest.mark.parametrize("both", [False, True])
def test_quantised_models_are_refused(tmp_path, make, config, message, both):
    """Also where every model of the merge is quantised alike, so that no tensor disagrees."""
    for name in ("a", "b"):
        tensors = state(0)
        write(tmp_path / name, tensors, config if both or name == "b" else {})
        if make is not None and (both or name == "b"):
            save_file(make(tmp_path / name, tensors), tmp_path / name / "model.safetensors")
    with pytest.raises(InputError, match=message):
        build(parse_recipe(average(tmp_path, "a", "b"), "recipe"))


def test_plain_models_are_not_taken_for_quantised(tmp_path):
    weights = trio(tmp_path)
    tensors = {**weights["base"], "model.scale": torch.ones(1), "model.steps": torch.ones(2, 2, dtype=torch.int64)}
    write(tmp_path / "own", tensors)
    build(parse_recipe(average(tmp_path, "own"), "recipe"))
