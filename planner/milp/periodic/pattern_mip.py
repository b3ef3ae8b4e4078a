"""The periodic schedule: in steady state every microbatch repeats one pattern, one period T after the one before.

Operation o = (stage, kind, class) of the k-th microbatch of its class starts at ``s_o + k T``, ``s_o = T k_o + tau_o``:

    minimise the span, max over o of s_o + p_o
    s_j >= s_i + p_i + c_ij                                    data arcs of one microbatch
    tau_j - tau_i >= p_i - T y_ij, tau_i - tau_j >= p_j - T (1 - y_ij)      two operations on one stream; y: j first
    sum_o alloc_o ([o <= a] - k_o) - free_o ([o < a] - k_o) + workspace_a <= capacity     when a starts, on its rank
    0 <= tau_o < T, k_o >= 0 integer, y binary

(Software pipelining by modulo scheduling, Rau 1994; Tessel's "repetend", Lin et al. 2024.) The size does not depend on
the number of microbatches. Two classes that are each other's image under an exchange of ranks (the two directions of a
two-way pipeline) share one pattern, which halves the model. What is left out: warm-up and cool-down
(`mipipe.planner.search.follow` squeezes them), microbatches of different durations (the pattern uses means; the
order adapts when it is evaluated), memory across the two streams of a rank (counted as held), contended channels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

from mipipe.planner import clock
from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.periodic.modulo import greedy
from mipipe.planner.milp.periodic.pattern import PACES, OperationKey, PeriodicPattern, pattern_of

STEPS = (*PACES, 1.075, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)
"""Periods tried, in loads of the busiest rank."""


@dataclass(frozen=True, slots=True)
class PeriodicResult:
    """``starts_ns[stage, kind, class]``: start in the class's first microbatch; None if no pattern was found."""

    period_ns: int | None
    starts_ns: dict[OperationKey, float] | None
    span_ns: float | None
    outcome: SolverOutcome


def pace(view: StageView, period_ns: int | None = None, *, time_limit_s: float, seed: int,
         start: dict[OperationKey, float] | None = None) -> PeriodicResult:
    """The pattern of least span at the least period that has one (at ``period_ns`` alone if given).

    Periods rise from the load by `STEPS`; each has a quarter of the time left to find a pattern or to be refuted, half
    of it where greedy modulo scheduling gives a start. ``start`` (times of some schedule's middle) replaces that.
    """
    pattern = pattern_of(view)
    left = time_limit_s
    outcome = SolverOutcome(SolverStatus.TIME_LIMIT, None, None, 0.0, 0, 0)
    periods = [period_ns] if period_ns is not None else [math.ceil(pattern.load * step) for step in STEPS]
    for number, period in enumerate(periods):
        known = start or greedy(pattern, period)
        last = number + 1 == len(periods)
        limit = left if last else left / 2 if known else left / 4
        if limit <= clock.LEAST_S and known is None:
            break
        model = build(pattern, period)
        if known is not None:
            _set_start(model, pattern, period, known)
        outcome = highs.solve(model, time_limit_s=limit, seed=seed, warm_start=known is not None, gap=1e-3)
        left -= outcome.seconds
        if outcome.has_solution:
            return _read(model, pattern, period, outcome)
        if start is None and known is not None:
            span = max(moment + pattern.duration[key] for key, moment in known.items())
            return PeriodicResult(period, known, span, outcome)
        if outcome.termination is SolverStatus.INTERRUPTED:
            break
    return PeriodicResult(None, None, None, outcome)


def build(pattern: PeriodicPattern, period_ns: int) -> pyo.ConcreteModel:
    """The model of the module docstring, times in periods."""
    model = pyo.ConcreteModel(name="periodic MIP")
    own = [key for key in pattern.keys if pattern.alias[key] == key]
    number = {key: own.index(pattern.alias[key]) for key in pattern.keys}
    deepest = 2 + _depth(pattern, period_ns)
    model.tau = pyo.Var(range(len(own)), bounds=(0, 1 - 1e-6))
    model.k = pyo.Var(range(len(own)), domain=pyo.NonNegativeIntegers, bounds=(0, deepest))
    model.span = pyo.Var(bounds=(0, deepest + 2))
    model.goal = pyo.Objective(expr=model.span)
    model.rows = pyo.ConstraintList()
    size = {key: pattern.duration[key] / period_ns for key in pattern.keys}

    def start(key: OperationKey) -> pyo.Expression:
        return model.k[number[key]] + model.tau[number[key]]

    for a, b, lag in pattern.arcs:
        if pattern.alias[a] == a:
            model.rows.add(start(b) - start(a) >= size[a] + lag / period_ns)
    for key in own:
        model.rows.add(model.span - start(key) >= size[key])
    machines: dict[int, list[OperationKey]] = defaultdict(list)
    for key, where in pattern.machine.items():
        machines[where].append(key)
    seen: set[frozenset[int]] = set()
    model.y = pyo.Var(pyo.Any, dense=False, domain=pyo.Binary)
    for members in machines.values():
        shape = frozenset(number[key] for key in members)
        if shape in seen and len(shape) == len(members):
            continue  # the mirror image of a machine that is in already
        seen.add(shape)
        for one, two in combinations(members, 2):
            i, j = number[one], number[two]
            if i == j:
                continue
            later = model.y[i, j]
            model.rows.add(model.tau[j] - model.tau[i] + later >= size[one])
            model.rows.add(model.tau[i] - model.tau[j] - later >= size[two] - 1)
        _memory(model, pattern, members, number)
    # one pattern can be shifted as a whole: its first operation starts at 0
    first = number[min(pattern.keys, key=lambda key: (key[2], key[0], key[1] is not ActionKind.F))]
    model.k[first].fix(0)
    return model


def _memory(model: pyo.ConcreteModel, pattern: PeriodicPattern, members: list[OperationKey],
            number: dict[OperationKey, int]) -> None:
    """What is held when an operation that takes memory starts; other streams of the rank count as held throughout."""
    rank = pattern.machine[members[0]] // 2
    others = [key for key, where in pattern.machine.items() if where // 2 == rank and key not in members]
    capacity = pattern.capacity[rank]
    if not any(pattern.alloc[key] or pattern.workspace[key] for key in members):
        return
    for a in members:
        if not (pattern.alloc[a] or pattern.workspace[a]):
            continue
        held = pattern.alloc[a] + pattern.workspace[a]
        body = pattern.alloc[a] * -model.k[number[a]] + pattern.free[a] * model.k[number[a]]
        for o in (*members, *others):
            change = pattern.alloc[o] - pattern.free[o]
            if o == a or not (pattern.alloc[o] or pattern.free[o]):
                continue
            body += -change * model.k[number[o]]
            if o in others:
                held += pattern.alloc[o]
            elif (number[o], number[a]) in model.y:
                held += change
                body += -change * model.y[number[o], number[a]]  # y: a first
            elif (number[a], number[o]) in model.y:
                body += change * model.y[number[a], number[o]]
        model.rows.add(body / max(1, capacity) <= (capacity - held) / max(1, capacity))


def _depth(pattern: PeriodicPattern, period_ns: int) -> int:
    """Periods from a microbatch's first operation to its last along its longest path, doubled for what waits."""
    reach = dict.fromkeys(pattern.keys, 0)
    for _ in range(len(pattern.keys)):
        moved = False
        for a, b, lag in pattern.arcs:
            arrival = reach[a] + pattern.duration[a] + lag
            if arrival > reach[b]:
                reach[b], moved = arrival, True
        if not moved:
            break
    return 2 * math.ceil(max(reach[key] + pattern.duration[key] for key in pattern.keys) / period_ns)


def _set_start(model: pyo.ConcreteModel, pattern: PeriodicPattern, period_ns: int,
               start: dict[OperationKey, float]) -> None:
    own = [key for key in pattern.keys if pattern.alias[key] == key]
    times = [start[key] / period_ns for key in own]
    for n, moment in enumerate(times):
        model.k[n].set_value(math.floor(moment), skip_validation=True)
        model.tau[n].set_value(moment - math.floor(moment), skip_validation=True)
    for a, b in model.y:
        model.y[a, b].set_value(int(model.tau[b].value < model.tau[a].value), skip_validation=True)


def _read(model: pyo.ConcreteModel, pattern: PeriodicPattern, period_ns: int, outcome: SolverOutcome) -> PeriodicResult:
    own = [key for key in pattern.keys if pattern.alias[key] == key]
    starts = {key: (round(model.k[n].value) + model.tau[n].value) * period_ns for n, key in enumerate(own)}
    return PeriodicResult(period_ns, {key: starts[pattern.alias[key]] for key in pattern.keys},
                          model.span.value * period_ns, outcome)
