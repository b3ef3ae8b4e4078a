"""Captured graphs compute what the model computes: loss, every gradient, buffers; and the cut is where it should be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_checks import assert_same_step
from torch import Tensor, nn

from mipipe.graphs.capture.model import capture, capture_module
from mipipe.graphs.coarse.coarsen import coarsen
from mipipe.graphs.errors import GraphError, InputError
from mipipe.graphs.operator_graph import Phase, Role
from mipipe.graphs.tracing.compose import parameter_tensors, run_step
from mipipe.graphs.tracing.trace import uses_random


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
    trace = graph.trace(graph.segments[2])  # layers.0.mlp, whose backward belongs to the modules it is of
    assert [item.fqn for item in trace.operators if "mm" in item.kind] == ["0", "2", "2", "0", "2", "0"]
    assert {item.fqn for item in trace.operators if "norm" in item.kind} == {"ln2"}


@pytest.mark.parametrize("granularity", ["layer", "module", "operator"])
def test_granularities(granularity: Any) -> None:
    module, batch = skip_tied()
    graph = capture_module(module, batch, granularity=granularity)
    assert_same_step(graph, module, batch, module(**batch)["loss"])
    assert len(graph.segments) == {"layer": 5, "module": 11, "operator": 17}[granularity]


def test_unknown_granularity() -> None:
    module, batch = skip_tied()
    with pytest.raises(GraphError, match="found 'row', expected one of layer, block, module, operator"):
        capture_module(module, batch, granularity="row")  # type: ignore[arg-type]


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


class Counted(nn.Module):
    """A layer with a buffer of its own (layers differ in it) and a batch norm."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("shift", torch.full((4,), float(index)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.linear(x)) + self.shift)


class Tower(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Counted(index) for index in range(3))
        self.drop, self.head = nn.Dropout(drop), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(self.drop(x)).pow(2).mean()


def test_each_layer_keeps_its_buffers_and_tracing_moves_none() -> None:
    torch.manual_seed(0)
    module, batch = Tower().double(), {"x": torch.randn(5, 4, dtype=torch.float64)}
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    graph = capture_module(module, batch)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert len({segment.trace for segment in graph.segments[:2]}) <= 2
    assert [group.single for group in coarsen(graph, granularity="operator").groups] == [True, True, True, False]
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: tensor.clone() for name, tensor in parameter_tensors(graph, named).items()}
    step = run_step(graph, state, batch)
    assert_same_step(graph, module, batch, module(**batch))
    for name, buffer in module.named_buffers():
        moved = step.buffers.get(name)
        assert "shift" in name if moved is None else torch.allclose(moved.double(), buffer.double(), rtol=1e-12)


def test_dropout_is_reproduced_from_the_seed() -> None:
    torch.manual_seed(0)
    module, batch = Tower(drop=0.5).double(), {"x": torch.randn(5, 4, dtype=torch.float64)}
    graph = capture_module(module, batch)
    assert [uses_random(graph.trace(segment)) for segment in graph.segments] == [False, False, False, True]
    torch.manual_seed(1)
    assert_same_step(graph, module, batch, module(**batch))


def test_poisoned_memory_changes_nothing() -> None:
    """Uninitialised memory is filled with NaN: nothing reads it."""
    module, batch = skip_tied()
    graph = capture_module(module, batch)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert_same_step(graph, module, batch, module(**batch)["loss"])
    finally:
        torch.use_deterministic_algorithms(False)


def test_saved_program(tmp_path: Any) -> None:
    module, batch = skip_tied()
    program = torch.export.export(module, (), batch, strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    graph = capture(tmp_path / "model.pt2")
    assert_same_step(graph, module, batch, module(**batch)["loss"])
    assert [segment.name for segment in graph.segments][:2] == ["emb", "layers.0.attn"]


class LoraLinear(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.base = nn.Linear(size, size).requires_grad_(False)
        self.down, self.up = nn.Linear(size, 2, bias=False), nn.Linear(2, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LoraTower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4).requires_grad_(False)
        self.layers = nn.ModuleList(LoraLinear(4) for _ in range(3))
        self.head = nn.Linear(4, 7).requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x), ids)


def test_lora_needs_w_only_where_something_trains() -> None:
    torch.manual_seed(0)
    module, batch = LoraTower().double(), {"ids": torch.randint(0, 7, (6,))}
    graph = capture_module(module, batch, granularity="layer")
    assert_same_step(graph, module, batch, module(**batch))
    has = ["".join(p for p in Phase if graph.trace(segment).has(p)) for segment in graph.segments]
    assert has == ["F", "FW", "FIW", "FIW", "FI"]


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.mean()
        return x.sum()


@pytest.mark.parametrize(("module", "inputs", "message"), [
    (Branching(), {"x": torch.zeros(3)}, r"test_capture\.py:\d+ `if x\.sum\(\) > 0:`.*torch\.where"),
    (nn.Linear(3, 1), {"wrong": torch.zeros(2, 3)}, r"wrong"),
    (nn.Linear(3, 1), {"input": torch.zeros(2, 4)}, r"model Linear cannot be exported.*example_inputs"),
])
def test_what_cannot_be_exported_says_why(module: nn.Module, inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        capture_module(module, inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "options", "message"), [
    ("no_such_model_type", {}, "not a model class"),
    ("llama", {"overrides": {"hidden_sizee": 3}}, "hidden_sizee"),
    ("llama", {"dtype": "int64"}, "dtype"),
    ("llama", {"overrides": {"architectures": 3}}, "architectures"),
    ("llama", {"batch": 0}, "batch"),
    ("math:sqrt", {}, "part of Python.s own library"),
    ("no.such.package:factory", {}, "cannot import"),
    ("missing.pt2", {}, "no such file"),
])
def test_bad_sources(source: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        capture(source, **options)
