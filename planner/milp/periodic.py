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
(`mipipe.planner.milp.unroll` squeezes them), microbatches of different durations (the pattern uses means; the order
adapts when it is evaluated), memory across the two streams of a rank (counted as held), contended channels.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

import pyomo.environ as pyo

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs import job_shop
from mipipe.planner.milp import highs
from mipipe.planner.milp.highs import SolverOutcome, Termination
from mipipe.planner.stages import StageView

Key = tuple[int, ActionKind, int]
"""(stage, kind, class), a class named by its first microbatch."""

STEPS = (1.0, 1.01, 1.02, 1.035, 1.05, 1.075, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0)


@dataclass(frozen=True, slots=True)
class Pattern:
    """The operations of one period: ``alias[o]`` is the operation whose times o shares."""

    keys: list[Key]
    alias: dict[Key, Key]
    duration: dict[Key, int]
    machine: dict[Key, int]
    arcs: list[tuple[Key, Key, int]]
    alloc: dict[Key, int]
    free: dict[Key, int]
    workspace: dict[Key, int]
    capacity: list[int]
    load: int


@dataclass(frozen=True, slots=True)
class PeriodicResult:
    """``starts_ns[stage, kind, class]``: start in the class's first microbatch; None if no pattern was found."""

    period_ns: int | None
    starts_ns: dict[Key, float] | None
    span_ns: float | None
    outcome: SolverOutcome


def pace(view: StageView, period_ns: int | None = None, *, time_limit_s: float, seed: int,
         start: dict[Key, float] | None = None) -> PeriodicResult:
    """The pattern of least span at the least period that has one (at ``period_ns`` alone if given).

    The first half of the time goes to proving a period infeasible or finding a pattern, by `STEPS` above the load.
    A start (times of some schedule's middle) is used at every period.
    """
    pattern = pattern_of(view)
    left = time_limit_s
    outcome = SolverOutcome(Termination.TIME_LIMIT, None, None, 0.0, 0, 0)
    periods = [period_ns] if period_ns is not None else [math.ceil(pattern.load * step) for step in STEPS]
    for number, period in enumerate(periods):
        limit = left if number + 1 == len(periods) else left / 2
        if limit <= 0.05:
            break
        model = build(pattern, period)
        if start is not None:
            _set_start(model, pattern, period, start)
        outcome = highs.solve(model, time_limit_s=limit, seed=seed, warm_start=start is not None, gap=1e-3)
        left -= outcome.seconds
        if outcome.has_solution:
            return _read(model, pattern, period, outcome)
        if outcome.termination is Termination.INTERRUPTED:
            break
    return PeriodicResult(None, None, None, outcome)


def pattern_of(view: StageView) -> Pattern:
    """The operations of one microbatch of every class, with durations and sizes averaged over the class's loads.

    Classes here are routes: microbatches that differ only in load share a pattern.
    """
    jobs = job_shop(view, fifo=False)
    route_of = [tuple(route[m] for route in view.placement.routes) for m in range(view.problem.num_microbatches)]
    first = {route: m for m, route in reversed(list(enumerate(route_of)))}
    name = [first[route] for route in route_of]
    members: dict[Key, list[int]] = defaultdict(list)
    for job, action in enumerate(jobs.compiled.actions):
        members[action.stage, action.kind, name[action.microbatch]].append(job)

    def mean(column: list[int]) -> dict[Key, int]:
        return {key: -(-sum(column[job] for job in found) // len(found)) for key, found in members.items()}

    index = {job: key for key, found in members.items() for job in found}
    arcs = sorted({(index[a], index[b], lag) for a, b, lag in jobs.arcs
                   if jobs.compiled.actions[a].microbatch == name[jobs.compiled.actions[a].microbatch]})
    keys = list(members)
    machine = {key: jobs.machine[found[0]] for key, found in members.items()}
    duration = mean(jobs.durations)
    load: dict[int, int] = defaultdict(int)
    for key in keys:
        load[machine[key]] += duration[key]
    return Pattern(keys, _aliases(view, sorted(set(name)), keys, duration, machine), duration, machine, arcs,
                   mean(jobs.alloc), mean(jobs.free), mean(jobs.workspace), list(jobs.capacity), max(load.values()))


def _aliases(view: StageView, names: list[int], keys: list[Key], duration: dict[Key, int],
             machine: dict[Key, int]) -> dict[Key, Key]:
    """Identity, or the second class on the first where an exchange of ranks maps one onto the other."""
    alias = {key: key for key in keys}
    if len(names) != 2:
        return alias
    one, two = names
    image = dict(zip((route[one] for route in view.placement.routes), (route[two] for route in view.placement.routes),
                     strict=True))
    swaps = all(image[route[one]] == route[two] and image.get(route[two]) == route[one]
                for route in view.placement.routes)
    if swaps and all(duration[stage, kind, one] == duration[stage, kind, two] for stage, kind, _ in keys):
        alias.update({(stage, kind, two): (stage, kind, one) for stage, kind, _ in keys})
    return alias


def build(pattern: Pattern, period_ns: int) -> pyo.ConcreteModel:
    """The model of the module docstring, times in periods."""
    model = pyo.ConcreteModel()
    own = [key for key in pattern.keys if pattern.alias[key] == key]
    number = {key: own.index(pattern.alias[key]) for key in pattern.keys}
    deepest = 2 + _depth(pattern, period_ns)
    model.tau = pyo.Var(range(len(own)), bounds=(0, 1 - 1e-6))
    model.k = pyo.Var(range(len(own)), domain=pyo.NonNegativeIntegers, bounds=(0, deepest))
    model.span = pyo.Var(bounds=(0, deepest + 2))
    model.goal = pyo.Objective(expr=model.span)
    model.rows = pyo.ConstraintList()
    size = {key: pattern.duration[key] / period_ns for key in pattern.keys}

    def start(key: Key) -> pyo.Expression:
        return model.k[number[key]] + model.tau[number[key]]

    for a, b, lag in pattern.arcs:
        if pattern.alias[a] == a:
            model.rows.add(start(b) - start(a) >= size[a] + lag / period_ns)
    for key in own:
        model.rows.add(model.span - start(key) >= size[key])
    machines: dict[int, list[Key]] = defaultdict(list)
    for key in pattern.keys:
        machines[pattern.machine[key]].append(key)
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


def _memory(model: pyo.ConcreteModel, pattern: Pattern, members: list[Key], number: dict[Key, int]) -> None:
    """What is held when an operation that takes memory starts; other streams of the rank count as held throughout."""
    rank = pattern.machine[members[0]] // 2
    others = [key for key in pattern.keys if pattern.machine[key] // 2 == rank and key not in members]
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


def _depth(pattern: Pattern, period_ns: int) -> int:
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


def _set_start(model: pyo.ConcreteModel, pattern: Pattern, period_ns: int, start: dict[Key, float]) -> None:
    own = [key for key in pattern.keys if pattern.alias[key] == key]
    times = [start[key] / period_ns for key in own]
    for n, moment in enumerate(times):
        model.k[n].set_value(math.floor(moment), skip_validation=True)
        model.tau[n].set_value(moment - math.floor(moment), skip_validation=True)
    for a, b in model.y:
        model.y[a, b].set_value(int(model.tau[b].value < model.tau[a].value), skip_validation=True)


def _read(model: pyo.ConcreteModel, pattern: Pattern, period_ns: int, outcome: SolverOutcome) -> PeriodicResult:
    own = [key for key in pattern.keys if pattern.alias[key] == key]
    starts = {key: (round(model.k[n].value) + model.tau[n].value) * period_ns for n, key in enumerate(own)}
    return PeriodicResult(period_ns, {key: starts[pattern.alias[key]] for key in pattern.keys},
                          model.span.value * period_ns, outcome)
