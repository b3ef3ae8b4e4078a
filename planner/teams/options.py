"""What a search of degrees is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mipipe.planner.teams.degrees import Recompute


@dataclass(frozen=True, slots=True)
class TeamOptions:
    """What is fixed (degrees, microbatch, recomputation; None: free), and the limit in seconds."""

    given: Mapping[str, int] = field(default_factory=dict)
    microbatch: int | None = None
    recomputation: Recompute | None = None
    time_limit_s: float = 60.0
    seed: int = 0
    order: bool = True
