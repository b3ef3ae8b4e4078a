"""The time-indexed model: a strong lower bound at a placement, and the optimum where durations are small integers.

A *line* is one (stage, kind) of one class of interchangeable microbatches, which run in FIFO order
(`mipipe.planner.jobs.job_shop`). N[l,t], an integer, counts the jobs of line l that have started by the end of slot t:

    N[l,t] >= N[l,t-1]
    N[b,t] <= N[a, t - p_a - lag] + shift     job k + shift of line b needs job k of line a (data, FIFO, memory arcs)
    sum_l N[l,t] - N[l, t - p_l] <= 1         over the lines of a machine: one job at a time
    sum_l alloc_l N[l,t] - free_l N[l, t - p_l] <= capacity              on a rank, for every t
    #(jobs of l whose latest start is by t) <= N[l,t] <= #(jobs of l whose head is by t)

This is the disaggregated formulation with one binary per job and slot (Pritsker et al. 1969; Christofides et al. 1987)
with the binaries of a line added up: clipping N[l,t] - k to [0, 1] gives them back, so the relaxation is as strong,
and the size no longer grows with the number of microbatches except through the horizon. On a coarser grid durations
and lags are floored, which keeps it a relaxation (``s_b >= s_a + p`` in slots: at least the floor of p/g later).

Where overlapped pairs gain, jobs are their shares (`mipipe.planner.bounds.pairs`), and the bound holds for schedules
with pairs.

The bound is destructive: a horizon is refuted by the linear relaxation or by branch and bound. On a grid coarser
than the durations' divisor it refutes little: exactness is worth its size.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass

from mipipe.planner.bounds.at_placement import bounding_shop, heads_and_tails, placement_bound, reduce_tails
from mipipe.planner.jobs.job_shop import Jobs, lines
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.jobs.times import run_orders
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.order.job_shop import fits, to_schedule
from mipipe.planner.plan import Schedule

RELAXATION = {"solver": "ipm", "run_crossover": "off"}
"""Interior points refute these relaxations faster than the simplex method."""


@dataclass(frozen=True, slots=True)
class IndexedResult:
    """``bound_ns`` at the placement; a schedule and its makespan if the exact grid gave one that is shorter."""

    bound_ns: int
    schedule: Schedule | None
    makespan_ns: int | None
    outcome: SolverOutcome


@dataclass(slots=True)
class _Grid:
    """A placement on slots of ``grid`` nanoseconds: per line its jobs, slots, machine; arcs (a, b, slots, shift)."""

    jobs: Jobs
    grid: int
    lines: list[list[int]]
    slots: list[int]
    heads: list[int]
    tails: list[int]
    arcs: set[tuple[int, int, int, int]]


def bound(view: StageView, *, makespan_ns: int, time_limit_s: float, seed: int, lower_ns: int = 0,
          max_columns: int = 40_000) -> IndexedResult:
    """The best bound found in time, by bisection between the known bound and an incumbent's makespan.

    Args:
        view: the placement.
        makespan_ns: of some schedule at this placement.
        time_limit_s, seed: of all solves together.
        lower_ns: a known bound.
        max_columns: most lines x slots; durations are floored onto a coarser grid if the exact one has more.

    Raises:
        PlanError: some activations never fit together.
    """
    deadline = time.monotonic() + time_limit_s
    jobs = bounding_shop(view)
    lower = max(lower_ns, placement_bound(view, jobs).ns)
    # every makespan is a multiple of the durations' common divisor; with pairs, which are rounded, of 1
    unit = 1 if jobs.extra else math.gcd(*jobs.durations, *(lag for _, _, lag in jobs.arcs)) or 1
    slots = max(10, max_columns // len(lines(jobs)))
    exact = makespan_ns // unit <= slots
    grid = _grid(jobs, unit if exact else -(-makespan_ns // slots))
    outcome = SolverOutcome(SolverStatus.TIME_LIMIT, None, None, 0.0, 0, 0)
    low, high = -(-lower // unit), makespan_ns // unit  # in units: proven from below, not refuted from above
    found: tuple[Schedule, int] | None = None
    first = exact  # branch and bound on "shorter than the incumbent" proves optimality; then bisection by relaxations
    while low < high and (left := deadline - time.monotonic()) > 0.1:
        horizon = high - 1 if first else (low + high - 1) // 2
        model = build(grid, horizon * unit, relaxed=not first)
        if model is None:
            outcome = SolverOutcome(SolverStatus.INFEASIBLE, None, None, 0.0, 0, 0)
        else:
            outcome = highs.solve(model, time_limit_s=left / 2 if first else left, seed=seed,
                                  options=None if first else RELAXATION)
        if outcome.termination is SolverStatus.INTERRUPTED:
            break
        if outcome.termination is SolverStatus.INFEASIBLE:
            low = horizon + 1
        elif first and outcome.has_solution and model is not None:
            drawn = _schedule(grid, model)
            if drawn is not None and drawn[1] < (makespan_ns if found is None else found[1]):
                found = drawn
            high = min(horizon, found[1] // unit) if found else horizon
            continue
        else:
            high = horizon
        first = False
    best = makespan_ns if found is None else found[1]
    schedule, makespan = found or (None, None)
    return IndexedResult(min(max(lower, low * unit), best), schedule, makespan, outcome)


def _grid(jobs: Jobs, grid: int) -> _Grid:
    heads, tails = heads_and_tails(jobs)
    reduce_tails(jobs, tails)
    members = list(lines(jobs).values())
    place = {job: (line, position) for line, found in enumerate(members) for position, job in enumerate(found)}
    arcs = set()
    for a, b, lag in jobs.arcs:
        (one, first), (two, second) = place[a], place[b]
        if one != two:
            arcs.add((one, two, (jobs.durations[a] + lag) // grid, second - first))
    return _Grid(jobs, grid, members, [jobs.durations[found[0]] // grid for found in members], heads, tails, arcs)


def build(grid: _Grid, horizon_ns: int, *, relaxed: bool) -> pyo.ConcreteModel | None:
    """The model of the module docstring for one horizon; None if the windows alone refute it."""
    count = horizon_ns // grid.grid + 1
    limits = []
    for members in grid.lines:
        low, high = [0] * count, [0] * count
        for job in members:
            latest = horizon_ns - grid.tails[job]
            if grid.heads[job] > latest:
                return None
            high[grid.heads[job] // grid.grid] += 1
            low[latest // grid.grid] += 1
        for t in range(1, count):
            low[t] += low[t - 1]
            high[t] += high[t - 1]
        limits.append((low, high))
    model = pyo.ConcreteModel(name="time-indexed " + ("LP" if relaxed else "MIP"))
    model.n = pyo.Var(range(len(grid.lines)), range(count), domain=pyo.Reals if relaxed else pyo.Integers,
                      bounds=lambda _, line, t: (limits[line][0][t], limits[line][1][t]))
    model.goal = pyo.Objective(expr=0)
    model.rows = pyo.ConstraintList()

    def open_at(line: int, t: int) -> bool:
        return limits[line][0][t] < limits[line][1][t]

    for line in range(len(grid.lines)):
        for t in range(1, count):
            if open_at(line, t) or open_at(line, t - 1):
                model.rows.add(model.n[line, t] >= model.n[line, t - 1])
    for a, b, wait, shift in grid.arcs:
        for t in range(count):
            if t < wait:
                if limits[b][1][t] > shift:
                    model.n[b, t].setub(max(shift, 0))
            elif limits[b][1][t] > limits[a][0][t - wait] + shift:
                model.rows.add(model.n[b, t] <= model.n[a, t - wait] + shift)
    _machines(model, grid, count)
    _memory(model, grid, count)
    if any(var.lb > var.ub for var in model.n.values()):
        return None
    return model


def _machines(model: pyo.ConcreteModel, grid: _Grid, count: int) -> None:
    """At most one job of a machine has started but not ended."""
    machines: dict[int, list[int]] = defaultdict(list)
    for line, members in enumerate(grid.lines):
        if grid.slots[line]:
            machines[grid.jobs.machine[members[0]]].append(line)
    for found in machines.values():
        for t in range(count):
            running = sum(model.n[line, t] - (model.n[line, t - grid.slots[line]] if t >= grid.slots[line] else 0)
                          for line in found)
            model.rows.add(running <= 1)


def _memory(model: pyo.ConcreteModel, grid: _Grid, count: int) -> None:
    """Bytes taken by what has started less bytes returned by what has ended, in shares of the rank's capacity."""
    jobs = grid.jobs
    ranks: dict[int, list[int]] = defaultdict(list)
    for line, members in enumerate(grid.lines):
        if any(jobs.alloc[job] or jobs.free[job] for job in members):
            ranks[jobs.machine[members[0]] // 2].append(line)
    for rank, found in ranks.items():
        room = jobs.capacity[rank]
        # jobs of one line are alike: a class shares its loads
        taken = sum(jobs.alloc[grid.lines[line][0]] * len(grid.lines[line]) for line in found)
        if taken <= room:
            continue
        for t in range(count):
            held = 0
            for line in found:
                job = grid.lines[line][0]
                held += jobs.alloc[job] / room * model.n[line, t]
                if t >= grid.slots[line] and jobs.free[job]:
                    held -= jobs.free[job] / room * model.n[line, t - grid.slots[line]]
            model.rows.add(held <= 1 + 1e-9)


def _schedule(grid: _Grid, model: pyo.ConcreteModel) -> tuple[Schedule, int] | None:
    """The schedule of an integer solution and its makespan; None if it breaks what the model leaves out (channels)."""
    jobs = grid.jobs
    start = [0] * jobs.count
    last = max(t for _, t in model.n)
    for line, members in enumerate(grid.lines):
        started = [round(model.n[line, t].value) for t in range(last + 1)]
        for position, job in enumerate(members):
            start[job] = next(t for t, number in enumerate(started) if number > position)
    orders = {machine: sorted(found, key=lambda job: (start[job], start[job] + jobs.durations[job]))
              for machine, found in jobs.by_machine().items()}
    evaluation = run_orders(jobs.compiled, list(orders.values()))
    if evaluation is None or not fits(jobs, evaluation):
        return None
    return to_schedule(jobs, orders), evaluation.makespan_ns
