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
from mipipe.graphs.merging.graph import MergeUnit
from mipipe.graphs.merging.method_table.method_spec import Scope
from mipipe.graphs.merging.passes import is_wide, scope_of
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.methods.method import Round, fill
from mipipe.runtime.merge.methods.registry import BY_METHOD

ScopeKey = tuple[str, str, str, int | None]
"""Branch, method, and for layers the stack and the layer."""


def scope_key(unit: MergeUnit) -> ScopeKey | None:
    """The wider scope a unit's statistics belong to; None where each piece has its own."""
    if not is_wide(unit):
        return None
    if scope_of(unit) is Scope.MODEL:
        return unit.group, unit.method, "", None
    return unit.group, unit.method, unit.stack, unit.layer


def unit_values(unit: MergeUnit) -> dict[str, Any]:
    """Keyword arguments of the unit's method."""
    return fill(BY_METHOD[unit.method], unit.parameters, len(unit.models))


class Survey:
    """The statistics of all wider scopes, built up round by round; the same on all ranks."""

    def __init__(self, units: Sequence[MergeUnit], exchange: MergeRanks) -> None:
        """Sort the units by scope.

        Raises:
            InputError: tensors that share statistics have different parameters.
        """
        self._exchange = exchange
        scopes: dict[ScopeKey, list[MergeUnit]] = {}
        for unit in units:
            key = scope_key(unit)
            if key is not None:
                scopes.setdefault(key, []).append(unit)
        self._values = {key: unit_values(members[0]) for key, members in scopes.items()}
        self._rounds = {key: _rounds(members) for key, members in scopes.items()}
        self._stats: dict[ScopeKey, Any] = {}
        self._parts: dict[ScopeKey, dict[int, Tensor]] = {}

    def stats(self, unit: MergeUnit) -> Any:
        """What the rounds so far found out about a unit's scope; None before the first, and without a wider scope."""
        key = scope_key(unit)
        return None if key is None else self._stats.get(key)

    def step(self, unit: MergeUnit, number: int) -> Round:
        """The round of that number of a unit's scope."""
        key = scope_key(unit)
        assert key is not None
        return self._rounds[key][number]

    def add(self, index: int, unit: MergeUnit, part: Tensor) -> None:
        """Take what this rank measured on a unit in the running round."""
        key = scope_key(unit)
        assert key is not None
        self._parts.setdefault(key, {})[index] = part

    def finish_round(self, number: int) -> None:
        """Join all ranks' measurements and begin the next round. One exchange for all scopes; all ranks call it."""
        running = [key for key, rounds in self._rounds.items() if number < len(rounds)]
        totals = _totals({key: self._parts.get(key, {}) for key in running}, self._exchange)
        for key, total in totals.items():
            self._stats[key] = self._rounds[key][number].finish(total, self._stats.get(key), **self._values[key])
        self._parts = {}


def _rounds(members: Sequence[MergeUnit]) -> tuple[Round, ...]:
    first = members[0]
    values = unit_values(first)
    for unit in members[1:] if scope_of(first) is Scope.MODEL else ():
        other = {**unit_values(unit), "weight": values.get("weight"), "lambda_": values.get("lambda_")}
        if any(other[key] != value for key, value in values.items()):
            raise InputError(f"{first.method} with statistics over the whole model: {first.name} and {unit.name} have"
                             " different parameters; give one value for all tensors")
    return BY_METHOD[first.method].rounds(**values)


def _totals(parts: Mapping[ScopeKey, Mapping[int, Tensor]], exchange: MergeRanks) -> dict[ScopeKey, Tensor]:
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
