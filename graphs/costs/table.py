"""Durations of groups on kinds of devices, each with its origin.

A `CostTable` is a file of its own: roofline estimates, profiles of this machine and calibrations from a run have the
same form, can be compared, and are never mixed silently (every entry says where it comes from).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mipipe.graphs.errors import ProblemError
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.serialize import STRICT, Amount

Origin = Literal["roofline", "profiled", "calibrated", "given"]


@dataclass(frozen=True, slots=True)
class GroupCost:
    """Durations of one group's phases on one device kind; a phase that does not exist has no entry.

    ``spread`` is the relative half-width of the middle half of the samples (0 where nothing was sampled).
    """

    __pydantic_config__: ClassVar = STRICT
    group: str
    device_kind: str
    times_ns: dict[Phase, Amount]
    origin: Origin
    spread: float = 0.0


@dataclass(frozen=True, slots=True)
class CostTable:
    """Costs of a coarse graph's groups. ``hardware`` names the machine, ``notes`` how the numbers were obtained."""

    FORMAT: ClassVar = "mipipe.costs"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    graph_digest: str
    entries: tuple[GroupCost, ...]
    hardware: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def find(self, group: str, device_kind: str) -> GroupCost:
        """The entry of a group on a device kind.

        Raises:
            ProblemError: there is none; costs are never filled in silently.
        """
        for entry in self.entries:
            if entry.group == group and entry.device_kind == device_kind:
                return entry
        raise ProblemError(f"costs: no entry for group {group!r} on device kind {device_kind!r}; profile it, or give"
                           " --costs a table that has it")
