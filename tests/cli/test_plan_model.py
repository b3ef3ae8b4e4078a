"""``mipipe plan MODEL``: the first useful answer takes one command, and says what it rests on and what comes next."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mipipe.cli.requests.inputs import read_problem
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import digest, load, save
from mipipe.graphs.units import parse_bytes
from mipipe.planner.device_memory import with_memory
from mipipe.planner.plan import Plan

CLUSTER = """\
format: mipipe.cluster
version: 1
hosts:
  - {name: here, devices: 2, kind: %s}
links: {within_host: {latency: 2us, bandwidth: 400GB/s}}
"""
QUICK = ("--time-limit", 0.5)


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, a cluster of two H100, and the tests' models as a user's module."""
    (tmp_path / "two.yaml").write_text(CLUSTER % "h100")
    (tmp_path / "cpu.yaml").write_text((CLUSTER % "cpu").replace("cpu}", "cpu, memory: 1GB}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_model_is_planned_in_one_command(mipipe, inside: Path) -> None:
    """Captured on the way, 4 microbatches for each device; the second time from the cache, with the same plan."""
    ended = mipipe("plan", "cli_models:small", "--cluster", "two.yaml", "-o", "plan.json", "--save-graph", "graph.json",
                   *QUICK)
    assert ended.code == 0, ended.stderr
    plan = load("plan.json", Plan)
    assert plan.problem.num_microbatches == 8 and plan.problem.graph_digest == digest(load("graph.json", OperatorGraph))
    for text in ("captured in float32", "samples/s per device", "model FLOP utilisation",
                 "roofline estimates, not measured", "weights ", "gradients ", "optimizer ", "activations ",
                 "next: mipipe show plan.json",
                 "mipipe train --plan plan.json --graph graph.json --config train.yaml --model cli_models:small"):
        assert text in ended.stdout, text
    again = mipipe("plan", "cli_models:small", "--cluster", "two.yaml", "--json", *QUICK).data
    assert again["graph"]["reused"] and Path(again["graph"]["file"]).is_relative_to(inside / "cache" / "mipipe")
    assert again["problem"] == plan.problem.digest()
    told = again["estimate"]
    assert told["costs"].keys() == {"roofline"} and not told["measured"] and told["optimizer"] == "adamw"
    assert told["samples_per_s"] == pytest.approx(8 * 4 / (again["makespan"] / 1e9))
    fresh = mipipe("plan", "cli_models:small", "--cluster", "two.yaml", "--json", "--no-cache", *QUICK).data
    assert fresh["graph"] == {"file": None, "reused": False}


def test_sixteen_bit_models_keep_master_weights(mipipe) -> None:
    made = mipipe("plan", "cli_models:small", "--cluster", "two.yaml", "--dtype", "bfloat16", "--json", *QUICK).data
    assert made["estimate"]["optimizer"] == "adamw_mixed" and made["estimate"]["dtype"] == "bfloat16"
    weights = sum(part["weights_bytes"] for part in made["estimate"]["memory"])
    assert sum(part["optimizer_bytes"] for part in made["estimate"]["memory"]) == 6 * weights


def test_a_full_device_is_warned_of(mipipe, inside: Path) -> None:
    """The fullest rank, given exactly what it needs, has no reserve; with six percent more it has enough.

    One microbatch: there is but one order, whose memory does not depend on the limit.
    """
    line = ("plan", "cli_models:small", "--cluster", "two.yaml", "--placement", "chain", "--microbatches", 1, *QUICK)
    ranks = mipipe(*line, "--json").data["ranks"]
    peak = max(rank["peak_bytes"] for rank in ranks)
    full, roomy = (mipipe(*line, "--memory", f"{round(1.07 * size)}B") for size in (peak, peak / 0.94))
    assert "warning: rank" in full.stdout and "100% of what tensors can fill" in full.stdout
    assert roomy.code == 0 and "warning" not in roomy.stdout


def test_memory_means_one_thing(mipipe, inside: Path) -> None:
    """What a cluster file says: on the command line, of a problem that was made for GPUs, and for teams."""
    (inside / "small.yaml").write_text((CLUSTER % "h100").replace("h100}", "h100, memory: 5MB}"))
    line = ("plan", "cli_models:small", "--microbatches", 2, "--placement", "chain", *QUICK)
    assert mipipe(*line, "--cluster", "small.yaml", "-o", "said.json").code == 0
    assert mipipe(*line, "--cluster", "two.yaml", "--memory", "5MB", "-o", "asked.json").code == 0
    said, asked = (load(name, Plan).problem for name in ("said.json", "asked.json"))
    assert said.digest() == asked.digest()
    held = {(item.memory_bytes, item.nominal_bytes) for item in said.topology.devices}
    assert held == {(round(5e6 / 1.07), 5 * 10**6)}
    save(said.replace(topology=with_memory(said.topology, 10**9)), inside / "problem.json")
    again, _ = read_problem(inside / "problem.json", None, None, memory="5MB")
    assert again.digest() == said.digest()


def test_the_memory_that_is_promised_for_gpus_would_do(mipipe, inside: Path) -> None:
    """In the terms of the cluster's file: what tensors need, and the allocator's share."""
    line = ("plan", "cli_models:small", "--cluster", "two.yaml", "--microbatches", 2, "--placement", "chain", *QUICK)
    ended = mipipe(*line, "--memory", "100B")
    promised = re.search(r"a device memory of (\S+) would do", ended.error)
    assert ended.code == 3 and promised, ended.error
    assert mipipe(*line, "--memory", promised[1]).code == 0
    assert mipipe(*line, "--memory", f"{round(parse_bytes(promised[1]) / 1.07)}B").code == 3


def test_what_is_wrong_shows_before_the_capture(mipipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mipipe.cli.requests.captured.captured", None)
    assert "--cluster" in mipipe("plan", "cli_models:small").error
    said = mipipe("plan", "cli_models:small", "--seq", 64, "--cluster", "cpu.yaml").error
    assert "mipipe capture cli_models:small --seq 64 -o graph.json" in said and "mipipe profile" in said
    assert "missing.yaml" in mipipe("plan", "cli_models:small", "--cluster", "missing.yaml").error
    ended = mipipe("plan", "cli_models:small", "--cluster", "two.yaml", "--exportable", "--placement", "v")
    assert ended.code == 1 and "--exportable" in ended.error


def test_no_model(mipipe, inside: Path) -> None:
    (inside / "empty").mkdir()
    for source in ("cli_models:nobody", "no_such_module:factory", "NoSuchClass", "empty"):
        ended = mipipe("plan", source, "--cluster", "two.yaml")
        assert ended.code == 1 and ended.error, source
    assert "missing.json" in mipipe("plan", "missing.json", "--cluster", "two.yaml").error


def test_capture_options_are_for_models(mipipe, folder: Path) -> None:
    for option in (("--seq", 8), ("--batch", 2), ("--dtype", "bfloat16"), ("--set", "a=1")):
        ended = mipipe("plan", folder / "problem.json", *option)
        assert ended.code == 1 and option[0] in ended.error


def test_a_configuration_says_its_dtype(tmp_path: Path) -> None:
    from mipipe.cli.requests.captured import own_dtype

    for config, dtype in (({"torch_dtype": "bfloat16"}, "bfloat16"), ({"dtype": "float16"}, "float16"), ({}, "float32"),
                          ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"), ({"dtype": 3}, "float32"),
                          ([], "float32")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert own_dtype(str(tmp_path)) == dtype
    assert own_dtype("package.module:factory") == "float32"


def test_an_exportable_plan_is_exported(mipipe, inside: Path) -> None:
    """What a free placement may not be, and what the refusal of the export names as the remedy."""
    line = ("plan", "cli_models:small", "--cluster", "two.yaml", "-o", "plan.json", *QUICK)
    assert mipipe(*line, "--placement", "two-way").code == 0
    refused = mipipe("export", "plan.json", "--csv", "order.csv")
    assert refused.code == 5 and "mipipe plan --exportable" in refused.error
    assert mipipe(*line, "--exportable").code == 0
    assert mipipe("export", "plan.json", "--csv", "order.csv").code == 0 and (inside / "order.csv").exists()
    assert load("plan.json", Plan).provenance["options"]["placement"] in ("v", "chain", "interleaved", "wave")
