"""``mipipe capture --modes`` and ``mipipe show --modes``: the chain of files, and what users get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import digest, load


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, mipipe) -> Path:
    """A folder with graph.json (no modes) and modes.json (tensor and batch on 2 and 4) of the small model."""
    path = tmp_path_factory.mktemp("modes")
    (path / "cli_models.py").write_text((Path(__file__).parent / "cli_models.py").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.syspath_prepend(str(path))
        for line in (["capture", "cli_models:small", "-o", "graph.json", "--no-verify"],
                     ["capture", "graph.json", "--modes", "tensor,batch", "--team", "2,4", "-o", "modes.json"]):
            ended = mipipe(*line)
            assert ended.code == 0, ended.stderr
    return path


@pytest.fixture(autouse=True)
def inside(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)


def test_modes_are_added_and_shown(mipipe) -> None:
    plain, graph = load("graph.json", OperatorGraph), load("modes.json", OperatorGraph)
    assert digest(plain) == digest(graph) and plain.modes is None and graph.modes is not None
    assert graph.modes.teams == (("tensor", 2), ("tensor", 4), ("batch", 2), ("batch", 4))
    shown = mipipe("show", "modes.json", "--modes", "4", "--json").data
    assert [row["mode"] for row in shown["rows"]] == ["one device", "tensor", "batch"] * len(graph.traces)
    assert shown["members"] == 4
    assert "AR all-reduce" in mipipe("show", "modes.json", "--modes", "2").stdout


@pytest.mark.parametrize("line, message", [
    (["capture", "graph.json", "--modes", "tensor", "-o", "x.json"], "--modes needs --team 4 beside it"),
    (["capture", "graph.json", "--team", "4", "-o", "x.json"], "--team needs --modes tensor,sequence beside it"),
    (["capture", "graph.json", "--modes", "tensr", "--team", "2", "-o", "x.json"], "'tensr' is no mode; expected some"),
    (["capture", "graph.json", "--modes", "tensor", "--team", "1", "-o", "x.json"], "found '1', expected numbers"),
    (["capture", "graph.json", "--modes", "tensor", "--team", "two", "-o", "x.json"], "found 'two', expected numbers"),
    (["capture", "graph.json", "-o", "x.json"], "is a captured graph already; give --modes and --team"),
    (["show", "graph.json", "--modes", "2"], "found none in the graph; add them with mipipe capture"),
    (["show", "modes.json", "--modes", "8"], "found those for 2, 4 members in the graph"),
    (["show", "graph.json", "modes.json", "--modes", "2"], "--modes is for one graph"),
])
def test_what_users_get_wrong(mipipe, line, message) -> None:
    """One line, exit code 1, and no file."""
    ended = mipipe(*line)
    assert ended.code == 1 and message in ended.error
    assert not Path("x.json").exists()
