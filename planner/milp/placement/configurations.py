"""A bound over all placements from what single devices can do: a configuration LP, by cutting planes.

A *configuration* is what one device holds: n[b] microbatches' worth of the units of bin b, a bin being equal units at
similar depth. Whatever the placement, the D devices cover every unit, so for any weights pi >= 0 of the bins

    some device carries at least its share:  sum_b pi[b] n[b] >= sum_b pi[b] size[b] / D

and no makespan is below the least C at which one device can (`_lightest`, a small MIP). Each weighting gives a valid
bound; the best one is sought by the cutting planes of the configuration LP's dual,

    maximise sum_b pi[b] size[b] - theta    subject to    theta >= D sum_b pi[b] n[b] for every configuration seen

What a device can do within C is a relaxation to flows of work (`mipipe.planner.milp.placement.device_model`).
Devices of different kinds have a configuration each, of which the LP adds up as many as there are. Left out, beside
what that leaves out: that different devices' first microbatches come one after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from mipipe.planner import clock
from mipipe.planner.bounds.over_placements import Bound, problem_bound
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.placement.device_model import Bin, bins_of, devices_model
from mipipe.planner.problem import PlanningProblem

WIDEST = 4.0
"""Most that a bin's weight may differ from its work's share: keeps the first weightings from being absurd."""

STEP = 0.003
"""How far above the bound a makespan is tried to be refuted."""

LONGEST_S = 5.0
"""Of one MIP."""

ROUGH = 0.05
"""Relative gap at which a configuration is heavy enough to change the weights."""

GAP = 1e-3
"""Relative gap of a weighting's MIP: the next weighting gains more than the rest of it."""


def configuration_bound(problem: PlanningProblem, *, time_limit_s: float,
                        seed: int = 0) -> tuple[Bound, SolverOutcome]:
    """The best bound over all placements found in time, or `problem_bound` if that is better; the last outcome."""
    began, best = time.monotonic(), problem_bound(problem)
    bins = bins_of(problem)
    even = [one.work / one.size / sum(other.work for other in bins) for one in bins]
    weights, seen = even, list[list[float]]()
    model = devices_model(problem, bins, best.ns)
    outcome = SolverOutcome(SolverStatus.TIME_LIMIT, None, None, 0.0, 0, 0)
    tried_ns = _above(best.ns)
    while (left := time_limit_s - (time.monotonic() - began)) > clock.LEAST_S:
        outcome = _heaviest(model, weights, tried_ns, left, seed)
        if outcome.bound is not None and outcome.bound < 1 - 1e-6:
            refuted = _lightest(model, weights, tried_ns, min(left, LONGEST_S), seed)
            value = tried_ns if refuted is None else max(tried_ns, refuted)
            best = Bound(value, "configuration MIP: what single devices can do, whichever groups they hold")
            tried_ns = _above(best.ns)
        elif outcome.has_solution:
            seen.append([sum(count * max(0.0, model.n[q, b].value) for q, count in enumerate(model.counts))
                         for b in range(len(bins))])
            found = _next_weights(bins, even, seen)
            if found is None:
                break
            weights = found
        if outcome.termination is SolverStatus.INTERRUPTED or not outcome.has_solution:
            break
    return best, outcome


def _above(bound_ns: int) -> int:
    """The next makespan that is tried to be refuted."""
    return bound_ns + max(1, int(STEP * bound_ns))


def _heaviest(model: pyo.ConcreteModel, weights: Sequence[float], makespan_ns: int,
              seconds: float, seed: int) -> SolverOutcome:
    """The most weight that the devices carry within a makespan, as a share of all; below 1 it is refuted."""
    model.makespan.fix(makespan_ns / model.unit_ns)
    model.share.deactivate()
    model.goal.set_value(_carried(model, weights))
    model.goal.sense = pyo.maximize
    outcome = highs.solve(model, time_limit_s=min(seconds, LONGEST_S), seed=seed, gap=ROUGH)
    unclear = outcome.objective is not None and outcome.objective <= 1 and (outcome.bound or 1) >= 1 - 1e-6
    left = seconds - outcome.seconds
    if unclear and left > 0:
        return highs.solve(model, time_limit_s=min(left, LONGEST_S), seed=seed, gap=GAP)
    return outcome


def _lightest(model: pyo.ConcreteModel, weights: Sequence[float], least_ns: int, seconds: float,
              seed: int) -> int | None:
    """A bound on the least makespan in which the devices carry all the weight."""
    model.makespan.unfix()
    model.makespan.setlb(least_ns / model.unit_ns)
    model.share.set_value(_carried(model, weights) >= 1)
    model.share.activate()
    model.goal.set_value(model.makespan)
    model.goal.sense = pyo.minimize
    outcome = highs.solve(model, time_limit_s=seconds, seed=seed, gap=GAP)
    return None if outcome.bound is None else math.ceil((outcome.bound - 1e-5) * model.unit_ns)


def _carried(model: pyo.ConcreteModel, weights: Sequence[float]) -> pyo.Expression:
    """The weight of what all devices hold."""
    return sum(count * weight * model.n[q, b]
               for q, count in enumerate(model.counts) for b, weight in enumerate(weights))


def _next_weights(bins: Sequence[Bin], even: Sequence[float], seen: Sequence[Sequence[float]]) -> list[float] | None:
    """The weights that no configuration seen carries the whole of, by the widest margin; None if there are none."""
    model = pyo.ConcreteModel(name="configuration LP")
    model.weight = pyo.Var(range(len(bins)), bounds=lambda _, b: (even[b] / WIDEST, even[b] * WIDEST))
    model.theta = pyo.Var()
    model.rows = pyo.ConstraintList()
    model.rows.add(sum(model.weight[b] * one.size for b, one in enumerate(bins)) == 1)
    for carried in seen:
        model.rows.add(sum(model.weight[b] * value for b, value in enumerate(carried)) <= model.theta)
    model.goal = pyo.Objective(expr=model.theta)
    outcome = highs.solve(model, time_limit_s=10.0, seed=0)
    if outcome.objective is None or outcome.objective > 1 - 1e-6:
        return None
    return [model.weight[b].value for b in range(len(bins))]
