"""PLeaS (arXiv 2407.02447): the units of a second model put in the order of the first's before the two are merged.

Orders of the groups of units (`mipipe.graphs.merging.unit_groups`) are found by matching, from weights (coordinate
descent over the groups, at most 100 rounds) or from activations (inputs of the maps that read a group, both models on
the same tokens). The merge then reads the second model in these orders;
`mipipe.runtime.merge.methods.closed_forms.pleas` does the least squares.

Partial merging keeps the units with the lowest matched scores apart: both models are read into the wide shape, the
units merged first, then the first model's others, then the second's. In rows that are merged each model stands with
zeros for the other's separate columns; a row of one model's own stands in both readings, so that every average is the
block form of the paper (merged from separate: half; separate from separate: zero; separate rows: as they are). Exactly
as many units are kept apart as asked for, where the paper's quantile merges all that tie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mipipe.graphs.merging.checkpoints.tensor_classes import TableRows
from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.merging.unit_groups import METHOD, TABLE, Group, UnitGroups, apart, unit_groups
from mipipe.runtime.calibration.results import Results
from mipipe.runtime.merge.reordering import Reordering
from mipipe.runtime.merge.sources import Surroundings, UnitPiece

ROUNDS = 100
"""Rounds of coordinate descent, at most."""


@dataclasses.dataclass(frozen=True)
class Matching:
    """For every unit of the first model the second's that it is matched with, and how well they fit, ``[n]`` each."""

    order: Tensor
    scores: Tensor


def assignment(scores: Tensor) -> Tensor:
    """For each unit of the first model the second's that it is matched with: the largest sum of ``scores`` ``[n,
    n]``."""
    from scipy.optimize import linear_sum_assignment
    _, columns = linear_sum_assignment(scores.double().numpy(), maximize=True)
    return torch.from_numpy(columns)


def features(units: UnitGroups, order: Tensor, size: int, kind: str) -> Tensor:
    """A group's order as indices of a tensor's side of ``size``: heads are runs of features, keys and values have one
    head for each group of query heads. Units that are not there (-1) have no features (-1)."""
    if kind != "heads":
        return order
    inside = units.heads // units.groups
    if size == units.heads * units.width:
        heads = order
    else:  # a key or value head for each group: where its first query head came from
        heads = torch.div(order[::inside], inside, rounding_mode="floor")
    places = heads[:, None] * units.width + torch.arange(units.width)[None]
    return torch.where(heads[:, None] < 0, -1, places).flatten()


def match_heads(units: UnitGroups, scores: Tensor) -> Tensor:
    """Query heads of the second model in the first's order, groups together: ``scores`` ``[heads, heads]``."""
    inside = units.heads // units.groups
    blocks = scores.reshape(units.groups, inside, units.groups, inside).permute(0, 2, 1, 3)
    best = [[assignment(block) for block in row] for row in blocks]
    totals = torch.tensor([[float(blocks[one, other].gather(1, order[:, None]).sum())
                            for other, order in enumerate(row)] for one, row in enumerate(best)])
    return torch.cat([best[one][other] + other * inside for one, other in enumerate(assignment(totals).tolist())])


def per_head(units: UnitGroups, scores: Tensor) -> Tensor:
    """Scores of features ``[n, n]`` summed to scores of heads, each feature against its own in the other head."""
    heads = len(scores) // units.width
    return torch.einsum("aibi->ab", scores.reshape(heads, units.width, heads, units.width))


def matched(units: UnitGroups, group: Group, scores: Tensor) -> Matching:
    """The matching of a group's units by their scores ``[n, n]``."""
    order = match_heads(units, scores) if group[0] == "heads" else assignment(scores)
    return Matching(order, scores.gather(1, order[:, None])[:, 0])


def by_activations(units: UnitGroups, joint: Callable[[str], Tensor]) -> dict[Group, Matching]:
    """Orders from the second moments of both models' inputs: ``joint(name)`` is ``[2 n, 2 n]`` of the map ``name``."""
    totals: dict[Group, Tensor] = {}
    for name, unit in units.units.items():
        columns = units.sides(unit)[1]
        if columns is None or TABLE.search(name):
            continue
        both = joint(name)
        if not both.numel():
            continue
        size = len(both) // 2
        cross = both[:size, size:]
        cross = per_head(units, cross) if columns[0] == "heads" else cross
        totals[columns] = totals[columns] + cross if columns in totals else cross
    return {group: matched(units, group, scores) for group, scores in totals.items()}


def by_weights(units: UnitGroups, read: Callable[[int, str], Tensor]) -> dict[Group, Matching]:
    """Orders under which the weights of both models agree most, group by group until none changes."""
    found: dict[Group, Matching] = {}
    for _ in range(ROUNDS):
        changed = False
        for group in units.names():
            scores = _scores(units, group, found, read)
            if scores is None:
                continue
            made = matched(units, group, scores)
            changed |= group not in found or not torch.equal(made.order, found[group].order)
            found[group] = made
        if not changed:
            break
    return found


def _scores(units: UnitGroups, group: Group, known: Mapping[Group, Matching],
            read: Callable[[int, str], Tensor]) -> Tensor | None:
    """How well each unit of the first model fits each of the second, all else as it is known."""
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
        if rest in known and rest is not None:
            other = other[:, features(units, known[rest].order, other.shape[1], rest[0])]
        part = one @ other.T
        if group[0] == "heads":
            part = per_head(units, part)
            if len(part) != units.heads:  # a key or value head counts for every query head of its group
                inside = units.heads // len(part)
                part = part.repeat_interleave(inside, 0).repeat_interleave(inside, 1)
        total = part if total is None else total + part
    return total


def side_by_side(units: UnitGroups, group: Group, found: Matching, count: int) -> tuple[Tensor, Tensor]:
    """Both models' units in a group of which ``count`` (of heads: groups of them) are kept apart: ``[n + count]`` each,
    -1 where a unit is the other model's alone."""
    inside = units.heads // units.groups if group[0] == "heads" else 1
    scores = found.scores.reshape(-1, inside).sum(1)
    best = torch.argsort(scores, descending=True, stable=True)
    together, alone = (part.sort().values for part in (best[:len(best) - count], best[len(best) - count:]))

    def members(numbers: Tensor) -> Tensor:
        return (numbers[:, None] * inside + torch.arange(inside)[None]).flatten()

    together, alone = members(together), members(alone)
    none = torch.full_like(alone, -1)
    return torch.cat([together, alone, none]), torch.cat([found.order[together], none, found.order[alone]])


def ordered(graph: MergeGraph, around: Surroundings, results: Results | None) -> Surroundings:
    """Surroundings that read the second model in the first's order; nothing to do for other methods."""
    unit = next((unit for unit in graph.units if unit.method == METHOD), None)
    if unit is None:
        return around
    units = unit_groups(graph.units, graph.source_config)
    first, second = (item.model for item in unit.models)

    def read(number: int, name: str) -> Tensor:
        made = units.units[name]
        return UnitPiece(made, TableRows(name, 0, 0), around).whole(made.models[number])

    if unit.parameters["matching"] == "weights":
        known = by_weights(units, read)
    else:
        assert results is not None
        known = by_activations(units, lambda name: results.fields("joint", second, name).get("sum", torch.zeros(0, 0)))
    more = apart(units, graph.source_config)
    count = {"mlp": more.units, "heads": more.groups}
    places = {group: side_by_side(units, group, item, count.get(group[0], 0)) for group, item in known.items()}
    found = dict(around.orders)
    for name, made in units.units.items():
        for number in (0, 1) if made.widened else (1,):
            stored = (*made.models[number].tensor.shape, 1)
            maps: list[dict[int, Tensor]] = []
            for axis, group in enumerate(units.sides(made)):
                known_side = group is not None and group in places
                maps.append({0: features(units, places[group][number], stored[axis], group[0])}
                            if known_side and group is not None else {})
            found[(first, second)[number], name] = Reordering(None, stored[0], maps[0], maps[1])
    return dataclasses.replace(around, orders=found)
