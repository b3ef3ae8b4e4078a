"""A planned run equals the single process: losses and all gradients, for every model, schedule and placement."""

import functools
import itertools
import random
from dataclasses import replace

import pytest
import runtime_dags as dags
import runtime_equal as equal
import runtime_models as models
import torch

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import ProblemError
from mipipe.graphs.models.loss import sum_over
from mipipe.planner.options import PlanOptions
from mipipe.planner.schedules import BASELINES
from mipipe.planner.solve import plan as solve
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions

pytestmark = pytest.mark.distributed

MODELS = ["skip", "moe", "vlm", "vlm-frozen", "vlm-lora"]


FEWER = [pytest.param(name, 2, marks=pytest.mark.slow) for name in MODELS if name != "moe"]
"""Two ranks where four say the same: in the slow suite."""


@pytest.mark.parametrize("name, ranks", [
    ("moe", 2), ("skip", 4), *FEWER,
    *(pytest.param(name, 4, marks=pytest.mark.slow) for name in MODELS if name != "skip")])
def test_planned_schedules(pool, name, ranks):
    """What the planner chooses, placement included."""
    made = equal.case(name)
    problem = equal.problem(made.graph, ranks, 4)
    result = solve(problem, PlanOptions(time_limit_s=0.3, seed=0, use_milp=False, threads=1))
    assert result.plan is not None, result.reason
    equal.compare(pool, made, [result.plan])


@pytest.mark.parametrize("seeds", [range(2), pytest.param(range(2, 6), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", [*MODELS[:-1], pytest.param("vlm-lora", marks=pytest.mark.slow)])
def test_random_placements_routes_and_orders(pool, name, seeds):
    """Replicas, several stages for a rank, two routes, recomputation, B and split backwards."""
    made = equal.case(name)
    equal.compare(pool, made, [dags.random_plan(random.Random(seed), made.graph, 4, 3) for seed in seeds])


@pytest.mark.parametrize("name", ["skip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("vlm", "moe"))])
def test_float32(pool, name):
    """The same in float32, to 1e-5."""
    made = equal.case(name, torch.float32)
    equal.compare(pool, made, [dags.random_plan(random.Random(7), made.graph, 2, 3)], tolerance=1e-5)


def baseline_plans(problem):
    """Every published schedule that exists for the problem's size, in every accounting."""
    plans, refused = [], []
    for baseline in BASELINES:
        for accounting in baseline.accountings:
            try:
                plan = baseline.plan(problem, split=accounting == "split")
            except ProblemError as error:
                refused.append(f"{baseline.name}: {error}")
                continue
            plans.append(replace(plan, name=f"{baseline.name} ({accounting})"))
    return plans, refused


@pytest.mark.parametrize("name, ranks", [("skip", 2), *(
    pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(MODELS, (2, 4)) if case != ("skip", 2))])
def test_every_baseline(pool, name, ranks):
    """GPipe to DualPipe, whole and split, on the same problem the planner gets."""
    made = equal.case(name)
    plans, refused = baseline_plans(equal.problem(made.graph, ranks, 8, 16))
    assert len(plans) >= 12, refused
    equal.compare(pool, made, plans)


def test_stages_are_the_functions_of_the_graph():
    """A model whose forward is gone, in every submodule, still trains: the engine takes nothing but its weights."""
    made = equal.case("skip")
    module = models.skip_module()

    def gone(*_, **__):
        raise AssertionError("a module's forward was called")

    for child in module.modules():
        child.forward = gone
    problem = equal.problem(made.graph, 1, 2)
    plan = baseline_plans(problem)[0][0]
    engine = Engine(plan, made.graph, lambda: module)
    optimizer = torch.optim.SGD(engine.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(engine.step(made.batch(2)))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]


@functools.cache
def dropped():
    """The skip model with dropout: its graph, and a problem's worth of options."""
    module = models.skip_module(dropout=0.5)
    batch = models.token_batch(equal.ROWS, equal.LENGTH, 11)
    return module, capture_module(module, batch, granularity="module", loss_info=sum_over("labels"))


def test_random_operators_do_not_depend_on_the_plan(pool):
    """Dropout masks are keyed by (seed, step, microbatch, segment): any placement, and recomputation, draw the same."""
    module, graph = dropped()
    state = dict(module.state_dict())
    batch = models.token_batch(equal.ROWS * 3, equal.LENGTH, 11)
    plans = [dags.random_plan(random.Random(seed), graph, 4, 3) for seed in range(4)]
    assert any(stage.recompute for plan in plans for stage in plan.placement.stages)
    alone = dags.random_plan(random.Random(0), graph, 1, 3)
    (loss, gradients), = equal.run_case([alone], graph, state, batch)
    (other, _), = equal.run_case([alone], graph, state, batch, EngineOptions(seed=1))
    assert other != loss
    answers = pool.run(4, equal.__file__, "run_case", plans, graph, state, batch)
    for number, answer in enumerate(zip(*answers, strict=True)):
        for own, mine in answer:
            assert own == pytest.approx(loss, rel=1e-12), number
            for name, gradient in mine.items():
                torch.testing.assert_close(gradient, gradients[name], rtol=1e-10, atol=1e-12)


def test_float32_master_weights_of_a_bfloat16_graph():
    """Compute in bfloat16, keep weights and gradients in float32: small steps are not lost to rounding."""
    made = equal.case("skip", torch.bfloat16)
    plan = baseline_plans(equal.problem(made.graph, 1, 2))[0][0]
    engine = Engine(plan, made.graph, made.state(), options=EngineOptions(master_dtype=torch.float32))
    before = {name: item.detach().clone() for name, item in engine.named_parameters()}
    optimizer = torch.optim.SGD(engine.parameters(), lr=1e-5)
    first = engine.step(made.batch(2))
    optimizer.step()
    for name, item in engine.named_parameters():
        assert item.dtype == item.grad.dtype == torch.float32
        torch.testing.assert_close(item.detach(), before[name] - 1e-5 * item.grad, rtol=1e-6, atol=0)
    single = equal.case("skip", torch.float32)
    pieces = models.chunked(single.batch(2), 2)
    expected, gradients = models.eager(single.module, pieces, equal.valid_labels(False, pieces))
    assert first == pytest.approx(expected, rel=0.02)
    total = sum(float((engine.weights.parameters[name].grad - gradients[name]).square().sum()) for name in gradients)
    assert total <= 0.05**2 * sum(float(gradient.square().sum()) for gradient in gradients.values())
