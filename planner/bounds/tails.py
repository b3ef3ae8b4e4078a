"""What must follow each group's F and I in every schedule, and what lies between them; for bounds over all placements.

Longest paths of one microbatch of the least load, on the fastest devices, with a transfer for every time that resident
bytes on the path overflow a device (as the heads of `mipipe.planner.bounds.over_placements`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mipipe.planner.bounds.loads import least_of
from mipipe.planner.bounds.over_placements import cheapest_hop
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.problem import PlanningProblem


@dataclass(frozen=True, slots=True)
class Tails:
    """Per group, in nanoseconds: ``between`` the end of F and the start of its first gradient phase, ``after_f`` and
    ``after_i`` from their ends to the end of the step. Where pairs may overlap nothing is said of ``between``.
    ``held``: from the start of F to the start of the first gradient phase, the end of I, and the end of W."""

    between: list[int]
    after_f: list[int]
    after_i: list[int]
    held: list[tuple[int, int, int]]


def tails_of(problem: PlanningProblem) -> Tails:
    """The tails of every group."""
    count = len(problem.groups)
    f, i, w = ([_least(problem, g, name) for g in range(count)] for name in ("f_ns", "i_ns", "w_ns"))
    size = [group.resident_bytes for group in problem.groups]
    hops = _hops(problem)
    after: list[list[int]] = [[] for _ in range(count)]
    back: list[list[int]] = [[] for _ in range(count)]  # groups whose gradient comes back from here
    for edge in problem.edges:
        for target in edge.targets:
            after[edge.source].append(target)
            if edge.grad_bytes is not None:
                back[target].append(edge.source)
    behind = [(w[g] or 0, size[g]) for g in range(count)]  # (path from the end of I, its bytes, g's own with them)
    for g in range(count):
        for source in back[g]:
            first = i[source] if i[source] is not None else w[source]
            if first is not None:
                rest, held = behind[source] if i[source] is not None else (0, size[source])
                behind[g] = max(behind[g], (first + rest, held + size[g]), key=lambda path: path[0] + hops(path[1]))
    there = [(0, size[g]) for g in range(count)]  # (path from the end of F to the gradient, bytes on the way out)
    after_f = [0] * count
    for g in reversed(range(count)):
        for target in after[g]:
            after_f[g] = max(after_f[g], (f[target] or 0) + after_f[target])
            turn = i[target]
            if g in back[target] and turn is not None:
                path = (f[target] or 0) + there[target][0] + turn, there[target][1] + size[g]
                there[g] = max(there[g], path, key=lambda path: path[0] + 2 * hops(path[1]))
        own = i[g] if i[g] is not None else w[g]
        if own is not None:
            rest, held = behind[g] if i[g] is not None else (0, 0)
            after_f[g] = max(after_f[g], there[g][0] + 2 * hops(there[g][1]) + own + rest + hops(held))
    gain = pair_gain(problem)
    plain = gain.ratio == 1
    between = [length + 2 * hops(held) for length, held in there]
    stays = []
    for g, rest in enumerate(between):
        start = (f[g] or 0) + rest
        done = start + (i[g] or 0)
        stays.append((gain.shortened(start), gain.shortened(done), gain.shortened(done + (w[g] or 0))))
    return Tails([rest if plain else 0 for rest in between],
                 [gain.shortened(path) for path in after_f],
                 [gain.shortened(length + hops(held)) for length, held in behind], stays)


def _least(problem: PlanningProblem, g: int, name: str) -> int | None:
    group = problem.groups[g]
    values = [getattr(group.times[device.kind], name) for device in problem.topology.devices]
    return None if None in values else least_of(group, min(values))


def _hops(problem: PlanningProblem) -> Callable[[int], int]:
    """Least transfer time of a chain with so many resident bytes."""
    hop = cheapest_hop(problem)
    room = max(resident_room(problem, rank) for rank in range(problem.num_ranks))
    return lambda held: hop * max(0, -(-held // room) - 1) if room else 0
