"""The router of Twin-Merging and 1bit-Merging: features of prompts, a run that learns their tasks, shares."""

import json
import random
from pathlib import Path

import pytest
import runtime_dags as dags
import torch
from safetensors.torch import save_file
from test_fused import model

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import InputError
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.task_router import batches, factory, task_features, task_shares


@pytest.fixture
def place(tmp_path):
    model(tmp_path / "model", ["the", " cat"], 0)
    for name, letters in (("early", "abcd"), ("late", "wxyz")):
        rows = [{"text": "".join(random.Random(f"{name}{row}").choices(letters, k=12))} for row in range(24)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_run_learns_whose_prompt_it_is(place):
    """On held-out prompts of both tasks; the shares sum to one and stand in the order of the tasks."""
    texts = {name: place / f"{name}.jsonl" for name in ("early", "late")}
    task_features(place / "model", texts, place / "features", samples=24, length=16)
    router, inputs = factory(str(place / "features"), rows=8)
    graph = capture_module(router, inputs, granularity="module")
    engine = Engine(dags.random_plan(random.Random(0), graph, 1, 2), graph, router)
    optimizer = torch.optim.Adam(engine.parameters(), lr=5e-3)
    losses = []
    for _, batch in zip(range(60), batches(graph, 16, 0, str(place / "features")), strict=False):
        losses.append(engine.step(batch))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    Path(place / "router").mkdir()
    save_file({name: item.detach() for name, item in engine.weights.parameters.items()},
              place / "router" / "model.safetensors")
    for prompt, task in (("dcbadcba", "early"), ("zyxwzyxw", "late")):
        shares = task_shares(place / "router", place / "features", prompt)
        assert list(shares) == ["early", "late"] and sum(shares.values()) == pytest.approx(1.0)
        assert max(shares, key=shares.__getitem__) == task


def test_what_is_no_router_is_one_line(place):
    with pytest.raises(InputError, match="found 1 tasks, expected two or more"):
        task_features(place / "model", {"early": place / "early.jsonl"}, place / "features")
    with pytest.raises(InputError, match="task_features writes it"):
        factory(str(place / "none"))
    texts = {name: place / f"{name}.jsonl" for name in ("early", "late")}
    task_features(place / "model", texts, place / "features", samples=2, length=16)
    with pytest.raises(InputError, match="exists already"):
        task_features(place / "model", texts, place / "features")
    with pytest.raises(InputError, match="is no router of"):
        task_shares(place / "model", place / "features", "a")
