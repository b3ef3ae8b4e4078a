"""Random models, placements, routes and orders give the gradients of one process: the engine knows no pipeline."""

import random

import pytest
import runtime_dags as dags
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.distributed


PLANS = given(seed=st.integers(0, 2**32), ranks=st.integers(1, 4), segments=st.integers(2, 9),
              microbatches=st.integers(1, 3))


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@PLANS
def test_random_plans_equal_autograd(pool, seed, ranks, segments, microbatches):
    check(pool, seed, ranks, segments, microbatches)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@PLANS
def test_many_random_plans_equal_autograd(pool, seed, ranks, segments, microbatches):
    check(pool, seed, ranks, segments, microbatches)


def check(pool, seed, ranks, segments, microbatches):
    """Losses and gradients equal to 1e-12 in float64, on every holder of every parameter."""
    rng = random.Random(seed)
    graph = dags.random_graph(rng, segments)
    plan = dags.random_plan(rng, graph, ranks, microbatches)
    loss, gradients = dags.reference(graph, dags.kinds_of(graph), microbatches)
    answers = pool.run(ranks, dags.__file__, "run_random", plan, graph)
    found = {}
    for losses, mine in answers:
        assert losses[0] == pytest.approx(loss, rel=1e-12, abs=1e-12)
        for name, gradient in mine.items():
            found[name] = gradient
            difference = torch.linalg.vector_norm(gradient - gradients[name])
            assert difference <= 1e-12 * torch.linalg.vector_norm(gradients[name]) + 1e-300, name
    nonzero = {name for name, gradient in gradients.items() if gradient.any()}
    assert nonzero <= set(found) <= set(gradients)
