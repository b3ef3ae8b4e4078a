"""APEX (arXiv 2505.24241): neurons that matter little get a mixture of those that matter much, trained, then fused.

A stage: `ActivationVotes` watches some batches (or `mipipe.runtime.count_votes` writes a file of votes, which
``expand`` in ``train.yaml`` names); `expand` pairs the units with the fewest votes with those with the most, in every
feed-forward layer, and makes ``W_low <- diag(v) W_low + M W_high`` and ``W_high <- diag(s) W_high + D`` trainable
through v, s, D and a Monarch matrix M; a run under any plan trains them; `fuse` writes the weights and drops the rest,
as a run does when it saves. Rows of ``gate_proj`` and ``up_proj`` and the matching columns of ``down_proj`` are treated
alike.

Left out: attention heads. Legend: U units of a layer, k chosen, d the other side of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT, load

ROWS, COLUMNS = ("gate_proj", "up_proj"), ("down_proj",)
PREFIX = "apex_"
"""What names of an expansion's parts begin with."""
Pairs = Mapping[str, tuple[Sequence[int], Sequence[int]]]
"""The low and the high units of every feed-forward layer."""


@dataclass(frozen=True, slots=True)
class ExpandConfig:
    """One stage of APEX: ``votes`` is a file that `mipipe.runtime.count_votes` wrote."""

    __pydantic_config__: ClassVar = STRICT
    votes: str


@dataclass(frozen=True, slots=True)
class VoteFile:
    """Votes on disk: counts of every layer's units, and the stage that they are for."""

    FORMAT: ClassVar = "mipipe.votes"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    counts: dict[str, list[int]]
    ratio: float
    stage: int


def read_pairs(path: str | Path) -> Pairs:
    """The units that a file of votes pairs.

    Raises:
        InputError: no such file, or one that holds something else.
    """
    found = load(path, VoteFile)
    return {name: paired(torch.tensor(counts), found.ratio, found.stage) for name, counts in found.counts.items()}


def paired(counts: Tensor, ratio: float, stage: int) -> tuple[list[int], list[int]]:
    """The k units with the fewest votes, and as many with the most; the lowest goes with the highest."""
    order = counts.argsort(stable=True)
    most = chosen_units(len(order), ratio, stage)
    return order[:most].tolist(), order.flip(0)[:most].tolist()


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

    def pairs(self) -> Pairs:
        """The units of every layer, as `paired` has them."""
        return {name: paired(counts, self._ratio, self._stage) for name, counts in self.counts.items()}


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
        return expanded_weight(self.weight, {key: getattr(self, key) for key in PARTS}, self.side.dimension)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.expanded(), self.bias)


PARTS = ("apex_low", "apex_high", "apex_v", "apex_s", "apex_first", "apex_second", "apex_delta")


def expanded_weight(weight: Tensor, parts: Mapping[str, Tensor], dimension: int) -> Tensor:
    """A weight with its chosen units (rows or columns, by ``dimension``) mixed."""
    units = weight if dimension == 0 else weight.t()
    low, high = units[parts["apex_low"]], units[parts["apex_high"]]
    mixed = parts["apex_v"][:, None] * low + monarch(parts["apex_first"], parts["apex_second"], high)
    made = units.index_copy(0, parts["apex_low"], mixed).index_copy(
        0, parts["apex_high"], parts["apex_s"][:, None] * high + parts["apex_delta"])
    return made if dimension == 0 else made.t()


def is_expansion(name: str) -> bool:
    """Whether a parameter or buffer is part of an expansion."""
    return name.rpartition(".")[2].startswith(PREFIX)


def dimension_of(name: str) -> int:
    """Whether units are rows (0) or columns (1) of the weight that a name is of."""
    return 0 if name.split(".")[-2] in ROWS else 1


def first_value(name: str, like: Tensor) -> Tensor:
    """What a trained part of an expansion starts with: the mixture that changes nothing."""
    part = name.rpartition(".")[2]
    if part == "apex_first":
        return torch.eye(like.shape[-1], dtype=like.dtype).expand(like.shape).clone()
    return (torch.ones if part in ("apex_v", "apex_s") else torch.zeros)(like.shape, dtype=like.dtype)


def monarch(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """M x for x [k,d]: blocks ``first`` [b,b,b] along b groups of b rows, a transposition of the groups, and blocks
    ``second`` [b,b,b] (Dao et al., Monarch, arXiv 2204.00595); rows beyond k are zeros."""
    side, rows = first.shape[0], x.shape[0]
    padded = nn.functional.pad(x, (0, 0, 0, side * side - rows)).reshape(side, side, x.shape[1])
    inner = torch.bmm(first, padded).transpose(0, 1)
    made: Tensor = torch.bmm(second, inner).transpose(0, 1).reshape(side * side, x.shape[1])[:rows]
    return made


def expand(model: nn.Module, votes: ActivationVotes | Pairs, device: torch.device | str | None = None) -> nn.Module:
    """The model, changed: every feed-forward layer's chosen units trainable through their mixture, all else frozen. Its
    output is what it was. ``device``: of the numbers of the chosen units; None: the weights'.

    Raises:
        InputError: the votes are of another model, or too few units are chosen.
    """
    pairs = votes.pairs() if isinstance(votes, ActivationVotes) else votes
    layers = feed_forward_layers(model)
    for name, layer in layers.items():
        units, chosen = layer.down_proj.in_features, [unit for side in pairs.get(name, ()) for unit in side]
        if name in pairs and not chosen:
            raise InputError(f"apex: {name} has {units} units, too few for this ratio and stage")
        if name not in pairs or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < units:
            raise InputError(f"apex: the votes are of another model: {name} has {units} units, of which they choose"
                             f" {chosen[:4] or 'none'}")
    model.requires_grad_(False)
    for name, layer in layers.items():
        low, high = (torch.tensor(side, device=device or layer.down_proj.weight.device) for side in pairs[name])
        for item in (*ROWS, *COLUMNS):
            _expand(getattr(layer, item), low, high, _Side(0 if item in ROWS else 1))
    return model


def _expand(linear: Any, low: Tensor, high: Tensor, side: _Side) -> None:
    count, like = len(low), linear.weight
    across = like.shape[1 - side.dimension]
    block = math.isqrt(count - 1) + 1
    sizes = {"apex_v": (count,), "apex_s": (count,), "apex_first": (block,) * 3, "apex_second": (block,) * 3,
             "apex_delta": (count, across)}
    linear.__class__, linear.side = ExpandedLinear, side
    for key, size in sizes.items():
        made = first_value(f"{key}.{key}", like.new_empty(size, device="meta")).to(like.device)
        linear.register_parameter(key, nn.Parameter(made))
    linear.register_buffer("apex_low", low.clone(), persistent=False)
    linear.register_buffer("apex_high", high.clone(), persistent=False)


@torch.no_grad()
def fuse(model: nn.Module) -> nn.Module:
    """The model, changed back: expanded layers are plain ones with the weights that they computed with."""
    for part in model.modules():
        if isinstance(part, ExpandedLinear):
            part.weight.copy_(part.expanded())
            for key in [key for key in (*part._parameters, *part._buffers) if key.startswith(PREFIX)]:
                delattr(part, key)
            part.__class__ = nn.Linear  # type: ignore[assignment]
    return model.requires_grad_(True)
