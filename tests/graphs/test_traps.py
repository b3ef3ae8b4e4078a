"""The traps of tracing, one test for each that has no other: what a captured graph must not get wrong silently.

Elsewhere: buffers per layer, batch norm, dropout, poisoned memory, tied weights (`test_capture`, `test_partition`),
experts without tokens (`test_trace`), an auxiliary loss of router logits (`test_families`), recomputed random numbers
(tests/runtime).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from graph_checks import assert_same_step
from torch import Tensor, nn

from mipipe.graphs.capture.model import capture, capture_module
from mipipe.graphs.errors import GraphError, InputError
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.tracing.compose import parameter_tensors, run_step
from mipipe.graphs.tracing.trace import build_phase, phase_signature

F64 = torch.float64


class Layer(nn.Module):
    """Mixes its input with a transposed and an expanded view of it, and with a position table made in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, spread: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.tanh(self.linear(x + spread + places))
        return mixed.transpose(0, 1), mixed[:1].expand(4, 4)


class Views(nn.Module):
    """Layers hand each other transposed and expanded views; positions are written into slices before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        places = ids.cumsum(0).double().repeat(4, 1)
        places[:, 1:] = places[:, :-1].clone() * 0.5
        spread = x[:1].expand(4, 4)
        for layer in self.layers:
            x, spread = layer(x, spread, places)
        return (x * spread).square().sum()


def views() -> tuple[Views, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Views().double(), {"x": torch.randn(4, 4, dtype=F64), "ids": torch.randint(0, 5, (4,))}


def test_transposed_and_expanded_tensors_cross_segments_and_positions_do_not() -> None:
    module, batch = views()
    graph = capture_module(module, batch)
    assert_same_step(graph, module, batch, module(**batch))
    readers = [segment.name for segment in graph.segments if "ids" in segment.inputs]
    assert readers == [segment.name for segment in graph.segments][:3]  # each writes its own copy of the positions
    crossing = [value for value in graph.values if value.source in readers[:2]]
    assert len(crossing) <= 4 and all(value.differentiable for value in crossing)


def test_phases_take_strided_tensors_as_the_runtime_hands_them_over() -> None:
    """Strides are baked in where a trace is made: what a phase gets is contiguous, whatever the batch was."""
    module, batch = views()
    graph = capture_module(module, batch)
    trace = graph.trace(graph.segments[0])
    arguments, results = phase_signature(trace, Phase.F)
    state = dict(zip((*trace.parameters, *trace.buffers),
                     (parameter_tensors(graph, dict(module.named_parameters()))[name]
                      for name in (*graph.segments[0].parameters, *graph.segments[0].buffers)), strict=True))
    given = {name: batch[value] for name, value in zip(trace.inputs, graph.segments[0].inputs, strict=True)} | state
    made = build_phase(trace, Phase.F)(*[given[name] for name in arguments])
    assert all(tensor.is_contiguous() for name, tensor in zip(results, made, strict=True) if name in trace.outputs)


def test_the_gradient_of_the_loss_is_an_argument() -> None:
    module, batch = views()
    graph = capture_module(module, batch)
    state = parameter_tensors(graph, dict(module.named_parameters()))
    whole, part = (run_step(graph, state, batch, scale=scale).gradients for scale in (1.0, 0.25))
    for name, gradient in whole.items():
        torch.testing.assert_close(part[name], gradient * 0.25, rtol=1e-12, atol=0)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own, self.memory = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + torch.tanh(self.own(x) + self.memory(memory))


class Remembering(nn.Module):
    """Encoder layers, a norm, and decoder layers that all read what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Reader() for _ in range(2))
        self.norm, self.decoder = nn.LayerNorm(4), nn.ModuleList(Reader() for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x, x)
        memory = self.norm(x)
        for layer in self.decoder:
            y = layer(y, memory)
        return y.square().sum()


def test_what_several_layers_read_stays_with_its_maker() -> None:
    """An encoder's last norm is no part of the first decoder layer, so that decoder layers stay alike."""
    torch.manual_seed(0)
    module, batch = Remembering().double(), {"x": torch.randn(3, 4, dtype=F64), "y": torch.randn(3, 4, dtype=F64)}
    graph = capture_module(module, batch)
    homes = {segment.name for segment in graph.segments if any("norm" in name for name in segment.parameters)}
    assert homes == {"encoder.1"}


class Closed(nn.Module):
    """Reads a tensor that is no buffer."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(2, 2), torch.arange(size, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.table[-2:]).sum()


def test_small_constants_are_kept_and_large_ones_refused() -> None:
    torch.manual_seed(0)
    module, batch = Closed(3).double(), {"x": torch.randn(2, 2, dtype=F64)}
    assert_same_step(capture_module(module, batch), module, batch, module(**batch))
    with pytest.raises(GraphError, match=r"closes over a tensor of shape \(5000,\).*make it a buffer"):
        capture_module(Closed(5000).double(), batch)


class Odd(nn.Module):
    """Returns what is no tensor."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.linear, self.result = nn.Linear(2, 1), result

    def forward(self, x: Tensor) -> Any:
        self.linear(x)
        return self.result


class Thing:
    """No pytree."""


@pytest.mark.parametrize(("result", "message"), [
    (Thing(), "model Odd returns a Thing: expected tensors"), (3.5, "model Odd returns a float: expected tensors"),
    ({"loss": "low"}, "returns nothing: expected one scalar loss"), (None, "model Odd returns a NoneType")])
def test_results_that_are_no_tensors(result: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message) as caught:
        capture_module(Odd(result), {"x": torch.zeros(1, 2)})
    assert "\n" not in str(caught.value)


def test_a_model_in_which_nothing_trains() -> None:
    with pytest.raises(GraphError, match=r"model Views: nothing in it trains \(all 6 tensors are frozen\)"):
        capture_module(views()[0].requires_grad_(False), views()[1])


def test_a_model_that_cannot_run_names_its_line_and_torch_stays_silent(capfd: pytest.CaptureFixture[str]) -> None:
    module, batch = views()
    module.layers[0].linear = nn.Linear(5, 4, dtype=F64)
    with pytest.raises(GraphError, match=r"stopped at .*traps.py:\d+ `mixed = torch.tanh.*got \[4, 4\] X \[5, 4\]"
                       r".*--inputs module:function$"):
        capture_module(module, batch)
    assert capfd.readouterr().err == ""


FACTORIES = """
import torch
def raises(): raise ValueError("no weights here\\nsecond line")
def alone(): return torch.nn.Linear(1, 1)
def without_inputs(): return torch.nn.Linear(1, 1), {}
def no_module(): return "model", {"x": torch.zeros(1)}
"""


@pytest.mark.parametrize(("name", "message"), [
    ("raises", "the factory raised ValueError: no weights here$"),
    ("alone", r"found Linear, expected \(module, example_inputs\)"),
    ("without_inputs", "must be a dict of example tensors"), ("no_module", "is a str, expected a torch.nn.Module"),
    ("absent", "has no 'absent'")])
def test_factories_that_give_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                      message: str) -> None:
    (tmp_path / "odd_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=message):
        capture(f"odd_factories:{name}")


@pytest.mark.parametrize(("text", "message"), [
    ('{"model_type": "nobodys"}', "model_type 'nobodys' is unknown to transformers"), ("{", "not readable as JSON"),
    ("{}", "model_type None is unknown")])
def test_configurations_nobody_knows(tmp_path: Path, text: str, message: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        capture(tmp_path)


def test_values_that_a_model_refuses() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match=r"Whisper.* cannot be built from .*: AssertionError: Padding_idx must.*--set"):
        capture("whisper", overrides={"vocab_size": 10})
