"""Captured graphs compute what the model computes: loss, every gradient, buffers; and the cut is where it should be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mipipe.graphs.capture import capture_module
from mipipe.graphs.compose import parameter_tensors, run_step
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role
from mipipe.graphs.serialize import from_data, to_data


def assert_same_step(graph: OperatorGraph, module: nn.Module, batch: Mapping[str, Tensor], loss: Tensor,
                     rtol: float = 1e-12) -> None:
    """F, I, W of all segments give the loss that ``module`` gave and the gradients of its backward (run here)."""
    graph = from_data(to_data(graph), OperatorGraph, "graph")
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: tensor.clone() for name, tensor in parameter_tensors(graph, named).items()}
    torch.manual_seed(1)
    step = run_step(graph, state, batch)
    assert abs(step.outputs[graph.loss] - loss.detach()) <= rtol * abs(loss.detach())
    module.zero_grad()
    loss.backward()
    expected = {name: param.grad for name, param in module.named_parameters() if param.grad is not None}
    assert set(step.gradients) == set(expected)
    for name, grad in expected.items():
        error = (step.gradients[name] - grad).norm() / grad.norm().clamp(min=1e-300)
        assert error <= rtol, f"{name}: relative error {error}"


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attn = nn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln2(x))


class SkipTied(nn.Module):
    """A skip connection over all layers, embedding tied to the head, two outputs, a buffer per model."""

    def __init__(self, vocabulary: int = 17, size: int = 8, layers: int = 3) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, vocabulary, bias=False)
        self.head.weight = self.emb.weight
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        start = x = self.emb(ids)
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x + self.scale * start)
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "size": x.pow(2).mean()}


def skip_tied() -> tuple[SkipTied, dict[str, Tensor]]:
    torch.manual_seed(0)
    return SkipTied().double(), {"ids": torch.randint(0, 17, (2, 5)), "labels": torch.randint(0, 17, (2, 5))}


def test_skip_tied_two_outputs() -> None:
    module, batch = skip_tied()
    graph = capture_module(module, batch)
    assert_same_step(graph, module, batch, module(**batch)["loss"])
    assert len(graph.traces) == 4  # embedding, attention, mlp, head; layers share
    assert [item.tied_to for item in graph.parameters if item.tied_to] == ["emb.weight"]
    assert graph.outputs == ("loss", "size")
    assert [segment.tags.layer for segment in graph.segments] == [None, 0, 0, 1, 1, 2, 2, None]
    assert graph.segments[-1].tags.role is Role.HEAD


@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_granularities(granularity: Any) -> None:
    module, batch = skip_tied()
    graph = capture_module(module, batch, granularity=granularity)
    assert_same_step(graph, module, batch, module(**batch)["loss"])
    assert len(graph.segments) == {"layer": 5, "module": 11}[granularity]


def test_frozen_layers_need_no_backward() -> None:
    module, batch = skip_tied()
    for part in (module.emb, module.layers[0]):
        part.requires_grad_(False)
    graph = capture_module(module, batch)
    assert_same_step(graph, module, batch, module(**batch)["loss"])
    has = {segment.name: "".join(p for p in Phase if graph.trace(segment).has(p)) for segment in graph.segments}
    assert has["emb"] == has["layers.0.attn"] == has["layers.0.mlp"] == "F"
    assert has["layers.1.attn"] == "FW" and has["layers.1.mlp"] == has["head"][:2] + "W" == "FIW"


def test_no_scalar_loss() -> None:
    with pytest.raises(GraphError, match=r"expected one scalar loss"):
        capture_module(nn.Linear(3, 3), {"input": torch.zeros(2, 3)})


def test_loss_function() -> None:
    module = nn.Linear(3, 3).double()
    batch = {"input": torch.randn(2, 3, dtype=torch.float64)}
    graph = capture_module(module, batch, loss=lambda output, inputs: (output - inputs["input"]).pow(2).sum())
    assert_same_step(graph, module, batch, (module(batch["input"]) - batch["input"]).pow(2).sum())
