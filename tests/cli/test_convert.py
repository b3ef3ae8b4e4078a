"""``mipipe convert``: its report, and what comes after it: capture, plan, train, and loading what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "max_position_embeddings": 64}
CLUSTER = Path(__file__).resolve().parents[2] / "examples" / "cluster_2cpu.yaml"
TEXTS = {"data": "text.jsonl", "samples": 8, "length": 32}
RECIPES = {
    "molae": {"model": "moe", "group": 4}, "m_smoe": {"model": "moe", "groups": 4, "calibration": TEXTS},
    "mc_smoe": {"model": "moe", "groups": 4, "calibration": TEXTS},
    "prune_experts": {"model": "moe", "keep": 4, "calibration": TEXTS},
    "ream": {"model": "moe", "groups": 4, "calibration": TEXTS},
    "dive": {"model": "dense", "experts": 2, "domains": [TEXTS, TEXTS]},
    "moe_adaptation": {"model": "dense", "experts": 8, "experts_per_token": 4, "shared_ratio": 0.1, "dense_layers": [0],
                       "calibration": TEXTS}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    torch.manual_seed(0)
    moe = transformers.Qwen3MoeConfig(**SIZES, head_dim=32, moe_intermediate_size=32, num_experts=8,
                                      num_experts_per_tok=2, mlp_only_layers=[])
    transformers.AutoModelForCausalLM.from_config(moe).save_pretrained(folder / "moe")
    dense = transformers.LlamaConfig(**SIZES, intermediate_size=64)
    transformers.AutoModelForCausalLM.from_config(dense).save_pretrained(folder / "dense")
    rows = [{"tokens": [(number * 31 + place * place) % 256 for place in range(32)]} for number in range(8)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, recipe in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"method": name, **recipe}))
    return folder


@pytest.mark.slow
def test_less_memory_for_the_planner(mipipe, models: Path, tmp_path: Path) -> None:
    """MoLAE's parameters are those of the formula, in the graph that is planned as well; the report is one object."""
    ended = mipipe("convert", models / "molae.yaml", "-o", tmp_path / "out", "--json")
    assert ended.code == 0, ended.stderr
    saved = 2 * (ended.data["gate_up_parameters_before"] - ended.data["gate_up_parameters"])
    assert ended.data["source_bytes"] - ended.data["bytes"] == 4 * saved > 0
    state = {}
    for name, folder in (("before", models / "moe"), ("after", tmp_path / "out")):
        assert mipipe("capture", folder, "--seq", "16", "-o", tmp_path / f"{name}.json").code == 0
        planned = mipipe("plan", tmp_path / f"{name}.json", "--cluster", CLUSTER.with_name("cluster_8xh100.yaml"),
                         "--microbatches", "2", "--time-limit", "1", "-o", tmp_path / f"{name}.plan", "--json")
        assert planned.code == 0, planned.stderr
        groups = json.loads((tmp_path / f"{name}.plan").read_text())["problem"]["groups"]
        state[name] = sum(group["resident_bytes"] for group in groups)
    assert state["before"] - state["after"] == 4 * 4 * saved  # weights, gradients and Adam's two moments in float32


@pytest.mark.slow
def test_routing_to_merged_experts_is_counted_by_the_routers_numbers(mipipe, models: Path, tmp_path: Path) -> None:
    """A layer of four merged experts has eight that its router chooses among, and chooses by what the file says."""
    from mipipe.graphs.operator_graph import OperatorGraph
    from mipipe.graphs.serialize import load
    from mipipe.runtime.experts.layers import routed_layers

    assert mipipe("convert", models / "m_smoe.yaml", "-o", tmp_path / "out").code == 0
    assert mipipe("capture", tmp_path / "out", "--seq", "16", "--verify", "-o", tmp_path / "graph.json").code == 0
    layers = routed_layers(load(tmp_path / "graph.json", OperatorGraph))
    assert [layer.num_experts for layer in layers] == [8, 8]


def test_a_recipe_of_dense_models_is_assembled(mipipe, models: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({
        "base_model": str(models / "dense"), "gate_mode": "random",
        "experts": [{"source_model": str(models / "dense")}] * 2}))
    ended = mipipe("convert", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert ended.code == 0, ended.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "mixtral"


def test_errors_are_lines(mipipe, models: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("method: shrink\nmodel: moe\n")
    assert "method: found 'shrink'; expected one of molae" in mipipe("convert", tmp_path / "recipe.yaml", "-o",
                                                                     tmp_path / "out").error
    assert mipipe("convert", models / "molae.yaml", "-o", tmp_path / "molae").code == 0
    for option, told in (("--expert-groups", "cut through MoLAE's groups of 4"),
                         ("--expert-parallel", "cannot be captured for expert parallelism")):
        assert told in mipipe("capture", tmp_path / "molae", option, "4", "--seq", "8", "-o", tmp_path / "g.json").error
    assert "exists already" in mipipe("convert", models / "molae.yaml", "-o", models / "moe").error
    assert "cannot be read" in mipipe("convert", tmp_path / "absent.yaml", "-o", tmp_path / "out").error


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", RECIPES)
def test_converted_models_plan_and_train(mipipe, models: Path, tmp_path: Path, method: str) -> None:
    """Capture (verified against eager autograd), costs, a plan, a step under torchrun, and the trained folder loads."""
    def done(*arguments: object) -> None:
        ended = mipipe(*arguments)
        assert ended.code == 0, ended.stderr

    done("convert", models / f"{method}.yaml", "-o", tmp_path / "out")
    graph, costs, plan, config = (tmp_path / name for name in ("graph.json", "costs.json", "plan.json", "train.yaml"))
    done("capture", tmp_path / "out", "--seq", "16", "--batch", "2", "--verify", "-o", graph)
    done("profile", graph, "--workers", "1", "-o", costs)
    done("plan", graph, "--cluster", CLUSTER, "--costs", costs, "--microbatches", "2", "--time-limit", "1", "-o", plan)
    config.write_text(yaml.safe_dump({"steps": 1, "weights": str(tmp_path / "out"),
                                      "save": {"folder": str(tmp_path / "trained")}}))
    done("train", "--plan", plan, "--graph", graph, "--config", config)
    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained", trust_remote_code=True)
    assert trained(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("method, changes, option", [
    ("molae", {"group": 4}, "--expert-groups"), ("molae", {"group": 2}, "--expert-groups"),
    ("m_smoe", {}, "--expert-groups"), ("m_smoe", {}, "--expert-parallel"), ("mc_smoe", {}, "--expert-groups"),
    ("dive", {}, "--expert-groups"), ("moe_adaptation", {}, "--expert-groups")])
def test_parts_of_converted_experts_are_the_model(mipipe, models: Path, tmp_path: Path, method: str, changes: dict,
                                                  option: str) -> None:
    """Loss and gradients of the captured parts equal eager autograd's; latents once per token, or once per row."""
    (models / "changed.yaml").write_text(yaml.safe_dump({"method": method, **RECIPES[method], **changes}))
    assert mipipe("convert", models / "changed.yaml", "-o", tmp_path / "out").code == 0
    ended = mipipe("capture", tmp_path / "out", option, "2", "--seq", "8", "--verify", "-o", tmp_path / "graph.json")
    assert ended.code == 0, ended.stderr
