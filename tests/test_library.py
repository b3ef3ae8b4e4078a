"""The face's functions on a module of one's own: from capture to a page, with values and with files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import mipipe


class Small(nn.Module):
    """Four linear layers and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layers(x).square().mean()}


@pytest.fixture(scope="module")
def graph() -> mipipe.OperatorGraph:
    return mipipe.capture(Small(), {"x": torch.zeros(4, 8)}, name="small", granularity="module")


@pytest.fixture(scope="module")
def topology() -> mipipe.Topology:
    return mipipe.Topology.uniform(2, latency_ns=1000, bytes_per_s=10**11, kind="h100", memory_bytes=10**9)


def test_capture_plan_look(graph, topology, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan, checked, simulated and drawn; its bytes are the same whether the graph is a value or a file."""
    result = mipipe.plan(graph, topology, microbatches=4, time_limit_s=2, placement="chain", memory="1GB")
    assert result.termination is mipipe.Termination.OPTIMAL and result.plan is not None
    mipipe.check(result.plan)
    timeline = mipipe.simulate(result.plan)
    assert timeline.makespan_ns == result.makespan_ns
    told = mipipe.estimate(result.plan, timeline)
    assert told is not None and told.samples_per_s == pytest.approx(16 / (timeline.makespan_ns / 1e9))
    mipipe.show(result.plan)
    assert "samples/s per device" in capsys.readouterr().out
    mipipe.show(timeline)
    mipipe.show(result.plan, html=tmp_path / "plan.html")
    assert "rank 1" in capsys.readouterr().out and (tmp_path / "plan.html").stat().st_size > 10_000
    mipipe.save(graph, tmp_path / "graph.json")
    mipipe.save(result.plan, tmp_path / "plan.json")
    assert mipipe.load(tmp_path / "plan.json", mipipe.Plan) == result.plan == mipipe.load(tmp_path / "plan.json")
    again = mipipe.problem(tmp_path / "graph.json", topology, microbatches=4, memory=10**9)
    assert again == result.plan.problem
    mipipe.check(tmp_path / "plan.json")


def test_a_problem_of_ones_own(topology) -> None:
    problem = mipipe.uniform_problem(ranks=2, microbatches=4, f=1, i=1, w=1)
    rows = mipipe.compare(problem, ["1F1B", "mipipe"], time_limit_s=0.5)
    assert [row.name for row in rows][-1] == "mipipe" and rows[-1].makespan <= rows[1].makespan
    assert mipipe.plan(problem, time_limit_s=0.5).plan is not None
    with pytest.raises(mipipe.InputError, match="has its own devices"):
        mipipe.plan(problem, topology)


def test_no_plan_is_a_result(graph, topology) -> None:
    result = mipipe.plan(graph, topology, microbatches=2, memory="100B", time_limit_s=2)
    assert result.plan is None and result.termination is mipipe.Termination.INFEASIBLE and result.reason


def test_wrong_arguments(graph, topology, tmp_path: Path) -> None:
    with pytest.raises(mipipe.InputError, match="needs inputs"):
        mipipe.capture(Small())
    with pytest.raises(mipipe.InputError, match="names a model"):
        mipipe.capture("a/folder", {"x": torch.zeros(1)})
    with pytest.raises(mipipe.InputError, match="needs a cluster"):
        mipipe.plan(graph)
    with pytest.raises(mipipe.InputError, match="memory: found 'much'"):
        mipipe.plan(graph, topology, microbatches=2, memory="much")
    with pytest.raises(mipipe.InputError, match="no peak rates"):
        mipipe.plan(graph, mipipe.Topology.uniform(2, kind="abacus"), microbatches=2)
    mipipe.save(graph, tmp_path / "graph.json")
    with pytest.raises(mipipe.InputError, match="expected a file of format"):
        mipipe.check(tmp_path / "graph.json")


def test_a_recipe_as_a_mapping(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "x", "num_hidden_layers": 1}')
        save_file({"w": torch.full((2,), value)}, tmp_path / name / "model.safetensors", {"format": "pt"})
    merged = mipipe.merge({"merge_method": "linear", "models": [
        {"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in "ab"]}, tmp_path / "out",
        verify=False)
    assert load_file(merged.out / "model.safetensors")["w"].tolist() == [2.0, 2.0]


def test_the_work_of_a_step_is_the_literatures(topology, tmp_path: Path) -> None:
    """6 products for each weight and token (Kaplan et al., 2020) but the embedding's, and causal attention's own:

    2 products for the scores, 2 for the values, halved, and twice that backward: the scores that flash attention makes
    again are no work of the model's.
    """
    pytest.importorskip("transformers")
    width, layers, vocabulary, seq, heads = 64, 2, 128, 256, 4
    (tmp_path / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": 96,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "vocab_size": vocabulary, "max_position_embeddings": seq}))
    graph = mipipe.capture(tmp_path, seq=seq, batch=2)
    result = mipipe.plan(graph, topology, microbatches=3, time_limit_s=1, placement="chain")
    assert result.plan is not None
    facts = result.plan.provenance["model"]
    tokens = 3 * 2 * seq
    weights = vocabulary * width + layers * (4 * width * width + 3 * width * 96)  # the head, and the layers' matrices
    attention = layers * 2 * seq * width * 3
    assert facts["tokens"] == tokens
    assert facts["flops"] == pytest.approx(tokens * (6 * weights + attention), rel=0.01)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_commands_of_the_example_for_ones_own_module(tmp_path: Path) -> None:
    """Those in its docstring, run in a copy of the examples' folder."""
    import ast
    import shutil
    import subprocess
    import sys

    examples = Path(__file__).resolve().parent.parent / "examples"
    folder = shutil.copytree(examples, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    text = ast.get_docstring(ast.parse((examples / "own_model.py").read_text(encoding="utf-8"))) or ""
    commands = [line.split()[1:] for line in text.splitlines() if line.strip().startswith("mipipe ")]
    assert [command[0] for command in commands] == ["capture", "profile", "plan", "train"]
    for command in commands:
        more = ["--time-limit", "3"] if command[0] == "plan" else []
        run = subprocess.run([str(Path(sys.executable).with_name("mipipe")), *command, *more], cwd=folder,
                             capture_output=True, text=True, timeout=200)
        assert run.returncode == 0, run.stderr
    losses = [float(line.split()[3]) for line in run.stdout.splitlines() if line.startswith("step ")]
    assert len(losses) >= 20 and losses[-1] < losses[0]
