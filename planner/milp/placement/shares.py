"""Which device holds what: the placement MIP, with replicas.

Units u are colocated sets of groups (usually single groups). x[u,d]: d holds a replica of u; n[u,d]: the share of the
microbatches u runs on d. Per device, for each stream, with everything per step of M microbatches:

    minimise C + hop_weight * (time a microbatch spends in transfers)
    C >= head_d + q sum_u work[u,d] n[u,d] + tail_d        the device's first group cannot start before its head
    C >= return_d + q (sum_u work[u,d] n[u,d] - forwards_d)   until gradients return its memory holds forwards_d of work
    C capacity_d >= sum_u area_u n[u,d]                    activations take bytes x time (Little's law)
    sum_u resident_u x[u,d] <= resident room of d;  sum_u saved_u x[u,d] <= capacity_d  (one microbatch of each)
    n[u,d] <= x[u,d],  sum_d n[u,d] = 1,  1 <= sum_d x[u,d] <= max_replicas
    r[u,d] <= n[u,d],  sum_d r[u,d] = z[u]                 u runs F again before its gradients (where it may): its work
                                                           grows by again_u, its area shrinks to what is kept meanwhile
    head_d = sum_u head_u first[u,d],  sum_u first[u,d] = 1 - idle_d,  first <= x    (the least head wins by itself)
    x[u,d] <= 1 - idle_d                                   a device may hold nothing: see `_may_idle`

q is the least share of its time that work takes in an overlapped pair (`mipipe.planner.jobs.overlap`). The row with
saved_u only for one replica each: then a microbatch holds all of them at once. Heads, areas and returns count transfers
at the cheapest link only where memory forces them, so with ``hop_weight = 0`` the optimum is a lower bound on the
makespan of every placement with at most ``max_replicas`` replicas of each unit. Equal devices are interchangeable: they
are numbered by their first unit. Left out: channels as machines (checked by the evaluation of what is proposed).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from mipipe.planner import clock
from mipipe.planner.actions import Stream
from mipipe.planner.bounds.loads import work_of
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.placement.routes import to_placement, to_shares
from mipipe.planner.milp.placement.units import Units, forwards_per_byte, units_of
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem

HOP_WEIGHTS = (1.0, 4.0, 0.25, 0.0)
"""Weights of transfer time that give different placements: few hops shorten warm-up, many start devices sooner."""

LASTING = 1.5
"""How much longer than on the shortest path activations stay in a schedule without idle time, where it matters which
groups run F again: a chain of P equal stages with F = I = W holds P microbatches at its first stage, each for P periods
of F + I + W, against P (F + I) on the path of one microbatch."""


@dataclass(frozen=True, slots=True)
class ShareProposal:
    """A placement, the estimate of its makespan (C above), and the solve it came from.

    ``bound_ns`` holds for every placement with as few replicas (None if the solve minimised transfers as well).
    """

    placement: Placement
    estimate_ns: int
    bound_ns: int | None
    outcome: SolverOutcome


def propose_by_mip(problem: PlanningProblem, *, time_limit_s: float, seed: int, count: int = 4, max_replicas: int = 1,
                   contiguous: bool = False, start: Placement | None = None) -> list[ShareProposal]:
    """Up to ``count`` different placements, each the best found for another weight of transfer time.

    Args:
        problem: what to place.
        time_limit_s, seed: of all solves together; see `highs.solve`.
        count: most placements.
        max_replicas: most devices that hold the same unit.
        contiguous: devices hold consecutive pieces, in device order (one replica each).
        start: a placement with at most ``max_replicas`` replicas, from which every solve starts.
    """
    units = units_of(problem, shared=max_replicas > 1)
    found: list[ShareProposal] = []
    lasting = LASTING if any(kept is not None for kept in units.kept) else 1.0
    began = time.monotonic()
    for number, weight in enumerate(HOP_WEIGHTS[:count]):
        if time.monotonic() - began > time_limit_s:
            break  # writing large models takes time as well
        model = build(problem, units, max_replicas=max_replicas, contiguous=contiguous, hop_weight=weight,
                      pressure=1.0 if number % 2 else lasting)
        if start is not None:
            _begin(model, to_shares(problem, units.groups, start))
        outcome = highs.solve(model, time_limit_s=time_limit_s / min(count, len(HOP_WEIGHTS)), seed=seed, gap=1e-3,
                              warm_start=start is not None)
        if outcome.has_solution:
            made = _proposal(model, problem, units, outcome, exact=not weight and (number % 2 == 1 or lasting == 1.0))
            found = [other for other in found if other.placement != made.placement] + [made]
        if outcome.termination is SolverStatus.INTERRUPTED:
            break
    return sorted(found, key=lambda proposal: proposal.estimate_ns)


def propose_beyond(problem: PlanningProblem, known: Sequence[Placement], *, hop_weight: float, pressure: float,
                   max_replicas: int, cutoff_ns: int, time_limit_s: float,
                   seed: int) -> tuple[ShareProposal | None, SolverOutcome]:
    """The best placement whose estimate is below a cutoff and which holds units elsewhere than all known ones do.

    With ``pressure = 1`` an outcome that is `infeasible` proves that a placement with so few replicas and a makespan
    below the cutoff holds every unit where a known one does.
    """
    units = units_of(problem, shared=max_replicas > 1)
    model = build(problem, units, max_replicas=max_replicas, contiguous=False, hop_weight=hop_weight, pressure=pressure)
    for other in known:
        shares = to_shares(problem, units.groups, other)
        model.rows.add(sum((1 - model.x[u, d]) if value > 0 else model.x[u, d] for u, row in enumerate(shares)
                           for d, value in enumerate(row)) >= 1)
    model.makespan.setub((cutoff_ns - 1 + 1e-3) / _scale(problem))
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, gap=1e-3)
    if not outcome.has_solution:
        return None, outcome
    return _proposal(model, problem, units, outcome, exact=not hop_weight and pressure == 1.0), outcome


def _proposal(model: pyo.ConcreteModel, problem: PlanningProblem, units: Units, outcome: SolverOutcome, *,
              exact: bool) -> ShareProposal:
    """The solution in a model's variables as a proposal; ``exact``: its objective is the makespan alone."""
    shares = [[max(0.0, share(model)[u, d].value) for d in range(problem.num_ranks)] for u in range(len(units.groups))]
    again = {u for u in model.z if model.z[u].value > 0.5}
    bound = bound_of(problem, outcome) if exact else None
    return ShareProposal(to_placement(problem, units.groups, shares, again=again),
                    round(model.makespan.value * _scale(problem)), bound, outcome)


def free_bound(problem: PlanningProblem, *, time_limit_s: float, seed: int) -> tuple[int | None, SolverOutcome]:
    """A bound on the makespan over all placements, with any number of replicas."""
    units = units_of(problem, shared=problem.num_ranks > 1)
    model = build(problem, units, max_replicas=problem.num_ranks, contiguous=False, hop_weight=0.0)
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, gap=1e-4)
    return bound_of(problem, outcome), outcome


def fits_nowhere(problem: PlanningProblem, *, time_limit_s: float, seed: int) -> bool:
    """Whether it is proven that no placement fits: what weights take on a device, and one microbatch's saved tensors.

    With one replica of each unit, which says it for more as well: the route of any microbatch is such a placement.
    """
    model = build(problem, units_of(problem), max_replicas=1, contiguous=False, hop_weight=0.0)
    return highs.solve(model, time_limit_s=time_limit_s, seed=seed, gap=1.0).infeasible


def bound_of(problem: PlanningProblem, outcome: SolverOutcome) -> int | None:
    """The solver's bound less its tolerance, rounded up to a whole nanosecond as makespans are."""
    return None if outcome.bound is None else math.ceil((outcome.bound - 1e-5) * _scale(problem))


def _scale(problem: PlanningProblem) -> float:
    """Nanoseconds per solver unit: an even device's work is 1,000 units."""
    total = sum(work_of(problem, group, next(iter(group.times.values())).total_ns) for group in problem.groups)
    return max(1.0, total / problem.num_ranks / 1000)


def build(problem: PlanningProblem, units: Units, *, max_replicas: int, contiguous: bool,
          hop_weight: float, pressure: float = 1.0) -> pyo.ConcreteModel:
    """The model of the module docstring, times in units of `_scale`.

    ``pressure`` multiplies areas: activations stay longer than the shortest path says (then C is no bound).
    """
    model = pyo.ConcreteModel(name="placement MIP")
    devices, members = range(problem.num_ranks), range(len(units.groups))
    model.x = pyo.Var(members, devices, domain=pyo.Binary)
    if max_replicas > 1:
        model.n = pyo.Var(members, devices, bounds=(0, 1))
    model.makespan = pyo.Var(bounds=(0, None))
    model.rows = pyo.ConstraintList()
    for u in members:
        clock.ask()
        if max_replicas > 1:
            model.rows.add(sum(model.n[u, d] for d in devices) == 1)
            for d in devices:
                model.rows.add(model.n[u, d] <= model.x[u, d])
        held = sum(model.x[u, d] for d in devices)
        model.rows.add(pyo.inequality(1, held, max_replicas))
    may = [u for u in members if units.kept[u] is not None]
    model.z = pyo.Var(may, domain=pyo.Binary)
    model.r = pyo.Var(may, devices, bounds=(0, 1))
    for u in may:
        model.rows.add(sum(model.r[u, d] for d in devices) == model.z[u])
        for d in devices:
            model.rows.add(model.r[u, d] <= share(model)[u, d])
    device_rows(model, problem, units, pressure, _may_idle(problem, units, max_replicas))
    moved = hops(model, problem, units) if hop_weight else 0.0
    model.goal = pyo.Objective(expr=model.makespan + hop_weight * moved)
    if contiguous:
        _in_device_order(model, problem, units)
    else:
        _interchangeable(model, problem, len(units.groups))
    return model


def _begin(model: pyo.ConcreteModel, shares: Sequence[Sequence[float]]) -> None:
    """Give x and n the values of a placement; HiGHS completes the rest."""
    for u, row in enumerate(shares):
        for d, value in enumerate(row):
            model.x[u, d].set_value(float(value > 0))
            if model.component("n") is not None:
                model.n[u, d].set_value(value)


def share(model: pyo.ConcreteModel) -> pyo.Var:
    """n[u, d]; with one replica of each unit it is x itself."""
    n = model.component("n")
    return model.x if n is None else n


def _may_idle(problem: PlanningProblem, units: Units, max_replicas: int) -> list[int]:
    """Devices that may have to hold nothing for a placement to be in the model.

    Where all devices may share a unit, one with room for any unit need not: holding it and running none of its
    microbatches costs nothing (its head and its return are below every makespan).
    """
    if max_replicas < problem.num_ranks:
        return list(range(problem.num_ranks))
    least = min(units.resident)
    return [d for d in range(problem.num_ranks) if least > resident_room(problem, d)]


def device_rows(model: pyo.ConcreteModel, problem: PlanningProblem, units: Units, pressure: float,
                may_idle: Sequence[int]) -> None:
    """Everything that holds on one device: load with head and with return, memory and its area."""
    scale, members, n = _scale(problem), range(len(units.groups)), share(model)
    may = [(u, kept) for u in members if (kept := units.kept[u]) is not None]
    model.first = pyo.Var(members, range(problem.num_ranks), bounds=(0, 1))
    model.back = pyo.Var(members, range(problem.num_ranks), bounds=(0, 1))
    model.idle = pyo.Var(may_idle, domain=pyo.Binary)
    rate = forwards_per_byte(problem)
    ratio = float(pair_gain(problem).ratio)
    for d, device in enumerate(problem.topology.devices):
        clock.ask()
        busy = 1 - model.idle[d] if d in model.idle else 1
        if d in model.idle:
            for u in members:
                model.rows.add(model.x[u, d] <= busy)
        resident, room = (device.memory_bytes if limit is None else min(device.memory_bytes, limit)
                          for limit in (problem.limits.resident_bytes, problem.limits.activation_bytes))
        model.rows.add(sum(units.resident[u] / max(1, resident) * model.x[u, d] for u in members) <= 1)
        if any(units.saved) and n is model.x:
            given = sum((units.saved[u] - kept) / max(1, room) * model.r[u, d] for u, kept in may)
            model.rows.add(sum(units.saved[u] / max(1, room) * model.x[u, d] for u in members) - given <= 1)
        if any(units.area):
            area = pressure / max(1, room) / scale
            given = sum(area * (units.area[u] - units.kept_area[u]) * model.r[u, d] for u, _ in may)
            model.rows.add(model.makespan >= sum(area * units.area[u] * n[u, d] for u in members) - given)
        model.rows.add(sum(model.first[u, d] for u in members) == busy)
        for u in members:
            model.rows.add(model.first[u, d] <= model.x[u, d])
        head = sum(units.head[u] / scale * model.first[u, d] for u in members)
        for stream, work in units.work.items():
            if any(any(row) for row in work):
                load = sum(ratio * work[u][d] / scale * n[u, d] for u in members)
                if stream is Stream.COMPUTE:
                    load += sum(units.again[u] / scale * model.r[u, d] for u, _ in may)
                model.rows.add(model.makespan >= load + (head if stream is Stream.COMPUTE else 0))
        if rate is not None and all(moment is not None for moment in units.gradient):
            model.rows.add(sum(model.back[u, d] for u in members) == busy)
            for u in members:
                model.rows.add(model.back[u, d] <= model.x[u, d])
            back = sum((units.gradient[u] or 0) / scale * model.back[u, d] for u in members)
            load = sum(ratio * units.work[Stream.COMPUTE][u][d] / scale * n[u, d] for u in members)
            # what saves nothing may run its forwards while the device waits
            light = sum(ratio * units.light[u] / scale * n[u, d] for u in members)
            model.rows.add(model.makespan >= load + back - ratio * room * rate / scale - light)


def hops(model: pyo.ConcreteModel, problem: PlanningProblem, units: Units) -> pyo.Expression:
    """Time a microbatch spends in transfers: for each edge the share of microbatches that must change devices."""
    unit_of = {g: u for u, unit in enumerate(units.groups) for g in unit}
    n = share(model)
    cost: dict[tuple[int, int], int] = {}
    topology = problem.topology
    ranks = range(problem.num_ranks)
    typical = max((topology.transfer_ns(a, b, 0), a, b) for a in ranks for b in ranks if a != b or len(ranks) == 1)[1:]
    for edge in problem.edges:
        for target in {unit_of[g] for g in edge.targets} - {unit_of[edge.source]}:
            pair = unit_of[edge.source], target
            size = topology.transfer_ns(*typical, edge.num_bytes)
            back = topology.transfer_ns(*typical, edge.grad_bytes) if edge.grad_bytes is not None else 0
            cost[pair] = cost.get(pair, 0) + size + back
    model.hop = pyo.Var(list(cost), range(problem.num_ranks), bounds=(0, 1))
    for u, v in cost:
        for d in range(problem.num_ranks):
            model.rows.add(model.hop[u, v, d] >= n[u, d] - n[v, d])
    scale = _scale(problem)
    # a chain without transfer time still prefers few hops a little: every hop is one more message
    return sum(max(time / scale, 1e-3) * model.hop[u, v, d] for (u, v), time in cost.items()
               for d in range(problem.num_ranks))


def _in_device_order(model: pyo.ConcreteModel, problem: PlanningProblem, units: Units) -> None:
    unit_of = {g: u for u, unit in enumerate(units.groups) for g in unit}
    pairs = {(unit_of[edge.source], unit_of[g]) for edge in problem.edges for g in edge.targets}
    for u, v in sorted(pairs):
        if u != v:
            for low in range(problem.num_ranks - 1):
                model.rows.add(sum(model.x[v, d] for d in range(low + 1)) <= sum(model.x[u, d] for d in range(low + 1)))


def _interchangeable(model: pyo.ConcreteModel, problem: PlanningProblem, count: int) -> None:
    """Equal devices are numbered by their first unit: d holds u only if d - 1 holds some unit up to u."""
    if problem.topology.overrides:
        return
    for (d, one), (e, two) in pairwise(enumerate(problem.topology.devices)):
        if (one.kind, one.memory_bytes, one.host) == (two.kind, two.memory_bytes, two.host):
            for u in range(min(count, 24)):
                model.rows.add(model.x[u, e] <= sum(model.x[v, d] for v in range(u + 1)))
