"""The script for the first GPU: every part rehearsed on the CPU, and held there by whoever has a GPU."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from runtime_cases import chain_graph

from mipipe.graphs.operators import kernels
from mipipe.graphs.serialize import save

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))  # where a script finds what lies beside it
    try:
        return importlib.import_module("gpu_check")
    finally:
        sys.path.remove(str(SCRIPT.parent))


def hold(results):
    """What the parts must say, wherever they ran."""
    assert not [name for name, part in results.items() if "failed" in part]
    parity = results["parity chain"]
    assert parity["error"] < 1e-12 and parity["repeats"]
    assert results["attention"]["cases"] == 36 and not results["attention"]["outside"]
    assert results["grouped"]["worst"] < 1e-2
    assert results["fused"] == {**results["fused"], "steps": 2.0, "finite": True}


def hold_runs(results):
    """What the parts about whole runs must say, as far as they ran."""
    assert results and not [name for name, part in results.items() if "failed" in part]
    if both := results.get("together"):
        assert both["loss_error"] < 1e-4 and both["norm_error"] < 1e-3 and both["streams_agree"] and both["aside"]
    if run := results.get("training"):
        assert run["resumes_bitwise"] and run["falls"] and 0.5 < run["predicted/least"] < 2.0
    if fast := results.get("compiled"):
        assert fast["graphs"] > 0 and fast["in_steps"] == 0
        assert fast["compiled"] == pytest.approx(fast["plain"], rel=1e-2)


KERNELS = ["parity", "attention", "grouped", "dense", "fused"]
RUNS = ["communicators", "together", "training", "compiled"]


def test_the_rehearsal(script, tmp_path, capsys):
    """All parts run on the CPU, each prints its line, and the file has them all."""
    save(chain_graph(2), tmp_path / "chain.json")
    results = script.main([str(tmp_path / "chain.json"), "--device", "cpu", "--out", str(tmp_path / "found.json"),
                           "--only", *KERNELS, "communicators"])
    hold(results)
    assert results["parity chain"]["host_syncs"] == 0
    assert set(results["dense"]) >= {"flash", "window", "sinks", "mask", "softcap"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": {")[0] for line in lines[1:]] == list(results)
    assert json.loads((tmp_path / "found.json").read_text())["parts"] == results


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("part", RUNS[1:])
def test_the_rehearsal_of_whole_runs(script, part):
    """Two processes, training with a halt, torch.compile: on the CPU, each by itself."""
    results = script.main(["--device", "cpu", "--only", part])
    hold_runs(results)


def test_a_part_that_fails_stops_no_other(script, tmp_path, monkeypatch):
    """A wrong kernel shows in its part, and a graph that is not there in its own."""
    right = kernels.grouped_mm_weight
    calls = []

    def every_other(*operands):
        calls.append(0)
        return right(*operands) * (1.5 if len(calls) % 2 else 1.0)

    monkeypatch.setattr(kernels, "grouped_mm_weight", every_other)
    monkeypatch.setattr(script, "CASES", script.CASES[:1])
    results = script.main([str(tmp_path / "absent.json"), "--device", "cpu", "--only", *KERNELS])
    assert "InputError" in results["parity absent"]["failed"]
    assert results["grouped"]["worst"] == pytest.approx(0.5, rel=0.1)
    assert results["attention"]["cases"] == 4 and results["fused"]["finite"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(script, tmp_path):
    save(chain_graph(2), tmp_path / "chain.json")
    hold(script.main([str(tmp_path / "chain.json"), "--only", *KERNELS]))


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_whole_runs_on_a_gpu(script):
    results = script.main(["--only", *RUNS])
    hold_runs(results)
    assert results["training"]["clock"] == "events" and results["communicators"]["driver_bytes 8"] > 0
    spans, step = results["training"]["spans_s"], results["training"]["measured_step_s"]
    assert 0.5 < spans / step < 1.05 and 0.5 < results["training"]["predicted/step"] < 1.5
