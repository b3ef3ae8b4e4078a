"""Training runs of the tests of teams: what a process does, the same in one process, and the comparison of both."""

import functools
import itertools
import random
from dataclasses import replace

import pytest
import runtime_dags as dags
import runtime_equal as equal
import runtime_models as models
import torch

from mipipe.graphs.operator_graph import Role
from mipipe.runtime.checkpoints.checkpoint import optimizer_tensors
from mipipe.runtime.checkpoints.checkpoint_run import Start
from mipipe.runtime.checkpoints.save import Target, save_weights
from mipipe.runtime.engine.compiling.team import member_pieces
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.recipes.optimizers import BANK, OPTIMIZERS
from mipipe.runtime.train.config import CheckpointConfig, OptimizerConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.launching.prepare import zero_of
from mipipe.runtime.train.optim import parameter_roles
from mipipe.runtime.train.training import Trainer
from mipipe.runtime.weights.stored_weights import StoredWeights

RUNS = __file__
"""Where the workers find `train`."""
MICROBATCHES, STEPS, CLIP = 4, 4, 0.1
"""Microbatches of a step over all copies."""


def batches_of(name, copy, copies):
    """One copy's rows of an endless sequence of batches."""
    number = 0
    while True:
        rows = equal.ROWS * MICROBATCHES
        batch = models.image_batch(rows, seed=100 + number) if name.startswith("vlm") else \
            models.token_batch(rows, equal.LENGTH, 64, seed=100 + number)
        yield {key: tensor.chunk(copies)[copy] for key, tensor in batch.items()}
        number += 1


def train(name, plan, graph, state, config, folder=None):
    """What a process does: losses, this member's part of every weight, the names it keeps optimizer state for; then a
    folder, from which the weights are read back."""
    options = EngineOptions(zero=zero_of(config, plan, graph))
    engine = Engine(plan, graph, state, options=options)
    mesh = engine.mesh
    rows = equal.ROWS * MICROBATCHES // mesh.num_copies
    trainer = Trainer(engine, config, Batches(batches_of(name, mesh.copy, mesh.num_copies), rows, in_turn=True))
    losses = trainer.run(trainer.begin(Start.RESUME_IF_ANY))
    pieces = member_pieces(engine.compiled, graph, mesh)
    weights = {key: (item.detach().clone(), pieces.get(key)) for key, item in engine.weights.parameters.items()}
    if folder is not None:
        module = getattr(models, f"tiny_{name}")()
        save_weights(engine, module, Target(folder, 10**9))
        again = Engine(plan, graph, StoredWeights(folder, module, {"model.embed_tokens.weight": ("lm_head.weight",)}),
                       options=options)
        assert all(torch.equal(again.weights.parameters[key], item) for key, (item, _) in weights.items())
    kept = {key.split(".", 1)[1].rpartition(".")[0] for key in optimizer_tensors(engine, trainer.optimizer)}
    return losses, weights, kept


@functools.cache
def alone(name, optimizer_name="adamw"):
    """The same training in one process: losses and the weights after every step."""
    made = equal.case(name)
    before = {key: item.clone() for key, item in made.module.state_dict().items()}
    trained = {key: item for key, item in made.module.named_parameters() if item.requires_grad}
    if optimizer_name == "adamw":
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    else:
        roles = parameter_roles(made.graph)
        chosen = [key for key, item in trained.items()
                  if item.dim() > 1 and roles.get(key) not in (Role.EMBEDDING, Role.HEAD)]
        for key in chosen:
            setattr(trained[key], BANK, roles.get(key) is Role.EXPERTS and trained[key].dim() == 3)
        optimizer = OPTIMIZERS[optimizer_name]([
            {"params": [trained[key] for key in chosen], "matrix": True},
            {"params": [item for key, item in trained.items() if key not in chosen], "matrix": False}], lr=1e-2)
    losses, weights = [], []
    for _, batch in zip(range(STEPS), batches_of(name, 0, 1), strict=False):
        pieces = models.chunked(batch, MICROBATCHES)
        losses.append(models.eager(made.module, pieces, equal.valid_labels(made.shift, pieces), made.loss_of)[0])
        torch.nn.utils.clip_grad_norm_(made.module.parameters(), CLIP)
        optimizer.step()
        weights.append({key: item.detach().clone() for key, item in made.module.named_parameters()})
    made.module.load_state_dict(before)
    return losses, weights


def plan_of(graph, ranks, team):
    """A random plan in which no rank is idle."""
    count = MICROBATCHES // (team.copies if team is not None else 1)
    plans = (dags.random_plan(random.Random(seed), graph, ranks, count) for seed in itertools.count(3))
    return replace(next(plan for plan in plans if {rank for stage in plan.placement.stages for rank in stage.ranks}
                        == set(range(ranks))), team=team)


def config_of(folder, steps, shard=False, name="adamw"):
    return TrainConfig(steps, optimizer=OptimizerConfig(name, 1e-2, shard=shard), clip=CLIP,
                       checkpoint=CheckpointConfig(str(folder), every=1, keep=9))


def close(key, item, wanted):
    """To 1e-12 of the norm; a key's bias, whose gradient is nothing but rounding, by the difference itself."""
    difference, size = torch.linalg.vector_norm(item - wanted), torch.linalg.vector_norm(wanted)
    assert difference <= 1e-12 * (1.0 if key.endswith("k_proj.bias") else size), f"{key} is off by {difference / size}"


def check(name, answers, first, last, optimizer="adamw"):
    """Losses of the steps after ``first`` up to ``last``, and the weights after these, to 1e-12."""
    losses, weights = alone(name, optimizer)
    for own, mine, _ in answers:
        assert mine and own == pytest.approx(losses[first:last], rel=1e-12)
        for key, (item, piece) in mine.items():
            wanted = weights[last - 1][key] if piece is None else piece.cut(weights[last - 1][key])
            close(key, item, wanted)
