"""Captures that are kept: reused while nothing they rest on changes, made anew when anything does."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path

import pytest

from mipipe.graphs.capture import cached
from mipipe.graphs.capture.cached import Captured, capture_cached
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import digest, load

MOMENTS = itertools.count(1_700_000_000)
OPTIONS = {"seq": 8, "batch": 1, "dtype": "float32", "overrides": {}}
MODULE = """
import json, torch
from pathlib import Path
from torch import nn
WIDTH = {width}
class Net(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)))
    def forward(self, x):
        return {{"loss": self.layers(x).square().mean()}}
def factory():
    depth = json.loads(Path({settings!r}).read_text())["depth"]
    return Net(depth), {{"x": torch.zeros(2, WIDTH)}}
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cached_model.py, which reads settings.json; the cache is tmp_path / cache."""
    (tmp_path / "settings.json").write_text('{"depth": 2}')
    write(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def write(folder: Path, width: int) -> None:
    text = MODULE.format(width=width, settings=str(folder / "settings.json"))
    (folder / "cached_model.py").write_text(text)
    moment = next(MOMENTS)  # Python tells edits apart by second and size, and these come within one
    os.utime(folder / "cached_model.py", (moment, moment))


def again(folder: Path, **options: object) -> Captured:
    """As a new process would: the user's module is imported anew."""
    sys.modules.pop("cached_model", None)
    sys.path_importer_cache.pop(str(folder), None)
    return capture_cached("cached_model:factory", OPTIONS | options, folder=folder / "cache")


def widths(graph: OperatorGraph) -> set[tuple[int, ...]]:
    return {parameter.spec.shape for parameter in graph.parameters}


def test_the_same_model_is_captured_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = again(model)
    assert not first.reused and first.path is not None and load(first.path, OperatorGraph) == first.graph
    monkeypatch.setattr(cached, "capture", None)  # a second capture would fail
    second = again(model)
    assert second.reused and second.graph == first.graph and second.path == first.path


def test_whatever_it_rests_on_makes_it_anew(model: Path) -> None:
    """An option, the user's source, a file the factory reads, the entry itself, and the place it is called from."""
    first = again(model)
    assert not again(model, dtype="float64").reused
    assert again(model).reused
    (model / "settings.json").write_text('{"depth": 3}')
    deeper = again(model)
    assert not deeper.reused and len(deeper.graph.parameters) == len(first.graph.parameters) + 2
    write(model, 16)
    wider = again(model)
    assert not wider.reused and (16, 16) in widths(wider.graph) and (4, 4) not in widths(wider.graph)
    assert again(model).reused
    assert wider.path is not None
    wider.path.write_text(wider.path.read_text()[:-20])
    mended = again(model)
    assert not mended.reused and digest(mended.graph) == digest(wider.graph)


def test_an_older_plan_keeps_its_graph(model: Path) -> None:
    first = again(model)
    write(model, 16)
    again(model)
    assert first.path is not None and digest(load(first.path, OperatorGraph)) == digest(first.graph)


def test_a_damaged_entry_is_no_error(model: Path) -> None:
    again(model)
    for text in ("", "[]", '{"graph": 3}', '{"graph": "../../x", "sha256": null, "files": {}}', "\x00"):
        for path in (model / "cache").glob("*.key.json"):
            path.write_text(text)
        assert not again(model).reused and again(model).reused


def test_a_cache_that_cannot_be_written_is_no_error(model: Path) -> None:
    (model / "cache").write_text("a file where the folder would be")
    found = again(model)
    assert found.path is None and not found.reused and widths(found.graph) >= {(4, 4)}


def test_the_oldest_graphs_go(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached, "KEPT", 2)
    for width in (2, 3, 5, 6):
        write(model, width)
        again(model)
    assert len(list((model / "cache").glob("*.graph.json"))) == 2
    assert again(model).reused


def test_a_folder_is_known_by_its_configuration(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 16,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    calls = [capture_cached(folder, OPTIONS, folder=tmp_path / "cache") for _ in range(2)]
    assert [call.reused for call in calls] == [False, True]
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    assert not capture_cached(folder, OPTIONS, folder=tmp_path / "cache").reused
