"""Hand-made plans on a hand-made graph: every kind of instruction against torch's autograd."""

import pytest
import runtime_cases as cases
import torch

from mipipe.runtime.ranks.options import EngineOptions

CASES = cases.__file__

pytestmark = pytest.mark.distributed


def check(answers, expected_loss, expected_gradients, steps=1):
    """All ranks have the loss, and together all gradients."""
    found = {}
    for losses, gradients in answers:
        assert losses == pytest.approx([expected_loss] * steps, rel=1e-12)
        found.update(gradients)
    assert set(found) == set(expected_gradients)
    for name, gradient in found.items():
        wanted = expected_gradients[name] * steps
        assert torch.linalg.vector_norm(gradient - wanted) <= 1e-12 * torch.linalg.vector_norm(wanted), name


def two_ranks(orders, microbatches=2, recompute=False):
    """Layer 0 on rank 0; layer 1 and the loss on rank 1."""
    problem = cases.problem_of(cases.chain_graph(), microbatches, 2, [["layer0"], ["layer1", "loss"]])
    return cases.plan_of(problem, [([0], [0]), ([1], [1])], [[0] * microbatches, [1] * microbatches], orders, recompute)


@pytest.mark.parametrize("orders", [
    ("0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1W0 1F1 1I1 1W1"),
    ("0F0 0F1 0I0 0I1 0W0 0W1", "1F0 1F1 1I0 1I1 1W1 1W0"),
    ("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"),
    ("0F0 0F1 0B0 0B1", "1F0 (1F1;1B0)OVERLAP_F_B 1B1"),
])
def test_two_ranks_equal_autograd(pool, orders):
    """F, I, W, B and OVERLAP_F_B give the single process's loss and gradients."""
    answers = pool.run(2, CASES, "run_chain", two_ranks(orders), 2, 2)
    check(answers, *cases.chain_reference(2, 2))


def test_recomputation(pool):
    """F run again before the gradients changes nothing."""
    orders = ("0F0 0F1 0R0 0I0 0W0 0R1 0I1 0W1", "1F0 1R0 1I0 1W0 1F1 1R1 1I1 1W1")
    answers = pool.run(2, CASES, "run_chain", two_ranks(orders, recompute=True), 2, 2)
    check(answers, *cases.chain_reference(2, 2))


def test_gradients_add_up_over_steps(pool):
    """Two steps without zero_grad give twice the gradient."""
    answers = pool.run(2, CASES, "run_chain", two_ranks(("0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1")), 2, 2, 2)
    check(answers, *cases.chain_reference(2, 2), steps=2)


def two_way(num_microbatches=2):
    """Both ranks hold both stages; microbatch 0 goes 0 -> 1, microbatch 1 the other way."""
    problem = cases.problem_of(cases.chain_graph(), num_microbatches, 2, [["layer0"], ["layer1", "loss"]])
    return cases.plan_of(problem, [([0], [0, 1]), ([1], [0, 1])], [[0, 1], [1, 0]],
                         ["0F0 1F1 1I1 1W1 0I0 0W0", "0F1 1F0 1I0 1W0 0I1 0W1"])


@pytest.mark.parametrize("steps", [1, 2])
def test_two_way_replicas_sum_their_gradients(pool, steps):
    """Every replica ends with the whole gradient, also when gradients add up over steps."""
    answers = pool.run(2, CASES, "run_chain", two_way(), 2, 2, steps)
    loss, gradients = cases.chain_reference(2, 2)
    for answer in answers:
        check([answer], loss, gradients, steps)


def test_copies_of_the_plan(pool):
    """A one-rank plan started on two processes is data parallel: each sees its own rows, gradients are summed."""
    problem = cases.problem_of(cases.chain_graph(), 2, 1)
    plan = cases.plan_of(problem, [([0], [0]), ([1, 2], [0])], [[0, 0], [0, 0]], ["0F0 1F0 1B0 0B0 0F1 1F1 1B1 0B1"])
    answers = pool.run(2, CASES, "run_chain", plan, 2, 2)
    loss, gradients = cases.chain_reference(2, 2)
    for answer in answers:
        check([answer], loss, gradients)


def test_saved_memory_is_given_back(pool):
    """After the last action of a step nothing is held."""
    plan = two_ranks(("0F0 0F1 0I0 0W0 0I1 0W1", "1F0 1I0 1W0 1F1 1I1 1W1"))
    for peak, end in pool.run(2, __file__, "memory_of", plan):
        assert peak > 0 and end == 0


def memory_of(plan):
    from mipipe.runtime.engine.engine import Engine
    engine = Engine(plan, cases.chain_graph(), cases.chain_state(), options=EngineOptions(track_memory=True))
    engine.step(cases.chain_batch(2))
    sizes = [size for _, size in engine.record.memory]
    return max(sizes), sizes[-1]
