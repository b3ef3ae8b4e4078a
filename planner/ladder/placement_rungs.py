"""Placements of a problem's own beside the known shapes, and the bound over all: the placement MIP, and modes.

- `by_mip`: where no known shape fits, the placement MIP's placements (with one and with two replicas).
- `bounding`: bounds over all placements, in the loop: that MIP's, from what a single device can hold and do, and from
  devices that see their first gradients one after the other.
- `with_modes`: where stages may recompute, the mode MIP chooses which, for the best placements under several memory
  pressures; all are candidates beside the placement without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mipipe.graphs.errors import PlanError
from mipipe.planner.bounds.over_placements import Bound
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.placement import cells, modes, shares
from mipipe.planner.milp.placement.cells import CellBound
from mipipe.planner.milp.placement.configurations import configuration_bound
from mipipe.planner.placements.shapes import resident_fits
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.sizes import NEVER_NS
from mipipe.planner.time_shares import SHARES

MODED = 4
"""Placements for which modes are chosen: the best by their first schedules, and the first that nothing fits."""

Admit = Callable[[Run, Placement], Candidate | None]


def by_mip(run: Run, admit: Admit) -> None:
    """Candidates from the placement MIP, where the known shapes gave none: without recomputation, then with it."""
    if run.problem.num_ranks < 2:
        return
    given = [without_recomputation(run.problem), *([run.problem] if run.recomputes else [])]
    for problem, replicas, count in ((problem, *asked) for asked in ((1, 3), (2, 2)) for problem in given):
        began = time.monotonic()
        for proposal in shares.propose_by_mip(problem, time_limit_s=SHARES.placement_mip * run.options.time_limit_s,
                                              seed=run.options.seed, count=count, max_replicas=replicas):
            _enter(run, admit, proposal.placement, ("placement MIP",), began, proposal.outcome,
                   estimate=proposal.estimate_ns / run.problem.unit_ns)


Solve = Callable[[PlanningProblem, float, int], tuple[Bound | None, SolverOutcome]]
"""A formulation's bound over all placements of a problem, found in so many seconds with a seed."""


@dataclass(slots=True)
class Bounding:
    """The bound over all placements by one formulation, for longer each time (an activity of the loop)."""

    run: Run
    name: str
    solve: Solve
    ended: bool = False

    def step(self, seconds: float) -> bool:
        """Solve for some seconds; False where nothing is left to prove or the options do not allow all placements."""
        run = self.run
        if self.ended or run.options.placement != "free" or run.problem.num_ranks < 2:
            return False
        problem = run.problem if run.options.recompute else without_recomputation(run.problem)
        began = time.monotonic()
        bound, outcome = self.solve(problem, seconds, run.options.seed)
        self.ended = time.monotonic() - began < 0.8 * seconds  # before its time: it has found all it can
        if bound is not None:
            run.raise_bound(bound)
        record_placing(run, f"{self.name} bound", "all placements", run.makespan_ns, began, outcome,
                       bound=None if run.bound_ns is None else run.bound_ns / run.problem.unit_ns)
        if outcome.termination is SolverStatus.INTERRUPTED:
            raise KeyboardInterrupt
        return True


def bounding(run: Run) -> list[Bounding]:
    """What bounds all placements: the placement MIP, and what a single device can hold and do."""
    def by_placements(problem: PlanningProblem, seconds: float, seed: int) -> tuple[Bound | None, SolverOutcome]:
        found, outcome = shares.free_bound(problem, time_limit_s=seconds, seed=seed)
        return None if found is None else Bound(found, "placement MIP"), outcome

    def by_configurations(problem: PlanningProblem, seconds: float, seed: int) -> tuple[Bound, SolverOutcome]:
        return configuration_bound(problem, time_limit_s=seconds, seed=seed)

    one_after_the_other: list[CellBound] = []

    def by_cells(problem: PlanningProblem, seconds: float, seed: int) -> tuple[Bound | None, SolverOutcome]:
        if not one_after_the_other:
            one_after_the_other.append(CellBound(problem))
        found = one_after_the_other[0].improve(run.bound_ns or 0, seconds, seed)
        return found, one_after_the_other[0].outcome

    return [Bounding(run, "placement MIP", by_placements), Bounding(run, "configuration MIP", by_configurations),
            Bounding(run, cells.NAME, by_cells)]


def nothing_fits(run: Run) -> bool:
    """Whether the placement MIP proves that no placement the options allow fits; False where a shape is asked for."""
    if run.options.placement != "free" or not run.options.use_milp:
        return False
    problem = run.problem if run.options.recompute else without_recomputation(run.problem)
    return shares.fits_nowhere(problem, time_limit_s=SHARES.placement_mip * run.options.time_limit_s,
                               seed=run.options.seed)


def with_modes(run: Run, admit: Admit, waiting: list[Placement]) -> None:
    """Candidates whose stages partly run F again: of the best candidates, else of ``waiting`` (which do not fit)."""
    if not run.options.recompute or not any(group.recompute_bytes is not None for group in run.problem.groups):
        return
    best = sorted(run.candidates, key=lambda found: found.makespan_ns)[:MODED]
    bases = [(found.placement, found.proposer) for found in best]
    for base, proposer in bases or [(shape, (f"shape {shape.name}",)) for shape in waiting]:
        for pressure in modes.PRESSURES:
            if run.best is not None and run.past(SHARES.until_moded):
                return
            began = time.monotonic()
            try:
                chosen = modes.choose(run.problem, base, pressure=pressure, time_limit_s=1.0, seed=run.options.seed)
            except PlanError:
                break
            if chosen is not None:
                _enter(run, admit, chosen.placement, (*proposer, "mode MIP"), began, chosen.outcome, pressure=pressure)


def without_recomputation(problem: PlanningProblem) -> PlanningProblem:
    """The problem in which no group may run its forward again."""
    from dataclasses import replace

    return problem.replace(groups=tuple(replace(group, recompute_bytes=None) for group in problem.groups))


def _enter(run: Run, admit: Admit, found: Placement, proposer: tuple[str, ...], began: float, outcome: SolverOutcome,
           **more: float) -> None:
    """Make a proposed placement a candidate unless it is one already or does not fit; the last of ``proposer`` made
    it."""
    before = run.makespan_ns
    new = all((other.placement.stages, other.placement.routes) != (found.stages, found.routes)
              for other in run.candidates)
    if new and resident_fits(run.problem, found):
        made = admit(run, found)
        if made is not None:
            made.proposer = proposer
            record_placing(run, proposer[-1], found.name, before, began, outcome,
                    own=made.makespan_ns / run.problem.unit_ns, **more)
    if outcome.termination is SolverStatus.INTERRUPTED:
        raise KeyboardInterrupt


def record_placing(run: Run, rung: str, name: str, before: int, began: float, outcome: SolverOutcome,
            **more: float | None) -> None:
    """A row of the ablation; ``own`` is the proposal's first schedule."""
    unit = run.problem.unit_ns

    def shown(makespan: int) -> float | None:
        return None if makespan >= NEVER_NS else makespan / unit

    run.ablation.append({"rung": rung, "placement": name, "before": shown(before), "makespan": shown(run.makespan_ns),
                         "variables": outcome.num_variables, "constraints": outcome.num_constraints,
                         "seconds": round(time.monotonic() - began, 3), **more})
