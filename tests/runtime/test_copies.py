"""Data-parallel copies of a whole plan: equal to one process, overlapped with the backward, optimizer state sharded."""

import functools
import random

import pytest
import runtime_dags as dags
import runtime_equal as equal
import runtime_models as models
import torch

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.models.loss import sum_over
from mipipe.planner.actions import ActionKind
from mipipe.planner.schedules import BASELINES
from mipipe.runtime.checkpoints.checkpoint import optimizer_tensors
from mipipe.runtime.engine.compiling import buckets
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.recipes.whole import from_parts, whole_tensors
from mipipe.runtime.train.config import CheckpointConfig, OptimizerConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.launching.prepare import zero_of
from mipipe.runtime.train.training import Trainer

pytestmark = pytest.mark.distributed

COUNT, COPIES, STEPS = 3, 2, 3


@functools.cache
def frozen_and_tied():
    """The skip model (tied embedding and head) with two layers frozen, and its graph."""
    module = models.skip_module()
    module.layers[2].requires_grad_(False)
    module.layers[5].up.requires_grad_(False)
    batch = models.token_batch(equal.ROWS, equal.LENGTH, 11)
    return module, capture_module(module, batch, granularity="module", loss_info=sum_over("labels"))


def whole_batches():
    """An endless loader of batches for all copies together; the number of valid labels differs between copies."""
    number = 0
    while True:
        yield models.token_batch(equal.ROWS * COUNT * COPIES, equal.LENGTH, 11, seed=100 + number)
        number += 1


def rows_of(copy):
    """One copy's rows of every batch."""
    for batch in whole_batches():
        yield {name: tensor.chunk(COPIES)[copy] for name, tensor in batch.items()}


def train(plan, graph, state, config, resume=False, master=None):
    """What a rank does: losses, parameters and gradients' sizes, the names it keeps optimizer state for, the loss of an
    evaluation."""
    buckets.BUCKET_BYTES = 1000  # several sums for one model as small as this
    engine = Engine(plan, graph, state, options=EngineOptions(zero=zero_of(config, plan, graph), master_dtype=master))
    trainer = Trainer(engine, config, Batches(rows_of(engine.mesh.copy)))
    losses = trainer.run(trainer.resume() if resume else 0)
    kept = {name.split(".", 1)[1].rpartition(".")[0] for name, item in optimizer_tensors(engine,
            trainer.optimizer).items() if item.dim()}
    evaluated = engine.evaluate(next(rows_of(engine.mesh.copy)))
    trained = {name for name, _ in engine.named_parameters()}
    return losses, {name: item for name, item in whole_tensors(engine, lambda name: name in trained).items()
                    if name in trained}, kept, evaluated


@functools.cache
def alone(clip, name="AdamW"):
    """The same training in one process; and the loss of the first batch afterwards."""
    module, _ = frozen_and_tied()
    initial = {name: item.clone() for name, item in module.state_dict().items()}
    optimizer = getattr(torch.optim, name)([item for item in module.parameters() if item.requires_grad], lr=1e-2)
    losses = []
    for _, batch in zip(range(STEPS), whole_batches(), strict=False):
        pieces = models.chunked(batch, COUNT * COPIES)
        losses.append(models.eager(module, pieces, equal.valid_labels(False, pieces))[0])
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    final = {name: item.detach().clone() for name, item in module.named_parameters()}
    pieces = models.chunked(next(whole_batches()), COUNT * COPIES)
    evaluated, _ = models.eager(module, pieces, equal.valid_labels(False, pieces))
    module.load_state_dict(initial)
    return losses, final, evaluated


def state_of(module):
    return {name: item.detach() for name, item in module.named_parameters(remove_duplicate=False)}


CASES = [(4, 0.1, "AdamW", True), (4, 0.1, "AdamW", "parameters")]
LONGER = [(4, 0.1, "AdamW", False), (4, 0.1, "AdamW", "gradients"),
          *((seed, clip, "AdamW", shard) for seed in (3, 5, 6) for clip in (None, 0.1)
            for shard in (False, True, "gradients", "parameters")),
          *((3, clip, "Adafactor", shard) for clip in (None, 0.1) for shard in (False, True))]


@pytest.mark.parametrize("seed, clip, name, shard", [*CASES, *(pytest.param(*case, marks=pytest.mark.slow)
                                                              for case in LONGER)])
def test_two_copies_of_two_ranks_equal_one_process(pool, seed, clip, name, shard):
    """Losses, weights and evaluation; frozen parameters stay, tied and replicated ones count once in clipping. Copies
    have parts of every parameter's state, or, with an optimizer that looks at whole ones, that of some."""
    module, graph = frozen_and_tied()
    config = TrainConfig(STEPS, optimizer=OptimizerConfig(name, 1e-2, shard=shard), clip=clip)
    plan = dags.random_plan(random.Random(seed), graph, 2, COUNT)
    answers = pool.run(4, __file__, "train", plan, graph, state_of(module), config)
    losses, final, evaluated = alone(clip, name)
    for own, weights, _, other in answers:
        assert own == pytest.approx(losses, rel=1e-9) and other == pytest.approx(evaluated, rel=1e-9)
        for key, tensor in weights.items():
            assert torch.linalg.vector_norm(tensor - final[key]) <= 1e-8 * torch.linalg.vector_norm(final[key]), key
    for rank in range(2):
        first, second = answers[rank][2], answers[rank + 2][2]
        assert {key.partition("@")[0] for key in first | second} <= set(answers[rank][1])
        parted = {key for key in first if "@" in key}
        assert bool(parted) == (bool(shard) and name == "AdamW")
        if shard:
            assert first and second and first != second and not parted & second
        else:
            assert first == second


def test_sharded_state_is_in_the_checkpoint(pool, tmp_path):
    """Two copies with sharded state, a checkpoint, one copy that goes on with whole batches: as if never stopped."""
    module, graph = frozen_and_tied()
    saved = CheckpointConfig(str(tmp_path), every=2)
    config = TrainConfig(2, optimizer=OptimizerConfig("adamw", 1e-2, shard=True), checkpoint=saved)
    plan = dags.random_plan(random.Random(3), graph, 2, COUNT)
    first = pool.run(4, __file__, "train", plan, graph, state_of(module), config)[0][0]
    longer = TrainConfig(STEPS, optimizer=OptimizerConfig("adamw", 1e-2), checkpoint=saved)
    again = dags.random_plan(random.Random(5), graph, 1, COUNT)
    rest = pool.run(2, __file__, "train", again, graph, state_of(module), longer, True)[0][0]
    assert first + rest == pytest.approx(alone(None)[0], rel=1e-9)


def gradients(plan, graph, state, zero, master):
    """What a rank does: losses and whole gradients of two steps together, and the sizes of its own ones by name."""
    buckets.BUCKET_BYTES = 1000
    engine = Engine(plan, graph, state, options=EngineOptions(zero=zero, master_dtype=master))
    rows = rows_of(engine.mesh.copy)
    losses = [engine.step(next(rows)) for _ in range(2)]
    own = {name: item.grad for name, item in engine.named_parameters()}
    return losses, from_parts(engine, own), {name: item.numel() for name, item in own.items()}


@pytest.mark.parametrize("zero, master", [(1, None), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
    (0, None), (2, None), (3, None), (1, torch.float32), (2, torch.float32)))])
def test_gradients_of_copies_that_divide_them(pool, zero, master):
    """Sums over microbatches, steps and copies equal those of one process; with parts each copy has half of some."""
    module, graph = frozen_and_tied()
    plan = dags.random_plan(random.Random(4), graph, 2, COUNT)
    module.zero_grad()
    losses = []
    for _, batch in zip(range(2), whole_batches(), strict=False):
        pieces = models.chunked(batch, COUNT * COPIES)
        before = {name: item.grad.clone() for name, item in module.named_parameters() if item.grad is not None}
        losses.append(models.eager(module, pieces, equal.valid_labels(False, pieces))[0])
        for name, item in module.named_parameters():
            if name in before and item.grad is not None:
                item.grad.add_(before[name])
    expected = {name: item.grad for name, item in module.named_parameters() if item.grad is not None}
    bound = 1e-12 if master is None else 1e-5
    for own, found, sizes in pool.run(4, __file__, "gradients", plan, graph, state_of(module), zero, master):
        assert own == pytest.approx(losses, rel=bound) and found.keys() == expected.keys()
        for name, item in expected.items():
            assert torch.linalg.vector_norm(found[name] - item) <= bound * torch.linalg.vector_norm(item), name
        halves = {name for name, size in sizes.items() if size == expected[name].numel() // 2}
        assert bool(halves) == bool(zero)
        assert all(name in halves or size == expected[name].numel() for name, size in sizes.items())
    module.zero_grad()


def sums_of(plan, graph, state):
    """Where the rank's program sums gradients over the copies, and where its last W is."""
    buckets.BUCKET_BYTES = 1000
    engine = Engine(plan, graph, state)
    kinds = [ready.kind for ready in engine.compiled.instructions]
    texts = [ready.label for ready in engine.compiled.instructions]
    sums = [place for place, text in enumerate(texts) if "over 2 copies" in text]
    return sums, max(place for place, kind in enumerate(kinds) if kind in (ActionKind.W, ActionKind.B))


def test_sums_start_during_the_backward(pool):
    """A bucket is summed as soon as its last W is done, while others still wait for theirs."""
    module, graph = frozen_and_tied()
    problem = equal.problem(graph, 2, 4, 8)
    plan = next(item for item in BASELINES if item.name == "ZB-V").plan(problem)
    for sums, last in pool.run(4, __file__, "sums_of", plan, graph, state_of(module)):
        assert sums[0] < last and sums == sorted(sums)
