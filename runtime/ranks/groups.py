"""Which process groups a run has: their members as global ranks, in the one order in which all processes make them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mipipe.planner.execution.opening import opening_order
from mipipe.planner.program import Program
from mipipe.planner.team import Team

ALONE = Team({})
"""A rank that is one device."""
Places = Mapping[tuple[int, int, int], int]
"""Global ranks by copy, plan rank and member."""
Shared = tuple[tuple[int, ...], tuple[str, ...], bool]
"""Plan ranks, and axes of their teams, whose members have a sum together; whether each copy has one of its own."""


def places_of(order: Sequence[int], num_ranks: int, num_copies: int, team: Team) -> Places:
    """Global ranks by (copy, plan rank, member), of processes in this order: copy by copy; with teams the members
    first, then the copies, as `mipipe.planner.team` has it."""
    if team is ALONE:
        return {(copy, rank, 0): order[copy * num_ranks + rank] for copy in range(num_copies)
                for rank in range(num_ranks)}
    return {(copy, rank, member): order[(rank * num_copies + copy) * team.members + member]
            for rank in range(num_ranks) for copy in range(num_copies) for member in range(team.members)}


class Use(Enum):
    """What a group is for; the values of single ones are `Mesh`'s names."""

    CHANNEL = "channels"
    AXIS = "axes"
    PLAN = "plan_group"
    ALL = "all_group"
    REDUCTION = "reductions"
    COPY = "copy_group"
    COPY_CONTROL = "copy_control"
    EXCHANGE = "exchange_group"
    EXPERT_COPIES = "expert_copies_group"


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """A group to be made: ``members`` as global ranks, for a channel the source first; ``key`` as `Mesh` has it."""

    use: Use
    key: Any
    members: tuple[int, ...]

    @property
    def control(self) -> bool:
        """Whether it carries CPU tensors only."""
        return self.use is Use.COPY_CONTROL


def group_specs(program: Program, shared: Iterable[Shared], places: Places, sharing: int, apart: bool,
                team: Team = ALONE, across: bool = False) -> list[GroupSpec]:
    """All groups of all copies in the one order in which every process makes and opens its own.

    ``sharing``: devices of a plan rank, in the order of copies and members, that share experts. ``apart``: control
    traffic has another backend than tensors.
    """
    num_ranks, members = len(program.ranks), range(team.members)
    copies = range(len(places) // (num_ranks * team.members))
    sums = set(shared)
    communicators = opening_order(program, {ranks for ranks, axes, alone in sums if not axes and not alone})
    specs = []
    for copy in copies:
        specs += [GroupSpec(Use.CHANNEL, item.members, tuple(places[copy, rank, member] for rank in item.members))
                  for item in communicators if not item.together for member in members]
        specs += [GroupSpec(Use.AXIS, axis, tuple(places[copy, rank, member] for member in line))
                  for rank in range(num_ranks) for axis in team.axes for line in lines(team, (axis,))]
        specs += [GroupSpec(Use.PLAN, (), tuple(number for place, number in places.items() if place[0] == copy))] \
            if num_ranks * team.members > 1 else []
    if across:
        specs.append(GroupSpec(Use.ALL, (), tuple(places.values())))
    sums = {(item.members, (), False) for item in communicators if item.together} | {
        item for item in sums if item[1] or item[2]}
    for key in sorted(sums):
        ranks, axes, alone = key
        specs += [GroupSpec(Use.REDUCTION, key, tuple(
            places[copy, rank, member] for copy in together for rank in ranks for member in line))
            for together in ([(copy,) for copy in copies] if alone else [tuple(copies)]) for line in lines(team, axes)]
    uses = [(Use.COPY, [copies]), *([(Use.COPY_CONTROL, [copies])] if apart else [])]
    for rank in range(num_ranks):
        specs += [GroupSpec(use, (rank,), tuple(places[copy, rank, member] for copy in together))
                  for member in members for use, parts in uses for together in parts if len(copies) > 1]
        seats = [places[copy, rank, member] for copy in copies for member in members]
        if sharing > 1:
            specs += [GroupSpec(Use.EXCHANGE, (rank,), tuple(seats[first:first + sharing]))
                      for first in range(0, len(seats), sharing)]
        if 1 < sharing < len(seats):
            specs += [GroupSpec(Use.EXPERT_COPIES, (rank,), tuple(seats[place::sharing])) for place in range(sharing)]
    return specs


def lines(team: Team, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The sets of members that differ along these axes only."""
    found: dict[tuple[int, ...], list[int]] = {}
    for member in range(team.members):
        where = team.coordinates(member)
        found.setdefault(tuple(place for axis, place in where.items() if axis not in axes), []).append(member)
    return [tuple(line) for line in found.values()]
