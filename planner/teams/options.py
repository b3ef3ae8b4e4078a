"""What a search of degrees is given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.serialize import STRICT
from mipipe.planner.teams.prices.degrees import KEYS, Recompute, least_of


@dataclass(frozen=True, slots=True)
class TeamOptions:
    """What is fixed (degrees, microbatch, recomputation; None: free), and the limit in seconds."""

    __pydantic_config__: ClassVar = STRICT
    given: Mapping[str, int] = field(default_factory=dict)
    microbatch: int | None = None
    recomputation: Recompute | None = None
    time_limit_s: float = 60.0
    seed: int = 0
    order: bool = True

    def __post_init__(self) -> None:
        for name, size in self.given.items():
            if name not in KEYS or size < least_of(name):
                raise InputError(f"degrees: {shown(name)} is {shown(size)}; expected {', '.join(KEYS)}, each at least"
                                 " 1 (zero: 0)")
        if self.microbatch is not None and self.microbatch < 1:
            raise InputError(f"microbatch: is {shown(self.microbatch)}; expected at least 1 sequence")
        if not 0 < self.time_limit_s < math.inf:
            raise InputError(f"time limit: is {self.time_limit_s} s; expected a number above 0")
