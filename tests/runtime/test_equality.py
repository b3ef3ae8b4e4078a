"""A planned run equals the single process: losses and all gradients, for every model, schedule and placement."""

import random

import pytest
import runtime_dags as dags
import runtime_equal as equal
import torch

from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan as solve

pytestmark = pytest.mark.distributed

MODELS = ["skip", "moe", "vlm", "vlm-frozen", "vlm-lora"]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_planned_schedules(pool, name, ranks):
    """What the planner chooses, placement included."""
    made = equal.case(name)
    problem = equal.problem(made.graph, ranks, 4)
    result = solve(problem, PlanOptions(time_limit_s=2, seed=0, use_milp=False, threads=1))
    assert result.plan is not None, result.reason
    equal.compare(pool, made, result.plan)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [1, 2])
def test_random_placements_routes_and_orders(pool, name, seed):
    """Replicas, several stages for a rank, two routes, recomputation, B and split backwards."""
    made = equal.case(name)
    equal.compare(pool, made, dags.random_plan(random.Random(seed), made.graph, 4, 3))


@pytest.mark.parametrize("name", ["skip", "moe", "vlm"])
def test_float32(pool, name):
    """The same in float32, to 1e-5."""
    made = equal.case(name, torch.float32)
    equal.compare(pool, made, dags.random_plan(random.Random(7), made.graph, 2, 3), tolerance=1e-5)
