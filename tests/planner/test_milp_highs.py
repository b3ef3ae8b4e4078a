"""The solver call: every way a solve can end is an outcome, and no incumbent is lost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import highspy
import pyomo.environ as pyo
import pytest

from mipipe.planner.milp import highs
from mipipe.planner.milp.highs import SolverStatus


def knapsack(items: int, rows: int = 10, seed: int = 1) -> pyo.ConcreteModel:
    """A multidimensional knapsack; with 200 items it is not solved within a minute."""
    rng = random.Random(seed)
    model = pyo.ConcreteModel()
    model.x = pyo.Var(range(items), domain=pyo.Binary)
    model.rows = pyo.ConstraintList()
    for _ in range(rows):
        weight = [rng.randint(1000, 100_000) for _ in range(items)]
        model.rows.add(sum(weight[i] * model.x[i] for i in range(items)) <= sum(weight) / 2)
    model.goal = pyo.Objective(expr=-sum(rng.randint(1000, 100_000) * model.x[i] for i in range(items)))
    return model


def test_the_optimum_of_a_row_that_ends_between_whole_numbers():
    """HiGHS 1.14.0 calls 29 the optimum (ERGO-Code/HiGHS#2957); bounds from it may be above plans that exist."""
    model = pyo.ConcreteModel()
    model.a = pyo.Var(bounds=(0, 20), domain=pyo.Integers)
    model.b = pyo.Var(bounds=(8, 20))
    model.row = pyo.Constraint(expr=model.a + model.b >= 20.1)
    model.goal = pyo.Objective(expr=model.a + 2 * model.b)
    assert highs.solve(model, time_limit_s=5, seed=0).objective == pytest.approx(28.2)


def test_optimal_values_land_on_the_variables():
    model = pyo.ConcreteModel()
    model.a = pyo.Var(bounds=(0, 10), domain=pyo.Integers)
    model.b = pyo.Var(bounds=(0, None))
    model.row = pyo.Constraint(expr=(1, model.a + 2 * model.b, 7.5))
    model.goal = pyo.Objective(expr=3 * model.a + model.b + 4, sense=pyo.maximize)
    outcome = highs.solve(model, time_limit_s=5, seed=0)
    assert outcome.termination is SolverStatus.OPTIMAL
    assert (model.a.value, model.b.value) == (pytest.approx(7), pytest.approx(0.25))
    assert outcome.objective == pytest.approx(25.25) == outcome.bound
    assert outcome.gap == pytest.approx(0)
    assert (outcome.num_variables, outcome.num_constraints) == (2, 1)


def test_a_fixed_variable_keeps_its_value():
    """It is in the rows as a number, so HiGHS may answer anything for its column; the same model is solved again: a
    configuration bound of 103 was then proven beside a plan of 102."""
    model = pyo.ConcreteModel()
    model.a, model.b = pyo.Var(bounds=(0, 9), domain=pyo.Integers), pyo.Var(bounds=(1, 10))
    model.row = pyo.Constraint(expr=model.a <= model.b)
    model.goal = pyo.Objective(expr=model.a, sense=pyo.maximize)
    model.b.fix(7)
    for _ in range(2):
        assert highs.solve(model, time_limit_s=5, seed=0).bound == pytest.approx(7)
    assert model.b.value == 7


def test_a_linear_program_has_its_value_as_bound():
    model = pyo.ConcreteModel()
    model.a = pyo.Var(bounds=(0, None))
    model.row = pyo.Constraint(expr=model.a >= 2.5)
    model.goal = pyo.Objective(expr=model.a)
    outcome = highs.solve(model, time_limit_s=5, seed=0)
    assert outcome.objective == outcome.bound == pytest.approx(2.5)


def test_infeasible_is_an_outcome():
    model = pyo.ConcreteModel()
    model.a = pyo.Var(domain=pyo.Binary)
    model.row = pyo.Constraint(expr=2 * model.a == 1)
    model.goal = pyo.Objective(expr=model.a)
    outcome = highs.solve(model, time_limit_s=5, seed=0)
    assert outcome.termination is SolverStatus.INFEASIBLE
    assert outcome.objective is None and outcome.bound is None and outcome.gap is None and not outcome.has_solution


def test_time_limit_returns_the_incumbent_with_its_bound():
    model = knapsack(200)
    outcome = highs.solve(model, time_limit_s=1.5, seed=0)
    assert outcome.termination is SolverStatus.FEASIBLE
    assert outcome.bound < outcome.objective < 0
    assert 0 < outcome.gap < 0.5
    assert outcome.objective == pytest.approx(pyo.value(model.goal))


def test_ctrl_c_returns_the_incumbent():
    model = knapsack(200)
    seen: list[float] = []
    bounds: list[float] = []

    def press(objective, values):
        seen.append(objective)
        if len(seen) == 2:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    outcome = highs.solve(model, time_limit_s=60, seed=0, on_incumbent=press, on_bound=bounds.append)
    assert outcome.termination is SolverStatus.INTERRUPTED
    assert outcome.seconds < 30
    assert outcome.objective == pytest.approx(seen[-1]) == pytest.approx(pyo.value(model.goal))
    assert bounds and outcome.bound == bounds[-1] <= outcome.objective


def test_no_interrupted_solve_returns_before_its_thread_has_ended(monkeypatch):
    """Whoever used the model meanwhile, or ended the process, would pull it from under HiGHS."""
    ended: list[bool] = []

    class Lasting(highspy.Highs):
        def run(self):
            status = super().run()
            time.sleep(0.3)
            ended.append(True)
            return status

    monkeypatch.setattr(highs.highspy, "Highs", Lasting)
    for delay in (0.2, 0.3):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert highs.solve(knapsack(200), time_limit_s=30, seed=0).termination is SolverStatus.INTERRUPTED
    assert ended


def test_a_start_is_taken_up():
    model = knapsack(30)
    best = highs.solve(model, time_limit_s=30, seed=0).objective
    seen: list[float] = []
    again = highs.solve(model, time_limit_s=30, seed=0, warm_start=True,
                        on_incumbent=lambda value, _: seen.append(value))
    assert seen[0] == pytest.approx(best) == again.objective


def test_the_same_seed_repeats():
    outcomes = []
    for _ in range(2):
        model = knapsack(25)
        highs.solve(model, time_limit_s=30, seed=7)
        outcomes.append([round(var.value) for var in model.x.values()])
    assert outcomes[0] == outcomes[1]


def test_a_nonlinear_row_is_our_bug():
    model = pyo.ConcreteModel()
    model.a = pyo.Var()
    model.row = pyo.Constraint(expr=model.a**2 <= 1)
    model.goal = pyo.Objective(expr=model.a)
    with pytest.raises(AssertionError, match="row is not linear"):
        highs.solve(model, time_limit_s=5, seed=0)
