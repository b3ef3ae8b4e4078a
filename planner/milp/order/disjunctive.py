"""The disjunctive order model: binary y decides which of two jobs on one machine comes first (Manne 1960).

    minimise C
    s_b >= s_a + p_a + lag_ab                        for every arc (data, FIFO, memory, decided pairs)
    s_b >= s_a + p_a - M_ab (1 - y_ab)               for every open pair on one machine, M_ab = latest end of a - r_b
    s_a >= s_b + p_b - M_ba y_ab
    y_ab >= y_a'b  where a is before a'              (FIFO: what precedes a' by b's order precedes b as well)
    base + sum_b (alloc_b - free_b) [b before a] + alloc_a + workspace_a <= capacity      at the start of every a
    C >= s_j + p_j + tail_j,  r_j <= s_j <= latest_j

Windows and decided pairs come from `shop.tighten`, so the horizon is both the cutoff and the source of all big-M.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from mipipe.planner.gap import BOUND_SLACK
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.order.shop import Shop, Tight, tighten, time_unit


@dataclass(frozen=True, slots=True)
class ShopResult:
    """``orders``: jobs of each machine (transfers left out), None without a solution; ``bound_ns`` on the makespan.

    INFEASIBLE means that no schedule within the horizon exists.
    """

    orders: dict[int, list[int]] | None
    bound_ns: int
    outcome: SolverOutcome


def solve_shop(shop: Shop, horizon_ns: int, *, time_limit_s: float, seed: int, lower_ns: int = 0,
               start_ns: list[int] | None = None, name: str = "order MIP",
               options: dict[str, Any] | None = None) -> ShopResult:
    """The best orders of a shop among those with a makespan of at most ``horizon_ns``.

    Args:
        shop: what to order.
        horizon_ns: no longer schedule is of interest; with ``start_ns``, at least its makespan.
        time_limit_s, seed: see `highs.solve`.
        lower_ns: a known bound on the makespan.
        start_ns: start of every job in some schedule, as the solver's start.
        name: of the formulation, for the ledger of calls.
        options: further HiGHS options.
    """
    unit = time_unit(shop, horizon_ns)
    tight = tighten(shop, horizon_ns) if lower_ns <= horizon_ns else None
    if tight is None:
        outcome = SolverOutcome(SolverStatus.INFEASIBLE, None, None, 0.0, 0, 0)
        return ShopResult(None, max(lower_ns, horizon_ns + 1), outcome)
    model = build(shop, tight, unit, lower_ns, name)
    if start_ns is not None:
        _start(model, shop, start_ns, unit)
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, warm_start=start_ns is not None,
                          absolute_gap=0.999 if _integral(shop, unit) else 1e-6, gap=0.0, options=options)
    bound = lower_ns
    if outcome.termination is SolverStatus.INFEASIBLE:
        bound = max(bound, horizon_ns + 1)
    elif outcome.bound is not None:
        # the solver's feasibility tolerance is 1e-6 of a unit; a bound just above an integer must not be rounded up
        bound = max(bound, -int(-(outcome.bound - BOUND_SLACK) // 1) * unit if _integral(shop, unit)
                    else int((outcome.bound - BOUND_SLACK) * unit))
    return ShopResult(_orders(model, shop, tight) if outcome.has_solution else None, bound, outcome)


def build(shop: Shop, tight: Tight, unit: int, lower_ns: int, name: str = "order MIP") -> pyo.ConcreteModel:
    """The model of the module docstring, times in ``unit`` nanoseconds."""
    model = pyo.ConcreteModel(name=name)
    release, latest = tight.release / unit, tight.latest / unit
    model.s = pyo.Var(range(shop.count), bounds=lambda _, j: (release[j], latest[j]))
    model.makespan = pyo.Var(bounds=(lower_ns / unit, tight.horizon / unit))
    model.y = pyo.Var([pair for pair in tight.open_pairs if _tied(shop, pair) is None], domain=pyo.Binary)
    model.goal = pyo.Objective(expr=model.makespan)
    model.rows = pyo.ConstraintList()
    arcs(model, shop, tight, unit)
    disjunctions(model, shop, tight, unit)
    first_in_first_out(model, shop, tight)
    memory(model, shop, tight, unit)
    return model


def arcs(model: pyo.ConcreteModel, shop: Shop, tight: Tight, unit: int) -> None:
    """``s_b >= s_a + p_a + lag_ab``, and ``C >= s_j + p_j + tail_j`` where no arc implies it."""
    implied = [0] * shop.count
    longest: dict[tuple[int, int], int] = {}
    for a, b, lag in shop.arcs:
        longest[a, b] = max(lag, longest.get((a, b), 0))
        implied[a] = max(implied[a], lag + shop.durations[b] + shop.tail[b])
    for (a, b), lag in longest.items():
        model.rows.add(model.s[b] - model.s[a] >= (shop.durations[a] + lag) / unit)
    for a, b in _decided(shop, tight):
        if (a, b) not in longest:
            model.rows.add(model.s[b] - model.s[a] >= shop.durations[a] / unit)
    for job in range(shop.count):
        if shop.tail[job] > implied[job] or not implied[job]:
            model.rows.add(model.makespan - model.s[job] >= (shop.durations[job] + shop.tail[job]) / unit)


def _decided(shop: Shop, tight: Tight) -> list[tuple[int, int]]:
    """Pairs on one machine whose order the horizon fixed, without those that follow from others."""
    by_machine: dict[int, list[int]] = defaultdict(list)
    for job, machine in enumerate(shop.machine):
        by_machine[machine].append(job)
    pairs = []
    for members in by_machine.values():
        ordered = sorted(members, key=lambda job: (tight.release[job], tight.latest[job]))
        for a in members:
            later = [b for b in ordered if tight.before[a, b]]
            for b in later:
                if not any(tight.before[a, c] and tight.before[c, b] for c in later if c != b):
                    pairs.append((a, b))
    return pairs


def disjunctions(model: pyo.ConcreteModel, shop: Shop, tight: Tight, unit: int) -> None:
    """One of ``s_b >= s_a + p_a`` and ``s_a >= s_b + p_b`` for every open pair; M from the windows."""
    for a, b in tight.open_pairs:
        for first, second in ((a, b), (b, a)):
            big = int(tight.latest[first]) + shop.durations[first] - int(tight.release[second])
            constant, sign, var = precedes(model, shop, tight, first, second)
            # s_second - s_first >= p - M (1 - literal)
            model.rows.add(model.s[second] - model.s[first] - (big / unit) * sign * var
                           >= (shop.durations[first] - big + big * constant) / unit)


def precedes(model: pyo.ConcreteModel, shop: Shop, tight: Tight, a: int, b: int) -> tuple[int, int, Any]:
    """The literal "a before b" of two jobs on one machine as ``constant + sign * variable``; sign 0: decided."""
    if tight.before[a, b]:
        return 1, 0, 0.0
    if tight.before[b, a]:
        return 0, 0, 0.0
    pair = (a, b) if a < b else (b, a)
    producers = _tied(shop, pair)
    if producers is not None:
        first, second = producers if a < b else producers[::-1]
        return precedes(model, shop, tight, first, second)
    return (0, 1, model.y[pair]) if a < b else (1, -1, model.y[pair])


def _tied(shop: Shop, pair: tuple[int, int]) -> tuple[int, int] | None:
    """The producers of two transfers if they share a machine: the channel follows their order."""
    a, b = shop.tied.get(pair[0]), shop.tied.get(pair[1])
    return (a, b) if a is not None and b is not None and shop.machine[a] == shop.machine[b] else None


def first_in_first_out(model: pyo.ConcreteModel, shop: Shop, tight: Tight) -> None:
    """``[a before b] >= [a' before b]`` for neighbours a, a' in a decided order: what keeps the relaxation together."""
    open_with: dict[int, set[int]] = defaultdict(set)
    for a, b in tight.open_pairs:
        if _tied(shop, (a, b)) is None:
            open_with[a].add(b)
            open_with[b].add(a)
    for a, later in _decided(shop, tight):
        for b in open_with[a] & open_with[later]:
            one, sign, var = precedes(model, shop, tight, a, b)
            other, other_sign, other_var = precedes(model, shop, tight, later, b)
            model.rows.add(sign * var - other_sign * other_var >= other - one)


def memory(model: pyo.ConcreteModel, shop: Shop, tight: Tight, unit: int) -> None:
    """What is held when a job starts fits its rank; rows that cannot bind are left out."""
    by_rank: dict[int, list[int]] = defaultdict(list)
    for job, rank in enumerate(shop.rank):
        if rank >= 0 and (shop.alloc[job] or shop.free[job] or shop.workspace[job]):
            by_rank[rank].append(job)
    for rank, members in by_rank.items():
        scale = max(1, shop.capacity[rank])
        for job in members:
            if not shop.alloc[job] and not shop.workspace[job]:
                continue
            known = shop.base[rank] + shop.alloc[job] + shop.workspace[job]
            terms: list[tuple[int, Any]] = []
            for other in members:
                if other != job:
                    known += _held(model, shop, tight, unit, other, job, terms)
            if known + sum(max(0, size) for size, _ in terms) > shop.capacity[rank]:
                body = sum((size / scale) * var for size, var in terms)
                if not terms:
                    model.rows.add(model.makespan <= -1)  # this job never fits: the horizon is infeasible
                else:
                    model.rows.add(body <= (shop.capacity[rank] - known) / scale)


def _held(model: pyo.ConcreteModel, shop: Shop, tight: Tight, unit: int, other: int, job: int,
          terms: list[tuple[int, Any]]) -> int:
    """Bytes ``other`` surely holds when ``job`` starts; what depends on the order is appended to ``terms``."""
    if shop.machine[other] == shop.machine[job]:
        change = shop.alloc[other] - shop.free[other]
        constant, sign, var = precedes(model, shop, tight, other, job)
        if sign and change:
            terms.append((sign * change, var))
        return constant * change
    if tight.before[job, other]:
        return 0
    taken, returned = shop.alloc[other] + shop.workspace[other], shop.free[other] + shop.workspace[other]
    if tight.before[other, job]:
        return taken - returned
    if taken:  # on the other stream: held unless it starts later
        started = _cross(model, "started", other, job)
        reach = (int(tight.latest[job]) - int(tight.release[other])) / unit
        model.rows.add(model.s[other] - model.s[job] + reach * started >= 0)
        terms.append((taken, started))
        mirrored = model.component(f"started_{job}_{other}")
        if mirrored is not None:  # two that start together hold both
            model.rows.add(started + mirrored >= 1)
    if returned:
        ended = _cross(model, "ended", other, job)
        big = int(tight.latest[other]) + shop.durations[other] - int(tight.release[job])
        model.rows.add(model.s[job] - model.s[other] - (big / unit) * ended >= (shop.durations[other] - big) / unit)
        terms.append((-returned, ended))
    return 0


def _cross(model: pyo.ConcreteModel, what: str, other: int, job: int) -> Any:
    name = f"{what}_{other}_{job}"
    model.add_component(name, pyo.Var(domain=pyo.Binary))
    return model.component(name)


def _start(model: pyo.ConcreteModel, shop: Shop, start_ns: list[int], unit: int) -> None:
    for job in range(shop.count):
        model.s[job].set_value(start_ns[job] / unit, skip_validation=True)
    for a, b in model.y:
        first = (start_ns[a], start_ns[a] + shop.durations[a]) <= (start_ns[b], start_ns[b] + shop.durations[b])
        model.y[a, b].set_value(int(first), skip_validation=True)


def _orders(model: pyo.ConcreteModel, shop: Shop, tight: Tight) -> dict[int, list[int]]:
    """Jobs of each machine, sorted by how many others come before them."""
    by_machine: dict[int, list[int]] = defaultdict(list)
    for job, machine in enumerate(shop.machine):
        if shop.rank[job] >= 0:
            by_machine[machine].append(job)
    value = {pair: round(var.value) for pair, var in model.y.items()}

    def comes_first(a: int, b: int) -> int:
        if tight.before[a, b] or tight.before[b, a]:
            return int(tight.before[a, b])
        return value[a, b] if a < b else 1 - value[b, a]

    return {machine: sorted(members, key=lambda job: sum(comes_first(other, job) for other in members if other != job))
            for machine, members in by_machine.items()}


def _integral(shop: Shop, unit: int) -> bool:
    columns = (shop.durations, shop.release, shop.tail, [lag for _, _, lag in shop.arcs])
    return not any(value % unit for column in columns for value in column)
