"""The verbs that need torch, on a model of two layers, from capture to calibrate; and what users get wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from mipipe.graphs.costs.table import CostTable
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import load
from mipipe.planner.plan import Plan

CLUSTER = """\
format: mipipe.cluster
version: 1
hosts:
  - {name: here, devices: 2, kind: cpu, memory: 1GB}
links: {within_host: {latency: 100us, bandwidth: 1GB/s}}
"""
CONFIG = """\
steps: 3
data: {source: "cli_data:batches"}
optimizer: {name: sgd, lr: 0.1}
metrics: metrics.jsonl
timeline: measured.json
timeout_s: 60
"""
DATA = """\
import torch

def batches(graph, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield {"x": torch.randn(rows, 8, generator=generator)}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, mipipe) -> Path:
    """A folder with graph.json, costs.json, cluster.yaml, train.yaml and plan.json of the small model on two ranks."""
    path = tmp_path_factory.mktemp("torch_verbs")
    (path / "cluster.yaml").write_text(CLUSTER)
    (path / "train.yaml").write_text(CONFIG)
    (path / "cli_data.py").write_text(DATA)
    (path / "cli_models.py").write_text((Path(__file__).parent / "cli_models.py").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        for line in (["capture", "cli_models:small", "-o", "graph.json", "--granularity", "module", "--json"],
                     ["profile", "graph.json", "--granularity", "operator", "-o", "costs.json", "--fresh", "--json"],
                     ["plan", "graph.json", "--cluster", "cluster.yaml", "--costs", "costs.json", "--microbatches", "4",
                      "--placement", "chain", "--time-limit", "1", "-o", "plan.json", "--json"]):
            ended = mipipe(*line)
            assert ended.code == 0, ended.stderr
            json.loads(ended.stdout)
    return path


@pytest.fixture(autouse=True)
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))


def test_a_captured_model_is_placed(mipipe, work: Path) -> None:
    """The groups that plan places, on the same two devices, by their measured times."""
    placed = mipipe("place", "graph.json", "--cluster", "cluster.yaml", "--costs", "costs.json", "--time-limit", "2",
                    "--json").data
    groups = load(work / "plan.json", Plan).problem.groups
    assert placed["assignment"].keys() == {group.name for group in groups}
    assert set(placed["assignment"].values()) <= {"acc0", "acc1"} and placed["proven"]
    work_ms = [group.times["cpu"].total_ns / 1e6 for group in groups]
    assert max(max(work_ms), sum(work_ms) / 2) <= placed["objective"] * (1 + 1e-9) <= sum(work_ms) * (1 + 1e-6)
    assert "--cluster" in mipipe("place", "graph.json").error


def test_the_chain_of_files_fits_together(mipipe, work: Path) -> None:
    """What profile noted, plan repeats: the same groups, without --groups."""
    table = load(work / "costs.json", CostTable)
    assert {entry.origin for entry in table.entries} == {"profiled"}
    assert mipipe("check", "plan.json", "--graph", "graph.json").code == 0
    shown = mipipe("show", "graph.json", "costs.json", "--html", "graph.html")
    assert shown.code == 0 and "F us" in shown.stdout
    assert "<svg" in (work / "graph.html").read_text()
    assert mipipe("show", "costs.json", "--json").data["rows"]


def test_train_runs_the_plan_and_calibrate_reads_it(mipipe, work: Path) -> None:
    ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "train.yaml", "--timeout", 120,
                   "--json")
    assert ended.code == 1 and "--model cli_models:small" in ended.error  # the graph alone may not call it
    ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "train.yaml", "--timeout", 120,
                   "--model", "cli_models:small", "--json")
    assert ended.code == 0, ended.stderr
    assert len(ended.data["losses"]) == 3
    shown = mipipe("show", "plan.json", "measured.json", "--json").data["timelines"]
    assert [item["origin"] for item in shown] == ["simulated", "measured"]
    corrected = mipipe("calibrate", "measured.json", "--plan", "plan.json", "--costs", "costs.json",
                       "-o", "better.json", "--replan", "again.json", "--time-limit", 0.5, "--json")
    assert corrected.code == 0 and corrected.data["ratio"] > 0
    assert 0 < corrected.data["replanned"]["makespan_ns"] <= corrected.data["recalibrated_ns"]
    assert mipipe("check", "again.json", "--graph", "graph.json").code == 0
    assert "calibrated" in {entry.origin for entry in load(work / "better.json", CostTable).entries}


@pytest.mark.parametrize(("source", "more", "words"), [
    ("cli_models:small", ["--set", "kind=branch"], ["cli_models.py:21", "y.sum().item()", "torch.where"]),
    ("cli_models:small", ["--set", "kind=vector"], ["expected one scalar loss"]),
    ("cli_models:small", ["--set", "kind"], ["--set kind: expected name=value"]),
    ("cli_models:small", ["--set", "knd=1"], ["factory raised TypeError"]),
    ("cli_models:raising", [], ["factory raised RuntimeError: no such weights"]),
    ("cli_models:no_module", [], ["expected a torch.nn.Module"]),
    ("cli_models:no_inputs", [], ["dict of example tensors"]),
    ("cli_models:nothing", [], ["has no 'nothing'"]),
    ("no_such_module:model", [], ["cannot import 'no_such_module'"]),
    ("no_such_folder", [], ["no_such_folder"]),
    ("cli_models:small", ["--dtype", "int7"], ["int7", "floating dtype"]),
])
def test_models_that_cannot_be_captured(mipipe, source: str, more: list[str], words: list[str]) -> None:
    ended = mipipe("capture", source, "-o", "x.json", *more)
    assert ended.code == 1
    assert all(word in ended.error for word in words), ended.error
    assert "\n" not in ended.error


def test_a_plan_for_another_graph(mipipe, work: Path) -> None:
    """Every step of the chain names the graph it was made for."""
    assert mipipe("capture", "cli_models:small", "-o", "other.json", "--dtype", "float64", "--json").code == 0
    assert load(work / "other.json", OperatorGraph) != load(work / "graph.json", OperatorGraph)
    ended = mipipe("check", "plan.json", "--graph", "other.json")
    assert ended.code == 5 and "made for graph" in ended.error
    ended = mipipe("plan", "other.json", "--cluster", "cluster.yaml", "--costs", "costs.json", "--microbatches", 4)
    assert ended.code == 1 and "made for graph" in ended.error
    ended = mipipe("train", "--plan", "plan.json", "--graph", "other.json", "--config", "train.yaml", "--timeout", 120)
    assert ended.code != 0 and "graph" in ended.error


def test_more_processes_than_ranks(mipipe) -> None:
    ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "train.yaml", "--processes", 3,
                   "--timeout", 120, "--model", "cli_models:small")
    assert ended.code == 4
    assert "3 processes" in ended.error and "2 ranks" in ended.error


def test_wrong_training_configurations(mipipe, work: Path) -> None:
    (work / "typo.yaml").write_text(CONFIG.replace("steps", "stpes"))
    ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "typo.yaml")
    assert ended.code == 1 and "stpes: unknown key" in ended.error
    (work / "broken.yaml").write_text("steps: [")
    ended = mipipe("train", "--plan", "plan.json", "--graph", "graph.json", "--config", "broken.yaml")
    assert ended.code == 1 and "broken.yaml" in ended.error


def test_planning_needs_devices_microbatches_and_costs(mipipe, work: Path) -> None:
    assert "--cluster" in mipipe("plan", "graph.json", "--microbatches", 4).error
    assert "--microbatches" in mipipe("plan", "graph.json", "--cluster", "cluster.yaml").error
    assert "mipipe profile" in mipipe("plan", "graph.json", "--cluster", "cluster.yaml", "--microbatches", 4).error
    (work / "kinds.yaml").write_text(CLUSTER.replace("kind: cpu", "kind: abacus"))
    ended = mipipe("plan", "graph.json", "--cluster", "kinds.yaml", "--microbatches", 4)
    assert ended.code == 1 and "abacus" in ended.error
    (work / "typo.yaml").write_text(CLUSTER.replace("latency", "latncy"))
    ended = mipipe("plan", "graph.json", "--cluster", "typo.yaml", "--microbatches", 4)
    assert ended.code == 1 and "latncy" in ended.error


def test_memory_too_small_for_the_model(mipipe) -> None:
    """The model needs 1,152 parameter bytes per layer and their AdamW state."""
    ended = mipipe("plan", "graph.json", "--cluster", "cluster.yaml", "--costs", "costs.json", "--microbatches", 4,
                   "--memory", "500B", "--time-limit", 5)
    assert ended.code == 3
    assert "bytes" in ended.error


def test_the_module_itself_runs(work: Path) -> None:
    """The model of these tests is the one that was captured, not a leftover of another run."""
    sys.path.insert(0, str(work))
    try:
        import cli_models
        module, inputs = cli_models.small()
        assert module(**inputs)["loss"].ndim == 0
    finally:
        sys.path.remove(str(work))


@pytest.mark.slow
def test_training_tells_lines_and_imports_from_the_current_folder(work: Path) -> None:
    """As a user calls it: the console script has neither the current folder on its path nor a terminal."""
    import subprocess

    script = Path(sys.executable).with_name("mipipe")
    run = subprocess.run([str(script), "train", "--plan", "plan.json", "--graph", "graph.json", "--config",
                          "train.yaml", "--model", "cli_models:small"], cwd=work, capture_output=True, text=True,
                         timeout=200)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and lines[-1].startswith("step 3/3  loss ") and "s a step" in lines[-1]
