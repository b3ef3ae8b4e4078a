"""Rings: two replicas of everything, ranks as the edges of a cycle through the parts, loads by how late they start.

In a two-way chain rank r and its mirror image hold the same two stages, so each has half of all work, whatever its
place. The middle ranks wait longest: their first gradient comes late, their last forward has far to go, and with memory
for n activations the F number k + n waits for W number k in between (the turnover bound of
`mipipe.planner.bounds.at_placement`). In a ring every rank holds a late part and an early one and shares them with two
*different* ranks, so that work can be moved around: a rank whose late part is one place nearer to the loss gets more
microbatches, ``SLOPE`` times as many as fit into the time it gains.

The parts are the stages of a chain (``ring``) or, of a V with twice as many, each stage with its opposite (``ring-v``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mipipe.planner.placements.cuts import Shape, fit_cuts, loads, split_streams, units
from mipipe.planner.plan import Placement, Stage
from mipipe.planner.problem import PlanningProblem

SLOPE = 0.7
"""Share of the time that a later stage gains which its rank spends on more microbatches. Which microbatches go which
way round matters too, and is not searched.
"""


def rings(problem: PlanningProblem, name: str = "free") -> Iterator[Placement]:
    """The rings a placement option allows, if the ranks are even in number and the loads are possible."""
    ranks = problem.num_ranks
    if ranks % 2 or ranks < 4:
        return
    for kind, turns in (("ring", 1), ("ring-v", 2)):
        if name in ("free", kind) and len(units(problem)) >= ranks * turns:
            found = _ring(problem, kind, turns, SLOPE)
            if found is not None:
                yield found


def _ring(problem: PlanningProblem, name: str, turns: int, slope: float) -> Placement | None:
    """The ring of parts of ``turns`` stages each; None where a stage would be empty or the loads are impossible."""
    ranks, count = problem.num_ranks, problem.num_microbatches
    forth = tuple(range(ranks))
    pieces = fit_cuts(problem, Shape(name, forth if turns == 1 else forth + forth[::-1], two_way=True))
    cycle = around(ranks)
    work = sum(sum(row) for row in loads(problem)) / ranks / ranks  # of one microbatch in one part
    shares = split(cycle, count, slope * _gained(problem) / turns / max(1.0, work))
    if not all(pieces) or shares is None:
        return None
    stages, routes = [], []
    for number, groups in enumerate(pieces):
        part = number if turns == 1 else max(ranks - 1 - number, number - ranks)  # the last stage is in the last part
        edge = cycle.index(part)
        share, ends = shares[edge], (edge, (edge - 1) % ranks)
        route = tuple(ends[0] if (m + 1) * share // count > m * share // count else ends[1] for m in range(count))
        for run in split_streams(problem, groups):
            stages.append(Stage(tuple(run), tuple(sorted(ends))))
            routes.append(route)
    return Placement(tuple(stages), tuple(routes), name)


def around(ranks: int) -> list[int]:
    """The parts in the cycle's order: late and early ones in turn, each beside those nearest to it in place."""
    half = ranks // 2
    odd, even = list(range(1, half, 2)), list(range(0, half, 2))
    late = [ranks - 1 - place for place in (0, *odd, *even[:0:-1])]
    early = [*even, *odd[::-1]]
    return [stage for pair in zip(late, early, strict=True) for stage in pair]


def split(cycle: Sequence[int], microbatches: int, slope: float) -> list[int] | None:
    """For each place of the cycle how many of its part's microbatches go to the edge after it; None if impossible.

    Rank e is the edge from place e to the next; its load is ``microbatches`` plus ``slope`` for every place by which
    its late part lies after the average late one.
    """
    ranks = len(cycle)
    late = [max(cycle[e], cycle[(e + 1) % ranks]) for e in range(ranks)]
    middle = sum(late) / ranks
    wanted = [microbatches + slope * (stage - middle) for stage in late]
    total, load, given = 0.0, [], 0
    for value in wanted:  # rounded so that they add up
        total += value
        load.append(round(total) - given)
        given += load[-1]
    shares = [0]
    for e in range(ranks - 1):
        shares.append(shares[-1] + microbatches - load[e])
    shift = round(microbatches / 2 - sum(shares) / ranks)
    shares = [share + shift for share in shares]
    return shares if all(0 < share < microbatches for share in shares) else None


def _gained(problem: PlanningProblem) -> float:
    """Time by which a rank's first gradient comes sooner, and its last forward may start later, one stage further on.

    That is one stage's way back twice and its way forth once, on the first device, transfers left out.
    """
    kind = problem.topology.devices[0].kind
    times = [group.times[kind] for group in problem.groups]
    return sum(time.f_ns + 2 * (time.i_ns or 0) for time in times) / problem.num_ranks
