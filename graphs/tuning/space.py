"""A recipe's free values: ``{search: [low, high]}`` for numbers in a range, ``{choose: [a, b, c]}`` for one of a few.

They may stand wherever a parameter's value does: in a gradient over layers, in a filter's value, per model. A point
gives each its value; numbers are kept in [0, 1] of their range, and ``integer: true`` rounds them. Places with the same
``as: name`` have one value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mipipe.graphs.errors import InputError, shown

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Free:
    """A value left open: where it stands, and its range, or the values it may take. ``tied``: the name of a value that
    stands in several places, ``others`` its places but the first; ``numbered``: whether its name begins with the
    document it stands in, since another document leaves the same place open."""

    path: Path
    low: float = 0.0
    high: float = 1.0
    integer: bool = False
    choices: tuple[Any, ...] = ()
    tied: str = ""
    others: tuple[Path, ...] = ()
    numbered: bool = False

    @property
    def name(self) -> str:
        """Its own name, or the place in words, without what every place shares: ``models.0.weight``; of the second of
        several documents with that place ``1.models.0.weight``."""
        return self.tied or ".".join(str(part) for part in self.path[0 if self.numbered else 1:]
                                     if part not in ("parameters", "value"))

    def value(self, unit: float) -> Any:
        """The value at a number in [0, 1]."""
        if self.choices:
            return self.choices[min(len(self.choices) - 1, int(unit * len(self.choices)))]
        found = self.low + min(1.0, max(0.0, unit)) * (self.high - self.low)
        return round(found) if self.integer else found

    def unit(self, value: float) -> float:
        """The number in [0, 1] of a value."""
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Documents of a recipe file (plain data) and the values they leave open."""

    documents: tuple[Any, ...]
    free: tuple[Free, ...]

    def point(self, units: Sequence[float]) -> tuple[Any, ...]:
        """The values at numbers in [0, 1]."""
        return tuple(item.value(unit) for item, unit in zip(self.free, units, strict=True))

    def documents_at(self, values: Sequence[Any]) -> list[Any]:
        """The documents with values put in."""
        found: list[Any] = list(self.documents)
        for item, value in zip(self.free, values, strict=True):
            for path in (item.path, *item.others):
                found = _with(found, path, value)
        return found

    def grid(self, points: int) -> list[tuple[Any, ...]]:
        """Every combination of ``points`` values of each range and all choices, the last varying fastest.

        Raises:
            InputError: they are more than a million.
        """
        axes = [list(item.choices) or list(dict.fromkeys(item.value(step / max(1, points - 1))
                                                         for step in range(points))) for item in self.free]
        count = math.prod(len(axis) for axis in axes)
        if count > 10**6:
            raise InputError(f"grid: {len(axes)} free values of up to {points} points are {count} merges; give fewer"
                             " points, or --search cma")
        found: list[tuple[Any, ...]] = [()]
        for axis in axes:
            found = [(*head, value) for head in found for value in axis]
        return found


def space_of(documents: Sequence[Any], where: str) -> SearchSpace:
    """The free values of a recipe's documents.

    Raises:
        InputError: a range that is none, one name for different values, a name that is another value's place, or no
            free value at all.
    """
    free = _named(_tied(_found(list(documents), (), where), where), where)
    if not free:
        raise InputError(f"{where}: leaves no value open; write {{search: [0.0, 1.0]}} or {{choose: [a, b]}} in place"
                         " of one")
    return SearchSpace(tuple(documents), free)


def _tied(found: Sequence[Free], where: str) -> tuple[Free, ...]:
    """The free values, those of one name made one."""
    kept: list[Free] = []
    for item in found:
        known = next((at for at, other in enumerate(kept) if item.tied and other.tied == item.tied), None)
        if known is None:
            kept.append(item)
            continue
        first = kept[known]
        if replace(first, path=item.path, others=()) != item:
            here, there = (".".join(map(str, one.path[1:])) for one in (item, first))
            raise InputError(f"{where}: {here}: as: {item.tied} is another range or choice at {there}; give both the"
                             " same, or two names")
        kept[known] = replace(first, others=(*first.others, item.path))
    return tuple(kept)


def _named(free: Sequence[Free], where: str) -> tuple[Free, ...]:
    """The free values, each under a name of its own: places that several documents have begin with their number."""
    count = Counter(item.name for item in free if not item.tied)
    named = tuple(replace(item, numbered=not item.tied and count[item.name] > 1) for item in free)
    first: dict[str, Free] = {}
    for item in named:
        known = first.setdefault(item.name, item)
        if known is not item:
            here, there = (".".join(map(str, one.path[1:])) for one in (item, known))
            raise InputError(f"{where}: {here}: found the name {item.name}, which the value at {there} has, expected"
                             " another; give one of them another name by as:")
    return named


def _found(data: Any, path: Path, where: str) -> list[Free]:
    if isinstance(data, Mapping):
        if "search" in data or "choose" in data:
            return [_free(data, path, where)]
        return [item for key, value in data.items() for item in _found(value, (*path, str(key)), where)]
    if isinstance(data, list):
        return [item for number, value in enumerate(data) for item in _found(value, (*path, number), where)]
    return []


def _free(data: Mapping[Any, Any], path: Path, where: str) -> Free:
    at = f"{where}: {'.'.join(map(str, path[1:]))}"
    unknown = sorted(map(str, set(data) - {"search", "choose", "integer", "as"}))
    if unknown or len({"search", "choose"} & set(data)) != 1:
        raise InputError(f"{at}: found the keys {', '.join(map(str, data))}, expected search (with integer) or choose,"
                         " and as")
    tied = data.get("as", "")
    if not isinstance(tied, str) or (not tied and "as" in data):
        raise InputError(f"{at}: as: found {shown(tied)}, expected a name")
    if "choose" in data:
        choices = data["choose"]
        if not isinstance(choices, list) or not choices:
            raise InputError(f"{at}: choose: found {shown(choices)}, expected a list of values")
        return Free(path, choices=tuple(choices), tied=tied)
    ends = data["search"]
    if (not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, (int, float)) for end in ends)
            or isinstance(ends[0], bool) or not ends[0] < ends[1]):
        raise InputError(f"{at}: search: found {shown(ends)}, expected [low, high] with low below high")
    return Free(path, float(ends[0]), float(ends[1]), bool(data.get("integer", False)), tied=tied)


def _with(data: Any, path: Path, value: Any) -> Any:
    """Data with one place replaced; nothing given is changed."""
    if not path:
        return value
    first, rest = path[0], path[1:]
    if isinstance(data, Mapping):
        return {key: _with(item, rest, value) if str(key) == first else item for key, item in data.items()}
    return [_with(item, rest, value) if number == first else item for number, item in enumerate(data)]
