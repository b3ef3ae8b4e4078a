"""Elastic MoE: co-activation sampling in a run, the routers' own loss, and other numbers of experts at evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import runtime_equal as equal
import runtime_experts as experts
import runtime_models as models
import torch
from torch import nn

from mipipe.graphs.capture.model import capture
from mipipe.graphs.errors import InputError
from mipipe.planner.options import PlanOptions
from mipipe.planner.plan import Plan
from mipipe.planner.solve import plan as solve
from mipipe.runtime.engine.compiling.calls import random_key
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.elastic import CoActivation
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.train.config import TrainConfig, read_train_config

POOL, SEED = 6, 5


def planned(graph: Any, ranks: int) -> Plan:
    found = solve(equal.problem(graph, ranks, 2), PlanOptions(time_limit_s=1, use_milp=False, threads=1)).plan
    assert found is not None
    return found


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: item.detach().clone() for name, item in (*module.named_parameters(remove_duplicate=False),
                                                           *module.named_buffers(remove_duplicate=False))}


def test_experts_are_drawn_evenly_from_the_pool() -> None:
    """k = 2 of 6: every rank in a third of the tokens, every pair in a fifteenth, none beyond the pool."""
    torch.manual_seed(0)
    scores = torch.rand(30_000, 8).softmax(-1)
    values, chosen = CoActivation(POOL, 1.0)(scores, 2, -1, True, True)
    assert torch.equal(values, scores.gather(1, chosen)) and bool((chosen[:, 0] != chosen[:, 1]).all())
    ranks = scores.argsort(1, descending=True).argsort(1).gather(1, chosen)
    shares = torch.bincount(ranks.flatten(), minlength=8) / len(scores)
    assert shares[:6].tolist() == pytest.approx([1 / 3] * 6, abs=0.015) and not shares[6:].any()
    pairs = torch.bincount(ranks.min(1).values * 6 + ranks.max(1).values, minlength=36) / len(scores)
    assert pairs[pairs > 0].tolist() == pytest.approx([1 / 15] * 15, abs=0.008)


@pytest.mark.parametrize("pool, probability", [(2, 1.0), (6, 0.0)])
def test_a_pool_of_k_or_no_draws_is_plain_routing(pool: int, probability: float) -> None:
    scores = torch.rand(50, 8)
    values, chosen = CoActivation(pool, probability)(scores, 2, -1, True, True)
    assert torch.equal(chosen.sort(1).values, scores.topk(2).indices.sort(1).values)
    assert torch.equal(values, scores.gather(1, chosen))


def test_a_run_draws_by_seed_step_microbatch_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients are those of eager autograd whose topk draws the same; evaluation draws nothing."""
    module, graph = experts.captured(False)
    state = state_of(module)
    batch = models.token_batch(2 * equal.ROWS, equal.LENGTH, experts.VOCAB)
    engine = Engine(planned(graph, 1), graph, state, options=EngineOptions(SEED, elastic=(POOL, 0.5)))
    plain = Engine(planned(graph, 1), graph, state, options=EngineOptions(SEED))
    assert engine.evaluate(batch) == plain.evaluate(batch)
    loss = engine.step(batch)
    gradients = {name: item.grad for name, item in engine.named_parameters() if item.grad is not None}

    routers = [number for number, segment in enumerate(graph.segments) if segment.name.endswith(".router")]
    assert len(routers) == experts.LAYERS
    true, sampler, place = torch.topk, CoActivation(POOL, 0.5), [0]

    def drawing(scores: torch.Tensor, count: int, dim: int = -1, *given: Any, **named: Any) -> Any:
        monkeypatch.setattr(torch, "topk", true)
        microbatch, layer = divmod(place[0], len(routers))
        torch.manual_seed(random_key(SEED, 0, microbatch, routers[layer]))
        found = sampler(scores, count, dim)
        monkeypatch.setattr(torch, "topk", drawing)
        place[0] += 1
        return found

    monkeypatch.setattr(torch, "topk", drawing)
    pieces = models.chunked(batch, 2)
    wanted, expected = models.eager(module, pieces, equal.valid_labels(True, pieces), models.token_losses)
    monkeypatch.setattr(torch, "topk", true)
    assert loss == pytest.approx(wanted, rel=1e-12) and loss != plain.step(batch)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-9, atol=1e-13), name


def run_elastic(plan: Plan, graph: Any, state: Any, batch: Any) -> float:
    return Engine(plan, graph, state, options=EngineOptions(SEED, elastic=(POOL, 0.5))).step(batch)


@pytest.mark.distributed
def test_every_plan_draws_the_same(pool: Any) -> None:
    """One rank and two."""
    module, graph = experts.captured(False)
    state = state_of(module)
    batch = models.token_batch(2 * equal.ROWS, equal.LENGTH, experts.VOCAB)
    alone = run_elastic(planned(graph, 1), graph, state, batch)
    answers = pool.run(2, __file__, "run_elastic", planned(graph, 2), graph, state, batch, timeout=120.0)
    assert answers == pytest.approx([alone, alone], rel=1e-12)


@pytest.mark.parametrize("pool, told", [(1, "expected 2, the experts per token"), (9, "to 8, all of them")])
def test_a_pool_that_does_not_fit_is_refused(pool: int, told: str) -> None:
    module, graph = experts.captured(False)
    with pytest.raises(InputError, match=told):
        Engine(planned(graph, 1), graph, state_of(module), options=EngineOptions(elastic=(pool, 0.5)))


def test_the_configuration_says_it(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("steps: 1\nexperts: {elastic: {pool: 6}}\n")
    config = read_train_config(path)
    assert isinstance(config, TrainConfig) and config.experts is not None and config.experts.elastic is not None
    assert (config.experts.elastic.pool, config.experts.elastic.probability) == (6, 0.5)
    path.write_text("steps: 1\nexperts: {elastic: {pool: 6, probability: 2}}\n")
    with pytest.raises(InputError, match="probability from 0 to 1"):
        read_train_config(path)


def test_the_router_loss_reaches_routers_only(tmp_path: Path) -> None:
    """Uniform routing costs 0, one-hot -ln E; the captured loss is the model's plus the mean over layers and tokens."""
    folder = tmp_path / "moe"
    experts.skewed_moe(torch.float32).save_pretrained(folder)
    graph = capture(folder, seq=8, router_loss=0.5, verify=True)  # compared with eager autograd
    assert graph.source["router_loss"] == 0.5
    plain = capture(folder, seq=8, verify=False)
    from mipipe.graphs.models.sources import open_source

    values = {}
    for name, coefficient in (("plain", 0.0), ("sharp", 0.5)):
        opened = open_source(folder, seq=8, router_loss=coefficient)
        torch.manual_seed(1)
        model = opened.build("cpu")
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.mlp.gate.weight.data.mul_(20)  # type: ignore[union-attr]
        inputs = {"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None]}
        output = model(input_ids=inputs["input_ids"], output_router_logits=True, use_cache=False)
        assert opened.loss is not None
        loss = opened.loss(output, inputs)
        loss.backward()
        values[name] = loss.item(), {key: item.grad for key, item in model.named_parameters()}, output.router_logits
    logits = torch.stack([item.double() for item in values["plain"][2]])
    shares = logits.softmax(-1)
    wanted = -(shares * (math.log(logits.shape[-1]) + shares.log())).sum(-1).mean().item()
    assert wanted < -1e-3
    assert values["sharp"][0] - values["plain"][0] == pytest.approx(0.5 * wanted * 7, rel=1e-4)  # 7 of 8 have a next
    for key, gradient in values["sharp"][1].items():
        assert torch.equal(gradient, values["plain"][1][key]) != key.endswith("mlp.gate.weight"), key
    assert len(plain.segments) == len(graph.segments)


def test_evaluation_with_more_experts_per_token(tmp_path: Path) -> None:
    from mipipe.runtime.tuning.protocol import evaluate_models, read_models

    experts.skewed_moe(torch.float32).save_pretrained(tmp_path / "moe")
    (tmp_path / "text.jsonl").write_text(json.dumps({"tokens": list(range(40))}) + "\n")
    (tmp_path / "models.yaml").write_text("merged: {moe: moe}\ndomains: {text: {perplexity: text.jsonl}}\n")
    found = read_models(tmp_path / "models.yaml")
    losses = [evaluate_models(found, (), "m", experts_per_token=count)[0].scores["text"] for count in (None, 2, 4)]
    assert losses[0] == losses[1] != losses[2]
    with pytest.raises(InputError, match="expected at most 8, the experts it has"):
        evaluate_models(found, (), "m", experts_per_token=9)
