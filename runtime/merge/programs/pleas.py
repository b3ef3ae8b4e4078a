"""PLeaS (arXiv 2407.02447): the units of a second model put in the order of the first's before the two are merged.

A decoder's weights may be permuted without changing what it computes: the residual stream (one order for the whole
model), the hidden units of every MLP, and the heads of every attention (groups of query heads with their key and value
head, and query heads inside a group). Orders are found by matching, from weights (coordinate descent over these groups,
at most 100 rounds) or from activations (inputs of the maps that read a group, both models on the same tokens). The
merge then reads the second model in these orders; `mipipe.runtime.merge.methods.closed_forms.pleas` does the least
squares.

Units stay merged one to one (the paper's partial merging with wider layers is not there), and decoders have the names
of Llama's family.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.graph import MergeGraph, MergeUnit
from mipipe.graphs.merging.tensor_classes import TableRows
from mipipe.runtime.calibration.results import Results
from mipipe.runtime.merge.sources import Reordering, Surroundings, UnitPiece

METHOD = "pleas"
ROUNDS = 100
"""Rounds of coordinate descent, at most."""
_READS = re.compile(r"\.(q|k|v|gate|up)_proj\.weight$|lm_head\.weight$")
_WRITES = re.compile(r"\.(o|down)_proj\.(weight|bias)$")
_TABLE, _NORM = re.compile(r"embed_tokens\.weight$"), re.compile(r"(?<![qk]_)(layer)?norm\.weight$")
_OTHER = re.compile(r"\.(q|k|v|gate|up)_proj\.bias$|\.[qk]_norm\.weight$")
_KNOWN = (_READS, _WRITES, _TABLE, _NORM, _OTHER)
Group = tuple[str, int]
"""A group of units: ``("residual", -1)``, ``("mlp", layer)`` or ``("heads", layer)``."""


def assignment(scores: Tensor) -> Tensor:
    """For each unit of the first model the second's that it is matched with: the largest sum of ``scores`` ``[n,
    n]``."""
    from scipy.optimize import linear_sum_assignment
    _, columns = linear_sum_assignment(scores.double().numpy(), maximize=True)
    return torch.from_numpy(columns)


class UnitGroups:
    """The groups of a decoder: which side of which tensor each of them orders."""

    def __init__(self, graph: MergeGraph, where: str = "recipe") -> None:
        odd = next((unit.name for unit in graph.units if unit.method == METHOD
                    and not any(pattern.search(unit.name) for pattern in _KNOWN)), None)
        if odd is not None:
            raise InputError(f"{where}: {METHOD} orders the units of decoders with the names of Llama's family; found"
                             f" the"
                             f" tensor {odd}")
        config: Any = graph.source_config
        text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        self.heads = int(text["num_attention_heads"])
        self.groups = int(text.get("num_key_value_heads") or self.heads)
        self.width = int(text.get("head_dim") or text["hidden_size"] // self.heads)
        self.units = {unit.name: unit for unit in graph.units if unit.method == METHOD}
        self.layers = sorted({unit.layer for unit in self.units.values() if unit.layer is not None})

    def sides(self, unit: MergeUnit) -> tuple[Group | None, Group | None]:
        """The groups that order a tensor's rows and its columns."""
        name, layer = unit.name, -1 if unit.layer is None else unit.layer
        residual: Group = ("residual", -1)
        inner: Group = ("mlp" if re.search(r"(gate|up|down)_proj", name) else "heads", layer)
        if _NORM.search(name):
            return residual, None
        if _TABLE.search(name) or name.endswith("lm_head.weight"):
            return None, residual
        if _WRITES.search(name):
            return residual, inner if len(unit.shape) > 1 else None
        if re.search(r"[qk]_norm", name):
            return None, None
        return inner, residual if len(unit.shape) > 1 else None

    def names(self) -> list[Group]:
        """All groups, in the order in which they are matched."""
        return [("residual", -1), *((kind, layer) for layer in self.layers for kind in ("mlp", "heads"))]

    def rows(self, order: Tensor, size: int, kind: str) -> Tensor:
        """A group's order as indices of a tensor's side of ``size``: heads are runs of features, keys and values have
        one head for each group of query heads."""
        if kind != "heads":
            return order
        if size == self.heads * self.width:
            heads = order
        else:  # a key or value head for each group: where its first query head came from
            heads = order[::self.heads // self.groups] // (self.heads // self.groups)
        return (heads[:, None] * self.width + torch.arange(self.width)[None]).flatten()

    def match_heads(self, scores: Tensor) -> Tensor:
        """Query heads of the second model in the first's order, groups together: ``scores`` ``[heads, heads]``."""
        inside = self.heads // self.groups
        blocks = scores.reshape(self.groups, inside, self.groups, inside).permute(0, 2, 1, 3)
        best = [[assignment(block) for block in row] for row in blocks]
        totals = torch.tensor([[float(blocks[one, other].gather(1, order[:, None]).sum())
                                for other, order in enumerate(row)] for one, row in enumerate(best)])
        return torch.cat([best[one][other] + other * inside for one, other in enumerate(assignment(totals).tolist())])

    def per_head(self, scores: Tensor) -> Tensor:
        """Scores of features ``[n, n]`` summed to scores of heads, each feature against its own in the other head."""
        heads = len(scores) // self.width
        return torch.einsum("aibi->ab", scores.reshape(heads, self.width, heads, self.width))


def by_activations(units: UnitGroups, joint: Callable[[str], Tensor]) -> dict[Group, Tensor]:
    """Orders from the second moments of both models' inputs: ``joint(name)`` is ``[2 n, 2 n]`` of the map ``name``."""
    found: dict[Group, Tensor] = {}
    totals: dict[Group, Tensor] = {}
    for name, unit in units.units.items():
        columns = units.sides(unit)[1]
        if columns is None or _TABLE.search(name):
            continue
        both = joint(name)
        if not both.numel():
            continue
        size = len(both) // 2
        cross = both[:size, size:]
        cross = units.per_head(cross) if columns[0] == "heads" else cross
        totals[columns] = totals[columns] + cross if columns in totals else cross
    for group, scores in totals.items():
        found[group] = units.match_heads(scores) if group[0] == "heads" else assignment(scores)
    return found


def by_weights(units: UnitGroups, read: Callable[[int, str], Tensor]) -> dict[Group, Tensor]:
    """Orders under which the weights of both models agree most, group by group until none changes."""
    found: dict[Group, Tensor] = {}
    for _ in range(ROUNDS):
        changed = False
        for group in units.names():
            scores = _scores(units, group, found, read)
            if scores is None:
                continue
            order = units.match_heads(scores) if group[0] == "heads" else assignment(scores)
            changed |= group not in found or not torch.equal(order, found[group])
            found[group] = order
        if not changed:
            break
    return found


def _scores(units: UnitGroups, group: Group, orders: Mapping[Group, Tensor],
            read: Callable[[int, str], Tensor]) -> Tensor | None:
    """How well each unit of the first model fits each of the second, all else as ``orders`` have it."""
    total: Tensor | None = None
    for name, unit in units.units.items():
        rows, columns = units.sides(unit)
        if group not in (rows, columns):
            continue
        one, other = (read(number, name).double() for number in (0, 1))
        one, other = (value[:, None] if value.dim() == 1 else value for value in (one, other))
        if group == columns:
            one, other, rest = one.T, other.T, rows
        else:
            rest = columns
        if rest in orders and rest is not None:
            other = other[:, units.rows(orders[rest], other.shape[1], rest[0])]
        part = one @ other.T
        if group[0] == "heads":
            part = units.per_head(part)
            if len(part) != units.heads:  # a key or value head counts for every query head of its group
                inside = units.heads // len(part)
                part = part.repeat_interleave(inside, 0).repeat_interleave(inside, 1)
        total = part if total is None else total + part
    return total


def ordered(graph: MergeGraph, around: Surroundings, results: Results | None) -> Surroundings:
    """Surroundings that read the second model in the first's order; nothing to do for other methods."""
    unit = next((unit for unit in graph.units if unit.method == METHOD), None)
    if unit is None:
        return around
    units = UnitGroups(graph)
    second = unit.models[1].model

    def read(number: int, name: str) -> Tensor:
        made = units.units[name]
        return UnitPiece(made, TableRows(name, 0, 0), around).whole(made.models[number])

    if unit.parameters["matching"] == "weights":
        orders = by_weights(units, read)
    else:
        assert results is not None
        orders = by_activations(units, lambda name: results.fields("joint", second, name).get("sum", torch.zeros(0, 0)))
    found = dict(around.orders)
    for name, made in units.units.items():
        sides = [None if group is None or group not in orders else units.rows(orders[group], size, group[0])
                 for group, size in zip(units.sides(made), (*made.shape, 1)[:2], strict=True)]
        found[second, name] = Reordering(None, made.shape[0], {} if sides[0] is None else {0: sides[0]},
                                         {} if sides[1] is None else {0: sides[1]})
    return dataclasses.replace(around, orders=found)
