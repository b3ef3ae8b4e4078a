"""Light-PEFT (arXiv 2406.03792): after a short first stage the model and its adapters lose what they need least.

Stage 1: `add_masks` puts a number on every attention head and every feed-forward unit, trained with the adapters under
the loss and strength times sum |m| (`add_penalty`); `Importance` watches adapters. Then `choose_kept` and `lighten`
remove heads (layer by layer), units (over all layers), adapters and their ranks for good. The model is smaller then: it
is captured again, planned again, and trained on. Heads that share keys and values go together.

In a run (``adapters: {method: light-peft}``) a probe beside every adapter takes ||dW x|| / ||W x|| of a microbatch for
its gradient, so that the backward of any plan sums them up.

Left out: what a configuration would say of the new sizes; a run saves a model of the old shape, zeros where something
is gone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.adapters import DOWN, GATE, PARTS, UP, AdaptedLinear
from mipipe.graphs.recipes.expansion import COLUMNS, ROWS, feed_forward_layers
from mipipe.graphs.serialize import STRICT

MASK, PROBE, PROJECTIONS = "unit_mask", "light_probe", ("q_proj", "k_proj", "v_proj", "o_proj")
Cuts = Mapping[str, tuple[tuple[int, list[int]], ...]]
"""What stays of tensors, by name: places along dimensions."""


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


@dataclass(frozen=True, slots=True)
class KeptUnits:
    """What stays, by layer: groups of heads, feed-forward units, and ranks of adapters (none: the adapter goes)."""

    FORMAT: ClassVar = "mipipe.light"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    heads: dict[str, list[int]] = field(default_factory=dict)
    units: dict[str, list[int]] = field(default_factory=dict)
    ranks: dict[str, list[int]] = field(default_factory=dict)


def choose_kept(model: nn.Module, importance: AdapterImportance | None = None, *, heads: float = 1 / 3,
                units: float = 1 / 3, modules: float = 0.75, ranks: float = 0.5, multiple: int = 1) -> KeptUnits:
    """What stays after pruning these shares: heads by layer, units and ranks over all layers, adapters by importance.

    A layer keeps a head, and as many units as are a multiple of ``multiple``, at least one multiple.
    """
    for name, share in (("heads", heads), ("units", units), ("modules", modules), ("ranks", ranks)):
        if not 0 <= share < 1:
            raise InputError(f"light-peft: {name}: found {share}, expected a share from 0 to below 1")
    kept = KeptUnits()
    for name, layer in attention_layers(model).items():
        groups = layer.k_proj.out_features // layer.head_dim
        scores = layer.o_proj.unit_mask.detach().abs().reshape(groups, -1).sum(1)
        order = scores.argsort(stable=True).tolist()
        kept.heads[name] = sorted(order[min(int(heads * groups), groups - 1):])
    layers = feed_forward_layers(model)
    masks = {name: layer.down_proj.unit_mask.detach().abs() for name, layer in layers.items()}
    flat = sorted((float(value), name, place) for name, mask in masks.items() for place, value in enumerate(mask))
    gone = {(name, place) for _, name, place in flat[:int(units * len(flat))]}
    for name, mask in masks.items():
        best = mask.argsort(descending=True, stable=True).tolist()
        count = sum((name, place) not in gone for place in best)
        kept.units[name] = sorted(best[:min(len(best), max(multiple, -(-count // multiple) * multiple))])
    if importance is not None:
        found = importance.modules()
        stay = sorted(found, key=lambda name: -found[name])[:max(1, len(found) - int(modules * len(found)))]
        every = importance.ranks()
        order = sorted((float(value), name, place) for name in stay for place, value in enumerate(every[name]))
        away = {(name, place) for _, name, place in order[:int(ranks * len(order))]}
        kept.ranks.update({name: [place for place in range(len(every[name])) if (name, place) not in away]
                           if name in stay else [] for name in found})
    return kept


def cuts_of(model: nn.Module, kept: KeptUnits) -> Cuts:
    """What stays of every weight and adapter that loses something, in the model as it is before."""
    found: dict[str, list[tuple[int, list[int]]]] = {}

    def cut(name: str, linear: Any, places: list[int], dimension: int) -> None:
        parts = {"weight": dimension, **({"bias": 0} if dimension == 0 and linear.bias is not None else {})}
        if isinstance(linear, AdaptedLinear):
            parts[UP if dimension == 0 else DOWN] = dimension
        for key, along in parts.items():
            found.setdefault(f"{name}.{key}", []).append((along, places))

    for name, layer in attention_layers(model).items():
        groups = layer.k_proj.out_features // layer.head_dim
        for item in PROJECTIONS if name in kept.heads else ():
            linear = getattr(layer, item)
            width = (linear.in_features if item == "o_proj" else linear.out_features) // groups
            places = [group * width + place for group in kept.heads[name] for place in range(width)]
            cut(f"{name}.{item}", linear, places, 1 if item == "o_proj" else 0)
    for name, layer in feed_forward_layers(model).items():
        for item in (*ROWS, *COLUMNS) if name in kept.units else ():
            cut(f"{name}.{item}", getattr(layer, item), kept.units[name], 1 if item in COLUMNS else 0)
    for name, places in kept.ranks.items():
        for key, along in ((DOWN, 0), (UP, 1), (GATE, 0)) if places else ():
            if hasattr(model.get_submodule(name), key):
                found.setdefault(f"{name}.{key}", []).append((along, places))
    return {name: tuple(items) for name, items in found.items()}


def cut(whole: Tensor, cuts: tuple[tuple[int, list[int]], ...]) -> Tensor:
    """What stays of a tensor."""
    for dimension, places in cuts:
        whole = whole.index_select(dimension, torch.tensor(places, device=whole.device))
    return whole


def uncut(part: Tensor, shape: Sequence[int], cuts: tuple[tuple[int, list[int]], ...]) -> Tensor:
    """A tensor of ``shape`` with what stayed at its places, zeros elsewhere."""
    for number in reversed(range(len(cuts))):
        dimension, places = cuts[number]
        sizes = [*part.shape]
        sizes[dimension] = shape[dimension]
        part = part.new_zeros(sizes).index_copy(dimension, torch.tensor(places, device=part.device), part)
    return part


@torch.no_grad()
def lighten(model: nn.Module, kept: KeptUnits, fold: bool = False) -> nn.Module:
    """The model, changed: what does not stay is gone, and so are the masks (``fold``: multiplied into the weights)."""
    masked = [layer.o_proj for layer in attention_layers(model).values()]
    for linear in (*masked, *(layer.down_proj for layer in feed_forward_layers(model).values())):
        _unmask(linear, fold)
    for name, items in cuts_of(model, kept).items():
        layer, _, key = name.rpartition(".")
        linear = model.get_submodule(layer)
        old = getattr(linear, key)
        setattr(linear, key, nn.Parameter(cut(old, items), old.requires_grad))
    for name, chosen in kept.ranks.items():
        linear = model.get_submodule(name)
        if not chosen:  # the layer is a plain one again
            for part in (*PARTS, PROBE):
                if hasattr(linear, part):
                    delattr(linear, part)
            linear.__class__ = nn.Linear
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    return model


def _unmask(linear: Any, fold: bool) -> None:
    if not hasattr(linear, MASK):
        return
    if fold:
        mask = linear.unit_mask.repeat_interleave(linear.unit_width)
        linear.weight.mul_(mask)
        if isinstance(linear, AdaptedLinear):
            linear.lora_A.mul_(mask)
    delattr(linear, MASK)
    linear.__class__ = type(linear).plain
