"""Every family of transformers trains three steps through a plan for two ranks, as the model itself would."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import runtime_steps
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "graphs"))

import runtime_equal as equal
import test_families as families

from mipipe.graphs.capture.model import capture
from mipipe.graphs.models.loss import weight
from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan as solve

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, MICROBATCHES = 3, 2


@pytest.mark.parametrize("name", families.CASES)
def test_three_planned_steps_equal_the_models_own(pool, name: str) -> None:
    """The planner chooses stages and order; the reference is transformers' eager model under the same descent."""
    case = families.CASES[name]
    graph = capture(case.source, overrides=case.overrides, dtype=case.dtype, **{"seq": 8, "batch": 2, **case.options})
    model, _, _ = families.reference(case, graph)
    state = {key: tensor.detach().clone() for key, tensor in
             [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]}
    result = solve(equal.problem(graph, 2, MICROBATCHES), PlanOptions(time_limit_s=2, use_milp=False, threads=1))
    assert result.plan is not None, result.reason
    assert len({rank for stage in result.plan.placement.stages for rank in stage.ranks}) == 2
    torch.manual_seed(5)
    config = families.configuration.read_model_config(case.source, case.overrides)
    batches = [[families.random_batch(case, graph, config) for _ in range(MICROBATCHES)] for _ in range(STEPS)]
    answers = pool.run(2, runtime_steps.__file__, "train_steps", result.plan, graph, state, batches, timeout=120.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=runtime_steps.RATE)
    expected = []
    for batch in batches:
        optimizer.zero_grad()
        total = sum(weight(graph, piece) for piece in batch)
        loss = sum(families.eager_loss(case, graph, model, piece) for piece in batch) / total
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert len(set(expected)) == STEPS
    for losses in answers:
        assert losses == pytest.approx(expected, rel=max(1e-6, case.rtol))
