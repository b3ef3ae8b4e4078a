"""`Plan`: where every group lives, which replica each microbatch uses, and the order of actions on every rank.

Order is decided, times follow: a plan has no times. They come from the simulator or from a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mipipe.graphs.serialize import STRICT
from mipipe.planner.actions import Action, Order
from mipipe.planner.problem import PlanningProblem


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups that run as one action, and the ranks that hold a replica of them.

    ``recompute``: only the stage's inputs stay after F, and F runs again (RECOMPUTE) before the gradients.
    """

    __pydantic_config__: ClassVar = STRICT
    groups: tuple[int, ...]
    ranks: tuple[int, ...]
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Stages in a topological order; every group is in exactly one. ``routes[stage][microbatch]`` is a rank."""

    __pydantic_config__: ClassVar = STRICT
    stages: tuple[Stage, ...]
    routes: tuple[tuple[int, ...], ...]
    name: str = "free"


@dataclass(frozen=True, slots=True)
class RankOrder:
    """The order of compute actions on one rank's two streams. Transfers are added by lowering."""

    __pydantic_config__: ClassVar = STRICT
    compute: Order = ()
    collective: Order = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """One `RankOrder` for each rank."""

    __pydantic_config__: ClassVar = STRICT
    ranks: tuple[RankOrder, ...]

    def actions(self) -> tuple[Action, ...]:
        """All actions, rank by rank."""
        return tuple(action for order in self.ranks for action in (*order.compute, *order.collective))

    @property
    def has_pairs(self) -> bool:
        """Whether a forward and a backward overlap somewhere."""
        return any(action.partner is not None for order in self.ranks for action in order.compute)


@dataclass(frozen=True, slots=True)
class Plan:
    """A solved problem: complete in itself, so it can be checked, simulated and run alone.

    ``bound_ns`` holds over all placements the problem allows, ``placement_bound_ns`` at this placement only; None
    where none was computed. ``provenance`` says how it was found (method, seconds, seed, versions).
    """

    FORMAT: ClassVar = "mipipe.plan"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    name: str
    problem: PlanningProblem
    placement: Placement
    schedule: Schedule
    makespan_ns: int | None = None
    bound_ns: int | None = None
    placement_bound_ns: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
