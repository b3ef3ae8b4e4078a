"""``mipipe tune`` and ``mipipe evaluate``: what they print and write, and one line for what is wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

RECIPE = """merge_method: linear
models:
  - {model: a, parameters: {weight: {search: [0.0, 1.0]}}}
  - {model: b, parameters: {weight: {choose: [0.5, 1.0]}}}
"""
SCORE = """from safetensors.torch import load_file
def near(folder):
    value = float(load_file(folder + "/model.safetensors")["model.norm.weight"][0])
    return {"up": value, "down": -value}
"""


@pytest.fixture()
def here(tmp_path, monkeypatch):
    for name, value in (("a", 1.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        save_file({"model.norm.weight": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "my_score.py").write_text(SCORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("my_score", None)


def test_a_search_prints_its_front_and_writes_a_page(here, mipipe):
    arguments = ("tune", "recipe.yaml", "-o", "work", "--evaluate", "my_score:near", "--points", "2", "--weight",
                 "up=1")
    shown = mipipe(*arguments, "--html", "front.html")
    assert shown.code == 0, shown.stderr
    assert "4 points measured, " in shown.stdout and "models.0.weight" in shown.stdout
    page = (here / "front.html").read_text()
    assert page.count("<circle") == 4 and "<script" not in page
    found = json.loads(mipipe(*arguments, "--json").stdout)
    best = found["trials"][found["best"]]
    assert best["values"][0] == 0.0 and best["scores"] == {"up": 3.0, "down": -3.0}
    assert (here / "work/best/model.safetensors").exists() and not (here / "work/trial").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (("tune", "recipe.yaml", "-o", "work"), "nothing to measure"),
    (("tune", "recipe.yaml", "-o", "work", "--evaluate", "my_score:near", "--weight", "up"), "expected NAME=NUMBER"),
    (("tune", "recipe.yaml", "-o", "work", "--evaluate", "os:system"), "part of Python's own library"),
    (("tune", "recipe.yaml", "-o", "work", "--evaluate", "my_score:near", "--search", "cma"), "only --search grid"
                                                                                              " takes"),
    (("evaluate", "recipe.yaml"), "unknown key"),
])
def test_what_is_wrong_is_one_line(here, mipipe, arguments, message):
    found = mipipe(*arguments)
    assert found.code == 1 and message in found.stderr and found.stderr.count("\n") == 1, found.stderr
