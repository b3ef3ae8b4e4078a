"""The exact order of actions at a fixed placement: the disjunctive job-shop MIP with memory.

`solve_order` is the definition of "optimal at this placement" and, on small instances, its proof. What makes it larger
than a textbook job shop are microbatches, and they also make it small: FIFO within a class removes all orders between
equal actions, and the horizon decides most of the rest.

Orders are of F, I and W. Where overlapped pairs gain, the model is a relaxation of schedules with pairs
(`mipipe.planner.bounds.pairs`): its bound holds for them, its order is evaluated without.
"""

from __future__ import annotations

from dataclasses import dataclass

from mipipe.planner.actions import Action
from mipipe.planner.bounds.at_placement import bounding_shop, placement_bound
from mipipe.planner.jobs.job_shop import Jobs, elementary_actions, job_shop, peak_memory
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.jobs.times import Evaluation, evaluate, run_orders
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.order import disjunctive
from mipipe.planner.milp.order.shop import time_unit, whole
from mipipe.planner.plan import RankOrder, Schedule

__all__ = ["OrderResult", "solve_order"]


@dataclass(frozen=True, slots=True)
class OrderResult:
    """The best schedule known (None: none found), its makespan as evaluated, and the bound at the placement."""

    schedule: Schedule | None
    makespan_ns: int | None
    bound_ns: int
    outcome: SolverOutcome


def solve_order(view: StageView, *, time_limit_s: float, seed: int, start: Schedule | None = None,
                horizon_ns: int | None = None, split_backward: bool = True) -> OrderResult:
    """The optimal order at a placement, or the best found in time.

    Args:
        view: the placement.
        time_limit_s, seed: see `highs.solve`.
        start: a schedule of the same actions within memory; the search is for strictly better ones.
        horizon_ns: only schedules up to this makespan are of interest; by default found by doubling.
        split_backward: I and W as actions of their own; False: joined to B.

    Raises:
        PlanError: no order fits the memory.
    """
    actions = elementary_actions(view, split_backward=split_backward)
    jobs = job_shop(view, actions)
    bounding = bounding_shop(view, actions)
    shop = whole(bounding)
    lower = placement_bound(view, bounding).ns
    unit = time_unit(shop, lower)
    best, best_ns = start, None
    if start is not None:
        best_ns = evaluate(view, start)[1].makespan_ns
        horizon_ns = min(best_ns - unit, horizon_ns or best_ns)
    if best_ns is not None and best_ns <= lower:
        return OrderResult(best, best_ns, lower, SolverOutcome(SolverStatus.OPTIMAL, best_ns, lower, 0.0, 0, 0))
    grow = horizon_ns is None
    horizon = horizon_ns if horizon_ns is not None else lower + lower // 8
    seconds, nodes = 0.0, 0
    while True:
        result = disjunctive.solve_shop(shop, horizon, time_limit_s=time_limit_s - seconds, seed=seed, lower_ns=lower)
        seconds, nodes = seconds + result.outcome.seconds, nodes + result.outcome.nodes
        lower = max(lower, result.bound_ns)
        if not (grow and result.outcome.termination is SolverStatus.INFEASIBLE) or seconds >= time_limit_s:
            break
        horizon += horizon // 4
    if result.orders is not None:
        found = run_orders(jobs.compiled, list(result.orders.values()))
        assert found is not None or bounding is not jobs, "the model's order deadlocks"  # shares may take no time
        if found is not None and (best_ns is None or found.makespan_ns < best_ns):
            best, best_ns = to_schedule(jobs, result.orders), found.makespan_ns
    return OrderResult(best, best_ns, lower if best_ns is None else min(lower, best_ns),
                       _summary(result.outcome, best_ns, lower, seconds, nodes))


def to_schedule(jobs: Jobs, orders: dict[int, list[int]]) -> Schedule:
    """The schedule with the given order of jobs on every machine."""
    actions = jobs.compiled.actions

    def line(machine: int) -> tuple[Action, ...]:
        return tuple(actions[job] for job in orders.get(machine, ()))

    return Schedule(tuple(RankOrder(line(2 * rank), line(2 * rank + 1)) for rank in range(len(jobs.capacity))))


def fits(jobs: Jobs, evaluation: Evaluation) -> bool:
    """Whether saved tensors and workspace stay within every rank's capacity."""
    peaks = peak_memory(jobs, evaluation.starts)
    return all(peak <= room for peak, room in zip(peaks, jobs.capacity, strict=True))


def _summary(outcome: SolverOutcome, best_ns: int | None, lower: int, seconds: float,
             nodes: int) -> SolverOutcome:
    """The outcome with respect to the best schedule, which the last solve may only have proven."""
    termination = outcome.termination
    if best_ns is not None and termination is not SolverStatus.INTERRUPTED:
        termination = SolverStatus.OPTIMAL if lower >= best_ns else SolverStatus.FEASIBLE
    return SolverOutcome(termination, best_ns, lower, seconds, outcome.num_variables, outcome.num_constraints,
                         nodes)
