"""Light-PEFT (arXiv 2406.03792): after a short first stage the model and its adapters lose what they need least.

By what the first stage learned (`mipipe.graphs.recipes.importance`), `choose_kept` and `lighten` remove heads (layer by
layer), units (over all layers), adapters and their ranks for good. The model is smaller then: it is captured again,
planned again, and trained on. Heads that share keys and values go together.

Left out: what a configuration would say of the new sizes; a run saves a model of the old shape, zeros where something
is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.adapters import DOWN, GATE, PARTS, UP, AdaptedLinear
from mipipe.graphs.recipes.expansion import COLUMNS, ROWS, feed_forward_layers
from mipipe.graphs.recipes.importance import MASK, PROBE, PROJECTIONS, AdapterImportance, attention_layers
from mipipe.graphs.serialize import STRICT

Cuts = Mapping[str, tuple[tuple[int, list[int]], ...]]
"""What stays of tensors, by name: places along dimensions."""


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
