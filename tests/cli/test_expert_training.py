"""The README's command sequence for experts: capture, profile, plan, train, experts, train under the map."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_counts_and_the_next_follows_the_map(mipipe, tmp_path: Path) -> None:
    """Four copies of a plan share eight experts; under the planned map with replicas the losses stay the same."""
    def run(*arguments: object) -> None:
        ended = mipipe(*arguments)
        assert ended.code == 0, f"{arguments[0]}: {ended.stderr}"

    graph, costs, plan = (tmp_path / f"{name}.json" for name in ("graph", "costs", "plan"))
    run("capture", ROOT / "examples/qwen3_moe_tiny", "--seq", 32, "--expert-parallel", 4, "--set",
        "num_hidden_layers=2", "-o", graph)
    run("profile", graph, "--groups", 12, "--workers", 1, "--fresh", "-o", costs)
    run("plan", graph, "--cluster", ROOT / "examples/cluster_1cpu.yaml", "--microbatches", 2, "--costs", costs,
        "--time-limit", 5, "-o", plan)
    losses = {}
    for name, more in (("first", {"loads": str(tmp_path / "loads.json")}),
                       ("second", {"map": str(tmp_path / "map.json")})):
        config = {"steps": 4, "optimizer": {"name": "adamw", "lr": 1e-3}, "data": {"source": "stdlib"},
                  "metrics": str(tmp_path / f"{name}.jsonl"), "experts": more}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
        run("train", "--plan", plan, "--graph", graph, "--config", tmp_path / "train.yaml", "--copies", 4, "--timeout",
            300)
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        losses[name] = [record["loss_metrics/global_avg_loss"] for record in records]
        assert all(record["experts/max_over_mean"] >= 1 for record in records)
        if name == "first":
            run("experts", "--loads", tmp_path / "loads.json", "--cluster", ROOT / "examples/cluster_4cpu.yaml",
                "--replicas", 4, "-o", tmp_path / "map.json")
    assert losses["first"] == pytest.approx(losses["second"], rel=1e-6)
    assert losses["first"][-1] < losses["first"][0]


@pytest.mark.slow
@pytest.mark.distributed
def test_experts_over_the_copies_of_a_plan_of_degrees(mipipe, tmp_path: Path) -> None:
    """Planned by degrees, what runs is told, and run: two ranks of two copies that share the experts and all other
    optimizer state, and two copies of two members that divide the sequence and share the experts with them, have the
    losses of two copies of a plan of one device, which share the experts."""
    def ended(*arguments: object) -> str:
        found = mipipe(*arguments)
        assert found.code == 0, f"{arguments[0]}: {found.stderr}"
        return " ".join(found.stdout.split())

    for parallel in (1, 2):
        ended("capture", ROOT / "examples/qwen3_moe_tiny", "--seq", 32, "--batch", 2, *(
            ["--expert-parallel", 2] if parallel > 1 else []), "--set", "num_hidden_layers=2", "-o",
            tmp_path / f"graph{parallel}.json")
    degrees = ("--kind", "h100", "--global-batch", 8, "--microbatch", 2, "--degrees")
    shared, whole = tmp_path / "graph2.json", tmp_path / "graph1.json"
    told = ended("plan", shared, "--devices", 4, *degrees, "ranks=2,copies=2,expert=2", "-o", tmp_path / "plan2.json")
    assert "`mipipe train` runs this plan" in told
    ended("plan", shared, "--devices", 2, *degrees, "copies=2,expert=2,zero=0", "-o", tmp_path / "plan1.json")
    told = ended("plan", shared, "--devices", 4, *degrees, "sequence=2,copies=2,expert=4",
                 "-o", tmp_path / "plan3.json")
    assert "`mipipe train` runs this plan" in told
    told = ended("plan", shared, "--devices", 4, *degrees, "copies=4,expert=2,zero=2")
    assert "`mipipe train` runs this plan" in told
    told = ended("plan", whole, "--devices", 2, *degrees, "copies=2,expert=2")
    assert "refuses this plan: it divides experts over 2 devices, but of a graph captured without" in told
    losses = []
    for ranks in (1, 2, 3):
        metrics = tmp_path / f"{ranks}.jsonl"
        config = {"steps": 3, "optimizer": {"name": "adamw", "lr": 1e-3}, "clip": 0.5, "data": {"source": "stdlib"},
                  "metrics": str(metrics)}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
        ended("train", "--plan", tmp_path / f"plan{ranks}.json", "--graph", shared, "--config", tmp_path / "train.yaml",
              "--device", "cpu", "--timeout", 300)
        losses.append([json.loads(line)["loss_metrics/global_avg_loss"] for line in metrics.read_text().splitlines()])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] == pytest.approx(losses[0], rel=1e-5)
