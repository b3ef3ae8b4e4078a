"""How much heads, feed-forward units and adapters matter, for Light-PEFT (arXiv 2406.03792): masks and probes.

`add_masks` puts a number on every attention head and every feed-forward unit, trained with the adapters under the loss
and strength times sum |m| (`add_penalty`); `Importance` watches adapters. In a run (``adapters: {method: light-peft}``)
a probe beside every adapter takes ||dW x|| / ||W x|| of a microbatch for its gradient, so that the backward of any plan
sums them up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mipipe.graphs.recipes.adapters import DOWN, UP, AdaptedLinear
from mipipe.graphs.recipes.expansion import feed_forward_layers

MASK, PROBE, PROJECTIONS = "unit_mask", "light_probe", ("q_proj", "k_proj", "v_proj", "o_proj")


class MaskedUnits:
    """What a masked layer does first: each unit of its input, ``unit_width`` numbers, times its mask."""

    def forward(self, x: Tensor) -> Tensor:
        mask = self.unit_mask.repeat_interleave(self.unit_width)  # type: ignore[attr-defined]
        made: Tensor = super().forward(x * mask)  # type: ignore[misc]
        return made


@functools.cache
def _masked(kind: type) -> type:
    return type(f"Masked{kind.__name__}", (MaskedUnits, kind), {"plain": kind})


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with q_proj, k_proj, v_proj, o_proj and a head_dim, by name."""
    return {name: part for name, part in model.named_modules() if hasattr(part, "head_dim")
            and all(isinstance(getattr(part, item, None), nn.Linear) for item in PROJECTIONS)}


def add_masks(model: nn.Module) -> nn.Module:
    """The model, changed: a trainable mask of ones on every head and every feed-forward unit."""
    for layer in feed_forward_layers(model).values():
        _mask(layer.down_proj, 1)
    for layer in attention_layers(model).values():
        _mask(layer.o_proj, layer.head_dim)
    return model


def _mask(linear: Any, width: int) -> None:
    kind: Any = type(linear)
    linear.__class__, linear.unit_width = _masked(kind), width
    linear.register_parameter(MASK, nn.Parameter(linear.weight.new_ones(linear.in_features // width)))


@torch.no_grad()
def add_penalty(named: Iterable[tuple[str, nn.Parameter]], strength: float = 1e-4) -> None:
    """Add the gradient of strength sum |m| to that of every mask; between the backward and the optimizer's step."""
    for name, item in named:
        if name.rpartition(".")[2] == MASK and item.grad is not None:
            item.grad.add_(item.sign(), alpha=strength)


class _Ratio(torch.autograd.Function):
    """``y`` as it is; the gradient of ``probe`` [1] is ||added|| / ||plain||."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, probe: Tensor, plain: Tensor, added: Tensor) -> Tensor:
        ctx.save_for_backward(plain, added)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        plain, added = ctx.saved_tensors
        ratio = added.double().norm() / plain.double().norm().clamp(min=1e-30)
        return grad, ratio.reshape(1).to(grad.dtype), None, None


class ProbedLinear(AdaptedLinear):
    """A layer with an adapter whose importance its backward tells: the gradient of ``light_probe``."""

    light_probe: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        plain = nn.functional.linear(x, self.weight)
        added = nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B) * self.config.scale
        y = plain + added if self.bias is None else plain + self.bias + added
        made: Tensor = _Ratio.apply(  # type: ignore[no-untyped-call]
            y, self.light_probe, plain.detach(), added.detach())
        return made


def add_probes(model: nn.Module) -> nn.Module:
    """The model, changed: a probe beside every adapter."""
    for part in model.modules():
        if type(part) is AdaptedLinear:
            part.__class__ = ProbedLinear
            part.register_parameter(PROBE, nn.Parameter(part.weight.new_zeros(1)))
    return model


def is_light(name: str) -> bool:
    """Whether a parameter is a mask or a probe of a first stage."""
    return name.rpartition(".")[2] in (MASK, PROBE)


class Importance:
    """What adapters did: the mean of ||dW x|| / ||W x|| of a layer's forwards, and |mean of w grad| of every rank.

    Only what is between ``with`` and its end counts: the second half of stage 1.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: part for name, part in model.named_modules() if isinstance(part, AdaptedLinear)}
        self.ratios: dict[str, list[float]] = {name: [] for name in self._layers}
        self._products: dict[str, list[Tensor]] = {name: [] for name in self._layers}
        self._handles: list[Any] = []

    def __enter__(self) -> Importance:
        for name, part in self._layers.items():
            def watch(layer: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                with torch.no_grad():
                    x, config = given[0], layer.config
                    if hasattr(layer, MASK):
                        x = x * layer.unit_mask.repeat_interleave(layer.unit_width)
                    added = nn.functional.linear(nn.functional.linear(x, layer.lora_A), layer.lora_B) * config.scale
                    whole = nn.functional.linear(x, layer.weight)
                    self.ratios[name].append(float(added.norm() / whole.norm().clamp(min=1e-30)))

            self._handles.append(part.register_forward_pre_hook(watch))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def after_backward(self, gradients: dict[str, Tensor | None]) -> None:
        """Count a step's gradients, by parameter."""
        for name, part in self._layers.items():
            down, up = gradients.get(f"{name}.{DOWN}"), gradients.get(f"{name}.{UP}")
            if down is not None and up is not None:
                both = (part.lora_A.detach() * down, (part.lora_B.detach() * up).t())
                self._products[name].append(torch.cat(both, 1))

    def modules(self) -> dict[str, float]:
        """The importance of every adapter."""
        return {name: sum(found) / max(1, len(found)) for name, found in self.ratios.items()}

    def ranks(self) -> dict[str, Tensor]:
        """The importance of every rank [r] of every adapter."""
        return {name: torch.stack(found).mean(0).abs().sum(1) if found else torch.zeros(self._layers[name].config.rank)
                for name, found in self._products.items()}


class AdapterImportance(Protocol):
    """The importance of adapters, and of each of their ranks."""

    def modules(self) -> Mapping[str, float]: ...

    def ranks(self) -> Mapping[str, Tensor]: ...
