"""Hugging Face folders in and out: each rank reads its own tensors, and what is saved is what transformers loads."""

import json
import logging
import resource

import pytest
import runtime_equal as equal
import runtime_models as models
import safetensors
import torch

from mipipe.graphs.capture.model import capture
from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.tracing.parameter_slices import slice_tensor
from mipipe.planner.schedules import BASELINES
from mipipe.runtime.checkpoints.own_pieces import byte_slice
from mipipe.runtime.checkpoints.save import Target, save_weights
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.mesh import Mesh
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.models import empty_module, initial_weights
from mipipe.runtime.weights.stored_names import StoredView

transformers = pytest.importorskip("transformers")
logging.getLogger("transformers").setLevel(logging.ERROR)

COUNT = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen3-MoE in shards, experts stored one by one; in ``fused`` the same, as transformers 5 holds it."""
    path = tmp_path_factory.mktemp("weights")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, use_cache=False, tie_word_embeddings=False)
    torch.manual_seed(11)
    model = transformers.Qwen3MoeForCausalLM(config)
    model.save_pretrained(path, max_shard_size="8KB")
    model.save_pretrained(path / "fused", save_original_format=False)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def graph(folder):
    """Its graph, with the experts in two groups."""
    return capture(str(folder), seq=equal.LENGTH, batch=equal.ROWS, expert_groups=2)


def plan(graph, ranks):
    name = "GPipe" if ranks == 1 else "1F1B"
    problem = equal.problem(graph, ranks, COUNT, 8)
    return next(item for item in BASELINES if item.name == name).plan(problem)


def batch():
    return models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 64)


class Counting:
    """safetensors' safe_open, which notes what is opened and read."""

    def __init__(self, monkeypatch):
        self.opened, self.read = set(), []
        real, notes = safetensors.safe_open, self

        class Open:
            def __init__(self, path, framework):
                notes.opened.add(path.name)
                self.file = real(path, framework=framework)

            def get_tensor(self, name):
                notes.read.append(name)
                return self.file.get_tensor(name)

            def get_slice(self, name):
                notes.read.append(name)
                return self.file.get_slice(name)

        monkeypatch.setattr(safetensors, "safe_open", Open)


def test_a_rank_reads_only_its_own_tensors(folder, graph, monkeypatch):
    """Two ranks together read every stored tensor once, and open only the files that hold theirs."""
    made, seen = plan(graph, 2), []
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for rank in range(2):
        notes = Counting(monkeypatch)
        mesh = Mesh(rank, 2, 0, 1, torch.device("cpu"), {(0, 0, 0): 0, (0, 1, 0): 1},
                    channels={(0, 1): None, (1, 0): None})
        Engine(made, graph, initial_weights(graph, TrainConfig(1, weights=str(folder))), mesh=mesh)
        assert notes.opened == {index[name] for name in notes.read}
        assert 0 < len(notes.opened) < len(set(index.values()))
        seen += notes.read
        monkeypatch.undo()
    assert sorted(seen) == sorted(index)


@pytest.mark.parametrize("form", ["experts one by one", "fused"])
def test_what_is_saved_is_what_transformers_loads(folder, graph, form, tmp_path):
    """From either form: the model's own loss before training; after a step, from_pretrained gives the engine's, and
    its weights to the last bit."""
    source = folder / "fused" if form == "fused" else folder
    weights = initial_weights(graph, TrainConfig(1, weights=str(source)))
    engine = Engine(plan(graph, 1), graph, weights)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    before = loss_of(model)
    assert engine.evaluate(batch()) == pytest.approx(before, rel=1e-6)
    engine.step(batch())
    torch.optim.SGD(engine.parameters(), lr=0.5).step()
    save_weights(engine, empty_module(graph, TrainConfig(1)), Target(tmp_path / "out", 6000), source, weights)
    found, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert engine.evaluate(batch()) == pytest.approx(loss_of(found), rel=1e-6)
    assert abs(loss_of(found) - before) > 1e-3 * before
    state = found.state_dict()
    assert all(torch.equal(slice_tensor(state, name), item) for name, item in engine.weights.parameters.items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors.index.json"} <= names and not (tmp_path / "out.next.partial").exists()
    assert ("tokenizer.json" in names) == (form != "fused")
    stored = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in stored


def loss_of(model):
    pieces = models.chunked(batch(), COUNT)
    with torch.no_grad():
        total = sum(models.token_losses(model.eval()(input_ids=piece["input_ids"]), piece).item() for piece in pieces)
    return total / equal.valid_labels(True, pieces)


def test_a_saved_folder_is_not_overwritten(folder, graph, tmp_path):
    """Unless the run is resumed: then it is replaced, in one rename. A full disk leaves nothing behind."""
    engine = Engine(plan(graph, 1), graph, initial_weights(graph, TrainConfig(1, weights=str(folder))))
    module = empty_module(graph, TrainConfig(1))
    (tmp_path / "out").mkdir()
    with pytest.raises(Exception, match="exists already"):
        save_weights(engine, module, Target(tmp_path / "out", 10**6))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(RunError, match="no space left: the merged model needs"):
            save_weights(engine, module, Target(tmp_path / "full", 10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    save_weights(engine, module, Target(tmp_path / "out", 10**6, torch.bfloat16), replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "qwen3_moe"
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as stream:
        assert stream.get_tensor("lm_head.weight").dtype is torch.bfloat16


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.unlink(), "which is not there"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
])
def test_damaged_folders_are_refused(folder, graph, tmp_path, damage, message):
    """By the name of the file."""
    for path in folder.glob("model*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / "model-00003-of-00005.safetensors" if (tmp_path / "model-00003-of-00005.safetensors").exists()
           else sorted(tmp_path.glob("*.safetensors"))[2])
    with pytest.raises(InputError, match=message):
        Engine(plan(graph, 1), graph, initial_weights(graph, TrainConfig(1, weights=str(tmp_path))))


def test_another_model_is_refused(graph, tmp_path):
    """A tensor that no stored one makes is named."""
    from safetensors.torch import save_file
    save_file({"model.norm.weight": torch.ones(16)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no stored tensor makes"):
        Engine(plan(graph, 1), graph, initial_weights(graph, TrainConfig(1, weights=str(tmp_path))))


def test_slices_cut_what_they_hold():
    """A bank of 4 experts of 2x3, held in two slices: an expert's part, nothing of another's, rows of the whole."""
    bank = torch.arange(24.0).reshape(4, 2, 3)
    third = StoredView("e2", "F32", (1, 3), "bank", (3, 1), 2 * 6 + 3, 12)
    assert torch.equal(byte_slice(third, None, bank)[1], bank[2, 1:])
    assert torch.equal(byte_slice(third, (2, 4), bank[2:])[1], bank[2, 1:])
    assert byte_slice(third, (0, 2), bank[:2]) == (0, None)
    whole = StoredView("bank", "F32", (4, 2, 3), "bank", (6, 3, 1), 0, 96)
    assert byte_slice(whole, (2, 4), bank[2:])[0] == 48 and torch.equal(byte_slice(whole, (2, 4), bank[2:])[1],
                                                                        bank[2:])
    turned = StoredView("bank", "F32", (4, 3, 2), "bank", (6, 1, 3), 0, 96)
    with pytest.raises(InputError, match="different ranks hold"):
        byte_slice(turned, (2, 4), bank[2:])
