"""`plan`: from a problem to a plan, with a bound and a history. The driver of the ladder.

1. Placements are proposed (`mipipe.planner.placements.shapes`) and the promising ones scheduled by list
   (`mipipe.planner.ladder.admission`); large problems have their own way (`mipipe.planner.ladder.large`).
2. The loop (`mipipe.planner.ladder.loop`): the master MIP proposes placements, orders are annealed, paced and polished,
   bounds are proven, in turns.

Everything stops when the incumbent meets the bound, time is up, or at Ctrl-C; the best plan so far is checked and
returned.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from typing import Any

from mipipe.graphs.errors import InfeasibleError, PlanError
from mipipe.graphs.serialize import to_data
from mipipe.planner import clock
from mipipe.planner.bounds.at_placement import placement_bound
from mipipe.planner.bounds.over_placements import Bound, problem_bound
from mipipe.planner.check import check_plan
from mipipe.planner.clock import OutOfTimeError, noting_ctrl_c
from mipipe.planner.execution.steps import schedule_period
from mipipe.planner.explain.binding import explain_plan
from mipipe.planner.gap import gap_of
from mipipe.planner.how import How
from mipipe.planner.jobs.stages import groups_apart
from mipipe.planner.ladder import exactly, fitting, large, order_rungs, period, placement_rungs
from mipipe.planner.ladder.activities import Indexing, Pacing, Polishing, Proving, Tightening
from mipipe.planner.ladder.admission import admit_placement, enter, recomputing, take, why_no_plan
from mipipe.planner.ladder.apart import Parting
from mipipe.planner.ladder.harvest import ANNEALING
from mipipe.planner.ladder.loop import Activity, loop
from mipipe.planner.ladder.moving import Moving
from mipipe.planner.ladder.objectives import OUT_OF_TIME, best_utilisation, least_memory, no_plan_within
from mipipe.planner.ladder.proposals import Proposing
from mipipe.planner.ladder.race import Race
from mipipe.planner.ladder.repeating import Repeating
from mipipe.planner.ladder.state import Incumbent, Progress, Run
from mipipe.planner.milp.calls import Ledger, counting
from mipipe.planner.options import PlanOptions
from mipipe.planner.placements.shapes import propose_shapes
from mipipe.planner.placements.shortages import fits_no_device
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.sizes import NEVER_NS, VERY_MANY
from mipipe.planner.time_shares import SHARES

__all__ = ["Incumbent", "Progress", "SolveResult", "Termination", "plan"]


class Termination(StrEnum):
    """How a solve ended. ``INFEASIBLE``: nothing was found that fits; the reason says whether nothing could be."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INTERRUPTED = "interrupted"
    INFEASIBLE = "infeasible"
    TIME_UP = OUT_OF_TIME


@dataclass(frozen=True, slots=True)
class SolveResult:
    """What a solve found. ``bound_ns`` holds over all placements the options allow, ``placement_bound_ns`` at the
    plan's own; ``reason`` says why there is no plan. ``ablation`` has one row per rung: what it found, its size, its
    seconds. ``how``: who proposed the placement and made the order, the bounds' sources, all calls of HiGHS.
    ``period_ns`` and its bound are set where the objective is the time from step to step.
    """

    plan: Plan | None
    makespan_ns: int | None
    bound_ns: int | None
    placement_bound_ns: int | None
    termination: Termination
    seconds: float
    history: tuple[Incumbent, ...] = ()
    rung: str = ""
    ablation: tuple[dict[str, Any], ...] = ()
    explanation: tuple[str, ...] = ()
    reason: str = ""
    how: How = How()
    period_ns: int | None = None
    period_bound_ns: int | None = None

    @property
    def gap(self) -> float | None:
        """``makespan / bound - 1``; None without a plan or a bound."""
        return gap_of(self.makespan_ns, self.bound_ns)


def plan(problem: PlanningProblem, options: PlanOptions | None = None,
         on_progress: Callable[[Progress], None] | None = None) -> SolveResult:
    """The best plan found within the options' time, with its bounds.

    Outcomes are data: an infeasible problem and a time limit passed without a plan are results with ``plan=None``.
    """
    with counting() as ledger:
        result = _solve(problem, options or PlanOptions(), on_progress)
    return with_calls(result, ledger)


def with_calls(result: SolveResult, ledger: Ledger) -> SolveResult:
    """The result with all of a ledger's calls as its own, in its plan's provenance as well."""
    how = replace(result.how, highs=ledger.rows())
    if result.plan is None:
        return replace(result, how=how)
    return replace(result, how=how, plan=replace(result.plan, provenance={**result.plan.provenance,
                                                                          "how": to_data(how)}))


def _solve(problem: PlanningProblem, options: PlanOptions,
           on_progress: Callable[[Progress], None] | None) -> SolveResult:
    """The result of one objective's solves, its calls not counted yet."""
    if options.objective == "memory":
        return least_memory(problem, options, plan, on_progress)
    if options.objective == "utilisation":
        return best_utilisation(problem, options, plan, on_progress)
    run = Run(problem, options, on_progress)

    def note() -> None:
        run.interrupted = True

    try:
        with noting_ctrl_c(note), clock.watched(lambda: run.patience):
            if fits_no_device(problem) is not None:
                raise InfeasibleError(why_no_plan(run, proven=True))
            if options.exact:
                _exactly(run)
            elif options.objective == "period":
                period.climb(run, _for_makespan(run))
            else:
                _ladder(run)
    except InfeasibleError as error:
        return SolveResult(None, None, None, None, Termination.INFEASIBLE, run.seconds, reason=str(error))
    except KeyboardInterrupt:
        run.interrupted = True
    except OutOfTimeError:
        pass
    with clock.watched(None):  # what was found is checked and told, whoever else watches the time
        result = _finish(run)
    return result if options.objective == "makespan" else _with_period(run, result)


def _exactly(run: Run) -> None:
    """The exact model's plan; where it proves that none fits, with what lacks."""
    try:
        exactly.climb(run, admit_placement)
    except InfeasibleError as error:
        raise InfeasibleError(f"{error}; {why_no_plan(run)}") from None


def _for_makespan(run: Run) -> Plan | None:
    """The plan for the makespan, from a share of the time: its own order may have the shortest period as well."""
    found = plan(run.problem, replace(run.options, objective="makespan",
                                      time_limit_s=SHARES.for_makespan * run.options.time_limit_s))
    if found.termination is Termination.INTERRUPTED:
        run.interrupted = True
    return found.plan


def _ladder(run: Run) -> None:
    """First plans by lists, then the loop: propose, order and prove until the proof or the limit."""
    run.raise_bound(problem_bound(run.problem))
    if run.problem.num_ranks == 1 and not run.recomputes:
        _bound_alone(run)
    tuning = _first_plans(run)
    if not run.candidates and run.options.recompute:
        recomputing(run)
    proven = not run.candidates and placement_rungs.nothing_fits(run)
    if not run.candidates and not proven:
        fitting.fit(run)
        if not run.candidates:
            exactly.rescue(run)
    if not run.candidates:
        raise InfeasibleError(why_no_plan(run, proven=proven))
    if run.best is not None:
        run.ablation.append({"rung": run.best.rung, "placement": run.best.placement.name, "before": None,
                             "makespan": run.makespan_ns / run.problem.unit_ns, "variables": None, "constraints": None,
                             "seconds": round(run.seconds, 3)})
    began, before = run.seconds, run.makespan_ns
    loop(run, _activities(run, tuning), Race(run) if run.options.use_search else None)
    if run.options.use_search and run.best is not None:
        annealed = [item for item in run.history if item.rung == ANNEALING]
        run.ablation.append({"rung": ANNEALING, "placement": annealed[-1].placement if annealed else "",
                             "before": before / run.problem.unit_ns, "variables": None, "constraints": None,
                             "makespan": (annealed[-1].makespan_ns if annealed else before) / run.problem.unit_ns,
                             "seconds": round(run.seconds - began, 3)})


def _bound_alone(run: Run) -> None:
    """The bound on one device, where nothing is placed: no group waits less than as a stage of its own."""
    if 3 * len(run.problem.groups) * run.problem.num_microbatches <= VERY_MANY:
        with suppress(PlanError):  # what never fits is said where it is placed
            run.raise_bound(placement_bound(groups_apart(run.problem)))


def _first_plans(run: Run) -> large.Tuning | None:
    """Candidates of the known shapes, by lists, and of published schedules; rules to tune where these made them."""
    options, tuning = run.options, None
    if large.applies(run.problem) and options.use_search:
        published = options.use_baselines and not large.is_huge(run.problem)
        if published and run.problem.pairs_gain:  # lists have no pairs: what has some comes first
            order_rungs.published(run)
        tuning = large.climb(run)
        if published and not run.problem.pairs_gain:
            order_rungs.published(run)
        if run.candidates:
            return tuning
    enter(run)
    if options.use_baselines:
        order_rungs.published(run)
    if options.use_milp:
        if options.placement == "free" and not run.candidates:
            placement_rungs.by_mip(run, admit_placement)
        shapes = islice(propose_shapes(run.problem, options.placement), 3)
        placement_rungs.with_modes(run, admit_placement, list(shapes))
    return tuning


def _activities(run: Run, tuning: large.Tuning | None) -> list[Activity]:
    """What the options allow beside annealing, in the order in which each has its first turn: moves come before what
    asks HiGHS, whose first slices together may be all the time there is; of that the model that may prove a small
    problem at once is first."""
    slice_s = min(1.0, max(0.2, SHARES.first_slice * run.options.time_limit_s))
    whole_s = SHARES.whole_model * run.options.time_limit_s
    found: list[Activity] = []
    if run.options.use_search:
        moving = Moving(run)
        found.append(Activity("moving", moving.step, slice_s, progress=lambda: moving.gained, wide=moving.step))
    if run.options.use_milp:
        found.append(Activity("exact", exactly.Deciding(run, run.problem).step, whole_s))
    steps: dict[str, Callable[[float], bool]] = {"bound": Tightening(run).step}
    if run.options.use_milp:
        steps |= {"pacing": Pacing(run).step, "proposing": Proposing(run, take).step, "proving": Proving(run).step,
                  "windows": Polishing(run).step}
        steps |= {f"{bound.name} bound": bound.step for bound in placement_rungs.bounding(run)}
    if run.options.use_search:
        steps["parting"] = Parting(run, take).step
    if tuning is not None:
        steps["quotas"] = tuning.step
    if run.options.use_search:
        steps["repeating"] = Repeating(run).step
    found += [Activity(name, step, slice_s) for name, step in steps.items()]
    if run.options.use_milp:
        found.append(Activity("indexing", Indexing(run).step, whole_s))
    return found


def _with_period(run: Run, result: SolveResult) -> SolveResult:
    """The result of a solve for the period: that decides whether it is optimal, and stands in its plan's provenance."""
    if result.plan is None:
        return result
    if run.best is not None and run.period_ns >= NEVER_NS:  # time was up before its first plan's period was asked for
        run.period_ns = schedule_period(run.best.view, result.plan.schedule)
    ended = (Termination.OPTIMAL if run.period_ns <= run.period_bound_ns else
             Termination.INTERRUPTED if run.interrupted else Termination.FEASIBLE)
    noted = {**result.plan.provenance, "termination": ended.value,
             "period": {"period_ns": run.period_ns, "bound_ns": run.period_bound_ns}}
    return replace(result, plan=replace(result.plan, provenance=noted), termination=ended, period_ns=run.period_ns,
                   period_bound_ns=run.period_bound_ns)


def _finish(run: Run) -> SolveResult:
    """Check the best plan and write the result."""
    best = run.best
    if best is None or best.best is None:
        ended = Termination.INTERRUPTED if run.interrupted else Termination.TIME_UP
        why = run.no_plan or no_plan_within(run.options.time_limit_s)
        return SolveResult(None, None, run.bound_ns, None, ended, run.seconds, reason=why)
    if not run.entered and run.bound_ns is None:  # time was up among the placements of the shape asked for
        run.raise_bound(problem_bound(run.problem))
    lowest = run.lowest
    bound = None if lowest is None else lowest.ns
    if bound is not None and bound > best.bound.ns:
        best.bound = Bound(bound, "the bound over all placements")
    proven = bound is not None and best.makespan_ns <= bound
    ended = Termination.OPTIMAL if proven else Termination.INTERRUPTED if run.interrupted else Termination.FEASIBLE
    found = Plan(f"{run.problem.name}/{best.placement.name}", run.problem, best.placement, best.best.schedule,
                 best.makespan_ns, bound, best.bound.ns,
                 {"method": best.rung, "seconds": round(run.seconds, 3), "seed": run.options.seed,
                  "termination": ended.value})
    check_plan(found)
    how = How(best.proposer, best.lineage, "" if lowest is None else lowest.what, best.bound.what)
    return SolveResult(found, best.makespan_ns, bound, best.bound.ns, ended, run.seconds, tuple(run.history),
                       best.rung, tuple(run.ablation), explain_plan(best), how=how)
