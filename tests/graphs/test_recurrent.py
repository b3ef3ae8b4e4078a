"""Recurrent networks: F, I and W give the loss and all gradients that torch's own layers give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_checks import assert_same_step
from torch import Tensor, nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.operator_graph import Phase

F64 = torch.float64


class Tagger(nn.Module):
    """A recurrent encoder that uses all outputs and all last states, and starts from a given state where it says so."""

    def __init__(self, kind: str, given: bool = False, **options: Any) -> None:
        super().__init__()
        self.cells, self.given = getattr(nn, kind)(5, 6, **options), given
        self.first = nn.Linear(5, 4 * (options.get("proj_size") or 6))
        width = (options.get("proj_size") or 6) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        start = None
        if self.given:
            start = self.first(x[:, 0]).view(len(x), 4, -1).transpose(0, 1)[:2].contiguous()
        if self.given and isinstance(self.cells, nn.LSTM):
            out, last = self.cells(x, (start, torch.tanh(start)))
        else:
            out, last = self.cells(x, start)
        lasts = last if isinstance(last, tuple) else (last,)
        return nn.functional.cross_entropy(self.head(out).flatten(0, 1), y.flatten()) + sum(
            item.square().mean() for item in lasts)


CASES = {
    "lstm": ("LSTM", {"num_layers": 2}),
    "lstm_both_ways": ("LSTM", {"bidirectional": True, "num_layers": 2, "bias": False}),
    "lstm_projected": ("LSTM", {"proj_size": 4}),
    "lstm_given": ("LSTM", {"given": True, "num_layers": 2}),
    "gru": ("GRU", {"num_layers": 2}),
    "gru_both_ways": ("GRU", {"bidirectional": True}),
    "gru_given": ("GRU", {"given": True, "num_layers": 2, "bias": False}),
    "rnn": ("RNN", {"num_layers": 2, "given": True}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu", "bidirectional": True}),
}

QUICK = ("lstm", "gru_both_ways", "rnn_relu")


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
                                  for name in CASES])
def test_recurrent_layers_equal_torch(name: str) -> None:
    kind, options = CASES[name]
    torch.manual_seed(0)
    module = Tagger(kind, batch_first=True, **options).to(F64)
    batch = {"x": torch.randn(3, 4, 5, dtype=F64), "y": torch.randint(0, 3, (3, 4))}
    if not options.get("given"):
        del module.first
    assert_same_step(capture_module(module, batch), module, batch, module(**batch))


def test_weight_gradients_of_recurrent_layers_can_be_delayed() -> None:
    """The sequential part is in F and I; the products that make weight gradients are in W."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), Last(), nn.Linear(6, 1))
    graph = capture_module(module, {"input": torch.randn(3, 4, 5)}, loss=lambda out, inputs: out.square().sum())
    kinds = {phase: [item.kind for segment in graph.segments for item in graph.trace(segment).phase_operators(phase)]
             for phase in Phase}
    assert "mipipe.recurrence.default" in kinds[Phase.F] and "mipipe.recurrence_backward.default" in kinds[Phase.I]
    assert not any("recurrence" in kind for kind in kinds[Phase.W])
    assert sum(kind in ("aten.mm.default", "aten.addmm.default") for kind in kinds[Phase.W]) >= 4


class Last(nn.Module):
    """The last output of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(5, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0][:, -1]
