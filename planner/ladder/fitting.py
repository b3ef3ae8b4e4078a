"""A placement that fits, where no known shape does: moves that leave fewer bytes lacking, without a solver.

Saved tensors fit at a placement if one microbatch at a time does (`mipipe.planner.placements.feasible`), so the bytes
that its ranks lack for that say how far a placement is from fitting. The walk begins at the shape that lacks least,
every group a stage of its own, and goes on to any placement that lacks no more.
"""

from __future__ import annotations

import random

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.ladder.admission import seed_search
from mipipe.planner.ladder.candidate import Candidate, candidate
from mipipe.planner.ladder.proposals import finest
from mipipe.planner.ladder.state import Run
from mipipe.planner.placements.moves import drawn, elsewhere, toggled, unit_hosts
from mipipe.planner.placements.shapes import keeps_single, propose_shapes
from mipipe.planner.placements.shortages import lacking_bytes
from mipipe.planner.plan import Placement
from mipipe.planner.sizes import NEVER_NS
from mipipe.planner.time_shares import SHARES

PROPOSER = "fitted stages"
"""What the search is called where a plan says how it came about."""


def fit(run: Run) -> None:
    """Make a candidate of a placement that some order fits, if one is found in time; only of free placements, and not
    without search."""
    problem, rng = run.problem, random.Random(run.options.seed)
    if run.options.placement != "free" or problem.num_ranks < 2 or not run.options.use_search:
        return
    moves = (drawn, elsewhere, toggled) if run.options.recompute else (drawn, elsewhere)
    at: Placement | None = None
    lack, seen = NEVER_NS, set[tuple[object, ...]]()
    for shape in propose_shapes(problem, "free"):
        if run.past(SHARES.until_proposed) and at is not None:
            break
        apart = finest(problem, shape)
        start = shape if unit_hosts(problem, apart) is None else apart  # groups that stay together are one stage
        if keeps_single(problem, shape) and unit_hosts(problem, start) is not None:
            seen.add((start.stages, start.routes))
            least = lacking(run, start)
            if at is None or least < lack:
                at, lack = start, least
    if at is None:
        return
    while not run.past(SHARES.until_fitted):
        clock.ask()
        found = rng.choice(moves)(problem, at, rng)
        if found is None or (found.stages, found.routes) in seen:
            continue
        seen.add((found.stages, found.routes))
        least = lacking(run, found)
        if least > lack:
            continue
        at, lack = found, least
        made = tried(run, at) if not lack else None
        if made is not None:
            made.proposer = (PROPOSER,)
            run.candidates.append(made)
            return


def tried(run: Run, placement: Placement) -> Candidate | None:
    """The placement as a candidate, if a list of any rule fits its memory."""
    try:
        found = candidate(run.problem, placement)
    except PlanError:
        return None
    return found if seed_search(run, found) else None


def lacking(run: Run, placement: Placement) -> int:
    """The bytes that all ranks lack together for one microbatch at a time; beyond all others where it is no placement
    of the problem."""
    try:
        return sum(lacking_bytes(run.problem, placement))
    except PlanError:
        return NEVER_NS
