"""Groups of a decoder's units that share one order, and how wide they are when two models' units are partly kept apart.

A decoder's weights may be permuted without changing what it computes: the residual stream (one order for the whole
model), the hidden units of every MLP, and the heads of every attention (groups of query heads with their key and value
head, and query heads inside a group). PLeaS (arXiv 2407.02447) matches two models' units group by group. In *partial
merging* only the units that fit best are merged, the others of both models stand side by side.

Widened are MLPs and heads, each by one share in all layers, so that the result is a model of the same class with a
larger ``intermediate_size`` and more heads. The residual stream stays one to one: its normalisations are over all of
it, and those of two streams are not the one of both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.graph import MergeUnit

METHOD = "pleas"
_READS = re.compile(r"\.(q|k|v|gate|up)_proj\.weight$|lm_head\.weight$")
_WRITES = re.compile(r"\.(o|down)_proj\.(weight|bias)$")
TABLE, _NORM = re.compile(r"embed_tokens\.weight$"), re.compile(r"(?<![qk]_)(layer)?norm\.weight$")
_OTHER = re.compile(r"\.(q|k|v|gate|up)_proj\.bias$|\.[qk]_norm\.weight$")
_KNOWN = (_READS, _WRITES, TABLE, _NORM, _OTHER)
WHOLE_HEADS = frozenset({"llama", "arcee", "cwm", "gemma2", "gemma3_text", "jais2", "hyperclovax"})
"""Model types whose config wants hidden_size to be a multiple of the number of heads, whatever their width is."""
Group = tuple[str, int]
"""A group of units: ``("residual", -1)``, ``("mlp", layer)`` or ``("heads", layer)``."""


@dataclass(frozen=True)
class UnitGroups:
    """Which side of which tensor each group orders, and how a decoder's heads are grouped."""

    units: Mapping[str, MergeUnit]
    heads: int
    groups: int
    width: int
    """Features of a head."""

    @property
    def layers(self) -> list[int]:
        return sorted({unit.layer for unit in self.units.values() if unit.layer is not None})

    def sides(self, unit: MergeUnit) -> tuple[Group | None, Group | None]:
        """The groups that order a tensor's rows and its columns."""
        name, layer = unit.name, -1 if unit.layer is None else unit.layer
        residual: Group = ("residual", -1)
        inner: Group = ("mlp" if re.search(r"(gate|up|down)_proj", name) else "heads", layer)
        if _NORM.search(name):
            return residual, None
        if TABLE.search(name) or name.endswith("lm_head.weight"):
            return None, residual
        if _WRITES.search(name):
            return residual, inner if len(unit.shape) > 1 else None
        if re.search(r"[qk]_norm", name):  # of every head alike, or (OLMo 2) over all heads together
            return None if unit.shape == (self.width,) else inner, None
        return inner, residual if len(unit.shape) > 1 else None

    def names(self) -> list[Group]:
        """All groups, in the order in which they are matched."""
        return [("residual", -1), *((kind, layer) for layer in self.layers for kind in ("mlp", "heads"))]


def unit_groups(units: Sequence[MergeUnit], config: Mapping[str, Any], where: str = "recipe") -> UnitGroups:
    """The groups of the units that PLeaS merges.

    Raises:
        InputError: a tensor that Llama's family does not have, or a config without sizes.
    """
    odd = next((unit.name for unit in units if unit.method == METHOD
                and not any(pattern.search(unit.name) for pattern in _KNOWN)), None)
    if odd is not None:
        raise InputError(f"{where}: {METHOD} orders the units of decoders with the names of Llama's family; found"
                         f" the tensor {odd}")
    text = _text(config)
    lacking = next((key for key in ("num_attention_heads", "hidden_size", "intermediate_size")
                    if not isinstance(text.get(key), int)), None)
    if lacking is not None:
        raise InputError(f"{where}: {METHOD} needs the first model's config.json, which has no {lacking}")
    heads = int(text["num_attention_heads"])
    return UnitGroups({unit.name: unit for unit in units if unit.method == METHOD}, heads,
                      int(text.get("num_key_value_heads") or heads),
                      int(text.get("head_dim") or text["hidden_size"] // heads))


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def apart_within(budget: float, fixed: int, mlp: int, heads: int, worth_heads: float, choices: Sequence[float]
                 ) -> tuple[float, float]:
    """The shares of MLP units and of heads kept apart that lose least within a budget.

    Maximises ``q_mlp + worth_heads q_heads`` where ``fixed + mlp (1 + q_mlp) + heads (1 + q_heads)`` is at most
    ``budget`` times its value at 0; ``choices`` are the shares that heads can have. PLeaS' program with the residual
    stream's share 0, so that for each share of heads the best one of MLP units is known.
    """
    room = (budget - 1) * (fixed + mlp + heads) * (1 + 1e-12)
    found = [(min(1.0, (room - heads * share) / max(1, mlp)), share) for share in choices if heads * share <= room]
    return max(found, key=lambda shares: (shares[0] + worth_heads * shares[1], shares[0]))


@dataclass(frozen=True)
class Apart:
    """How many hidden units of every MLP, and how many groups of heads, are kept apart."""

    units: int
    groups: int


def apart(groups: UnitGroups, config: Mapping[str, Any], where: str = "recipe") -> Apart:
    """What the recipe's parameters say.

    Raises:
        InputError: other values for some tensors, a budget beside shares, or a number of heads that no config has.
    """
    keys = ("separate", "separate_heads", "budget", "worth_heads")
    values: list[tuple[Any, ...]] = [tuple(unit.parameters.get(key) for key in keys) for unit in groups.units.values()]
    if any(value != values[0] for value in values):
        raise InputError(f"{where}: {METHOD}: {', '.join(keys)} are of the whole model; found several values")
    mlp, heads, budget, worth = values[0] if values else (0.0, 0.0, None, 1.0)
    text, inside = _text(config), groups.heads // groups.groups
    whole = text.get("model_type") in WHOLE_HEADS
    counts = [count for count in range(groups.groups + 1)
              if not whole or not int(text["hidden_size"]) % (groups.heads + count * inside)]
    if budget is not None:
        if mlp or heads:
            raise InputError(f"{where}: {METHOD}: budget finds separate and separate_heads; give one or the other")
        costs = {"mlp": 0, "heads": 0, "residual": 0}
        for unit in groups.units.values():
            if len(unit.shape) > 1 and not TABLE.search(unit.name):
                kinds = [side[0] for side in groups.sides(unit) if side is not None]
                costs[next((kind for kind in kinds if kind != "residual"), "residual")] += math.prod(
                    unit.models[0].tensor.shape)
        mlp, heads = apart_within(budget, costs["residual"], costs["mlp"], costs["heads"], worth,
                                  [count / groups.groups for count in counts])
    # a share that was computed may be a rounding error below a whole number
    found = Apart(math.floor(mlp * int(text["intermediate_size"]) + 1e-9), math.floor(heads * groups.groups + 1e-9))
    if found.groups not in counts:
        raise InputError(f"{where}: {METHOD}: separate_heads: {heads} makes {groups.heads + found.groups * inside}"
                         f" heads, of which a {text.get('model_type')} config wants hidden_size"
                         f" {text['hidden_size']} to be a multiple; expected"
                         f" {', '.join(f'{count / groups.groups:.6g}' for count in counts)}")
    return found


def widened(units: Sequence[MergeUnit], config: dict[str, Any], source: Mapping[str, Any], where: str
            ) -> tuple[tuple[MergeUnit, ...], dict[str, Any]]:
    """Units with the shapes that partial merging gives them, and the config.json of such a model.

    Raises:
        InputError: as of `unit_groups` and `apart`; heads that are normalised together, or layers of another method.
    """
    if not any(unit.method == METHOD for unit in units):
        return tuple(units), config
    groups = unit_groups(units, source, where)
    more = apart(groups, source, where)
    if not more.units and not more.groups:
        return tuple(units), config
    other = next((unit.name for unit in units if unit.method != METHOD and unit.layer is not None), None)
    if other is not None:
        raise InputError(f"{where}: {METHOD} widens all layers alike; found another method for {other}")
    inside = groups.heads // groups.groups
    added = {"mlp": more.units, "heads": more.groups}
    found = []
    for unit in units:
        shape = list(unit.shape)
        sides = groups.sides(unit) if unit.method == METHOD else ()
        for axis, side in enumerate(sides):
            if side is None or not added.get(side[0]):
                continue
            if unit.name.endswith("_norm.weight"):
                raise InputError(f"{where}: {METHOD}: {unit.name} normalises all heads together, which heads kept apart"
                                 " would change; leave separate_heads 0")
            query = shape[axis] == groups.heads * groups.width
            each = 1 if side[0] == "mlp" else groups.width * (inside if query else 1)
            shape[axis] += added[side[0]] * each
        changed = tuple(shape) != unit.shape
        found.append(replace(unit, shape=tuple(shape), widened=True) if changed else unit)
    return tuple(found), _config(config, groups, more)


def _config(config: Mapping[str, Any], groups: UnitGroups, more: Apart) -> dict[str, Any]:
    text = dict(_text(config))
    text["intermediate_size"] = int(text["intermediate_size"]) + more.units
    text |= {"num_attention_heads": groups.heads + more.groups * (groups.heads // groups.groups),
             "num_key_value_heads": groups.groups + more.groups, "head_dim": groups.width}
    return {**config, "text_config": text} if isinstance(config.get("text_config"), dict) else text
