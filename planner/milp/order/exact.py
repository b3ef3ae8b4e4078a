"""The literal MIP of She et al. (arXiv 2503.09357), extended by split backward and memory: placement and order at once.

Each group is a stage of its own on one device for all microbatches. Units u are colocated sets of groups, jobs j are
(group, kind, microbatch), big-M is the horizon H:

    x[u,d] binary, sum_d x[u,d] = 1                          assignment
    z[u,v,d,e] = x[u,d] x[v,e], linearised: sum_e z[u,v,d,e] = x[u,d], sum_d z[u,v,d,e] = x[v,e]
    same[u,v] = sum_d z[u,v,d,d]
    p_j = sum_d p[j,d] x[u,d]
    s_b >= s_a + p_a + sum_{d,e} transfer[d,e] z[u,v,d,e]    data
    s_b >= s_a + p_a                                         FIFO (equal microbatches)
    s_b >= s_a + p_a - H (2 - same - y_ab), s_a >= s_b + p_b - H (1 - same + y_ab)      one job at a time on a stream
    C >= s_j + p_j,  C >= sum of a device's work
    c_t: start of transfer t on its channel; two transfers occupy one channel like two jobs one device
    memory at the start of a: sum over b of alloc_b [b before a, same device] - free_b [likewise] + own <= capacity

This is the definition of the optimum without replicas, and on 15 to 30 jobs its proof; nothing larger is its business.
Left out: replicas, recomputation, overlapped pairs (the bound is one for them as well), values in flight, memory held
by groups of the collective stream (refused).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from mipipe.graphs.errors import PlanError, ProblemError
from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.bounds.at_placement import problem_bound
from mipipe.planner.gap import BOUND_SLACK
from mipipe.planner.jobs.memory import resident_room
from mipipe.planner.jobs.overlap import pair_gain
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import evaluate
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.order.exact_parts import MipTransfer, Sketch, sketch
from mipipe.planner.plan import Placement, RankOrder, Schedule, Stage
from mipipe.planner.problem import PlanningProblem


@dataclass(frozen=True, slots=True)
class ExactResult:
    """The best placement and order (None: none found), its makespan as evaluated; ``bound_ns`` without replicas.

    ``queued``: whether transfers may wait for each other, in the order in which they become ready.
    """

    placement: Placement | None
    schedule: Schedule | None
    makespan_ns: int | None
    bound_ns: int
    outcome: SolverOutcome
    queued: bool = False


def solve_exact(problem: PlanningProblem, *, time_limit_s: float, seed: int,
                horizon_ns: int | None = None) -> ExactResult:
    """The optimal placement and order of a small problem.

    Args:
        problem: what to plan; 15 to 30 jobs are its business.
        time_limit_s, seed: see `highs.solve`.
        horizon_ns: only plans up to this makespan are of interest; by default everything in sequence.

    Raises:
        ProblemError: groups of the collective stream hold memory.
    """
    if any(group.stream is Stream.COLLECTIVE and (group.saved_fi_bytes or group.saved_fw_bytes or group.saved_iw_bytes)
           for group in problem.groups):
        raise ProblemError(f"problem {problem.name}: the exact model has no memory for groups of the collective stream;"
                           " use the ladder (`mipipe plan`)")
    drawn = sketch(problem, horizon_ns)
    model, end = build(drawn), time.monotonic() + time_limit_s
    while True:
        outcome = highs.solve(model, time_limit_s=max(clock.LEAST_S, end - time.monotonic()), seed=seed, gap=0.0,
                              absolute_gap=0.999)
        overfull = outcome.has_solution and forbid_overfull(model, drawn)
        if not overfull or outcome.termination is not SolverStatus.OPTIMAL:  # out of time, or Ctrl-C
            break
    bound, queued = problem_bound(problem).ns, bool(drawn.meetings)
    if outcome.bound is not None:  # of schedules without overlapped pairs; those with pairs stretch to such ones
        proven = outcome.bound - BOUND_SLACK  # in units; a makespan is so many whole ones only where all times are
        units = math.ceil(proven) if drawn.whole else proven
        bound = max(bound, pair_gain(problem).shared(math.floor(units * drawn.unit)))
    if not outcome.has_solution or overfull:
        return ExactResult(None, None, None, bound, outcome, queued)
    placement, schedule = _read(drawn, model)
    try:
        _, evaluation = evaluate(view(problem, placement), schedule)
    except PlanError:  # jobs shorter than the solver's tolerances have any order there
        placement, schedule = _read(drawn, model, by_start=True)
        _, evaluation = evaluate(view(problem, placement), schedule)
    return ExactResult(placement, schedule, evaluation.makespan_ns, min(bound, evaluation.makespan_ns), outcome, queued)


def build(drawn: Sketch) -> pyo.ConcreteModel:
    """The model of the module docstring, times in units of ``drawn.unit``."""
    model = pyo.ConcreteModel(name="exact MIP")
    units, devices = range(len(drawn.units)), range(drawn.problem.num_ranks)
    jobs = range(len(drawn.jobs))
    model.x = pyo.Var(units, devices, domain=pyo.Binary)
    model.z = pyo.Var(list(combinations(units, 2)), devices, devices, bounds=(0, 1))
    model.s = pyo.Var(jobs, bounds=lambda _, j: (drawn.head[j], drawn.horizon - drawn.tail[j]))
    model.makespan = pyo.Var(bounds=(0, drawn.horizon))
    model.y = pyo.Var(drawn.pairs, domain=pyo.Binary)
    model.goal = pyo.Objective(expr=model.makespan)
    model.rows = pyo.ConstraintList()
    assignment(model, drawn)
    data(model, drawn)
    one_at_a_time(model, drawn)
    channels(model, drawn)
    memory(model, drawn)
    return model


def assignment(model: pyo.ConcreteModel, drawn: Sketch) -> None:
    """Every unit on one device; z the product of two assignments; loads and resident bytes of devices."""
    devices = range(drawn.problem.num_ranks)
    for u in range(len(drawn.units)):
        model.rows.add(sum(model.x[u, d] for d in devices) == 1)
    for u, v in combinations(range(len(drawn.units)), 2):
        for d in devices:
            model.rows.add(sum(model.z[u, v, d, e] for e in devices) == model.x[u, d])
            model.rows.add(sum(model.z[u, v, e, d] for e in devices) == model.x[v, d])
    for d in devices:
        room = resident_room(drawn.problem, d)
        model.rows.add(sum(drawn.resident[u] / max(1, room) * model.x[u, d] for u in range(len(drawn.units))) <= 1)
        for stream in (Stream.COMPUTE, Stream.COLLECTIVE):
            work = {j: drawn.duration[j][d] for j in range(len(drawn.jobs)) if drawn.stream[j] is stream}
            if any(work.values()):
                model.rows.add(model.makespan >= sum(time * model.x[drawn.unit_of[j], d] for j, time in work.items()))
    for (_, one), (d, two) in pairwise(enumerate(drawn.problem.topology.devices)):
        if (one.kind, one.memory_bytes, one.host) == (two.kind, two.memory_bytes, two.host) and drawn.interchangeable:
            for u in range(len(drawn.units)):  # equal devices are numbered by their first unit
                model.rows.add(model.x[u, d] <= sum(model.x[v, d - 1] for v in range(u)))


def forbid_overfull(model: pyo.ConcreteModel, drawn: Sketch) -> bool:
    """Forbid what overfills a device in the model's solution, there and wherever it does, in whole bytes: rows on
    gigabytes let a few more pass. Whether there was any."""
    rooms, found = [resident_room(drawn.problem, d) for d in range(drawn.problem.num_ranks)], False
    for d, room in enumerate(rooms):
        members = [u for u in range(len(drawn.units)) if model.x[u, d].value > 0.5 and drawn.resident[u]]
        size = sum(drawn.resident[u] for u in members)
        if size > room:
            found = True
            for other, space in enumerate(rooms):
                if size > space:
                    model.rows.add(sum(model.x[u, other] for u in members) <= len(members) - 1)
    return found


def together(model: pyo.ConcreteModel, drawn: Sketch, u: int, v: int) -> Any:
    """same[u, v]."""
    if u == v:
        return 1
    low, high = min(u, v), max(u, v)
    return sum(model.z[low, high, d, d] for d in range(drawn.problem.num_ranks))


def length(model: pyo.ConcreteModel, drawn: Sketch, j: int) -> Any:
    """p_j."""
    times = drawn.duration[j]
    if len(set(times)) == 1:
        return times[0]
    return sum(time * model.x[drawn.unit_of[j], d] for d, time in enumerate(times))


def on_channel(model: pyo.ConcreteModel, u: int, v: int, d: int, e: int) -> Any:
    """1 where u is on d and v on e."""
    return model.z[u, v, d, e] if u < v else model.z[v, u, e, d]


def data(model: pyo.ConcreteModel, drawn: Sketch) -> None:
    """Arcs between jobs, with the transfer where their devices differ; the makespan."""
    model.c = pyo.Var(range(len(drawn.transfers)), bounds=(0, drawn.horizon))
    for a, b in drawn.arcs:
        model.rows.add(model.s[b] >= model.s[a] + length(model, drawn, a))
    for t, moved in enumerate(drawn.transfers):
        model.rows.add(model.c[t] >= model.s[moved.producer] + length(model, drawn, moved.producer))
        model.rows.add(model.s[moved.consumer] >= model.c[t] + _carried(model, drawn, moved, moved.times))
    for j in range(len(drawn.jobs)):
        model.rows.add(model.makespan >= model.s[j] + length(model, drawn, j))


def _carried(model: pyo.ConcreteModel, drawn: Sketch, moved: MipTransfer, times: dict[tuple[int, int], float]) -> Any:
    u, v = drawn.unit_of[moved.producer], drawn.unit_of[moved.consumer]
    if u == v:
        return 0
    return sum(time * on_channel(model, u, v, d, e) for (d, e), time in times.items())


def one_at_a_time(model: pyo.ConcreteModel, drawn: Sketch) -> None:
    """The disjunction of two jobs on one stream, where their units share a device."""
    big = drawn.horizon
    for a, b in drawn.pairs:
        if drawn.stream[a] is not drawn.stream[b]:
            continue
        same = together(model, drawn, drawn.unit_of[a], drawn.unit_of[b])
        model.rows.add(model.s[b] >= model.s[a] + length(model, drawn, a) - big * (2 - same - model.y[a, b]))
        model.rows.add(model.s[a] >= model.s[b] + length(model, drawn, b) - big * (1 - same + model.y[a, b]))


def channels(model: pyo.ConcreteModel, drawn: Sketch) -> None:
    """Two transfers on one channel, one after the other, in the order in which they become ready."""
    model.v = pyo.Var(drawn.meetings, domain=pyo.Binary)
    model.w = pyo.Var(drawn.meetings, bounds=(0, 1))
    big = 2 * drawn.horizon
    for p, q in drawn.meetings:
        one, two = drawn.transfers[p], drawn.transfers[q]
        ends = [(drawn.unit_of[moved.producer], drawn.unit_of[moved.consumer]) for moved in (one, two)]
        for d, e in one.times:
            model.rows.add(model.w[p, q] >= on_channel(model, *ends[0], d, e) + on_channel(model, *ends[1], d, e) - 1)
        together_first = 2 - model.w[p, q] - model.v[p, q]
        together_second = 1 - model.w[p, q] + model.v[p, q]
        model.rows.add(model.c[q] >= model.c[p] + _carried(model, drawn, one, one.occupied) - big * together_first)
        model.rows.add(model.c[p] >= model.c[q] + _carried(model, drawn, two, two.occupied) - big * together_second)
        ready = [model.s[moved.producer] + length(model, drawn, moved.producer) for moved in (one, two)]
        model.rows.add(ready[1] >= ready[0] - big * together_first)
        model.rows.add(ready[0] >= ready[1] - big * together_second)


def memory(model: pyo.ConcreteModel, drawn: Sketch) -> None:
    """What a job's device holds when it starts. [b before a, same device] is bounded from the side that matters."""
    limits, devices = drawn.problem.limits, drawn.problem.topology.devices
    holders = [j for j in range(len(drawn.jobs)) if drawn.alloc[j] or drawn.free[j]]
    smallest = min((device.memory_bytes for device in devices), default=0)
    total = sum(drawn.alloc) + sum(drawn.resident) + max(drawn.workspace, default=0)
    scale = max(1, limits.activation_bytes or max(drawn.alloc))
    for a in range(len(drawn.jobs)):
        if not (drawn.alloc[a] or drawn.workspace[a]):
            continue
        u = drawn.unit_of[a]
        held: Any = (drawn.alloc[a] + drawn.workspace[a]) / scale
        for b in holders:
            if b != a and drawn.stream[a] is drawn.stream[b] and not drawn.precedes(a, b):
                held += _share(model, drawn, b, a, scale)
        if limits.activation_bytes is not None and limits.activation_bytes < total:
            # a multiple of 0 keeps a row of numbers alone a row: one that no solution meets
            model.rows.add(held + 0 * model.makespan <= limits.activation_bytes / scale)
        if smallest < total:
            resident = sum(size / scale * together(model, drawn, u, v) for v, size in enumerate(drawn.resident) if size)
            model.rows.add(held + resident <= sum(device.memory_bytes / scale * model.x[u, d]
                                                  for d, device in enumerate(devices)))


def _share(model: pyo.ConcreteModel, drawn: Sketch, b: int, a: int, scale: int) -> Any:
    """Bytes of b counted when a starts."""
    same = together(model, drawn, drawn.unit_of[a], drawn.unit_of[b])
    if drawn.precedes(b, a):
        return (drawn.alloc[b] - drawn.free[b]) / scale * same
    first = model.y[b, a] if b < a else 1 - model.y[a, b]
    share: Any = 0
    change = drawn.alloc[b] - drawn.free[b]
    if change:
        name = f"held_{b}_{a}"
        model.add_component(name, pyo.Var(bounds=(0, 1)))
        both = model.component(name)
        if change > 0:
            model.rows.add(both >= first + same - 1)
        else:
            model.rows.add(both <= first)
            model.rows.add(both <= same)
        share = change / scale * both
    return share


def _read(drawn: Sketch, model: pyo.ConcreteModel, by_start: bool = False) -> tuple[Placement, Schedule]:
    """The solution as a placement and orders; ``by_start``: by start times, and never against what precedes what."""
    device = [max(range(drawn.problem.num_ranks), key=lambda d: model.x[u, d].value) for u in range(len(drawn.units))]
    unit = {g: u for u, members in enumerate(drawn.units) for g in members}
    count = drawn.problem.num_microbatches
    ranks = [device[unit[g]] for g in range(len(drawn.problem.groups))]
    placement = Placement(tuple(Stage((g,), (rank,)) for g, rank in enumerate(ranks)),
                          tuple((rank,) * count for rank in ranks), "exact")

    def comes_first(a: int, b: int) -> int:
        if drawn.precedes(a, b) or drawn.precedes(b, a):
            return int(drawn.precedes(a, b))
        return round(model.y[a, b].value) if a < b else 1 - round(model.y[b, a].value)

    jobs = range(len(drawn.jobs))
    depth = drawn.reach.sum(axis=0)  # how many jobs come before; more, the later on any path
    latest = [max([model.s[j].value, *(model.s[b].value for b in jobs if drawn.precedes(b, j))]) for j in jobs]

    def line(rank: int, stream: Stream) -> tuple[Action, ...]:
        members = [j for j in jobs if drawn.stream[j] is stream and device[drawn.unit_of[j]] == rank]
        ordered = sorted(members, key=lambda j: (latest[j], depth[j]) if by_start else
                         sum(comes_first(other, j) for other in members if other != j))
        return tuple(Action(g, ActionKind(kind), m) for g, kind, m in (drawn.jobs[j] for j in ordered))

    return placement, Schedule(tuple(RankOrder(line(rank, Stream.COMPUTE), line(rank, Stream.COLLECTIVE))
                                     for rank in range(drawn.problem.num_ranks)))
