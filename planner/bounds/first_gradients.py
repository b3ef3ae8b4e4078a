"""The least sum over all devices of the moments at which they see their first gradient. Part of `over_placements`.

Each device's first gradient on the compute stream is one of a unit u (a colocated set of groups) and a microbatch m,
and different devices have different (u, m): what a microbatch does in a unit, one device does. On a chain of units

- unit u has at least as many holders as devices begin with it, and holders take resident bytes;
- k microbatches pass the unit that has the fewest holders, c of them, so one device runs ``ceil(k / c)`` of their
  forwards there, one after the other: the k-th microbatch to reach any gradient comes that much later (`_delays`);
- the gradient that u waits for was on another device, or it would have been the first: a transfer lies in between.

So the moments are at least those of D different cells (u, k), the k-th gradient of u. With fewest holders c, every
unit offers c cells for its bytes c times, and further cells cost the bytes of further holders. The bound is the least
over c.
Where pairs may overlap, only the holders are counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement

from mipipe.planner.actions import Stream
from mipipe.planner.problem import PlanningProblem


@dataclass(frozen=True, slots=True)
class ChainUnit:
    """One unit of a chain: resident bytes, earliest gradient on the compute stream, and what it does to followers.

    ``runs``: (compute time, path) of F from one of its compute groups to another, of one microbatch.
    """

    size: int
    gradient: int
    runs: tuple[tuple[int, int], ...]


def least_first_gradients(units: Sequence[ChainUnit], *, devices: int, microbatches: int, room: int, slack: int,
                          relief: Fraction = Fraction(0), most: int | None = None) -> tuple[int, int]:
    """The least sum of the devices' first gradients, less ``relief`` of the time each comes before the last of them;
    and the latest moment that there is.

    Args:
        units: those that a device may see its first gradient of; a unit without resident bytes can be everywhere.
        devices, microbatches: how many there are.
        room: resident bytes of all devices together.
        slack: nanoseconds by which two parts of a path may fall short of the whole (a transfer counted in neither).
        relief: at most ``1 / devices``, so that no device gains by seeing its first gradient later.
        most: later moments count as this one. A device that does nothing at all sees no gradient; it counts as one
            that sees its first at the latest moment.
    """
    solid = [unit for unit in units if unit.size]
    total = sum(unit.size for unit in solid)
    latest, last = max(unit.gradient for unit in units), 0
    sums = []
    for fewest in fewest_holders(units, devices=devices, room=room):
        spare = max(0, room - fewest * total) // min((unit.size for unit in solid), default=1)
        delays = _delays(solid, fewest, min(devices, microbatches), slack)
        free = sorted(unit.gradient + delay for unit in units
                      for delay in (delays[:fewest] if unit.size else delays))[:devices]
        paid = sorted(unit.gradient + delay for unit in solid for delay in delays[fewest:])[:min(devices, spare)]
        for count in range(len(paid) + 1):
            cells = [*free[:devices - count], *paid[:count]]
            cells += [latest] * (devices - len(cells))
            last = max(last, *cells)
            cells = cells if most is None else [min(most, cell) for cell in cells]
            sums.append(sum(cells) - math.ceil(relief * (devices * max(cells) - sum(cells))))
    return min(sums), last if most is None else min(most, last)


def fewest_holders(units: Sequence[ChainUnit], *, devices: int, room: int) -> range:
    """How many devices may hold the unit that has the fewest holders; arguments as `least_first_gradients`."""
    total = sum(unit.size for unit in units)
    return range(1, max(1, min(devices, room // total if total else 1)) + 1)


def moments_of(units: Sequence[ChainUnit], fewest: int, *, devices: int, microbatches: int, room: int,
               slack: int) -> list[list[int]]:
    """Per unit, how early at most its first, second, .. gradients are, of as many microbatches as it may have holders
    where the unit with the fewest has so many; arguments as `least_first_gradients`."""
    solid = [unit for unit in units if unit.size]
    spare = max(0, room - fewest * sum(unit.size for unit in solid))
    delays = _delays(solid, fewest, min(devices, microbatches), slack)
    return [[unit.gradient + delay for delay in (delays[:fewest + spare // unit.size] if unit.size else delays)]
            for unit in units]


def _delays(solid: Sequence[ChainUnit], fewest: int, count: int, slack: int) -> list[int]:
    """How much later than the first the k-th microbatch comes at least, k = 1 .. count, with so few holders.

    One device runs q microbatches in a unit: the last is through a run of its groups ``q * work`` after the first could
    begin it, where a single one takes the path.
    """
    waits = []
    for k in range(count):
        q = k // fewest + 1
        waits.append(0 if q == 1 or not solid else min(
            max(0, *(q * work - path - slack for work, path in unit.runs)) for unit in solid))
    return waits


def chain_units(problem: PlanningProblem, *, durations: Sequence[Sequence[int]], heads: Sequence[int],
                gradient_heads: Sequence[int | None], hop: int, solid: bool) -> list[ChainUnit] | None:
    """The units of a chain in order, or None where the problem is none of colocated runs of groups.

    Args:
        problem: whose groups all have gradients that flow back along the chain.
        durations: least F and I of each group, of its least load ([2][group]); zeros where pairs may overlap.
        heads, gradient_heads: earliest starts of each group's F and gradient.
        hop: the cheapest transfer; 0 where pairs may overlap.
        solid: only of units with resident bytes: a device's first gradient among those.
    """
    linked = {edge.source for edge in problem.edges if edge.grad_bytes is not None and edge.source + 1 in edge.targets}
    count = len(problem.groups)
    forwards, gradients = durations
    unit_groups = colocated(problem)
    whole = all(unit == list(range(unit[0], unit[-1] + 1)) for unit in unit_groups)
    if not whole or len(linked) < count - 1 or any(head is None for head in gradient_heads):
        return None
    if any(times.i_ns is None for group in problem.groups[1:] for times in group.times.values()):
        return None
    found: list[ChainUnit] = []
    behind: list[int] | None = None  # the unit whose gradient comes before
    for groups in reversed(unit_groups):
        compute = [g for g in groups if problem.groups[g].stream is Stream.COMPUTE]
        size = sum(problem.groups[g].resident_bytes for g in groups)
        if not compute:
            return None
        moment = gradient_heads[compute[-1]] or 0
        if behind is not None and (not solid or any(problem.groups[g].resident_bytes for g in behind)):
            left = (gradient_heads[behind[0]] or 0) + gradients[behind[0]] + hop
            moment = max(moment, left + sum(gradients[g] for g in groups if g > compute[-1]))
        behind = groups
        if size or not solid:
            runs = tuple((sum(forwards[g] for g in compute if a <= g <= b), heads[b] + forwards[b] - heads[a])
                         for a, b in combinations_with_replacement(compute, 2))
            found.append(ChainUnit(size, moment, runs))
    return found or None


def colocated(problem: PlanningProblem) -> list[list[int]]:
    """The groups of each unit: colocated sets, in topological order of their first groups."""
    leader = list(range(len(problem.groups)))
    for members in problem.colocate:
        lowest = min(leader[g] for g in members)
        old = {leader[g] for g in members}
        leader = [lowest if name in old else name for name in leader]
    return [[g for g, name in enumerate(leader) if name == first] for first in sorted(set(leader))]


def common_room(sizes: Sequence[int], rooms: Sequence[int]) -> int:
    """Bytes of all rooms that sizes can fill: of each a multiple of their common divisor."""
    divisor = math.gcd(*sizes)
    return sum(rooms) if not divisor else sum(room // divisor * divisor for room in rooms)
