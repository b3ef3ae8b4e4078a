"""The script for the first GPU: every part rehearsed on the CPU, and held there by whoever has a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from runtime_cases import chain_graph

from mipipe.graphs.operators import kernels
from mipipe.graphs.serialize import save

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hold(results):
    """What the parts must say, wherever they ran."""
    assert not [name for name, part in results.items() if "failed" in part]
    parity = results["parity chain"]
    assert parity["error"] < 1e-12 and parity["repeats"]
    assert results["attention"]["cases"] == 36 and not results["attention"]["outside"]
    assert results["grouped"]["worst"] < 1e-2
    assert results["fused"] == {**results["fused"], "steps": 2.0, "finite": True}


def test_the_rehearsal(script, tmp_path, capsys):
    """All parts run on the CPU, each prints its line, and the file has them all."""
    save(chain_graph(2), tmp_path / "chain.json")
    results = script.main([str(tmp_path / "chain.json"), "--device", "cpu", "--out", str(tmp_path / "found.json")])
    hold(results)
    assert results["parity chain"]["host_syncs"] == 0 and set(results["dense"]) >= {"flash", "window", "sinks"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": {")[0] for line in lines[1:]] == list(results)
    assert json.loads((tmp_path / "found.json").read_text())["parts"] == results


def test_a_part_that_fails_stops_no_other(script, tmp_path, monkeypatch):
    """A wrong kernel shows in its part, and a graph that is not there in its own."""
    right = kernels.grouped_mm_weight
    calls = []

    def every_other(*operands):
        calls.append(0)
        return right(*operands) * (1.5 if len(calls) % 2 else 1.0)

    monkeypatch.setattr(kernels, "grouped_mm_weight", every_other)
    monkeypatch.setattr(script, "CASES", script.CASES[:1])
    results = script.main([str(tmp_path / "absent.json"), "--device", "cpu"])
    assert "InputError" in results["parity absent"]["failed"]
    assert results["grouped"]["worst"] == pytest.approx(0.5, rel=0.1)
    assert results["attention"]["cases"] == 4 and results["fused"]["finite"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(script, tmp_path):
    save(chain_graph(2), tmp_path / "chain.json")
    hold(script.main([str(tmp_path / "chain.json")]))
