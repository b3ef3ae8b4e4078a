"""Recipes, optimizers and plans in every combination: each trains and saves what one process does, or is refused before
the first step, in one line and for a reason that is written down here."""

import functools
import random
from dataclasses import replace

import pytest
import recipe_models as recipes
import runtime_dags as dags
import torch
from safetensors.torch import load_file

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.models.sources import open_source
from mipipe.graphs.recipes.adapters import AdapterConfig
from mipipe.graphs.recipes.expansion import ExpandConfig, VoteFile
from mipipe.graphs.recipes.options import LossConfig, RecipeConfig, ReferenceConfig
from mipipe.graphs.recipes.routers import RouterConfig
from mipipe.graphs.recipes.source import recipe_of, with_recipe
from mipipe.graphs.serialize import save
from mipipe.planner.team import Team, TeamMode
from mipipe.runtime.checkpoints.save import save_trained
from mipipe.runtime.checkpoints.save_check import check_save
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.train.config import OptimizerConfig, SaveConfig, TrainConfig
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.launching.prepare import check_team, zero_of
from mipipe.runtime.train.models import initial_weights
from mipipe.runtime.train.training import Trainer

pytestmark = pytest.mark.distributed

MICROBATCHES, STEPS, ROWS, LENGTH, VOCABULARY = 4, 3, 2, 8, 24
"""Microbatches of a step over all copies."""
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
         "tie_word_embeddings": False, "pad_token_id": 0}
MODELS = {
    "llama": ("LlamaForCausalLM", {}),
    "fused": ("Phi3ForCausalLM", {}),
    "moe": ("Qwen3MoeForCausalLM", {"head_dim": 4, "moe_intermediate_size": 8, "num_experts": 4,
                                    "num_experts_per_tok": 2}),
}
GROUPS = ("rift", "asympo", "spo", "grpo", "dpo", "distill", "fuse")


def recipe(name, folder):
    """The recipe that a row of the table names."""
    if name == "apex":
        counts = {f"model.layers.{layer}.mlp": list(range(32)) for layer in range(2)}
        save(VoteFile(counts, 0.375, 0), folder / "votes.json")
        return RecipeConfig(expand=ExpandConfig(str(folder / "votes.json")))
    if name in ("lora", "dora", "beamlora", "growing"):
        method = "beamlora" if name == "growing" else name
        return RecipeConfig(adapters=AdapterConfig(r"re:(q|o|up|down|gate_up)_proj$", method, 4, keep=0.7,
                                                   period=2 if name == "growing" else 0))
    if name == "router":
        return RecipeConfig(router=RouterConfig(balance=0.1, z=0.1))
    if name.partition("/")[0] in GROUPS:
        loss, _, chunk = name.partition("/")
        options = {"top": 4} if loss == "fuse" else {}
        return RecipeConfig(LossConfig(loss, options, int(chunk or 0)),
                            ReferenceConfig() if loss in ("dpo", "distill") else None)
    return RecipeConfig()


@functools.cache
def captured(model, name, folder):
    source, sizes = MODELS[model]
    opened = open_source(source, seq=LENGTH, batch=ROWS, dtype="float64", overrides={**SIZES, **sizes})
    opened = with_recipe(opened, recipe(name, folder))
    return capture_module(opened.build("meta"), opened.inputs("meta"), loss=opened.loss, loss_info=opened.loss_info,
                          withheld=opened.withheld, constants=opened.constants, source=opened.record, verify=False)


def config_of(graph, optimizer, shard, folder=None):
    kept = recipe_of(graph)
    return TrainConfig(STEPS, optimizer=OptimizerConfig(optimizer, 1e-2, shard=shard), clip=1.0, seed=3,
                       reference=kept.reference, save=None if folder is None else SaveConfig(str(folder)))


def batches_of(graph, copy, copies):
    """One copy's rows of an endless sequence of batches, whose groups no copy shares."""
    number = 0
    while True:
        whole = recipes.batch(graph, ROWS * MICROBATCHES, seed=number, length=LENGTH, vocabulary=VOCABULARY, each=2)
        yield {key: tensor.chunk(copies)[copy] for key, tensor in whole.items()}
        number += 1


def begun(graph, plan, config):
    """All that happens before the first step."""
    check_team(plan, graph, config)
    engine = Engine(plan, graph, initial_weights(graph, config),
                    options=EngineOptions(config.seed, zero=zero_of(config, plan, graph)))
    if config.save is not None:
        check_save(engine, config, None)
    mesh = engine.mesh
    rows = ROWS * MICROBATCHES // mesh.num_copies
    return Trainer(engine, config, Batches(batches_of(graph, mesh.copy, mesh.num_copies), rows, in_turn=True))


def train(graph, plan, config):
    """What a process does: its losses, or why it was refused."""
    try:
        trainer = begun(graph, plan, config)
    except MipipeError as error:
        return f"{type(error).__name__}: {error}"
    losses = trainer.run()
    save_trained(trainer.engine, config, None)
    return losses


def plan_of(graph, ranks, team, copies=1):
    return replace(dags.random_plan(random.Random(3), graph, ranks, MICROBATCHES // copies), team=team)


PLANS = {
    "two ranks": (2, None, False, 1),
    "zero-1": (2, None, True, 2),
    "zero-3": (2, Team({}, 2), "parameters", 2),
    "team": (2, Team({"tensor": 2}), False, 1),
    "sequence": (1, Team({"tensor": 2}, modes=(TeamMode("tensor", "sequence"),)), False, 1),
    "two axes": (1, Team({"context": 2, "tensor": 2}), False, 1),
    "team, zero-1": (1, Team({"tensor": 2}, 2, zero=1), False, 2),
    "team, zero-3": (1, Team({"tensor": 2}, 2, zero=3), False, 2),
}
"""Ranks, team, shard, copies."""

PARTED = ("zero-3", "team", "sequence", "two axes", "team, zero-1", "team, zero-3")
REFUSED = {
    **{("*", "adafactor", plan): "looks at whole tensors" for plan in PARTED},
    **{("growing", "*", plan): "ranks that grow (period 2) move whole ones" for plan in ("zero-1", *PARTED)},
    **{("*", optimizer, "*"): f"optimizer '{optimizer}': expected one of" for optimizer in ("lbfgs", "sparseadam")},
}
"""(recipe, optimizer, plan) and why; ``*`` for all."""


def reason(name, optimizer, plan):
    keys = [(name, optimizer, plan), (name, "*", plan), ("*", optimizer, plan), ("*", optimizer, "*")]
    return next((REFUSED[key] for key in keys if key in REFUSED), None)


def check(pool, folder, model, name, optimizer, plan):
    graph = captured(model, name, folder)
    ranks, team, shard, copies = PLANS[plan]
    config = config_of(graph, optimizer, shard, folder / "saved")
    made = plan_of(graph, ranks, team, copies)
    world = ranks * (team.members * team.copies if team is not None else copies)
    answers = pool.run(world, __file__, "train", graph, made, config, timeout=180.0)
    why = reason(name, optimizer, plan)
    if why is not None:
        assert all(isinstance(answer, str) and answer.startswith("InputError: ") and why in answer
                   and "\n" not in answer for answer in answers), answers
        return
    alone = train(graph, plan_of(graph, 1, None), config_of(graph, optimizer, False, folder / "alone"))
    assert isinstance(alone, list), alone
    for answer in answers:
        assert answer == pytest.approx(alone, rel=1e-8, abs=1e-10), answer
    for file in (folder / "alone").glob("*.safetensors"):
        wanted, found = load_file(file), load_file(folder / "saved" / file.name)
        assert set(wanted) == set(found)
        for key, item in wanted.items():
            assert torch.linalg.vector_norm(found[key] - item) <= 1e-7 * torch.linalg.vector_norm(item) + 1e-12, key


SOME = ("team", "two axes", "team, zero-3")
TABLE = [
    *(("llama", "none", optimizer, plan) for optimizer in ("reg", "muon", "adafactor") for plan in PLANS),
    *((model, "none", optimizer, plan) for model in ("fused", "moe") for optimizer in ("reg", "muon") for plan in SOME),
    *(("llama", name, "adamw", plan) for name in ("apex", "growing", "dora") for plan in PLANS),
    *(("llama", "lora", "muon", plan) for plan in SOME),
    *(("moe", "router", "adamw", plan) for plan in (*SOME, "two ranks")),
    *(("llama", name, "adamw", plan) for name in ("rift", "asympo", "spo/7", "grpo", "dpo", "distill/9", "fuse")
      for plan in SOME),
    *(("llama", "none", optimizer, plan) for optimizer in ("lbfgs", "sparseadam") for plan in ("two ranks", "zero-1")),
]


@pytest.mark.slow
@pytest.mark.parametrize("model, name, optimizer, plan", TABLE)
def test_a_combination_is_one_process_or_refused(pool, tmp_path, model, name, optimizer, plan):
    check(pool, tmp_path, model, name, optimizer, plan)
