"""Parameters of one tensor: filters, gradients over layers, and which level of the recipe speaks first."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.graphs.expressions import search
from mipipe.graphs.merging.method_table.method_spec import MethodSpec
from mipipe.graphs.merging.recipes.recipe import Parameters

MISSING = object()


class Filters:
    """Remembers which filters of a recipe matched a tensor: one that never does is an error, not a silent no-op."""

    def __init__(self) -> None:
        self._hits: dict[str, bool] = {}

    def matches(self, pattern: str, name: str) -> bool:
        """Whether a filter applies to a tensor: ``*`` to all, ``re:...`` by regular expression, else by substring."""
        hit = _fits(pattern, name)
        self._hits[pattern] = self._hits.get(pattern, False) or hit
        return hit

    def check(self, where: str, head: str = "") -> list[str]:
        """Lines about filters that matched only ``head``, a head that is the embedding and so no tensor of its own.

        Raises:
            InputError: a filter that matched no tensor at all.
        """
        unused = sorted(pattern for pattern, hit in self._hits.items() if not hit)
        strange = [pattern for pattern in unused if not (head and _fits(pattern, head))]
        if strange:
            raise InputError(f"{where}: filter {strange[0]!r} matches no tensor of the model")
        return [f"{where}: filter {pattern!r} does nothing: the models' head is their embedding" for pattern in unused]


def _fits(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return search(pattern[3:], name) is not None
    return pattern == "*" or pattern in name


def lookup(value: Any, name: str, position: float, filters: Filters) -> Any:
    """A parameter's value for a tensor at ``position`` (0 the first layer, 1 the last; see `units.UnitBuilder`), or
    `MISSING`.

    A list of numbers is a gradient, piecewise linear over the layers; a list of ``filter`` / ``value`` entries is
    searched from the top, and an entry without filter applies to all.
    """
    if not isinstance(value, list):
        return value
    if all(isinstance(item, dict) for item in value):
        found = MISSING
        for item in value:
            hit = filters.matches(str(item["filter"]), name) if item.get("filter") is not None else True
            if hit and found is MISSING:
                found = lookup(item["value"], name, position, filters)
        return found
    return gradient(value, position)


def gradient(values: Sequence[Any], position: float) -> Any:
    """Piecewise linear interpolation of evenly spaced ``values`` at a position in [0, 1]; of words the one before."""
    if len(values) == 1:
        return values[0]
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return values[int(min(max(position, 0.0), 1.0) * (len(values) - 1))]
    place = min(max(position, 0.0), 1.0) * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    share = place - left
    return float(values[left]) * (1 - share) + float(values[left + 1]) * share


def values_of(spec: MethodSpec, own: Sequence[tuple[Parameters, str]], shared: Iterable[Parameters], name: str,
              position: float, filters: Filters, where: str) -> dict[str, Any]:
    """Every parameter of a method for one tensor: a list per model for per-model parameters.

    Args:
        own: parameters of each model, with the name of the tensor in it (in slices, another layer's); filters of
            a model's own values look at that name, and at it in per-model values for all models (as in mergekit).
        shared: parameters of the slice or branch, then of the recipe: the first that has a value counts.
    """
    levels = list(shared)
    values: dict[str, Any] = {}
    for parameter in spec.parameters:
        if parameter.per_model:
            items = [_first([mine, *levels], parameter.name, there, position, filters) for mine, there in own]
        else:
            found = [_first([mine], parameter.name, there, position, filters) for mine, there in own]
            items = [next((item for item in found if item is not MISSING),
                          _first(levels, parameter.name, name, position, filters))]
        items = [parameter.default if item is MISSING else item for item in items]
        if not parameter.optional and any(item is None for item in items):
            raise InputError(f"{where}: {spec.name} needs the parameter {parameter.name} ({parameter.doc}); tensor"
                             f" {name} has none")
        if parameter.kind is int:
            items = [item if item is None else round(item) for item in items]
        if parameter.kind is bool:
            items = [item if item is None else bool(item) for item in items]
        values[parameter.name] = items if parameter.per_model else items[0]
    return values


def _first(levels: Sequence[Parameters], key: str, name: str, position: float, filters: Filters) -> Any:
    for level in levels:
        if key in level:
            found = lookup(level[key], name, position, filters)
            if found is not MISSING:
                return found
    return MISSING
