"""What calibration texts do inside a model: routing of mixtures, activations of dense MLPs, losses.

The whole model is in memory, in float32; sums are over all tokens and in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.models.families import converted_classes
from mipipe.runtime.convert.source import Source

BATCH = 8
"""Rows that run together."""


@dataclass
class Routing:
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
class Moments:
    """Mean and squared deviations of every channel over all tokens so far, and the sum of magnitudes (Chan et al.)."""

    mean: Tensor
    squares: Tensor
    magnitude: Tensor
    count: int = 0

    @classmethod
    def of(cls, size: int) -> Moments:
        return cls(*(torch.zeros(size, dtype=torch.float64) for _ in range(3)))

    def add(self, rows: Tensor) -> None:
        """Count more tokens: [T, channels]."""
        rows = rows.detach().double().reshape(-1, rows.shape[-1])
        mean = rows.mean(0)
        self.join(Moments(mean, ((rows - mean) ** 2).sum(0), rows.abs().sum(0), len(rows)))

    def join(self, other: Moments) -> None:
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

    kind = converted_classes(source.host)
    loader = AutoModelForCausalLM if kind is None else kind[1]
    from mipipe.runtime.merge.programs.router import quiet_transformers

    try:
        with quiet_transformers():
            return loader.from_pretrained(source.files.path, dtype=torch.float32, local_files_only=True,
                                          use_safetensors=True, trust_remote_code=False,
                                          attn_implementation="eager").eval()
    except Exception as error:
        raise InputError(f"{source.files.path}: transformers does not load it ({str(error).splitlines()[0]})") from None


def decoder_layer(model: Any, number: int) -> Any:
    return model.model.layers[number]


@contextlib.contextmanager
def _hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def routing(model: Any, layers: Sequence[int], rows: Tensor) -> dict[int, Routing]:
    """The routing of every MoE layer on rows of token ids."""
    found: dict[int, Routing] = {}

    def logits(number: int) -> Callable[..., None]:
        def seen(_module: nn.Module, _inputs: Any, output: Any) -> None:
            z = (output[0] if isinstance(output, tuple) else output).double().reshape(-1, found[number].chosen.shape[0])
            found[number].gram += z.T @ z
            found[number].tokens += len(z)
        return seen

    def choices(number: int) -> Callable[..., None]:
        def seen(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            index, weights = inputs[1].reshape(-1), inputs[2].reshape(-1).double()
            found[number].chosen.index_add_(0, index, torch.ones_like(weights))
            found[number].weights.index_add_(0, index, weights)
        return seen

    handles = []
    for number in layers:
        block = decoder_layer(model, number).mlp
        count = block.gate.weight.shape[0]
        zeros = [torch.zeros(count, dtype=torch.float64) for _ in range(2)]
        found[number] = Routing(*zeros, torch.zeros(count, count, dtype=torch.float64))
        handles += [block.gate.register_forward_hook(logits(number)),
                    block.experts.register_forward_pre_hook(choices(number))]
    with _hooked(handles), torch.no_grad():
        for batch in rows.split(BATCH):
            model(input_ids=batch, use_cache=False)
    return found


def channels(model: Any, layers: Sequence[int], rows: Tensor) -> dict[int, Moments]:
    """The moments of what goes into every MLP's down projection."""
    found = {number: Moments.of(decoder_layer(model, number).mlp.down_proj.weight.shape[1]) for number in layers}
    handles = [decoder_layer(model, number).mlp.down_proj.register_forward_pre_hook(
        lambda _module, inputs, number=number: found[number].add(inputs[0])) for number in layers]
    with _hooked(handles), torch.no_grad():
        for batch in rows.split(BATCH):
            model(input_ids=batch, use_cache=False)
    return found


def mean_loss(model: Any, rows: Tensor, kept: Mapping[int, Tensor] | None = None,
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
    with _hooked(handles), torch.no_grad():
        for batch in rows.split(BATCH):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
            count += batch[:, 1:].numel()
    return total / count
