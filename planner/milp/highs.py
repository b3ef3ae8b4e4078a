"""The only call to the solver: a Pyomo model goes in, a `SolverOutcome` comes out, values land on the variables.

Pyomo's own HiGHS interfaces lose the incumbent on Ctrl-C, take no start and have no callbacks, so this module hands the
linear model over itself: Pyomo's `generate_standard_repn` reads every row, highspy solves. HiGHS runs in a second
thread; on Ctrl-C the main thread asks it to stop and returns the best solution so far, as INTERRUPTED. Every call is
counted (`mipipe.planner.milp.calls`) under the model's name, which is that of its formulation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import highspy
import numpy as np

from mipipe.planner import clock
from mipipe.planner.gap import SOLVER_GAP, gap_of
from mipipe.planner.milp import calls, pyo


class SolverStatus(StrEnum):
    """How a solve ended. FEASIBLE: a limit was reached with an incumbent; TIME_LIMIT: without one."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    TIME_LIMIT = "time limit"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class SolverOutcome:
    """What a solve found. ``objective`` is None without an incumbent, ``bound`` None where nothing was proven;
    ``nodes`` are those of branch and bound."""

    termination: SolverStatus
    objective: float | None
    bound: float | None
    seconds: float
    num_variables: int
    num_constraints: int
    nodes: int = 0

    @property
    def gap(self) -> float | None:
        """As `mipipe.planner.gap`; HiGHS itself stops at one relative to the objective."""
        return gap_of(self.objective, self.bound)

    @property
    def has_solution(self) -> bool:
        return self.objective is not None

    @property
    def infeasible(self) -> bool:
        """Whether it is proven that there is no solution (below the cutoff, where one was given)."""
        return self.termination is SolverStatus.INFEASIBLE


@dataclass(slots=True)
class Matrix:
    """A model as HiGHS reads it, and its variables in that order."""

    variables: list[Any]
    lp: highspy.HighsLp


def solve(model: pyo.ConcreteModel, *, time_limit_s: float, seed: int, threads: int = 1, warm_start: bool = False,
          gap: float = SOLVER_GAP, absolute_gap: float = 1e-6, cutoff: float | None = None,
          on_incumbent: Callable[[float, np.ndarray], None] | None = None,
          on_bound: Callable[[float], None] | None = None, stop: Callable[[], bool] | None = None,
          options: dict[str, Any] | None = None, matrix: Matrix | None = None) -> SolverOutcome:
    """The outcome of minimising or maximising a linear Pyomo model; variable values are set if there is a solution.

    Args:
        model: variables, linear constraints and one linear objective; its name is that of the formulation.
        time_limit_s: wall-clock limit, model transfer included.
        seed: HiGHS's random seed; with the same seed and threads a solve that ends before its limit repeats.
        threads: HiGHS's worker threads.
        warm_start: start from the values the variables have; those without a value are completed by HiGHS.
        gap: relative gap at which the incumbent counts as optimal.
        absolute_gap: the same in units of the objective; just below 1 where the objective is known to be integer.
        cutoff: only solutions better than this are of interest (minimisation).
        on_incumbent: called with (objective, values in `variables` order) at every improvement, in the solver's thread.
        on_bound: called when the proven bound moves, in the solver's thread.
        stop: asked now and then, in the solver's thread; true ends the solve as Ctrl-C does.
        options: further HiGHS options.
        matrix: of `compiled`, where the same rows are solved again: only bounds and the objective are read anew.
    """
    began = time.monotonic()
    if matrix is None:
        matrix = compiled(model)
    else:
        _set_bounds(matrix)
        _set_goal(matrix, model)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("random_seed", seed % 2**31)
    solver.setOptionValue("threads", threads)
    solver.setOptionValue("mip_rel_gap", gap)
    solver.setOptionValue("mip_abs_gap", absolute_gap)
    if cutoff is not None:
        solver.setOptionValue("objective_bound", cutoff)
    for name, setting in (options or {}).items():
        solver.setOptionValue(name, setting)
    solver.passModel(matrix.lp)
    if warm_start:
        _set_start(solver, matrix)
    solver.setOptionValue("time_limit", max(clock.LEAST_S, time_limit_s - (time.monotonic() - began)))
    seen = _run(solver, on_incumbent, on_bound, stop)
    outcome = _outcome(solver, matrix, seen, time.monotonic() - began)
    calls.note(model.name, outcome.seconds, outcome.nodes)
    return outcome


def variables(model: pyo.ConcreteModel) -> list[Any]:
    """The model's variables in the order in which `on_incumbent` receives their values."""
    return list(model.component_data_objects(pyo.Var, active=True, descend_into=True))


def compiled(model: pyo.ConcreteModel) -> Matrix:
    """The model as HiGHS reads it; values of fixed variables are part of the rows."""
    from pyomo.repn import generate_standard_repn  # late, as all of Pyomo (`mipipe.planner.milp.pyo`)

    columns = variables(model)
    index = {id(column): number for number, column in enumerate(columns)}
    starts, indices, values, row_lower, row_upper = [0], [], [], [], []  # type: ignore[var-annotated]
    rows = model.component_data_objects(pyo.Constraint, active=True, descend_into=True)
    for row in clock.asking(rows, 256):
        read = generate_standard_repn(row.body, quadratic=False)
        assert read.is_linear(), f"constraint {row.name} is not linear"
        indices.extend(index[id(column)] for column in read.linear_vars)
        values.extend(read.linear_coefs)
        starts.append(len(indices))
        row_lower.append(-np.inf if row.lower is None else pyo.value(row.lower) - read.constant)
        row_upper.append(np.inf if row.upper is None else pyo.value(row.upper) - read.constant)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(columns), len(row_lower)
    lp.row_lower_, lp.row_upper_ = np.array(row_lower), np.array(row_upper)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.num_col_, lp.a_matrix_.num_row_ = len(columns), len(row_lower)
    lp.a_matrix_.start_ = np.array(starts, dtype=np.int32)
    lp.a_matrix_.index_ = np.array(indices, dtype=np.int32)
    lp.a_matrix_.value_ = np.array(values, dtype=np.float64)
    if any(column.is_integer() or column.is_binary() for column in columns):
        lp.integrality_ = [highspy.HighsVarType.kInteger if column.is_integer() or column.is_binary()
                           else highspy.HighsVarType.kContinuous for column in columns]
    matrix = Matrix(columns, lp)
    _set_bounds(matrix)
    _set_goal(matrix, model)
    return matrix


def _set_bounds(matrix: Matrix) -> None:
    matrix.lp.col_lower_ = np.array([-np.inf if column.lb is None else column.lb for column in matrix.variables],
                                    dtype=np.float64)
    matrix.lp.col_upper_ = np.array([np.inf if column.ub is None else column.ub for column in matrix.variables],
                                    dtype=np.float64)


def _set_goal(matrix: Matrix, model: pyo.ConcreteModel) -> None:
    """Its one objective; HiGHS sees no other column of it than the matrix has."""
    from pyomo.repn import generate_standard_repn

    index = {id(column): number for number, column in enumerate(matrix.variables)}
    goal = next(model.component_data_objects(pyo.Objective, active=True))
    read = generate_standard_repn(goal.expr, quadratic=False)
    cost = np.zeros(len(matrix.variables))
    for column, coefficient in zip(read.linear_vars, read.linear_coefs, strict=True):
        cost[index[id(column)]] += coefficient
    matrix.lp.col_cost_, matrix.lp.offset_ = cost, float(read.constant)
    matrix.lp.sense_ = highspy.ObjSense.kMinimize if goal.sense == pyo.minimize else highspy.ObjSense.kMaximize


def _set_start(solver: highspy.Highs, matrix: Matrix) -> None:
    known = [(number, float(column.value)) for number, column in enumerate(matrix.variables)
             if column.value is not None]
    if known:
        solver.setSolution(len(known), np.array([number for number, _ in known], dtype=np.int32),
                           np.array([value for _, value in known]))


@dataclass(slots=True)
class _Seen:
    """What the callbacks saw: HiGHS drops its own incumbent and bound when it is interrupted."""

    interrupted: bool = False
    objective: float | None = None
    values: np.ndarray | None = None
    bound: float | None = None


def _run(solver: highspy.Highs, on_incumbent: Callable[[float, np.ndarray], None] | None,
         on_bound: Callable[[float], None] | None, asked: Callable[[], bool] | None) -> _Seen:
    """Run HiGHS in a second thread and note its progress."""
    stop = threading.Event()
    seen = _Seen()

    def watch(event: Any) -> None:
        if asked is not None and asked():
            stop.set()
        if stop.is_set():
            event.interrupt()
        bound = event.data_out.mip_dual_bound
        if np.isfinite(bound) and bound != seen.bound:
            seen.bound = bound
            if on_bound is not None:
                on_bound(bound)

    def improve(event: Any) -> None:
        seen.objective = event.data_out.objective_function_value
        seen.values = np.array(event.data_out.mip_solution)
        if on_incumbent is not None:
            on_incumbent(seen.objective, seen.values)

    solver.cbMipInterrupt += watch
    solver.cbMipImprovingSolution += improve
    ended = threading.Event()

    def work() -> None:
        try:
            solver.run()
        finally:
            ended.set()

    threading.Thread(target=work, daemon=True).start()
    while not ended.is_set():  # no join: interrupted, it takes a running thread for an ended one
        try:
            ended.wait()
        except KeyboardInterrupt:
            stop.set()
    seen.interrupted = stop.is_set()
    return seen


def _outcome(solver: highspy.Highs, matrix: Matrix, seen: _Seen, seconds: float) -> SolverOutcome:
    status = solver.getModelStatus()
    info = solver.getInfo()
    statuses = highspy.HighsModelStatus
    objective, values, bound = seen.objective, seen.values, seen.bound
    if info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible:
        objective, values = info.objective_function_value, solver.getSolution().col_value
    if status == statuses.kOptimal:
        termination = SolverStatus.OPTIMAL
        bound = info.mip_dual_bound if matrix.lp.integrality_ else objective
    elif status in (statuses.kInfeasible, statuses.kObjectiveBound, statuses.kUnboundedOrInfeasible):
        termination, objective, bound = SolverStatus.INFEASIBLE, None, None
    elif seen.interrupted:
        termination = SolverStatus.INTERRUPTED
    else:
        termination = SolverStatus.TIME_LIMIT if objective is None else SolverStatus.FEASIBLE
        if matrix.lp.integrality_ and np.isfinite(info.mip_dual_bound):
            bound = info.mip_dual_bound
    if objective is not None and values is not None:
        for column, value in zip(matrix.variables, values, strict=True):
            if not column.fixed:  # its value is in the rows, and HiGHS sees a free column instead
                column.set_value(float(value), skip_validation=True)
    nodes = max(0, int(info.mip_node_count))  # -1 of a linear program
    return SolverOutcome(termination, objective, bound, seconds, matrix.lp.num_col_, matrix.lp.num_row_, nodes)
