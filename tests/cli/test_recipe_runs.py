"""A recipe from train.yaml to weights on disk: capture --config, plan, train, and what PEFT and merges make of it."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from mipipe.cli.main import app

HERE = str(Path(__file__).parent)
MODEL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 32,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32,
         "max_position_embeddings": 64}


def mipipe(*words, code=0):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a small model and its weights, that loaders are found from."""
    from transformers import AutoConfig, AutoModelForCausalLM
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE)
    monkeypatch.setenv("PYTHONPATH", HERE)
    Path("config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(MODEL))
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("config")).save_pretrained("base")
    return tmp_path


def write(name, **settings):
    data = {"steps": 3, "weights": "base", "optimizer": {"name": "reg", "lr": 1e-2},
            "data": {"source": "recipe_loader:responses"}, "metrics": f"{name}.jsonl", **settings}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(data))
    return f"{name}.yaml"


def cluster(ranks):
    path = Path(f"cluster{ranks}.yaml")
    path.write_text(yaml.safe_dump({
        "format": "mipipe.cluster", "version": 1,
        "hosts": [{"name": "localhost", "devices": ranks, "kind": "h100", "memory": "2GB"}],
        "links": {"within_host": {"latency": "400us", "bandwidth": "1GB/s"}}}))
    return path


def run(config, ranks=2, copies=1):
    name = Path(config).stem
    mipipe("capture", "base", "--seq", 8, "--batch", 2, "--config", config, "-o", f"{name}.json")
    mipipe("plan", f"{name}.json", "--cluster", cluster(ranks), "--microbatches", 2,
           "--time-limit", 2, "-o", f"{name}-plan.json")
    mipipe("train", "--plan", f"{name}-plan.json", "--graph", f"{name}.json", "--config", config, "--device", "cpu",
           "--copies", copies)
    return [json.loads(line) for line in Path(f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.distributed
def test_adapters_are_loaded_by_peft_and_merged(place):
    """What training saves is what PEFT makes of the base, and what `mipipe merge` merges."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    for method in ("lora", "dora", "beamlora"):
        config = write(method, adapters={"method": method, "rank": 4, "targets": "re:(q|v|down)_proj$"}, loss="rift",
                       save={"folder": f"{method}-out"})
        records = run(config)
        assert len(records) == 3
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), f"{method}-out")
        ids = torch.arange(8)[None]
        plain = AutoModelForCausalLM.from_pretrained("base")(input_ids=ids).logits
        adapted = loaded(input_ids=ids).logits
        assert not torch.allclose(adapted, plain, atol=1e-4)
        Path("merge.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "dtype": "float32",
                                                      "models": [{"model": f"base+{method}-out"}]}))
        mipipe("merge", "merge.yaml", "-o", f"{method}-merged")
        merged = AutoModelForCausalLM.from_pretrained(f"{method}-merged")(input_ids=ids).logits
        assert torch.allclose(merged, adapted, atol=1e-5), method


@pytest.mark.slow
@pytest.mark.distributed
def test_a_frozen_teacher_trains_nothing_and_is_not_saved(place):
    """DPO against the starting weights and distillation from a folder, on two ranks and two copies."""
    from safetensors.torch import load_file
    first = run(write("dpo", loss="dpo", reference={"model": "self"},
                      data={"source": "recipe_loader:responses", "options": {"same": True}}), copies=2)
    assert first[0]["loss_metrics/global_avg_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first[-1]["loss_metrics/global_avg_loss"] < first[0]["loss_metrics/global_avg_loss"]
    same = run(write("same", loss={"name": "distill", "chunk": 10}, reference={"model": "base"},
                     save={"folder": "saved"}))
    assert same[0]["loss_metrics/global_avg_loss"] == pytest.approx(0.0, abs=1e-6)
    names = set(load_file("saved/model.safetensors"))
    assert names == set(load_file("base/model.safetensors"))


@pytest.mark.slow
def test_a_file_that_wants_another_recipe_than_the_graph_has_is_refused(place):
    config = write("one", loss="rift")
    mipipe("capture", "base", "--seq", 8, "--batch", 2, "--config", config, "-o", "one.json")
    mipipe("plan", "one.json", "--cluster", cluster(1), "--microbatches", 2, "--time-limit", 1, "-o", "plan.json")

    def refused(text, **settings):
        other = write("other", **settings)
        result = CliRunner().invoke(app, ["train", "--plan", "plan.json", "--graph", "one.json", "--config", other,
                                          "--device", "cpu"])
        assert result.exit_code and text in result.output.replace("\n", " "), result.output

    refused("loss: found spo , but the graph was captured with rift", loss="spo")
    refused("adapters: found", loss="rift", adapters={"targets": ["q_proj"]})
    plain = write("plain")
    result = CliRunner().invoke(app, ["capture", "base", "--config", plain, "-o", "x.json"])
    assert "names no loss, reference, adapters or router" in result.output
