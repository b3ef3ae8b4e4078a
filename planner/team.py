"""`Team`: what a plan rank is where it is more than one device, and how its members share the work.

Devices are numbered in the order of the mesh, the fastest axis first: the team's last axis, its others, copies of the
whole plan, ranks. So the members of a team are neighbours, and the ranks of one pipeline furthest apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from mipipe.graphs.errors import PlanError, shown
from mipipe.graphs.modes import MODES
from mipipe.graphs.serialize import STRICT, Amount, Count

AXES = {"context": ("context",), "tensor": ("tensor", "sequence", "batch", "expert")}
"""The axes that a team may have, slowest first, and the modes that segments may run in along each."""


@dataclass(frozen=True, slots=True)
class TeamMode:
    """Segments that run in a mode along an axis; none are named: all that no other entry of the axis names."""

    __pydantic_config__: ClassVar = STRICT
    axis: str
    mode: str
    segments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Team:
    """The members of a plan rank, and the copies of the whole plan that the run has.

    ``axes``: members along each axis, the slowest first; without axes a rank is one device. ``modes``: what runs how.
    ``kind``: of the devices. ``microbatch``: sequences of one microbatch (0: as the graph was captured). ``expert``:
    devices that share banks of experts. ``zero``: what devices that hold the same divide (as in a run's degrees).
    ``again``: segments that keep only what goes into them and run again in the backward, in runs that do so together;
    ``attention_again``: those of which attention alone does; ``latents_again``: those of which queries, keys and values
    are made of latents again (`mipipe.graphs.costs.latents`).
    """

    __pydantic_config__: ClassVar = STRICT
    axes: dict[str, Count]
    copies: Count = 1
    modes: tuple[TeamMode, ...] = ()
    kind: str = "device"
    microbatch: Amount = 0
    expert: Count = 1
    zero: Amount = 0
    again: tuple[tuple[str, ...], ...] = ()
    attention_again: tuple[str, ...] = ()
    latents_again: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if list(self.axes) != [axis for axis in AXES if axis in self.axes] or min(self.axes.values(), default=2) < 2:
            raise PlanError(f"team: axes {shown(self.axes)}; expected at least 2 members along"
                            f" {' and '.join(AXES)}, in this order, or no axes")
        if self.zero > 3:
            raise PlanError(f"team: zero is {shown(self.zero)}; expected 0 to 3: what devices holding the same divide")
        for item in self.modes:
            if item.axis not in self.axes or item.mode not in AXES[item.axis]:
                raise PlanError(f"team: mode {shown(item.mode)} along axis {shown(item.axis)}; expected one of"
                                f" {', '.join(MODES)} along an axis that it is for")

    @property
    def members(self) -> int:
        """Devices of a plan rank."""
        return math.prod(self.axes.values())

    def coordinates(self, member: int) -> dict[str, int]:
        """Where a member is along every axis."""
        found: dict[str, int] = {}
        for axis, size in reversed(self.axes.items()):
            member, found[axis] = divmod(member, size)
        return found

    def modes_along(self, axis: str, segments: Iterable[str]) -> dict[str, str]:
        """The mode of every segment along an axis: what is said of it, else of all others, else the axis's own."""
        entries = [item for item in self.modes if item.axis == axis]
        usual = next((item.mode for item in entries if not item.segments), axis)
        named = {name: item.mode for item in entries for name in item.segments}
        found = {name: named.get(name, usual) for name in segments}
        unknown = sorted(set(named) - set(found))
        if unknown:
            raise PlanError(f"team: a mode is given for segment {shown(unknown[0])}, which the graph does not have")
        return found

    def text(self) -> str:
        """For people."""
        return " x ".join(f"{axis} {size}" for axis, size in self.axes.items()) or "one device"
