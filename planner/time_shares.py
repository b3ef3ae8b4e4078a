"""How a time limit is shared out: a row for every part of a solve, or of several, that works for a share or until one.

Shares of what is left, of single MIPs and of gains stand where they are used; seconds that do not depend on the limit,
too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimeShares:
    """Shares of the time limit, of four kinds.

    ``until_*``: of all that has passed since the solve began; what is kept for the end counts as passed
    (`mipipe.planner.ladder.state.Run.past`), but not for ``until_repeated``, ``until_outlined`` and ``until_raced``.
    ``last_round``, ``proving``, ``checking``, ``restarted``: what is left or kept for a part that follows. ``late``:
    what is added to the limit. ``remembered`` is a share of what was gained, and of the seconds. The others: what the
    part itself takes, at most."""

    until_proposed: float = 0.1
    """Shapes are proposed, the most promising of which enter first."""
    until_bounded: float = 0.15
    """Placements are bounded to tell the most promising; placements of large problems are tried."""
    until_entered: float = 0.5
    """Placements enter with a first schedule, and published schedules are tried."""
    until_several: float = 0.1
    """The same where there are several candidates already: the most promising came first."""
    until_fitted: float = 0.5
    """A placement that fits is looked for where no shape does, and nothing proves that none exists."""
    until_rescued: float = 0.7
    """The exact model of a small problem is asked for a plan where none was found."""
    until_moded: float = 0.4
    """Modes are chosen once there is a plan."""
    for_makespan: float = 0.25
    """The plan for the makespan, which is one for the period to begin with."""
    until_listed: float = 0.3
    """Placements are scheduled by list for the shortest period."""
    until_repeated: float = 2 * until_listed
    """Middles of short steps are repeated as lists give them."""
    until_outlined: float = 0.6
    """Problems with a collective stream are searched without it."""
    until_raced: float = 0.4
    """Finalists race; then only the most promising is searched, by all threads."""

    first_quotas: float = 0.02
    """Quotas of one placement of a large problem, before placements are compared."""
    more_quotas: float = 0.03
    """Quotas of the placements of a large problem that are still compared, together."""
    placement_mip: float = 0.04
    """One call of the placement MIP where nothing else fits."""
    first_slice: float = 0.02
    """The first slice of an activity beside annealing."""
    whole_model: float = 0.06
    """The first slice of the time-indexed LP, whose model is built and refuted at once or not at all."""
    longest_slice: float = 0.15
    """One slice of any activity, at most."""
    remembered: float = 0.6
    """Of gains and seconds of an activity's earlier slices, in its next."""
    half_forgotten: float = 0.05
    """After which the seconds that an activity took count half, if it has no turn meanwhile."""
    last_round: float = 0.15
    """What must be left for a last round (`mipipe.planner.search.annealing.finish`)."""
    bounding: float = 0.1
    """A placement's job-shop bound, at most."""
    proving: float = 0.2
    """Kept by the exact model for the bound at its placement."""
    checking: float = 0.4
    """Kept for checking, explaining and drawing the plan, at most."""
    late: float = 0.05
    """How far beyond the limit a schedule may still be judged."""

    told_apart: float = 0.4
    """`mipipe.planner.exportable`: first solves of all shapes together; lists find most of the difference at once."""
    compared: float = 0.5
    """`mipipe.planner.compare`: published schedules, where the planned row follows."""
    compared_spare: float = 0.1
    """What of it they may take without the planned row having less: a limit holds within a tenth."""
    restarted: float = 0.2
    """Kept for a second solve from published schedules, in case one of them is better."""


SHARES = TimeShares()
"""Those of every solve."""
