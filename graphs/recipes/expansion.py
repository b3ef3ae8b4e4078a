"""APEX (arXiv 2505.24241): neurons that matter little get a mixture of those that matter much, trained, then fused.

A stage: `ActivationVotes` watches some batches; `expand` pairs the units with the fewest votes with those with the
most, in every feed-forward layer, and makes ``W_low <- diag(v) W_low + M W_high`` and ``W_high <- diag(s) W_high + D``
trainable through v, s, D and a Monarch matrix M; a run under any plan trains them; `fuse` writes the weights and drops
the rest.
Rows of ``gate_proj`` and ``up_proj`` and the matching columns of ``down_proj`` are treated alike.

Left out: attention heads. Legend: U units of a layer, k chosen, d the other side of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError

ROWS, COLUMNS = ("gate_proj", "up_proj"), ("down_proj",)


def chosen_units(units: int, ratio: float, stage: int) -> int:
    """k = floor(ratio U / 2^(stage + 1)), ``stage`` from 0.

    Raises:
        InputError: low and high units would not be apart.
    """
    if not 0 < ratio <= 1 or stage < 0:
        raise InputError(f"apex: ratio {ratio}, stage {stage}; expected a ratio above 0, at most 1, and a stage from 0")
    return int(ratio * units / 2 ** (stage + 1))


def feed_forward_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with gate_proj, up_proj and down_proj, by name.

    Raises:
        InputError: there are none.
    """
    found = {name: part for name, part in model.named_modules()
             if all(isinstance(getattr(part, item, None), nn.Linear) for item in (*ROWS, *COLUMNS))}
    if not found:
        raise InputError(f"{type(model).__name__}: has no feed-forward layers with {', '.join((*ROWS, *COLUMNS))}")
    return found


class ActivationVotes:
    """Counts, per layer and unit [U], how often a unit's activation was among the k largest of a batch, less how often
    among the k smallest. Inside ``with`` it watches the model's forward passes."""

    def __init__(self, model: nn.Module, ratio: float = 0.375, stage: int = 0) -> None:
        self._layers = feed_forward_layers(model)
        self._ratio, self._stage = ratio, stage
        self.counts = {name: torch.zeros(layer.down_proj.in_features, dtype=torch.int64)
                       for name, layer in self._layers.items()}
        self._handles: list[Any] = []

    def __enter__(self) -> ActivationVotes:
        for name, layer in self._layers.items():
            def watch(_: Any, given: tuple[Tensor, ...], name: str = name) -> None:
                self.add(name, given[0].detach().reshape(-1, given[0].shape[-1]).norm(dim=0))

            self._handles.append(layer.down_proj.register_forward_pre_hook(watch))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def add(self, name: str, norms: Tensor) -> None:
        """Count a batch's activation norms [U] of a layer."""
        most = chosen_units(len(norms), self._ratio, self._stage)
        order = norms.cpu().argsort(stable=True)
        self.counts[name][order[:most]] -= 1
        self.counts[name][order[len(order) - most:]] += 1

    def pairs(self, name: str) -> tuple[Tensor, Tensor]:
        """The k units with the fewest votes, and as many with the most [k]; the lowest goes with the highest."""
        order = self.counts[name].argsort(stable=True)
        most = chosen_units(len(order), self._ratio, self._stage)
        return order[:most], order.flip(0)[:most]


@dataclass(frozen=True, slots=True)
class _Side:
    """Whether a layer's units are rows (0) or columns (1) of its weight."""

    dimension: int


class ExpandedLinear(nn.Linear):
    """A linear layer whose low and high units are mixed; made of a plain one by `expand`."""

    apex_low: Tensor
    apex_high: Tensor
    apex_v: nn.Parameter
    apex_s: nn.Parameter
    apex_first: nn.Parameter
    apex_second: nn.Parameter
    apex_delta: nn.Parameter
    side: _Side

    def expanded(self) -> Tensor:
        """The weight that the layer computes with."""
        units = self.weight if self.side.dimension == 0 else self.weight.t()
        low, high = units[self.apex_low], units[self.apex_high]
        mixed = self.apex_v[:, None] * low + monarch(self.apex_first, self.apex_second, high)
        made = units.index_copy(0, self.apex_low, mixed).index_copy(
            0, self.apex_high, self.apex_s[:, None] * high + self.apex_delta)
        return made if self.side.dimension == 0 else made.t()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.expanded(), self.bias)


def monarch(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """M x for x [k,d]: blocks ``first`` [b,b,b] along b groups of b rows, a transposition of the groups, and blocks
    ``second`` [b,b,b] (Dao et al., Monarch, arXiv 2204.00595); rows beyond k are zeros."""
    side, rows = first.shape[0], x.shape[0]
    padded = nn.functional.pad(x, (0, 0, 0, side * side - rows)).reshape(side, side, x.shape[1])
    inner = torch.bmm(first, padded).transpose(0, 1)
    made: Tensor = torch.bmm(second, inner).transpose(0, 1).reshape(side * side, x.shape[1])[:rows]
    return made


def expand(model: nn.Module, votes: ActivationVotes) -> nn.Module:
    """The model, changed: every feed-forward layer's chosen units trainable through their mixture, all else frozen. Its
    output is what it was."""
    model.requires_grad_(False)
    for name, layer in feed_forward_layers(model).items():
        low, high = votes.pairs(name)
        if not len(low):
            raise InputError(f"apex: {name} has {layer.down_proj.in_features} units, too few for this ratio and stage")
        for item in (*ROWS, *COLUMNS):
            _expand(getattr(layer, item), low, high, _Side(0 if item in ROWS else 1))
    return model


def _expand(linear: Any, low: Tensor, high: Tensor, side: _Side) -> None:
    count, like = len(low), linear.weight
    across = like.shape[1 - side.dimension]
    block = math.isqrt(count - 1) + 1
    first = torch.eye(block, dtype=like.dtype, device=like.device).expand(block, -1, -1).clone()
    made: Mapping[str, Tensor] = {
        "apex_v": like.new_ones(count), "apex_s": like.new_ones(count), "apex_first": first,
        "apex_second": like.new_zeros(block, block, block), "apex_delta": like.new_zeros(count, across)}
    linear.__class__, linear.side = ExpandedLinear, side
    for key, item in made.items():
        linear.register_parameter(key, nn.Parameter(item))
    linear.register_buffer("apex_low", low.to(like.device))
    linear.register_buffer("apex_high", high.to(like.device))


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """The model, changed back: expanded layers are plain ones with the weights that they computed with."""
    for part in model.modules():
        if isinstance(part, ExpandedLinear):
            part.weight.copy_(part.expanded())
            for key in [key for key in (*part._parameters, *part._buffers) if key.startswith("apex_")]:
                delattr(part, key)
            part.__class__ = nn.Linear  # type: ignore[assignment]
    return model.requires_grad_(True)
