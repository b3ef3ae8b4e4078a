"""Small problems' placements with their groups apart: a stage that is not joined may be interrupted, and send sooner.

Known shapes join the groups of a rank to few stages, which searches order well. Of few groups the same placement with
every group a stage of its own is a candidate, too, annealed and polished as the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mipipe.graphs.errors import PlanError
from mipipe.planner.ladder.candidate import Candidate, candidate
from mipipe.planner.ladder.exactly import MOST_JOBS
from mipipe.planner.ladder.proposals import Take, finest
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.order.exact_parts import num_jobs

JOBS = 3 * MOST_JOBS
"""Jobs (as of the exact model) up to which placements are looked at with groups apart: beyond, another candidate of so
many more actions costs the search more than it gains."""

APART = "+apart"
"""What the names of such placements end in."""


@dataclass(slots=True)
class Parting:
    """The best candidates with their groups apart, one at a time (an activity of the loop)."""

    run: Run
    take: Take
    done: list[Candidate] = field(default_factory=list)

    def step(self, seconds: float) -> bool:
        """Make the next candidate of one whose stages join groups; False where none is left."""
        run, problem = self.run, self.run.problem
        if run.options.placement != "free" or num_jobs(problem) > JOBS:
            return False
        waiting = [found for found in run.candidates if len(found.placement.stages) < len(problem.groups)
                   and not any(found is other for other in self.done)]
        if not waiting:
            return False
        joined = min(waiting, key=lambda found: found.makespan_ns)
        self.done.append(joined)
        placed = finest(problem, joined.placement)
        if any((found.placement.stages, found.placement.routes) == (placed.stages, placed.routes)
               for found in run.candidates):
            return True
        try:
            found = candidate(problem, replace(placed, name=placed.name + APART), (*joined.proposer, "groups apart"))
        except PlanError:  # some activations never fit
            return True
        if found.bound.ns < run.makespan_ns:
            self.take(run, found)
        return True
