"""Rows picked by data: loops over experts and masked rows, with no, some and all rows picked, equal eager autograd."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from graph_checks import assert_same_step
from torch import Tensor, fx, nn
from torch.nn import functional

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.operators.row_sizes import matched

F64, WIDTH = torch.float64, 6


class Mixture(nn.Module):
    """A MoE layer as most people write it, in one of the usual words."""

    def __init__(self, words: str, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.gate, self.top, self.words = nn.Linear(WIDTH, experts), top, words
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))
                                     for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = torch.topk(self.gate(flat).softmax(-1), self.top)
        out = torch.zeros_like(flat)
        if self.words == "concatenated":
            found = [torch.where(chosen == number) for number in range(len(self.experts))]
            made = torch.cat([expert(flat[row]) * weights[row, column, None] for expert, (row, column)
                              in zip(self.experts, found, strict=True)])
            return out.index_add(0, torch.cat([row for row, _ in found]), made).view_as(x)
        for number, expert in enumerate(self.experts):
            if self.words == "where":
                row, column = torch.where(chosen == number)
                out.index_add_(0, row, expert(flat[row]) * weights[row, column, None])
            elif self.words == "nonzero":
                found = (chosen == number).nonzero()
                row = found[:, 0]
                out = out.index_add(0, row, expert(flat[row]) * weights[row, found[:, 1]].unsqueeze(-1))
            elif self.words == "mask":
                mask = (chosen == number).any(-1)
                share = (weights * (chosen == number)).sum(-1)
                out[mask] += expert(flat[mask]) * share[mask].unsqueeze(-1)
            elif self.words == "one_hot":
                hit = functional.one_hot(chosen, len(self.experts)).permute(2, 1, 0)[number]
                column, row = torch.where(hit)
                state = flat[None, row].reshape(-1, WIDTH)
                out.index_add_(0, row, expert(state) * weights[row, column, None])
        return out.view_as(x)


class Model(nn.Module):
    def __init__(self, words: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, 20)
        self.layers = nn.ModuleList(Mixture(words) for _ in range(2))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("words", [
    "where", *(pytest.param(words, marks=pytest.mark.slow) for words in ("concatenated", "nonzero", "mask", "one_hot")),
])
def test_loops_over_experts(words: str) -> None:
    """Also where an expert gets no token, or all; the layers share their traces, and the experts are one segment."""
    torch.manual_seed(0)
    module = Model(words).to(F64)
    batch = {"ids": torch.randint(0, 20, (2, 5)), "labels": torch.randint(0, 20, (2, 5))}
    graph = capture_module(module, batch)
    assert len(graph.traces) < len(graph.segments)
    with torch.no_grad():
        for layer, bias in zip(module.layers, ([0.0, 0.0, 0.0, 0.0], [50.0, -50.0, 0.0, 0.0]), strict=True):
            layer.gate.bias.copy_(torch.tensor(bias))
    loss = module(**batch)
    check(graph, module, batch, loss)


def check(graph: OperatorGraph, module: nn.Module, batch: dict[str, Tensor], loss: Tensor) -> None:
    """As `assert_same_step`; parameters without a gradient in autograd have one of zeros here."""
    assert_same_step(graph, module, batch, loss + 0 * sum(item.sum() for item in module.parameters()))


class Masked(nn.Module):
    """Rows and entries picked by what the batch says."""

    def __init__(self, words: str) -> None:
        super().__init__()
        self.first, self.second, self.words = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5), words

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.words == "mean":
            return (self.second(h + h[y > 1].mean())).square().mean()
        if self.words == "loss":  # only labelled positions go through the head, as masked language models do
            return functional.cross_entropy(self.second(h[y >= 0]), y[y >= 0])
        if self.words == "entries":
            return self.second(h).masked_select((y > 1).unsqueeze(-1)).pow(2).sum()
        if self.words == "own":  # the mask depends on the model
            keep = h.sum(-1) > 0
            return self.second(h[keep].view(-1, 2, WIDTH // 2).flatten(1)).exp().sum() / (1 + keep.sum())
        if self.words == "beside":  # a row of its own before the picked ones
            return self.second(torch.cat([h[:1], h[y > 1]]).softmax(0)).square().sum()
        return torch.cat([self.second(h[y > 1]), self.second(h[y <= 1])]).softmax(0).square().sum()


@cache
def captured(words: str) -> tuple[Masked, OperatorGraph]:
    """The module and its graph, of a batch with some rows of every kind."""
    torch.manual_seed(0)
    module = Masked(words).to(F64)
    return module, capture_module(module, {"x": torch.randn(9, WIDTH, dtype=F64), "y": torch.randint(0, 5, (9,))})


@pytest.mark.parametrize("words", ["mean", "loss", "entries", "own", "beside", "parts"])
@pytest.mark.parametrize("low, high", [pytest.param(0, 5, marks=pytest.mark.slow), (2, 5), (3, 4)])
def test_masked_rows(words: str, low: int, high: int) -> None:
    module, graph = captured(words)
    torch.manual_seed(1)
    batch = {"x": torch.randn(9, WIDTH, dtype=F64), "y": torch.randint(low, high, (9,))}
    check(graph, module, batch, module(**batch))


def test_no_rows_at_all() -> None:
    torch.manual_seed(0)
    module = Masked("entries").to(F64)
    batch = {"x": torch.randn(9, WIDTH, dtype=F64), "y": torch.zeros(9, dtype=torch.int64)}
    check(capture_module(module, batch), module, batch, module(**batch))


class Unique(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        picked = torch.unique(x)
        return super().forward(x).sum() + picked.sum()


def test_other_sizes_that_depend_on_data_name_the_line() -> None:
    line = r"unique.* depends on data at .*test_dynamic_rows.py:\d+ `picked = torch.unique\(x\)`; rows picked by a mask"
    with pytest.raises(GraphError, match=line):
        capture_module(Unique(4, 4), {"x": torch.randn(2, 4)})


@pytest.mark.parametrize("sizes, expected", [
    ((7, 11), ([0], 1, 0)), ((21, 33), ([0], 3, 0)), ((20, 30), ([0, 1], 1, 0)), ((40, 60), ([0, 1], 2, 0)),
    ((9, 13), ([0], 1, 2)), ((22, 32), ([0, 1], 1, 2)), ((12, 18), ([1], 1, -1)), ((8, 13), None), ((15, 23), None)])
def test_sizes_are_matched_with_counts(sizes: tuple[int, int], expected: Any) -> None:
    """Multiples and sums of counts before those with a constant; what is none of them is not guessed."""
    graph = fx.Graph()
    picks = [graph.call_function(torch.ops.mipipe.nonzero.default, (graph.placeholder("mask"), *pair))
             for pair in ((7, 11), (13, 19))]
    found = matched(picks, *sizes)
    assert found == (None if expected is None else ([picks[place] for place in expected[0]], *expected[1:]))


def test_a_constant_that_two_counts_would_do_for_is_not_guessed() -> None:
    graph = fx.Graph()
    picks = [graph.call_function(torch.ops.mipipe.nonzero.default, (graph.placeholder("mask"), *pair))
             for pair in ((7, 11), (13, 17))]
    assert matched(picks, 14, 18) is None and matched(picks, 7, 11) == ([picks[0]], 1, 0)


class Sorted(nn.Linear):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        places = torch.cat([torch.where(y == number)[0] for number in range(3)])
        return (super().forward(x[places])[places.argsort()] * x[:, :1]).sum()


def test_rows_sorted_back_are_refused_with_what_to_write(capfd: pytest.CaptureFixture[str]) -> None:
    """Torch cannot know that three masks together pick each row once."""
    with pytest.raises(GraphError, match=r"segment .*any number of rows.*index_add_") as caught:
        capture_module(Sorted(4, 4), {"x": torch.randn(6, 4), "y": torch.arange(6) % 3})
    assert "\n" not in str(caught.value) and "Traceback" not in capfd.readouterr().err
