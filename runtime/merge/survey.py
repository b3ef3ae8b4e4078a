"""Statistics over more than one tensor: a layer (FRANK) or the whole model (global TIES, DOGE).

Every rank measures its own units. Counts are integers and are summed in any order; sums of floating numbers are
gathered per unit and added in the order of names, so that the number of ranks does not show in the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merge_graph import MergeUnit
from mipipe.runtime.merge.exchange import Exchange
from mipipe.runtime.merge.method import Method, Round, Scope, fill, measure_piece
from mipipe.runtime.merge.registry import BY_METHOD
from mipipe.runtime.merge.sources import Surroundings, unit_pieces

ScopeKey = tuple[str, str, str, int | None]
"""Branch, method, and for layers the stack and the layer."""


def scope_key(unit: MergeUnit) -> ScopeKey | None:
    """The wider scope a unit's statistics belong to; None where each piece has its own."""
    if unit.method == "copy":
        return None
    method = BY_METHOD[unit.method]
    if unit.tensor_class not in method.spec.classes:
        return None
    scope = method.scope(**unit_values(unit))
    if scope is Scope.PIECE:
        return None
    if scope is Scope.MODEL:
        return unit.group, unit.method, "", None
    # Tensors outside the layers have no layer to share statistics with; their method says what becomes of them.
    return None if unit.layer is None else (unit.group, unit.method, unit.stack, unit.layer)


def unit_values(unit: MergeUnit) -> dict[str, Any]:
    """Keyword arguments of the unit's method."""
    return fill(BY_METHOD[unit.method], unit.parameters, len(unit.models))


def survey(units: Sequence[MergeUnit], mine: Sequence[int], around: Surroundings,
           exchange: Exchange) -> Mapping[ScopeKey, Any]:
    """Statistics of every wider scope, the same on all ranks.

    Args:
        units: all units of the merge.
        mine: the units this rank measures.

    Raises:
        InputError: tensors that share statistics have different parameters.
    """
    scopes: dict[ScopeKey, list[int]] = {}
    for index, unit in enumerate(units):
        key = scope_key(unit)
        if key is not None:
            scopes.setdefault(key, []).append(index)
    own = set(mine)
    result: dict[ScopeKey, Any] = {}
    depth = max((len(_rounds(units, members)) for members in scopes.values()), default=0)
    for number in range(depth):
        # One exchange per round for all scopes together.
        parts: dict[ScopeKey, dict[int, Tensor]] = {}
        for key, members in scopes.items():
            steps = _rounds(units, members)
            if number < len(steps):
                parts[key] = {index: _measure(units[index], steps[number], result.get(key), around)
                              for index in members if index in own}
        totals = _totals(parts, exchange)
        for key, total in totals.items():
            values = unit_values(units[scopes[key][0]])
            result[key] = _rounds(units, scopes[key])[number].finish(total, result.get(key), **values)
    return result


def _rounds(units: Sequence[MergeUnit], members: Sequence[int]) -> tuple[Round, ...]:
    first = units[members[0]]
    values = unit_values(first)
    for index in members[1:] if _method(first).scope(**values) is Scope.MODEL else ():
        other = {**unit_values(units[index]), "weight": values.get("weight"), "lambda_": values.get("lambda_")}
        if any(other[key] != value for key, value in values.items()):
            raise InputError(f"{first.method} with statistics over the whole model: {first.name} and"
                             f" {units[index].name} have different parameters; give one value for all tensors")
    return _method(first).rounds(**values)


def _method(unit: MergeUnit) -> Method:
    return BY_METHOD[unit.method]


def _measure(unit: MergeUnit, step: Round, stats: Any, around: Surroundings) -> Tensor:
    values = unit_values(unit)
    parts = [measure_piece(step, piece, stats, values) for piece in unit_pieces(unit, around)]
    return torch.stack(parts).sum(0)


def _totals(parts: Mapping[ScopeKey, Mapping[int, Tensor]], exchange: Exchange) -> dict[ScopeKey, Tensor]:
    """Per scope the sum over units, whoever measured them."""
    local: dict[ScopeKey, tuple[Tensor | None, dict[int, Tensor]]] = {}
    for key, found in parts.items():
        whole = [part for part in found.values() if not part.is_floating_point()]
        counted = torch.stack(whole).sum(0).cpu() if whole else None
        local[key] = (counted, {index: part.cpu() for index, part in found.items() if part.is_floating_point()})
    everyone = exchange.gather(local)
    totals: dict[ScopeKey, Tensor] = {}
    for key in parts:
        counts = [rank[key][0] for rank in everyone if rank[key][0] is not None]
        sums: dict[int, Tensor] = {}
        for rank in everyone:
            sums.update(rank[key][1])
        ordered = [sums[index] for index in sorted(sums)]
        values = counts or ordered
        total = values[0].clone()
        for value in values[1:]:
            total = total + value
        totals[key] = total
    return totals
