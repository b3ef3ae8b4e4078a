"""What ``mipipe plan`` offers beyond one shortest plan: frontier, utilisation, sizes of microbatches, limits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from mipipe.graphs.serialize import save

TINY = ["text_config.hidden_size=16", "text_config.intermediate_size=32", "text_config.num_hidden_layers=8",
        "text_config.num_attention_heads=2", "text_config.num_key_value_heads=2", "text_config.vocab_size=64",
        "vision_config.hidden_size=8", "vision_config.intermediate_size=16", "vision_config.num_hidden_layers=4",
        "vision_config.num_attention_heads=2", "vision_config.image_size=8", "vision_config.patch_size=4",
        "image_token_index=63"]
QUICK = ("--without", "mip", "--without", "search")
CLUSTER = """format: mipipe.cluster
version: 1
hosts:
  - {name: host0, kind: h100, devices: 4}
links:
  within_host: {latency: 3us, bandwidth: 450GB/s}
"""


def test_the_frontier_trades_memory_for_bubble(mipipe, folder: Path, tmp_path: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "--pareto", "--time-limit", 1, "--html", tmp_path / "f.html",
                   "--json")
    points = [point for point in ended.data["points"] if point["makespan"] is not None]
    assert len(points) >= 3
    for more, less in itertools.pairwise(points):
        assert more["peak_bytes"] > less["peak_bytes"] and more["bubble_ratio"] <= less["bubble_ratio"]
        assert more["bound"] <= more["makespan"]
    page = (tmp_path / "f.html").read_text()
    assert page.count("<polyline") == 2 and page.count("<circle") == len(points)


def test_utilisation_is_told(mipipe, folder: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "--objective", "utilisation", "--time-limit", 2, "--json")
    used = ended.data["provenance"]["devices_in_use"]
    busy = sum(rank["busy"] for rank in ended.data["ranks"])
    assert ended.data["provenance"]["utilisation"] == pytest.approx(busy / used / ended.data["makespan"], abs=1e-4)


def test_activations_are_limited(mipipe, folder: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "--activations", "24kB", "--time-limit", 0.7, "--json")
    assert max(rank["peak_bytes"] - rank["resident_bytes"] for rank in ended.data["ranks"]) <= 24000


def test_parts_are_switched_off_and_the_plan_says_what_highs_did(mipipe, folder: Path, tmp_path: Path) -> None:
    made = ("plan", folder / "problem.json", "--without", "mip", "--without", "search", "--time-limit", 0.5)
    ended = mipipe(*made, "--json", "-o", tmp_path / "plan.json", "--html", tmp_path / "plan.html")
    how, options = ended.data["how"], ended.data["provenance"]["options"]
    assert (options["use_milp"], options["use_search"], options["use_baselines"]) == (False, False, True)
    assert how["highs"] == how["highs_part"] == [] and how["calls"] == 0 and "annealing" not in how["order"]
    line = "HiGHS was not called; it took no part in this plan"
    assert line in (tmp_path / "plan.html").read_text()
    for shown in (mipipe(*made), mipipe("show", tmp_path / "plan.json")):
        assert line in shown.stdout and "placement by" in shown.stdout
    refused = mipipe("plan", folder / "problem.json", "--without", "luck")
    assert refused.code == 1 and "without: found 'luck', expected mip, search, published" in refused.error


def test_the_exact_model_is_reached_and_refuses_what_is_too_large(mipipe, folder: Path, tmp_path: Path) -> None:
    from mipipe.planner.problems.uniform import uniform_problem

    save(uniform_problem(ranks=2, microbatches=2, f=2, i=2, w=1, comm=1, layers=4), tmp_path / "small.json")
    ended = mipipe("plan", tmp_path / "small.json", "--exact", "--time-limit", 20, "-o", tmp_path / "exact.json")
    assert "makespan 14.5, bound over placements with one replica of each group 14.5 (proven optimal)" in ended.stdout
    assert mipipe("check", tmp_path / "exact.json").code == 0
    refused = mipipe("plan", folder / "problem.json", "--exact")
    assert refused.code == 1 and "jobs" in refused.error and "at most 100" in refused.error


def test_the_explanation_says_where_each_ranks_bubble_comes_from(mipipe, folder: Path) -> None:
    ended = mipipe("plan", folder / "problem.json", "--explain", "--time-limit", 4, *QUICK, "--json")
    data = ended.data
    for row, rank in zip(data["bubbles"], data["ranks"], strict=True):
        parts = [row[name] for name in ("warm_up", "imbalance", "transfers", "memory", "recomputation")]
        assert sum(parts) == pytest.approx(row["bubble"]) == rank["bubble"]
    assert {item["what"] for item in data["what_if"]} == {"one more activation", "one more device",
                                                         "one more microbatch"}
    told = mipipe("plan", folder / "problem.json", "--explain", "--time-limit", 4, *QUICK)
    for words in ("where each rank's bubble comes from", "warm-up", "with one more device: "):
        assert words in told.stdout


def test_the_period_is_an_objective_and_told_of_every_plan(mipipe, folder: Path, tmp_path: Path) -> None:
    made = ("plan", folder / "problem.json", "--objective", "period", "--time-limit", 1, *QUICK)
    ended = mipipe(*made, "--json", "-o", tmp_path / "plan.json")
    noted = ended.data["provenance"]["period"]
    assert ended.data["period"] <= ended.data["makespan"] and noted["bound_ns"] <= noted["period_ns"]
    assert mipipe("check", tmp_path / "plan.json").code == 0
    line = f"from step to step without a barrier {ended.data['period']:g}, bound"
    assert line in mipipe("show", tmp_path / "plan.json").stdout
    compared = mipipe("compare", "--problem", tmp_path / "plan.json", "--schedules", "1F1B,ZB-V", "--json")
    rows = [row for row in compared.data["rows"] if row["makespan"] is not None]
    assert rows and all(0 < row["period"] <= row["makespan"] for row in rows)


def test_sizes_belong_to_graphs(mipipe, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "sizes.yaml").write_text("vision: [1, 2]\n")
    ended = mipipe("plan", folder / "problem.json", "--sizes", tmp_path / "sizes.yaml")
    assert ended.code == 1 and "--sizes does not apply" in ended.error


@pytest.mark.slow
def test_a_captured_multimodal_model_in_every_shape_and_beside_published_schedules(mipipe, tmp_path: Path) -> None:
    """Capture, cluster, sizes of microbatches: planned in every shape; baselines cut evenly and by time."""
    graph, cluster, sizes = tmp_path / "graph.json", tmp_path / "cluster.yaml", tmp_path / "sizes.yaml"
    cluster.write_text(CLUSTER)
    sizes.write_text("vision: [0, 4, 1, 2, 0, 3, 1, 1]\nprojector: [0, 4, 1, 2, 0, 3, 1, 1]\n")
    settings = [word for entry in TINY for word in ("--set", entry)]
    assert mipipe("capture", "llava", "--seq", 12, "--dtype", "bfloat16", *settings, "-o", graph).code == 0
    common = ("plan", graph, "--cluster", cluster, "--microbatches", 8, "--granularity", "block", "--sizes", sizes,
              "--json")
    makespans = {}
    for shape in ("chain", "v", "interleaved", "wave", "two-way", "two-way-v", "apart", "colocated", "free"):
        seconds = 15 if shape == "free" else 4
        data = mipipe(*common, "--placement", shape, "--time-limit", seconds, "-o", tmp_path / "plan.json").data
        makespans[shape] = data["makespan"]
        assert mipipe("check", tmp_path / "plan.json").code == 0
        if shape == "apart":
            ranks = {name: {rank for stage in data["stages"] for rank in stage["ranks"]
                            if any(("vision" in group) == (name == "vision") for group in stage["groups"])}
                     for name in ("vision", "text")}
            assert ranks["vision"].isdisjoint({rank for stage in data["stages"] for rank in stage["ranks"]
                                               if any("language_model.layers" in group for group in stage["groups"])})
    assert makespans["free"] <= 1.1 * min(makespans.values())
    compared = mipipe("compare", "--problem", tmp_path / "plan.json", "--schedules", "gpipe,1f1b,zb-v,dualpipe,mipipe",
                      "--time-limit", 6, "--json").data
    rows = [row for row in json.loads(json.dumps(compared["rows"])) if row["makespan"] is not None]
    assert {row["name"] for row in rows} == {"GPipe", "1F1B", "ZB-V", "DualPipe", "mipipe"}
    ours = next(row["makespan"] for row in rows if row["name"] == "mipipe")
    assert ours <= min(row["makespan"] for row in rows if row["accounting"] == "split")
