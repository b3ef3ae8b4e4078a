"""What a user may steer of the planner: limits, which rungs of the ladder run, which placements are allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT, from_data

if TYPE_CHECKING:
    from mipipe.planner.plan import Plan

PlacementName = Literal["free", "chain", "v", "interleaved", "wave", "two-way", "two-way-v", "two-way-interleaved",
                        "twin-chain", "twin-v", "twin-wave", "ring", "ring-v", "apart", "colocated"]
Objective = Literal["makespan", "memory", "utilisation", "period"]
Part = Literal["mip", "search", "published"]

PLACEMENTS: tuple[str, ...] = get_args(PlacementName)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
PARTS: dict[Part, str] = {"mip": "use_milp", "search": "use_search", "published": "use_baselines"}
"""What a solve can do without (`without`), and the option that says so: HiGHS, annealing, published schedules as
starts."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """Options of one solve.

    ``placement``: ``free`` lets the planner choose; another name fixes the shape, and bounds are then over placements
    of that shape, where it can be cut in few ways or its layers are equal; else over all. ``use_baselines``: published
    schedules may start the search. ``use_milp``: HiGHS may be called. ``use_search``: orders are annealed (`without`
    names these three). ``objective``: ``memory`` minimises peak activation memory at a makespan within ``1 + epsilon``
    of a first one, ``utilisation`` maximises the share of computing time of the devices in use at such a makespan
    (`mipipe.planner.ladder.objectives` defines both), ``period`` minimises the time from step to step where no barrier
    parts them (`mipipe.planner.ladder.period`). ``recompute``: stages may run F twice where that pays or memory is
    short. ``threads``: concurrent searches. ``gap``: stop at this relative gap. ``exact``: the literal MIP decides
    placement and order at once, and proves both (`mipipe.planner.ladder.exactly`, which says what it refuses).
    """

    __pydantic_config__: ClassVar = STRICT
    time_limit_s: float = 60.0
    seed: int = 0
    placement: PlacementName = "free"
    objective: Objective = "makespan"
    epsilon: float = 0.05
    use_baselines: bool = True
    use_milp: bool = True
    use_search: bool = True
    recompute: bool = True
    threads: int = 2
    gap: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.time_limit_s < math.inf:
            raise InputError(f"time limit: found {self.time_limit_s} s, expected more than 0, and some end")
        if self.placement not in PLACEMENTS:
            raise InputError(f"placement: found {self.placement!r}, expected one of {', '.join(PLACEMENTS)}")
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective: found {self.objective!r}, expected one of {', '.join(OBJECTIVES)}")
        if self.epsilon < 0 or self.gap < 0:
            raise InputError(f"epsilon and gap: found {self.epsilon} and {self.gap}, expected none below 0")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"seed: found {self.seed}, expected 0 to {2**31 - 1}")
        if not 1 <= self.threads <= 64:
            raise InputError(f"threads: found {self.threads}, expected 1 to 64")


def without(parts: Iterable[str]) -> dict[str, bool]:
    """The options that switch some parts off, as keyword arguments of `PlanOptions`.

    Raises:
        InputError: an unknown part.
    """
    chosen = set(parts)
    for part in sorted(chosen - PARTS.keys()):
        raise InputError(f"without: found {part!r}, expected {', '.join(PARTS)}")
    return {option: False for part, option in PARTS.items() if part in chosen}


def options_of(plan: Plan) -> PlanOptions:
    """The options a plan was made with (its provenance's ``options``); the defaults for a plan that does not say."""
    return from_data(plan.provenance.get("options", {}), PlanOptions, f"options of plan {plan.name}")
