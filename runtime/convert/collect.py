"""What calibration texts do inside a model: routing of mixtures, activations of dense MLPs, losses.

Routing and activations are collected layer by layer, with one layer of the model in memory and the states between
layers in a file; losses take the whole model. Sums are over all tokens and in float64.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.models.configuration import first_line
from mipipe.runtime.calibration.decoder import Decoder
from mipipe.runtime.calibration.files import States
from mipipe.runtime.calibration.quiet import quiet_transformers
from mipipe.runtime.calibration.tokens import Samples
from mipipe.runtime.convert.source import Source

BATCH = 4
"""Samples that run together."""


@dataclass
class RoutingCounts:
    """A MoE layer's routing: how often each expert was chosen, its summed weights, and Z Z^T of the router logits
    (Z: experts by tokens)."""

    chosen: Tensor
    weights: Tensor
    gram: Tensor
    tokens: int = 0

    @property
    def usage(self) -> list[float]:
        """Share of all choices."""
        return [float(item) for item in self.chosen / self.chosen.sum().clamp_min(1)]

    @property
    def similarity(self) -> Tensor:
        """(cos + 1) / 2 of the experts' logits over all tokens (M-SMoE)."""
        scale = self.gram.diagonal().clamp_min(1e-30).sqrt()
        return (self.gram / (scale[:, None] * scale[None, :]) + 1) / 2


@dataclass
class ChannelMoments:
    """Mean and squared deviations of every channel over all tokens so far, and the sum of magnitudes (Chan et al.)."""

    mean: Tensor
    squares: Tensor
    magnitude: Tensor
    count: int = 0

    @classmethod
    def of(cls, size: int) -> ChannelMoments:
        mean, squares, magnitude = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
        return cls(mean, squares, magnitude)

    def add(self, rows: Tensor) -> None:
        """Count more tokens: [T, channels]."""
        rows = rows.detach().double().reshape(-1, rows.shape[-1])
        mean = rows.mean(0)
        self.join(ChannelMoments(mean, ((rows - mean) ** 2).sum(0), rows.abs().sum(0), len(rows)))

    def join(self, other: ChannelMoments) -> None:
        """Count the tokens of others."""
        delta, total = other.mean - self.mean, self.count + other.count
        self.squares += other.squares + delta ** 2 * (self.count * other.count / total)
        self.mean += delta * (other.count / total)
        self.magnitude += other.magnitude
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Of the population."""
        return self.squares / max(1, self.count)


def load_model(source: Source) -> Any:
    """The source as a model of transformers, in float32.

    Raises:
        InputError: transformers does not load it.
    """
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            # no code of the folder runs: no auto_map (trust_remote_code), no pickle (use_safetensors), no hub
            return AutoModelForCausalLM.from_pretrained(
                source.files.path, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                trust_remote_code=False, attn_implementation="eager").eval()
    except Exception as error:
        raise InputError(f"{source.files.path}: transformers does not load it ({first_line(error)})") from None


def decoder_layer(model: Any, number: int) -> Any:
    return model.model.layers[number]


@contextlib.contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Hooks that go when what is inside ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_layers(source: Source, samples: Samples, layers: Sequence[int], scratch: Path,
               watch: Callable[[Any, int, Callable[[Tensor], Tensor]], list[Any]]) -> None:
    """Run a model on samples, one layer of it in memory at a time, up to the last of ``layers``.

    Args:
        scratch: a folder for the states between layers.
        watch: called with every one of these layers, its number and a function that takes the rows of real tokens out
            of a tensor [batch, length, ...] or [batch * length, ...]; returns handles of hooks.
    """
    decoder = open_decoder(source)
    with layer_states(source, samples, scratch) as run:
        run.start(decoder)
        for number in range(max(layers) + 1):
            layer = decoder.load_layer(number)
            handles = watch(layer, number, run.real) if number in layers else []
            with hooked(handles):
                run.advance(decoder, number)
            decoder.drop_layer(number)


def open_decoder(source: Source) -> Decoder:
    """The source, to be run layer by layer."""
    return Decoder(source.files.source, source.files.path, source.files.tensors,
                   lambda name: source.read(source.files.tensors[name]), functools.partial(rows_of, source),
                   source.dtype)


@dataclass
class LayerStates:
    """Samples between two layers of a model: their tokens, states in a file, batches of rows."""

    ids: Tensor
    lengths: Tensor
    states: States
    batches: list[tuple[int, int]]
    mask: Tensor

    def real(self, item: Tensor) -> Tensor:
        """The rows of real tokens of the batch that runs, out of [batch, length, ...] or [batch * length, ...]."""
        return item.reshape(*self.mask.shape, -1)[self.mask]

    def start(self, decoder: Decoder) -> None:
        """States before the first layer."""
        decoder.load_rest(head=False)
        for start, stop in self.batches:
            self.states.write(start, decoder.embed(self.ids[start:stop]))
        decoder.drop_rest()

    def passes(self, decoder: Decoder, number: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """Run a loaded layer on all samples, which stay before it; what is yielded before each batch is `real`."""
        for start, stop in self.batches:
            self._mark(start, stop)
            yield self.real
            decoder.forward(number, self.states.read(start, stop))

    def advance(self, decoder: Decoder, number: int) -> None:
        """Take all samples through a loaded layer."""
        for start, stop in self.batches:
            self._mark(start, stop)
            self.states.write(start, decoder.forward(number, self.states.read(start, stop)))

    def _mark(self, start: int, stop: int) -> None:
        self.mask = torch.arange(self.ids.shape[1])[None] < self.lengths[start:stop, None]


@contextlib.contextmanager
def layer_states(source: Source, samples: Samples, scratch: Path) -> Iterator[LayerStates]:
    """Samples to be taken through a model layer by layer; ``scratch`` is a folder that is gone afterwards."""
    scratch.mkdir(parents=True, exist_ok=True)
    ids, lengths = torch.from_numpy(samples.ids).long(), torch.from_numpy(samples.lengths)
    states = States(scratch / "states", ids.shape[1], int(source.files.config["hidden_size"]), source.dtype)
    batches = [(start, min(start + BATCH, len(ids))) for start in range(0, len(ids), BATCH)]
    try:
        with torch.no_grad():
            yield LayerStates(ids, lengths, states, batches, torch.empty(0))
    finally:
        states.remove()
        (scratch / "config.json").unlink(missing_ok=True)  # of a model that is run before it is written
        with contextlib.suppress(OSError):
            scratch.rmdir()


def rows_of(source: Source, name: str, rows: Tensor) -> Tensor:
    """Some rows of a table."""
    tensor = source.files.tensors[name]
    return torch.cat([source.shelf.read_rows(source.files.path, tensor, int(row), int(row) + 1, tensor.shape[1])
                      for row in rows]).to(source.dtype)


def routing(source: Source, samples: Samples, layers: Mapping[int, int], scratch: Path) -> dict[int, RoutingCounts]:
    """The routing of MoE layers (number: experts) on samples."""
    found = {number: RoutingCounts(torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64),
                             torch.zeros(count, count, dtype=torch.float64)) for number, count in layers.items()}

    def watch(layer: Any, number: int, real: Callable[[Tensor], Tensor]) -> list[Any]:
        into = found[number]

        def logits(_module: nn.Module, _inputs: Any, output: Any) -> None:
            z = real(output[0] if isinstance(output, tuple) else output).double()
            into.gram += z.T @ z
            into.tokens += len(z)

        def choices(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            index, weights = real(inputs[1]).reshape(-1), real(inputs[2]).reshape(-1).double()
            into.chosen.index_add_(0, index, torch.ones_like(weights))
            into.weights.index_add_(0, index, weights)

        return [layer.mlp.gate.register_forward_hook(logits), layer.mlp.experts.register_forward_pre_hook(choices)]

    run_layers(source, samples, list(layers), scratch, watch)
    return found


def channels(source: Source, samples: Samples, layers: Mapping[int, int], scratch: Path) -> dict[int, ChannelMoments]:
    """The moments of what goes into the down projections of layers (number: channels)."""
    found = {number: ChannelMoments.of(size) for number, size in layers.items()}

    def watch(layer: Any, number: int, real: Callable[[Tensor], Tensor]) -> list[Any]:
        return [layer.mlp.down_proj.register_forward_pre_hook(
            lambda _module, inputs: found[number].add(real(inputs[0])))]

    run_layers(source, samples, list(layers), scratch, watch)
    return found


def mean_loss(model: Any, samples: Samples, kept: Mapping[int, Tensor] | None = None,
              offset: Mapping[int, Tensor] | None = None) -> float:
    """The mean cross-entropy of next tokens; with ``kept``, of the model whose MLPs have only these channels (a factor
    for each), and with the ``offset`` of what is left out."""
    handles = [decoder_layer(model, number).mlp.down_proj.register_forward_pre_hook(
        lambda _module, inputs, factor=factor: (inputs[0] * factor.to(inputs[0].dtype),))
        for number, factor in (kept or {}).items()]
    handles += [decoder_layer(model, number).mlp.down_proj.register_forward_hook(
        lambda _module, _inputs, output, bias=bias: output + bias.to(output.dtype))
        for number, bias in (offset or {}).items()]
    total, count = 0.0, 0
    with hooked(handles), torch.no_grad():
        for ids, labels in batches(samples):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
            count += int((labels[:, 1:] >= 0).sum())
    return total / count


def batches(samples: Samples, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels, -100 where there is no token."""
    ids, lengths = torch.from_numpy(samples.ids).long(), torch.from_numpy(samples.lengths)
    labels = ids.masked_fill(torch.arange(ids.shape[1])[None] >= lengths[:, None], -100)
    return list(zip(ids.split(size), labels.split(size), strict=True))
