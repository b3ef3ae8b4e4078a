"""What a mode divides of a segment among the members of an axis, and what these send: what estimates are made of.

`mipipe.graphs.sharding.shares` finds it out as members' programs are made, without writing them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mipipe.graphs.again import copied
from mipipe.graphs.modes import Collective
from mipipe.graphs.operator_graph import Phase


@dataclass(frozen=True, slots=True)
class TeamShare:
    """A trace on ``size`` members along an ``axis``. ``dims``: along which dimension parameters and buffers are
    divided; ``values``: those of which a member has an equal part, by name; ``operators``: those with flops of which it
    runs an equal part; ``sums``: parameters whose gradients are sums over the members, added up once per step;
    ``whole``: what runs undivided though the mode divides it, each with the reason. ``collectives``: with the tensor
    that each changes (an operator's own: its result), without what W gathers of F's values, which may run beside the
    products of I."""

    axis: str
    size: int
    dims: Mapping[str, int] = field(default_factory=dict)
    values: frozenset[str] = frozenset()
    operators: frozenset[str] = frozenset()
    sums: frozenset[str] = frozenset()
    collectives: Mapping[Phase, tuple[tuple[Collective, str], ...]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    def parts(self, name: str) -> int:
        """Into how many parts a value is divided; one that is made again, as where it is made first."""
        return self.size if (copied(name) or name) in self.values else 1

    def runs(self, name: str) -> int:
        """Into how many parts an operator with flops is divided."""
        return self.size if (copied(name) or name) in self.operators else 1
