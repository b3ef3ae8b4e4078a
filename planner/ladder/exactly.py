"""The literal MIP (`milp.order.exact`) where it can prove something: as the whole solve (``plan --exact``), and in the
loop of others.

It decides placement and order at once, with one replica of each group. The model leaves out values in flight: where
these overfill a rank, it is solved again with that much less memory; the first solve's bound stays, so such a plan may
be left with a gap. The model has every group a stage of its own: where joined stages may save bytes, or time on a
channel (`mipipe.planner.bounds.joined`), its bound is not taken. In the loop the bound counts where one replica of each
group, whose forwards never run again, is all there can be; else the model has a plan to offer alone.

As the whole solve a chain's list schedule is its horizon, and the plan where it finds none in time; if the bound over
all placements does not prove the plan, the time-indexed MIP bounds its own placement.

Refused, with the reason: more than `MOST_JOBS` jobs or `MOST_PRODUCTS` products of assignments, recomputation, a fixed
shape, other objectives, and collectives that hold memory.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from mipipe.graphs.errors import InfeasibleError, InputError, ProblemError
from mipipe.planner import clock
from mipipe.planner.bounds.joined import is_chain, without_joint_bytes
from mipipe.planner.bounds.over_placements import Bound, problem_bound
from mipipe.planner.ladder import order_rungs, placement_rungs
from mipipe.planner.ladder.admission import RESERVES
from mipipe.planner.ladder.candidate import Candidate, candidate, judge, offer_judged
from mipipe.planner.ladder.proposals import replicas_fit
from mipipe.planner.ladder.state import Run
from mipipe.planner.milp.highs import SolverStatus
from mipipe.planner.milp.order import time_indexed
from mipipe.planner.milp.order.exact import ExactResult, solve_exact
from mipipe.planner.milp.order.exact_parts import num_jobs
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.cuts import colocated
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.time_shares import SHARES

MOST_JOBS = 100
"""Jobs (groups x phases x microbatches) from which the model is refused: 40 are proven within seconds, 70 seldom within
a minute. That many are written down in about a second, others in the square of their share."""

MOST_PRODUCTS = 20_000
"""Products of two assignments (pairs of units x devices squared) up to which the model is written."""


def climb(run: Run, admit: Callable[[Run, Placement], Candidate | None]) -> None:
    """Solve the exact model and make its plan the run's.

    Raises:
        ProblemError, InputError: the problem or the options are not the model's business.
        InfeasibleError: no placement with one replica of each group fits.
    """
    refuse(run.problem, run.options)
    run.raise_bound(problem_bound(run.problem))
    for placement in propose_shapes(run.problem, "chain"):
        if admit(run, placement) is not None:
            break
    problem = run.problem
    for turn in range(RESERVES):
        left = run.left - SHARES.proving * run.options.time_limit_s
        if left <= 0 or run.closed:
            break
        run.report("exact MIP")
        result = solve_exact(problem, time_limit_s=left, seed=run.options.seed,
                             horizon_ns=run.makespan_ns if run.best is not None else None)
        if not turn:
            _bound(run, result)
        excess = _take(run, result)
        if result.outcome.termination is SolverStatus.INTERRUPTED:
            raise KeyboardInterrupt
        if not excess:
            break
        run.no_plan = ("the exact model leaves out values in flight, and its plans do not fit beside them; plan without"
                       " --exact, or raise the activation limit")
        problem = _with_less(problem, excess)
    best = run.best
    if best is not None and not run.closed and run.left > 0:
        shown = time_indexed.bound(best.view, makespan_ns=best.makespan_ns, time_limit_s=run.left,
                                   seed=run.options.seed, lower_ns=best.bound.ns)
        if shown.bound_ns > best.bound.ns:
            best.bound = Bound(shown.bound_ns, shown.what)


def rescue(run: Run) -> None:
    """Where nothing that was tried fits: a candidate from the exact model, if it is small enough for that.

    Lists take memory for a microbatch's saved tensors all at once; an order may begin its backward before. What the
    model proves is of one replica of each group, and is not taken.
    """
    if not _takes(run.problem, run.options):
        return
    problem = run.problem
    for _ in range(RESERVES):
        if run.past(SHARES.until_rescued):
            return
        left = SHARES.until_rescued * run.options.time_limit_s - run.seconds
        try:
            result = solve_exact(problem, time_limit_s=max(clock.LEAST_S, left), seed=run.options.seed)
        except ProblemError:
            return
        excess = _take(run, result)
        if result.outcome.termination is SolverStatus.INTERRUPTED:
            raise KeyboardInterrupt
        if not excess:
            break
        problem = _with_less(problem, excess)
    for found in run.candidates:
        order_rungs.seed(run, found)


@dataclass(slots=True)
class Deciding:
    """The exact model in the loop, up to the incumbent, for longer each time; ``problem`` has less memory where values
    in flight overfilled a rank. ``open``: whether the model has anything left to say; None before its first turn."""

    run: Run
    problem: PlanningProblem
    open: bool | None = None

    def step(self, seconds: float) -> bool:
        """Solve for some seconds; False where the problem is too large, or the model has nothing left to say."""
        run = self.run
        if self.open is None:  # the problem is its business, and it is written down within a slice
            written_s = (num_jobs(run.problem) / MOST_JOBS) ** 2
            self.open = (written_s <= SHARES.longest_slice * run.options.time_limit_s
                         and _takes(run.problem, replace(run.options, recompute=False)))
        if not self.open or run.best is None:
            return False
        began, before, known = time.monotonic(), run.makespan_ns, len(run.candidates)
        try:
            result = solve_exact(self.problem, time_limit_s=seconds, seed=run.options.seed, horizon_ns=before)
        except ProblemError:  # the model has no memory for what it holds
            self.open = False
            return False
        if self.problem is run.problem and not replicas_fit(run.problem) and not run.recomputes:
            _bound(run, result)
        excess = _take(run, result)
        if excess:
            self.problem = _with_less(self.problem, excess)
        else:
            self.open = result.outcome.termination not in (SolverStatus.OPTIMAL, SolverStatus.INFEASIBLE)
        for found in run.candidates[known:]:
            order_rungs.seed(run, found)
        placement_rungs.record_placing(run, "exact MIP", "one replica of each group", before, began, result.outcome,
                                       bound=result.bound_ns / run.problem.unit_ns)
        if result.outcome.termination is SolverStatus.INTERRUPTED:
            raise KeyboardInterrupt
        return True


def _takes(problem: PlanningProblem, options: PlanOptions) -> bool:
    """Whether the exact model takes a problem with such options."""
    try:
        refuse(problem, options)
    except (InputError, ProblemError):
        return False
    return True


def refuse(problem: PlanningProblem, options: PlanOptions) -> None:
    """Raise the error that says why a problem or some options are not the exact model's business; else nothing."""
    if options.placement != "free" or options.objective != "makespan" or not options.use_milp:
        raise InputError("exact: it decides the placement itself, by HiGHS, for the makespan; leave out the placement,"
                         " the objective and what switches the MIP off")
    if options.recompute and any(group.recompute_bytes is not None for group in problem.groups):
        raise ProblemError(f"problem {problem.name}: the exact model does not run forwards again; plan without"
                           " recomputation, or not exactly")
    jobs = num_jobs(problem)
    if jobs > MOST_JOBS:
        raise ProblemError(f"problem {problem.name}: {jobs:,} jobs ({len(problem.groups)} groups,"
                           f" {problem.num_microbatches} microbatches, each with its phases); the exact model takes at"
                           f" most {MOST_JOBS} and proves about 40: merge groups, take fewer microbatches, or plan"
                           " without it")
    products = math.comb(len(colocated(problem)), 2) * problem.num_ranks ** 2
    if products > MOST_PRODUCTS:
        raise ProblemError(f"problem {problem.name}: {len(problem.groups)} groups on {problem.num_ranks} devices make"
                           f" {products:,} products of assignments; the exact model takes at most {MOST_PRODUCTS:,}:"
                           " merge groups, take fewer devices, or plan without it")


def _bound(run: Run, result: ExactResult) -> None:
    """Take the model's bound over placements with one replica of each group, where joining groups saves no bytes and
    lets no transfer pass another.

    Raises:
        InfeasibleError: there is none that fits.
    """
    if result.outcome.termination is SolverStatus.INFEASIBLE and run.best is None:
        raise InfeasibleError("no placement with one replica of each group fits the memory in any order")
    shortest_apart = without_joint_bytes(run.problem) is run.problem and (not result.queued or is_chain(run.problem))
    if shortest_apart:  # else joined stages may be shorter
        run.raise_bound(Bound(result.bound_ns, "exact MIP"))


def _take(run: Run, result: ExactResult) -> tuple[int, ...]:
    """Offer the model's plan; the bytes by which values in flight overfill each rank, nothing where it fits."""
    if result.placement is None or result.schedule is None:
        return ()
    found = candidate(run.problem, result.placement, ("exact MIP",))
    judged = judge(found.view, result.schedule)
    if not judged.fits:
        return judged.excess_bytes
    offer_judged(found, judged, "exact MIP")
    if found.makespan_ns < run.makespan_ns:
        run.candidates.append(found)
        run.note(found, "exact MIP")
    return ()


def _with_less(problem: PlanningProblem, excess: tuple[int, ...]) -> PlanningProblem:
    """The problem with less memory on the devices that were overfilled."""
    devices = tuple(replace(device, memory_bytes=max(0, device.memory_bytes - lacking))
                    for device, lacking in zip(problem.topology.devices, excess, strict=True))
    limits, most = problem.limits, max(excess)
    if limits.activation_bytes is not None:
        limits = replace(limits, activation_bytes=max(0, limits.activation_bytes - most))
    return problem.replace(topology=replace(problem.topology, devices=devices), limits=limits)
