"""Rungs that add placements of a problem's own to the known shapes: the placement MIP, and modes (F run again).

- `by_mip`: where the graph branches, devices or links differ, or forwards may run again, the placement MIP proposes
  placements (with one and with two replicas), and its bound over all placements is taken if it is better.
- `by_configurations`: where few replicas fit, the bound from what a single device can hold and do.
- `with_modes`: where stages may recompute, the mode MIP chooses which, for the best placements under several memory
  pressures; all are candidates beside the placement without.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from mipipe.graphs.errors import PlanError
from mipipe.planner.bounds.over_placements import Bound, resident_room
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp import modes, placement
from mipipe.planner.milp.configurations import configuration_bound
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.placements.shapes import resident_fits
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem

SHARE = 0.12
"""Of the time limit, for the placement MIP's solves together."""

MOST_S = 24.0
"""Seconds after which the placement MIP is not worth more: its incumbents barely change."""

CHOICES = 4_000
"""Units x devices up to which the placement MIP is tried."""

MODED = 4
"""Placements for which modes are chosen: the best by their first schedules, and the first that nothing fits."""

MOST_COPIES = 1.6
"""Copies of the model that fit, up to which what one device can hold tells more than when first gradients come."""

Admit = Callable[[Run, Placement], Candidate | None]


def is_plain(problem: PlanningProblem) -> bool:
    """Whether the known shapes say it all: a chain of groups that never run again, on equal devices and links."""
    sources = [0] * len(problem.groups)
    for edge in problem.edges:
        for target in edge.targets:
            sources[target] += 1
    branched = max(sources) > 1 or any(len(set(edge.targets)) > 1 for edge in problem.edges)
    devices = problem.topology.devices
    alike = len({(device.kind, device.memory_bytes) for device in devices}) == 1 and not problem.topology.overrides
    again = any(group.recompute_bytes is not None for group in problem.groups)
    return not branched and alike and len({device.host for device in devices}) == 1 and not again


def by_mip(run: Run, admit: Admit) -> None:
    """Candidates from the placement MIP, and its bound."""
    problem = run.problem
    if problem.num_ranks < 2 or len(problem.groups) * problem.num_ranks > CHOICES or is_plain(problem):
        return
    if not run.options.recompute:
        problem = without_recomputation(problem)
    if run.left < 0.6 * run.options.time_limit_s:
        return
    seconds = min(MOST_S, SHARE * run.options.time_limit_s) / 3
    began = time.monotonic()
    bound, outcome = placement.free_bound(problem, time_limit_s=seconds, seed=run.options.seed)
    if bound is not None:
        run.raise_bound(Bound(bound, "placement MIP"))
    _record(run, "placement MIP bound", "all placements", run.makespan_ns, began, outcome,
            bound=None if run.bound_ns is None else run.bound_ns / run.problem.unit_ns)
    for replicas, count in ((1, 3), (2, 2)):
        if run.left < 0.6 * run.options.time_limit_s:
            return
        began = time.monotonic()
        starts = [found for found in run.candidates
                  if all(len(stage.ranks) <= replicas for stage in found.placement.stages)]
        start = min(starts, key=lambda found: found.makespan_ns).placement if starts else None
        for proposal in placement.propose_by_mip(problem, time_limit_s=seconds, seed=run.options.seed, count=count,
                                                 max_replicas=replicas, start=start):
            _enter(run, admit, proposal.placement, ("placement MIP",), began, proposal.outcome,
                   estimate=proposal.estimate_ns / run.problem.unit_ns)


def by_configurations(run: Run) -> None:
    """The bound over all placements from what one device can hold, where replicas do not fit everywhere."""
    problem, limit = run.problem, run.options.time_limit_s
    if problem.num_ranks < 2 or run.closed or run.left < 0.6 * limit or scarcity(problem) > MOST_COPIES:
        return
    if not run.options.recompute:
        problem = without_recomputation(problem)
    began = time.monotonic()
    bound, outcome = configuration_bound(problem, time_limit_s=min(MOST_S, SHARE * limit), seed=run.options.seed)
    run.raise_bound(bound)
    _record(run, "configuration MIP bound", "all placements", run.makespan_ns, began, outcome,
            bound=None if run.bound_ns is None else run.bound_ns / problem.unit_ns)
    if outcome.termination is SolverStatus.INTERRUPTED:
        raise KeyboardInterrupt


def scarcity(problem: PlanningProblem) -> float:
    """How many copies of all groups the devices have room for; infinite where nothing is resident."""
    size = sum(group.resident_bytes for group in problem.groups)
    return sum(resident_room(problem, rank) for rank in range(problem.num_ranks)) / size if size else math.inf


def with_modes(run: Run, admit: Admit, waiting: list[Placement]) -> None:
    """Candidates whose stages partly run F again: of the best candidates, else of ``waiting`` (which do not fit)."""
    if not run.options.recompute or not any(group.recompute_bytes is not None for group in run.problem.groups):
        return
    best = sorted(run.candidates, key=lambda found: found.makespan_ns)[:MODED]
    bases = [(found.placement, found.proposer) for found in best]
    for base, proposer in bases or [(shape, (f"shape {shape.name}",)) for shape in waiting]:
        for pressure in modes.PRESSURES:
            if run.best is not None and run.left < 0.6 * run.options.time_limit_s:
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
            _record(run, proposer[-1], found.name, before, began, outcome,
                    own=made.makespan_ns / run.problem.unit_ns, **more)
    if outcome.termination is SolverStatus.INTERRUPTED:
        raise KeyboardInterrupt


def _record(run: Run, rung: str, name: str, before: int, began: float, outcome: SolverOutcome,
            **more: float | None) -> None:
    """A row of the ablation; ``own`` is the proposal's first schedule."""
    unit = run.problem.unit_ns

    def shown(makespan: int) -> float | None:
        return None if makespan >= 1 << 62 else makespan / unit

    run.ablation.append({"rung": rung, "placement": name, "before": shown(before), "makespan": shown(run.makespan_ns),
                         "variables": outcome.num_variables, "constraints": outcome.num_constraints,
                         "seconds": round(time.monotonic() - began, 3), **more})
