"""The router of Twin-Merging and 1bit-Merging: features of prompts, a run that learns their tasks, shares."""

import json
import random
from pathlib import Path

import pytest
import runtime_dags as dags
import torch
from safetensors.torch import load_file, save_file
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
    with pytest.raises(InputError, match="samples 0 and length 16: expected at least 1"):
        task_features(place / "model", texts, place / "new", samples=0, length=16)


def test_what_is_damaged_or_gone_is_one_line(place):
    """Of a trained router's folder, of the features it was trained on, and of the model they are of."""
    texts = {name: place / f"{name}.jsonl" for name in ("early", "late")}
    task_features(place / "model", texts, place / "features", samples=2, length=16)
    good = load_file(place / "features" / "features.safetensors")
    facts = (place / "features" / "features.json").read_text()
    made, _ = factory(str(place / "features"))
    (place / "router").mkdir()
    save_file(made.state_dict(), place / "router" / "model.safetensors")
    assert sum(task_shares(place / "router", place / "features", "ab").values()) == pytest.approx(1.0)

    def refused(text):
        with pytest.raises(InputError, match=text) as error:
            task_shares(place / "router", place / "features", "ab")
        assert "\n" not in str(error.value)

    for tensors, text in (({"features": good["features"]}, "found no tasks"),
                          ({**good, "tasks": good["tasks"][:, None]}, r"found tasks of shape \[4, 1\]"),
                          ({**good, "tasks": good["tasks"][:1]}, "do not fit"),
                          ({**good, "mean": good["mean"][:3]}, "do not fit"),
                          ({name: item[:0] for name, item in good.items()}, "has no row")):
        save_file(tensors, place / "features" / "features.safetensors")
        refused(text)
    (place / "features" / "features.safetensors").write_bytes(b"x" * 40)
    refused("no safetensors file")
    save_file(good, place / "features" / "features.safetensors")
    for content, text in (("{", "features.json"), ("[]", "expected a mapping"),
                          ('{"model": 3}', "expected model and tasks"),
                          (json.dumps({**json.loads(facts), "tasks": ["one"]}), "names 1 tasks"),
                          (json.dumps({**json.loads(facts), "model": str(place / "none")}), "has no tokenizer")):
        (place / "features" / "features.json").write_text(content)
        refused(text)
    (place / "features" / "features.json").unlink()
    refused("features.json")
    (place / "features" / "features.json").write_text(facts)
    (place / "router" / "model.safetensors").write_bytes(b"")
    refused("no safetensors file")
    (place / "router" / "model.safetensors").unlink()
    refused("no such file")
