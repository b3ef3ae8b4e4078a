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

from mipipe.planner import clock
from mipipe.planner.bounds.at_placement import bounding_shop, heads_and_tails, placement_bound, reduce_tails
from mipipe.planner.jobs.job_shop import Jobs, lines
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.jobs.times import run_orders
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome, SolverStatus
from mipipe.planner.milp.order.job_shop import fits, to_schedule
from mipipe.planner.plan import Schedule

NAME, RELAXED = "time-indexed MIP", "time-indexed LP"
"""Of the formulation and its relaxation, where a bound or an order is said to be theirs."""

RELAXATION = {"solver": "ipm", "run_crossover": "off"}
"""Interior points refute these relaxations faster than the simplex method."""

BRANCHING = {"presolve": "off"}
"""Presolve costs more here than it saves, and looks at the time seldom."""

UNSOLVED = SolverOutcome(SolverStatus.TIME_LIMIT, None, None, 0.0, 0, 0)
REFUTED = SolverOutcome(SolverStatus.INFEASIBLE, None, None, 0.0, 0, 0)
"""Of horizons that earliest and latest starts refute."""


@dataclass(frozen=True, slots=True)
class IndexedResult:
    """``bound_ns`` at the placement, raised by ``what``; a schedule and its makespan if the exact grid gave one that is
    shorter."""

    bound_ns: int
    what: str
    schedule: Schedule | None
    makespan_ns: int | None
    outcome: SolverOutcome


@dataclass(slots=True)
class SlotGrid:
    """A placement on slots of ``grid`` nanoseconds: per line its jobs, slots, machine; arcs (a, b, slots, shift)."""

    jobs: Jobs
    grid: int
    lines: list[list[int]]
    slots: list[int]
    heads: list[int]
    tails: list[int]
    arcs: set[tuple[int, int, int, int]]


@dataclass(slots=True)
class Indexed:
    """A placement's grid and what is known of it. In ``unit`` nanoseconds: no makespan is below ``low``, and the
    relaxation does not refute ``open``; ``what`` raised the bound last, if anything here did.

    ``exact``: slots are units. ``found``: a shorter schedule than was asked for, with its makespan in ns. ``outcome``:
    of the last solve.
    """

    grid: SlotGrid
    unit: int
    low: int
    open: int
    what: str = ""
    found: tuple[Schedule, int] | None = None
    outcome: SolverOutcome = UNSOLVED

    @property
    def exact(self) -> bool:
        return self.grid.grid == self.unit

    def bound_ns(self, makespan_ns: int) -> int:
        """The bound, at most the makespan of a schedule known."""
        return min(self.low * self.unit, makespan_ns if self.found is None else self.found[1])

    def relax(self, makespan_ns: int, time_limit_s: float, seed: int) -> bool:
        """Raise the bound by relaxations, up to a makespan: in steps that grow fourfold, then by bisection. False
        where time was up before the end."""
        deadline = time.monotonic() + time_limit_s
        self.open = min(self.open, -(-makespan_ns // self.unit))
        step = 0  # horizons far below the optimum are refuted soonest
        while self.low < self.open:
            step = min(4 * step + 1, (self.open - self.low + 1) // 2)
            horizon = self.low + step - 1
            if deadline - time.monotonic() <= clock.LEAST_S:
                return False
            self._solve(horizon, deadline, seed, relaxed=True)
            if self.outcome.termination is SolverStatus.INFEASIBLE:
                self.low, self.what = horizon + 1, RELAXED
            elif self.outcome.termination is SolverStatus.OPTIMAL:
                self.open = horizon
            else:  # before its time: it has nothing to say
                left = deadline - time.monotonic()
                return self.outcome.termination is not SolverStatus.INTERRUPTED and left > clock.LEAST_S
        return True

    def branch(self, makespan_ns: int, time_limit_s: float, seed: int) -> bool:
        """Branch and bound on "shorter than the makespan", until nothing is. False where time was up before the end;
        True as well where a solution breaks what the model leaves out (channels): more time shows no more."""
        deadline, high = time.monotonic() + time_limit_s, -(-makespan_ns // self.unit)
        while self.low < high:
            if deadline - time.monotonic() <= clock.LEAST_S:
                return False
            model = self._solve(high - 1, deadline, seed, relaxed=False)
            if self.outcome.termination is SolverStatus.INFEASIBLE:
                self.low, self.what = high, NAME
            elif not self.outcome.has_solution or model is None:
                return False
            else:
                drawn = _schedule(self.grid, model)
                if drawn is None or drawn[1] >= makespan_ns:
                    return True
                self.found, makespan_ns, high = drawn, drawn[1], -(-drawn[1] // self.unit)
                if self.outcome.termination is SolverStatus.INTERRUPTED:
                    return False
        return True

    def _solve(self, horizon: int, deadline: float, seed: int, *, relaxed: bool) -> pyo.ConcreteModel | None:
        model = build(self.grid, horizon * self.unit, relaxed=relaxed)
        self.outcome = REFUTED if model is None else highs.solve(
            model, time_limit_s=max(clock.LEAST_S, deadline - time.monotonic()), seed=seed,
            options=RELAXATION if relaxed else BRANCHING)
        return model


def indexed(view: StageView, *, makespan_ns: int, lower_ns: int = 0, max_columns: int = 40_000) -> Indexed:
    """A placement's model.

    Args:
        view: the placement.
        makespan_ns: of the best schedule known, here or at another placement.
        lower_ns: a known bound; 0: the job shop's.
        max_columns: most lines x slots; durations are floored onto a coarser grid if the exact one has more.

    Raises:
        PlanError: some activations never fit together.
    """
    jobs = bounding_shop(view)
    # every makespan is a multiple of the durations' common divisor; with pairs, which are rounded, of 1
    unit = 1 if jobs.extra else math.gcd(*jobs.durations, *(lag for _, _, lag in jobs.arcs)) or 1
    slots = max(10, max_columns // len(lines(jobs)))
    grid = _grid(jobs, unit if makespan_ns // unit <= slots else -(-makespan_ns // slots))
    lower = lower_ns or placement_bound(view, jobs).ns
    return Indexed(grid, unit, -(-lower // unit), -(-makespan_ns // unit))


def bound(view: StageView, *, makespan_ns: int, time_limit_s: float, seed: int, lower_ns: int = 0,
          max_columns: int = 40_000) -> IndexedResult:
    """The best bound found in time: where the grid is exact, by branch and bound in half of it; then by relaxations.

    Args:
        view, makespan_ns, lower_ns, max_columns: as of `indexed`.
        time_limit_s, seed: of all solves together.

    Raises:
        PlanError: some activations never fit together.
    """
    deadline = time.monotonic() + time_limit_s
    model = indexed(view, makespan_ns=makespan_ns, lower_ns=lower_ns, max_columns=max_columns)
    if model.exact:
        model.branch(makespan_ns, 0.5 * (deadline - time.monotonic()), seed)
    schedule, makespan = model.found or (None, None)
    if model.outcome.termination is not SolverStatus.INTERRUPTED:
        model.relax(makespan or makespan_ns, deadline - time.monotonic(), seed)
    return IndexedResult(model.bound_ns(makespan_ns), model.what, schedule, makespan, model.outcome)


def _grid(jobs: Jobs, grid: int) -> SlotGrid:
    heads, tails = heads_and_tails(jobs)
    reduce_tails(jobs, tails)
    members = list(lines(jobs).values())
    place = {job: (line, position) for line, found in enumerate(members) for position, job in enumerate(found)}
    arcs = set()
    for a, b, lag in jobs.arcs:
        (one, first), (two, second) = place[a], place[b]
        if one != two:
            arcs.add((one, two, (jobs.durations[a] + lag) // grid, second - first))
    return SlotGrid(jobs, grid, members, [jobs.durations[found[0]] // grid for found in members], heads, tails, arcs)


def build(grid: SlotGrid, horizon_ns: int, *, relaxed: bool) -> pyo.ConcreteModel | None:
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
    model = pyo.ConcreteModel(name=RELAXED if relaxed else NAME)
    model.n = pyo.Var(range(len(grid.lines)), range(count), domain=pyo.Reals if relaxed else pyo.Integers,
                      bounds=lambda _, line, t: (limits[line][0][t], limits[line][1][t]))
    model.goal = pyo.Objective(expr=0)
    model.rows = pyo.ConstraintList()

    def open_at(line: int, t: int) -> bool:
        return limits[line][0][t] < limits[line][1][t]

    for line in clock.asking(range(len(grid.lines)), 1):
        for t in range(1, count):
            if open_at(line, t) or open_at(line, t - 1):
                model.rows.add(model.n[line, t] >= model.n[line, t - 1])
    for a, b, wait, shift in clock.asking(grid.arcs, 1):
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


def _machines(model: pyo.ConcreteModel, grid: SlotGrid, count: int) -> None:
    """At most one job of a machine has started but not ended."""
    machines: dict[int, list[int]] = defaultdict(list)
    for line, members in enumerate(grid.lines):
        if grid.slots[line]:
            machines[grid.jobs.machine[members[0]]].append(line)
    for found in machines.values():
        for t in clock.asking(range(count), 64):
            running = sum(model.n[line, t] - (model.n[line, t - grid.slots[line]] if t >= grid.slots[line] else 0)
                          for line in found)
            model.rows.add(running <= 1)


def _memory(model: pyo.ConcreteModel, grid: SlotGrid, count: int) -> None:
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
        for t in clock.asking(range(count), 64):
            held = 0
            for line in found:
                job = grid.lines[line][0]
                held += jobs.alloc[job] / room * model.n[line, t]
                if t >= grid.slots[line] and jobs.free[job]:
                    held -= jobs.free[job] / room * model.n[line, t - grid.slots[line]]
            model.rows.add(held <= 1 + 1e-9)


def _schedule(grid: SlotGrid, model: pyo.ConcreteModel) -> tuple[Schedule, int] | None:
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
