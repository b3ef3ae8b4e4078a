"""What tests of the planner share."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def solver_loaded() -> None:
    """Pyomo and HiGHS, whose first load takes seconds, are not part of any test's time limit."""
    from mipipe.planner.milp import highs, pyo

    model = pyo.ConcreteModel()
    model.x = pyo.Var(domain=pyo.NonNegativeIntegers, bounds=(1, 2))
    model.goal = pyo.Objective(expr=model.x)
    assert highs.solve(model, time_limit_s=10.0, seed=0).objective == 1
