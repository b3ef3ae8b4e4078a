"""`Plan`: where every group lives, which replica each microbatch uses, and the order of actions on every rank.

Order is decided, times follow: a plan has no times. They come from the simulator or from a clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from mipipe.graphs.serialize import STRICT, Amount
from mipipe.planner.actions import Action, Order, Stream
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.team import Team


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups that run as one action, and the ranks that hold a replica of them.

    ``recompute``: only the stage's inputs stay after F, and F runs again (RECOMPUTE) before the gradients.
    """

    __pydantic_config__: ClassVar = STRICT
    groups: tuple[Amount, ...]
    ranks: tuple[Amount, ...]
    recompute: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Stages in a topological order; every group is in exactly one. ``routes[stage][microbatch]`` is a rank."""

    __pydantic_config__: ClassVar = STRICT
    stages: tuple[Stage, ...]
    routes: tuple[tuple[Amount, ...], ...]
    name: str = "free"


@dataclass(frozen=True, slots=True)
class RankOrder:
    """The order of compute actions on one rank's two streams. Transfers are added by lowering."""

    __pydantic_config__: ClassVar = STRICT
    compute: Order = ()
    collective: Order = ()

    def of(self, stream: Stream) -> Order:
        """The order of one stream."""
        return self.compute if stream is Stream.COMPUTE else self.collective


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
    where none was computed. ``provenance`` says how it was found (method, seconds, seed, versions). ``team``: what a
    rank is in a run with degrees of its own; the problem is then that of one member of every team.
    """

    FORMAT: ClassVar = "mipipe.plan"
    VERSION: ClassVar = 1
    OPTIONAL: ClassVar = ("team",)
    __pydantic_config__: ClassVar = STRICT
    name: str
    problem: PlanningProblem
    placement: Placement
    schedule: Schedule
    makespan_ns: Amount | None = None
    bound_ns: Amount | None = None
    placement_bound_ns: Amount | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    team: Team | None = None
