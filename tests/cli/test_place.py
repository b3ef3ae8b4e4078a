"""``mipipe place``: what it prints, what it refuses, and a planning problem as input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def data() -> dict:
    """Three nodes in a row, two accelerators, one core."""
    return {"maxFPGAs": 2, "maxCPUs": 1, "maxSizePerFPGA": 100,
            "nodes": [{"id": n, "supportedOnFpga": 1, "cpuLatency": 50, "fpgaLatency": 4, "isBackwardNode": 0,
                       "size": 10} for n in range(3)],
            "edges": [{"sourceId": 0, "destId": 1, "cost": 1}, {"sourceId": 1, "destId": 2, "cost": 2}]}


def write(folder: Path, data: object, name: str = "throughput.layer.three.json") -> Path:
    path = folder / name
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_the_largest_load_and_contiguous(mipipe, data: dict, tmp_path: Path) -> None:
    path = write(tmp_path, data)
    found = mipipe("place", path, "--time-limit", 2, "--json", "-o", tmp_path / "a.json").data
    assert (found["problem"], found["objective"], found["gap"], found["proven"]) == ("throughput", 9, 0, True)
    assert found["assignment"]["1"] == found["assignment"]["2"] != found["assignment"]["0"]
    assert json.loads((tmp_path / "a.json").read_text()) == found
    shown = mipipe("place", path, "--time-limit", 2, "--contiguous").stdout
    assert "largest load 9 (proven optimal)" in shown and "2 nodes" in shown


def test_a_planning_problem_is_placed(mipipe, folder: Path) -> None:
    found = mipipe("place", folder / "problem.json", "--time-limit", 2, "--json").data
    assert found["assignment"].keys() == {f"layer{n}" for n in range(8)}
    assert sorted(found["assignment"].values()) == sorted(2 * [f"acc{d}" for d in range(4)])
    assert found["proven"]


@pytest.mark.parametrize(("change", "message"), [
    ({"maxCPUs": 0, "maxSizePerFPGA": 12}, "maxSizePerFPGA must be at least 15"),
    ({"maxCPUs": 0, "maxFPGAs": 0}, "no devices"),
    ({"nodes": []}, "nodes"),
    ({"edges": [{"sourceId": 2, "destId": 2, "cost": 1}]}, "cycle: 2"),
])
def test_bad_workloads_say_why_in_one_line(mipipe, data: dict, tmp_path: Path, change: dict, message: str) -> None:
    ended = mipipe("place", write(tmp_path, data | change), "--time-limit", 1)
    assert ended.code != 0 and message in ended.error and "\n" not in ended.error


def test_options_that_do_not_apply(mipipe, data: dict, tmp_path: Path) -> None:
    path = write(tmp_path, data)
    assert "--cluster does not apply" in mipipe("place", path, "--cluster", path).error
    assert "three.json" in mipipe("place", write(tmp_path, "{"), "--json").error
