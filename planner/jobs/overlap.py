"""What overlapped pairs (OVERLAP_F_B) do to every bound: no work takes less than its share of a pair.

A pair of a forward (f) and a backward (b = i + w) takes ``D = overlap.duration_ns(f, b)``, at least ``r (f + b)`` for
some r. So a machine needs at least r times its work. And stretching a schedule's time by 1 / r makes every pair as
long as its parts in sequence: r times any bound on schedules without pairs bounds those with pairs.

A path is shortened less: an action of duration x on it takes x alone, or at least ``r (x + c)`` in a pair, where the
other half takes c or more. ``g(x) = min(x, r (x + c))`` is subadditive, so a path of x takes at least g(x).

`mipipe.planner.bounds.pairs` has what is known at a placement.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from mipipe.planner.problem import PlanningProblem

ROUNDED = 200
"""Nanoseconds up to which a pair's rounded duration is looked at for each sum of its parts."""


@dataclass(frozen=True, slots=True)
class PairGain:
    """``ratio``: the least share of its parts' time that a pair takes, 1 where pairs gain nothing; ``other_ns``: the
    least that the other half of a pair takes alone."""

    ratio: Fraction
    other_ns: int

    def shared(self, work_ns: int) -> int:
        """The least machine time of some work."""
        return int(self.ratio * work_ns)

    def shortened(self, path_ns: int) -> int:
        """The least time a path of ``path_ns`` takes where any of its actions may be in pairs."""
        return path_ns if self.ratio == 1 else min(path_ns, int(self.ratio * (path_ns + self.other_ns)))


def pair_gain(problem: PlanningProblem) -> PairGain:
    """What pairs gain in a problem. Their durations are rounded to a nanosecond, by at most a half."""
    forward, gradient = _least(problem, "f_ns"), [_least(problem, name) for name in ("i_ns", "w_ns")]
    if not problem.pairs_gain or forward is None or gradient[0] is None or gradient[1] is None:
        return PairGain(Fraction(1), 0)
    backward = gradient[0] + gradient[1]
    shortest = max(forward + backward, _least_positive(problem))
    ratio = Fraction(problem.overlap.numerator, problem.overlap.denominator)
    exact = [Fraction(problem.overlap.duration_ns(0, total), total) for total in range(shortest, ROUNDED)]
    beyond = ratio - Fraction(1, 2 * max(shortest, ROUNDED))
    return PairGain(max(Fraction(0), min([beyond, *exact, Fraction(1)])), min(forward, backward))


def _least_positive(problem: PlanningProblem) -> int:
    """No pair that takes time at all has parts of less than this together."""
    values = [max(1, int(value * load)) for group in problem.groups for times in group.times.values()
              for value in (times.f_ns, times.i_ns, times.w_ns) if value
              for load in (min((load for load in group.loads if load > 0), default=1.0),)]
    return min(values, default=1)


def _least(problem: PlanningProblem, name: str) -> int | None:
    """The least duration of a phase over groups that have it, device kinds and loads; None where no group has it."""
    return min((int(value * min(group.loads, default=1.0)) for group in problem.groups
                for times in group.times.values() if (value := getattr(times, name)) is not None), default=None)
