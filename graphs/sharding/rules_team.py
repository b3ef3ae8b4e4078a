"""Rules for what talks along another axis: a mode of a mode (a team with two axes)."""

from __future__ import annotations

from collections.abc import Iterator

from mipipe.graphs.sharding.case import Case, Choice
from mipipe.graphs.sharding.parts import PARTIAL, Kind
from mipipe.graphs.sharding.rules_views import Rule


def collective(case: Case) -> Iterator[Choice | None]:
    """Divided along a dimension that the collective leaves alone; sums of sums may be made in any order."""
    name = case.name(0)
    assert name is not None
    part = case.parts[name]
    reduces = case.op.kind == "mipipe.all_reduce.default"
    exchanges = case.op.kind == "mipipe.exchange_parts.default"
    dims = [] if reduces else [case.value(1)[0], case.value(2)[0]] if exchanges else [case.value(1)]
    if part.kind is Kind.PARTIAL and not (reduces and case.value(1) != "sum"):
        yield case.choice({name: PARTIAL}, PARTIAL)
    if part.kind is Kind.DIVIDED and part.dim not in dims:
        yield case.choice({name: part}, part)


TEAM: dict[str, Rule] = {f"mipipe.{name}.default": collective for name in (
    "all_reduce", "all_gather", "reduce_scatter", "exchange_parts", "take_part")}
