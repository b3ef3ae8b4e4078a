"""The periodic schedule of equal stages: one pattern for all ranks, each a fixed time after its neighbour.

Where the ranks of a placement hold alike stages, microbatches go over them in *legs*: a chain is one leg (0, 1, .., P -
1), a V two (0 .. P - 1, P - 1 .. 0), a two-way pipeline one in each direction. Operation o = (kind, leg) of the k-th
microbatch starts on rank r at

    s_o(r) + k T,    s_o(r) = T (tau_o + k_o + r (theta + g_o)),    0 <= tau_o < 1,  k_o, g_o integer

with one ``theta`` for all operations: modulo T every rank repeats rank 0's pattern, ``theta T`` later on each. So all
that must hold on every rank (operations of one rank apart modulo T, the memory when one starts) holds if it does on the
first and the last, and the model has a few integers for any number of ranks and microbatches:

    minimise the way of a microbatch: the start of its last input gradient, and a little of every other operation
    d (theta + g_F) T >= f + lag, -d (theta + g_I) T >= i + lag     along a leg of direction d; at its turns too
    tau_b - tau_a >= p_a / T - y_ab,  tau_a - tau_b >= p_b / T - (1 - y_ab)
    alloc of a + what is held when a starts on rank 0 and on rank P - 1 <= capacity

Building blocks of this kind are those of Qi et al., Pipeline Parallelism with Controllable Memory, 2024, who draw them
by hand; here HiGHS finds them. Stages that differ count as the longest and largest of their leg. The moments serve as
priorities (`mipipe.planner.search.follow`): that squeezes warm-up and cool-down and adapts to what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome
from mipipe.planner.milp.periodic.legs import Staircase
from mipipe.planner.milp.periodic.pattern import route_names

NAME = "staircase MIP"
"""What the formulation is called in a plan's history."""

STEPS = (1.0, 1.01, 1.03, 1.07, 1.15)
"""Periods tried, in loads of the busiest rank, until one has a pattern."""

OTHERS = 1e-3
"""Weight of all starts together beside that of the last input gradient: operations early, so memory is held briefly."""

PHASES = (ActionKind.F, ActionKind.I, ActionKind.W)


@dataclass(frozen=True, slots=True)
class Pattern:
    """``start[kind, leg]`` is (start on rank 0, increase from rank to rank), in ns; ``outcome`` is the last solve."""

    period_ns: float
    start: dict[tuple[ActionKind, int], tuple[float, float]]
    outcome: SolverOutcome


def pattern_of_staircase(stairs: Staircase, *, mirrored: bool, time_limit_s: float, seed: int,
                         theta: tuple[float, float] = (0.0, 1.0)) -> Pattern | None:
    """The first of the periods `STEPS` that has a pattern; None if none has within the time.

    ``mirrored``: two routes that are each other's image under an exchange of the ranks run at the same moments.
    ``theta``: its least and largest value: patterns of different slopes squeeze differently.
    """
    left = time_limit_s
    for step in STEPS:
        if left <= 0:
            return None
        period = step * stairs.least_period_ns
        model = build(stairs, period, mirrored=mirrored)
        model.theta.setlb(theta[0])
        model.theta.setub(theta[1])
        outcome = highs.solve(model, time_limit_s=left, seed=seed, gap=1e-3)
        left -= outcome.seconds
        if outcome.has_solution:
            start = {key: (period * (model.tau[n].value + round(model.k[n].value)),
                           period * (model.theta.value + round(model.g[n].value)))
                     for n, key in enumerate(_keys(stairs))}
            return Pattern(period, start, outcome)
    return None


def _keys(stairs: Staircase) -> list[tuple[ActionKind, int]]:
    return [(kind, number) for number, leg in enumerate(stairs.legs) for kind in PHASES if kind in leg.duration_ns]


def build(stairs: Staircase, period_ns: float, *, mirrored: bool) -> pyo.ConcreteModel:
    """The model of the module docstring, times in periods."""
    model = pyo.ConcreteModel(name=NAME)
    keys = _keys(stairs)
    number = {key: n for n, key in enumerate(keys)}
    last, deepest = stairs.ranks - 1, 8 * stairs.ranks * len(stairs.legs) + 8
    model.theta = pyo.Var(bounds=(0, 1))
    model.tau = pyo.Var(range(len(keys)), bounds=(0, 1 - 1e-6))
    model.k = pyo.Var(range(len(keys)), domain=pyo.Integers, bounds=(-deepest, deepest))
    model.g = pyo.Var(range(len(keys)), domain=pyo.Integers, bounds=(-9, 8))
    model.y = pyo.Var(pyo.Any, dense=False, domain=pyo.Binary)
    model.rows = pyo.ConstraintList()

    def size(key: tuple[ActionKind, int]) -> float:
        return stairs.legs[key[1]].duration_ns[key[0]] / period_ns

    def start(key: tuple[ActionKind, int], rank: int) -> pyo.Expression:
        n = number[key]
        return model.tau[n] + model.k[n] + rank * (model.theta + model.g[n])

    for at, leg in enumerate(stairs.legs):
        f, i, w = (ActionKind.F, at), (ActionKind.I, at), (ActionKind.W, at)
        lag, way = leg.lag_ns / period_ns, leg.direction
        begin, end = (0, last) if way > 0 else (last, 0)
        model.rows.add(way * (model.theta + model.g[number[f]]) >= size(f) + lag)
        model.rows.add(-way * (model.theta + model.g[number[i]]) >= size(i) + lag)
        if at + 1 < len(stairs.legs) and stairs.legs[at + 1].route == leg.route:
            other = 0 if stairs.legs[at + 1].direction > 0 else last
            turn = leg.turn_ns / period_ns
            model.rows.add(start((ActionKind.F, at + 1), other) - start(f, end) >= size(f) + turn)
            model.rows.add(start(i, end) - start((ActionKind.I, at + 1), other) >= size((ActionKind.I, at + 1)) + turn)
        else:
            model.rows.add(start(i, end) - start(f, end) >= size(f))
        if w in number:
            for rank in (0, last):
                model.rows.add(start(w, rank) - start(i, rank) >= size(i))
        if at == 0:
            model.rows.add(start(f, begin) >= 0)
            model.rows.add(start(f, begin) <= 1)
    for one, two in combinations(keys, 2):
        a, b = number[one], number[two]
        model.rows.add(model.tau[b] - model.tau[a] + model.y[a, b] >= size(one))
        model.rows.add(model.tau[a] - model.tau[b] - model.y[a, b] >= size(two) - 1)
    _memory(model, stairs, number)
    if mirrored:
        _mirror(model, stairs, number)
    ways = [start((ActionKind.I, at), 0 if leg.direction > 0 else last) for at, leg in enumerate(stairs.legs)
            if at == 0 or stairs.legs[at - 1].route != leg.route]
    model.goal = pyo.Objective(expr=sum(ways) + OTHERS * sum(start(key, rank) for key in keys for rank in (0, last)))
    return model


def _memory(model: pyo.ConcreteModel, stairs: Staircase, number: dict[tuple[ActionKind, int], int]) -> None:
    """What is held when an operation that takes memory starts, on the first and on the last rank."""
    alloc: dict[tuple[ActionKind, int], int] = {}
    free: dict[tuple[ActionKind, int], int] = {}
    for at, leg in enumerate(stairs.legs):
        until = ActionKind.W if (ActionKind.W, at) in number else ActionKind.I
        alloc[ActionKind.F, at] = leg.saved_fi + leg.saved_fw
        alloc[ActionKind.I, at] = leg.saved_iw
        free[ActionKind.I, at] = leg.saved_fi
        free[until, at] = free.get((until, at), 0) + leg.saved_fw + leg.saved_iw
    room = max(1, stairs.capacity)
    for one in number:
        if not alloc.get(one):
            continue
        a = number[one]
        for rank in (0, stairs.ranks - 1):
            body = 0.0
            for two, b in number.items():
                change = alloc.get(two, 0) - free.get(two, 0)
                started = model.k[a] + rank * model.g[a] - model.k[b] - rank * model.g[b]
                if two == one:
                    continue
                if (b, a) in model.y:  # y: a starts first in the period
                    earlier = 1 - model.y[b, a]
                else:
                    earlier = model.y[a, b]
                body += change * (started + earlier)
            model.rows.add(body / room <= (room - alloc[one]) / room)


def _mirror(model: pyo.ConcreteModel, stairs: Staircase, number: dict[tuple[ActionKind, int], int]) -> None:
    """The second route's operations start when their images of the first do: ``2 theta`` is whole then."""
    half = len(stairs.legs) // 2
    model.halves = pyo.Var(domain=pyo.Integers, bounds=(0, 1))
    model.rows.add(model.theta == 0.5 * model.halves)
    for (kind, at), a in number.items():
        if at < half:
            b = number[kind, at + half]
            model.rows.add(model.tau[b] + model.k[b] == model.tau[a] + model.k[a]
                           + (stairs.ranks - 1) * (0.5 * model.halves + model.g[a]))
            model.rows.add(model.g[b] == -model.g[a] - model.halves)


def starts_of(view: StageView, stairs: Staircase, pattern: Pattern) -> dict[tuple[int, ActionKind, int], float]:
    """Start of every (stage, kind, route) in ns, a route named by its first microbatch; stages outside the legs (ends
    dealt to all ranks) are beside their neighbours, twins at their images' moments."""
    known: dict[tuple[int, ActionKind, int], float] = {}
    own: dict[int, list[int]] = {}
    for number, leg in enumerate(stairs.legs):
        own.setdefault(leg.route, []).extend(leg.stages)
        for kind in leg.duration_ns:
            begin, step = pattern.start[kind, number]
            for stage in leg.stages:
                known[stage, kind, leg.route] = begin + (view.rank(stage, leg.route) - stairs.low) * step
    f, i, w = PHASES
    for route, stages in own.items():
        for stage in range(min(stages) - 1, -1, -1):
            known[stage, f, route] = known[stage + 1, f, route] - view.f_ns[stage][route]
            known[stage, i, route] = known[stage, w, route] = known[stage + 1, i, route] + 1
        for stage in range(max(stages) + 1, view.num_stages):
            known[stage, f, route] = known[stage - 1, f, route] + 1
            known[stage, i, route] = known[stage, w, route] = known[stage - 1, i, route] - 1
    given = next(iter(own))
    for name in set(route_names(view)) - set(own):
        known.update({(stage, kind, name): moment for (stage, kind, route), moment in list(known.items())
                      if route == given})
    return known
