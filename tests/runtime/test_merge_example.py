"""The example keeps its promise: merging helps, in the order the literature reports."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "merge_models.py"


@pytest.mark.slow
def test_task_arithmetic_beats_averaging_and_the_best_method_beats_both(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("merge_models", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    metric = module.Bench.normalised(SimpleNamespace(single={"test": [0.6, 0.5]}), [0.5, 0.4], "test")
    assert metric == pytest.approx(0.816667, abs=1e-6)  # MergeBench's own example
    records = {record["row"]: record["normalised"] for record in module.run(tmp_path, True, Console(quiet=True))}
    assert records["base"] < records["plain average"] < records["task_arithmetic"] < records["tsvm"] < 1.0
