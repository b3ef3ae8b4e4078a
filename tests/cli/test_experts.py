"""``mipipe experts`` and ``mipipe plan --experts``: from loads to maps, within memory, horizon and bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipipe.graphs.serialize import load, save
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """loads.json (2 layers of 8 experts, the second skewed), cluster.yaml, and blocks.json: equal blocks."""
    loads = ExpertLoads(((10.0,) * 8, (80.0, 4.0, 30.0, 20.0, 5.0, 5.0, 2.0, 1.0)), "small", token_ns={"h100": 100.0},
                        token_bytes=64, expert_bytes=10**9,
                        coactivation=(tuple((expert, expert + 4, 5.0) for expert in range(4)), ()))
    save(loads, tmp_path / "loads.json")
    blocks = tuple(range(8))
    save(ExpertMap(8, 4, (blocks, blocks), "small"), tmp_path / "blocks.json")
    (tmp_path / "cluster.yaml").write_text(
        "format: mipipe.cluster\nversion: 1\nhosts:\n"
        + "".join(f"  - {{name: host{host}, devices: 2, kind: h100}}\n" for host in range(2))
        + "links:\n  within_host: {latency: 1us, bandwidth: 300GB/s}\n  between_hosts: {latency: 5us,"
        " bandwidth: 50GB/s}\n")
    return tmp_path


def run(mipipe, files: Path, *more: object):
    """``mipipe experts`` on the files."""
    return mipipe("experts", "--loads", files / "loads.json", "--cluster", files / "cluster.yaml", "--time-limit", 5,
                  "-o", files / "map.json", *more)


def test_replicas_lower_the_busiest_device_and_eplbs_tables_agree(mipipe, files: Path) -> None:
    """JSON has figures per layer; the written map and EPLB's tables say the same."""
    ended = run(mipipe, files, "--replicas", 4, "--eplb", files / "eplb.json", "--json")
    assert ended.code == 0, ended.stderr
    layers = ended.data["layers"]
    assert all(layer["max_over_mean"] <= layer["greedy_max_over_mean"] * (1 + 1e-9) for layer in layers)
    assert layers[0]["shared_tokens"] == 20.0, "experts chosen together are on one host"
    made, tables = load(files / "map.json", ExpertMap), json.loads((files / "eplb.json").read_text())
    assert tables["physical_to_logical"] == [list(row) for row in made.physical_to_logical]
    assert tables["count"] == made.counts() and tables["logical_to_physical"] == made.logical_to_physical()


def test_memory_is_shared_among_layers(mipipe, files: Path) -> None:
    """Room for five experts per device in all: the skewed layer gets the fifth."""
    ended = run(mipipe, files, "--memory", "5.5GB")
    assert ended.code == 0, ended.stderr
    assert [len(row) for row in load(files / "map.json", ExpertMap).physical_to_logical] == [8, 12]
    assert run(mipipe, files, "--memory", "3GB").code == 3
    assert "--replicas does not go with it" in run(mipipe, files, "--memory", "5GB", "--replicas", 4).error


def test_moves_pay_off_within_the_horizon_and_the_bytes(mipipe, files: Path) -> None:
    """From equal blocks: nothing within one step, something within many, but never above the bound in bytes."""
    def moved(*more: object) -> list[int]:
        ended = run(mipipe, files, "--current", files / "blocks.json", "--json", *more)
        assert ended.code == 0, ended.stderr
        return [layer["moved"] for layer in ended.data["layers"]]

    assert moved("--horizon", 1) == [0, 0]
    free = moved("--horizon", 10**9)
    assert free[1] >= 2
    assert 0 < sum(moved("--horizon", 10**9, "--max-bytes", "2GB")) <= 2
    assert sum(moved("--horizon", 10**9, "--max-bytes", "999MB")) == 0
    assert max(moved("--horizon", 10**9, "--max-moves", 2)) <= 2


@pytest.mark.parametrize(("name", "content", "more", "message"), [
    ("loads.json", "[[1.0, -2.0]]", (), r"loads[0][1]: found -2.0"),
    ("loads.json", "[[1.0, 2.0], [3.0]]", (), "loads[1]: 1 experts, but layer 0 has 2"),
    ("loads.json", "[]", (), "loads: empty"),
    ("loads.json", "nonsense", (), "not readable as JSON"),
    ("loads.json", "[[1, 2, 3, 4]]", ("--replicas", 1), "next number of replicas that does is 4"),
    ("loads.json", "[[1, 2, 3, 4]]", ("--current", "blocks.json"), "belongs to another model or cluster"),
    ("loads.json", "[[1, 2, 3, 4]]", ("--memory", "1GB"), "expert_bytes is missing"),
    ("blocks.json", '{"physical_to_logical": [[0, 1, 2, 3, 4, 5, 6, 6], [0, 1, 2, 3, 4, 5, 6, 7]]}',
     ("--current", "blocks.json"), "layer 0: expert 7 is in no slot"),
])
def test_bad_input_is_one_line(mipipe, files: Path, name: str, content: str, more: tuple[object, ...],
                               message: str) -> None:
    """Negative, missing or uneven loads, too few slots, an expert without a replica, a map for another model."""
    (files / name).write_text(content)
    ended = run(mipipe, files, *(files / item if item == "blocks.json" else item for item in more))
    assert ended.code in (1, 3)
    assert message in ended.error


def test_plan_takes_loads_only_with_expert_groups(mipipe, folder: Path, files: Path) -> None:
    """A whole problem has its durations already."""
    ended = mipipe("plan", folder / "problem.json", "--experts", files / "loads.json")
    assert ended.code == 1 and "--experts does not apply to it" in ended.error
