"""Balances the units of a merge over equal ranks: how many units of each kind every rank takes.

Units of the same cost are interchangeable (the same tensor in every layer), so the integers are counts per kind and
rank, and the size does not depend on the number of layers. Memory is no row here: a rank runs one unit at a time, so
the cap is a test on each unit (`mipipe.planner.merging.plan`).

    minimise  z + epsilon (r + c + w)
    sum_d n[k, d] = N_k                         every unit is taken once
    sum_k time_k n[k, d] <= z                   for every rank d: its time
    sum_k read_k n[k, d] <= r mean read         its bytes read, as a multiple of the mean; the same for the arithmetic
                                                (c) and for the bytes written (w)
    load of rank d >= load of rank d + 1        equal ranks are interchangeable: order them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mipipe.planner.milp import pyo
from mipipe.planner.milp.highs import SolverOutcome, solve

EPSILON = 0.01
"""Weight of the balance of bytes beside that of time: it decides between plans of equal time."""

GAP = 5e-3
"""Relative gap at which a balance is good enough: costs are estimates."""


@dataclass(frozen=True, slots=True)
class UnitKind:
    """``count`` units of equal cost: nanoseconds in all, bytes read, nanoseconds of arithmetic, bytes written."""

    count: int
    time: int
    read: int
    compute: int
    write: int


def build(kinds: Sequence[UnitKind], num_ranks: int) -> pyo.ConcreteModel:
    """The model, in units of the mean load of a rank."""
    model = pyo.ConcreteModel(name="merge MIP")
    model.K, model.D = pyo.RangeSet(0, len(kinds) - 1), pyo.RangeSet(0, num_ranks - 1)
    model.n = pyo.Var(model.K, model.D, domain=pyo.NonNegativeIntegers,
                      bounds=lambda _model, k, _d: (0, kinds[k].count))
    model.z, model.r, model.c, model.w = (pyo.Var(domain=pyo.NonNegativeReals) for _ in range(4))

    def load(rank: int, costs: Sequence[int]) -> pyo.Expression:
        mean = max(1.0, sum(cost * kind.count for cost, kind in zip(costs, kinds, strict=True)) / num_ranks)
        return sum(cost / mean * model.n[k, rank] for k, cost in enumerate(costs))

    times = [kind.time for kind in kinds]
    model.taking = pyo.Constraint(model.K, rule=lambda model, k: sum(model.n[k, d] for d in model.D) == kinds[k].count)
    model.timing = pyo.Constraint(model.D, rule=lambda model, d: load(d, times) <= model.z)
    model.reading = pyo.Constraint(model.D, rule=lambda model, d: load(d, [kind.read for kind in kinds]) <= model.r)
    model.computing = pyo.Constraint(model.D,
                                     rule=lambda model, d: load(d, [kind.compute for kind in kinds]) <= model.c)
    model.writing = pyo.Constraint(model.D, rule=lambda model, d: load(d, [kind.write for kind in kinds]) <= model.w)
    model.sorting = pyo.Constraint(pyo.RangeSet(0, num_ranks - 2),
                                 rule=lambda model, d: load(d, times) >= load(d + 1, times))
    model.goal = pyo.Objective(expr=model.z + EPSILON * (model.r + model.c + model.w))
    return model


def balance(kinds: Sequence[UnitKind], num_ranks: int, start: Sequence[Sequence[int]], time_limit_s: float,
            seed: int = 0) -> tuple[list[list[int]], SolverOutcome]:
    """Counts ``[kind][rank]`` and the solver's outcome; ``start`` is a known solution of the same form."""
    model = build(kinds, num_ranks)
    for k, row in enumerate(start):
        for d, count in enumerate(row):
            model.n[k, d].value = count
    outcome = solve(model, time_limit_s=time_limit_s, seed=seed, warm_start=True, gap=GAP)
    if not outcome.has_solution:
        return [list(row) for row in start], outcome
    return [[round(model.n[k, d].value) for d in range(num_ranks)] for k in range(len(kinds))], outcome
