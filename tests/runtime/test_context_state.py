"""Members along the context axis divide state, gradients and parameters with the copies: the run of one process."""

import itertools
from dataclasses import replace

import pytest
import runtime_equal as equal
import runtime_models as models
import torch
from runtime_runs import MICROBATCHES, RUNS, STEPS, alone, batches_of, check, close, config_of, plan_of
from safetensors.torch import load_file

from mipipe.planner.team import Team, TeamMode
from mipipe.runtime.engine.compiling import buckets
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.recipes.whole import from_parts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CONTEXT = Team({"context": 2})
COPIES = replace(CONTEXT, copies=2)
BOTH = Team({"context": 2, "tensor": 2}, modes=(TeamMode("tensor", "sequence"),))
CASES = [("llama", 1, COPIES, True), ("llama", 1, COPIES, "parameters"), ("llama", 1, CONTEXT, True),
         ("llama", 2, CONTEXT, "gradients"), ("llama", 1, BOTH, True), ("moe", 1, COPIES, "parameters"),
         ("vlm", 1, COPIES, True), ("vlm", 1, COPIES, "gradients"), ("vlm-frozen", 1, COPIES, "parameters"),
         ("vlm-lora", 1, COPIES, True), ("llama-frozen", 1, COPIES, "parameters"), ("llama-frozen", 1, BOTH, True)]


def run(pool, name, ranks, team, *config):
    """A training run on processes of its own."""
    made = equal.case(name)
    return pool.run(ranks * team.members * team.copies, RUNS, "train", name,
                    plan_of(made.graph, ranks, team), made.graph, made.state(), *config, timeout=240.0)


@pytest.mark.parametrize("name, ranks, team, shard", CASES)
def test_context_members_divide_state(pool, tmp_path, name, ranks, team, shard):
    """Two steps, as in one process: of whatever trains, and divides, all devices of a rank together hold every element
    once, with its state. The saved folder is one process's, and other degrees go on from the checkpoint."""
    folders = [tmp_path / "saved"] if name == "llama" else []
    answers = run(pool, name, ranks, team, config_of(tmp_path / "kept", 2, shard), *folders)
    check(name, answers, 0, 2)
    alike = team.members * team.copies
    trained = {key: item for key, item in equal.case(name).module.named_parameters()
               if item.requires_grad and item.shape[0] % alike == 0 and any(key in mine for _, mine, _ in answers)}
    for key, item in trained.items() if "tensor" not in team.axes else ():
        states = [kept for _, mine, kept in answers if key in mine]
        assert {mine[key][0].numel() * alike for _, mine, _ in answers if key in mine} == {item.numel()}, key
        pieces = {part for kept in states for part in kept if part.partition("@")[0] == key and "@" in part}
        assert len(pieces) == alike and len(states) % alike == 0, key
    for folder in folders:
        saved = load_file(folder / "model.safetensors")
        for key, item in alone(name)[1][1].items():
            close(key, saved[key], item)
    again = run(pool, name, 2, Team({"tensor": 2}), config_of(tmp_path / "kept", STEPS))
    check(name, again, 2, STEPS)


def test_a_run_goes_on_with_context_members_that_divide(pool, tmp_path):
    """From whole state of a team of other degrees, and from other parts."""
    check("llama", run(pool, "llama", 1, Team({"tensor": 2}), config_of(tmp_path, 1)), 0, 1)
    check("llama", run(pool, "llama", 1, COPIES, config_of(tmp_path, 2, True)), 1, 2)
    check("llama", run(pool, "llama", 1, Team({"context": 2, "tensor": 2}), config_of(tmp_path, 3, "parameters")), 2, 3)
    check("llama", run(pool, "llama", 1, replace(Team({"tensor": 2}), copies=2), config_of(tmp_path, 4, True)), 3, 4)


def gradients(plan, graph, state, batches, zero, master):
    """What a process does: losses and whole gradients of steps together, and the sizes of its own by name."""
    buckets.BUCKET_BYTES = 1000  # several sums for one model as small as this
    engine = Engine(plan, graph, state, options=EngineOptions(zero=zero, master_dtype=master))
    copies = engine.mesh.num_copies
    losses = [engine.step({name: item.chunk(copies)[engine.mesh.copy] for name, item in batch.items()})
              for batch in batches]
    own = {name: item.grad for name, item in engine.named_parameters() if item.grad is not None}
    return losses, from_parts(engine, own), {name: item.numel() for name, item in own.items()}


def tower_in_batch_mode():
    """A team of two axes with a vision tower whose members along the tensor axis have samples each."""
    tower = tuple(item.name for item in equal.case("vlm").graph.segments if item.tags.branch == "vision")
    return Team({"context": 2, "tensor": 2}, modes=(TeamMode("tensor", "sequence"), TeamMode("tensor", "batch", tower)))


@pytest.mark.parametrize("name, team, zero, master", [
    ("llama", COPIES, 1, None), ("llama", COPIES, 1, torch.float32), ("llama", BOTH, 2, None),
    *(("vlm", "tower", zero, None) for zero in (1, 2, 3))])
def test_gradients_of_several_steps_are_added_up(pool, name, team, zero, master):
    """Sums over microbatches, steps, members and copies equal those of one process, each device with its part of them;
    also with a vision tower in ``batch`` mode, and with master weights of another type."""
    made, team = equal.case(name), tower_in_batch_mode() if team == "tower" else team
    batches = list(itertools.islice(batches_of(name, 0, 1), 2))
    expected: dict[str, torch.Tensor] = {}
    losses = []
    for batch in batches:
        pieces = models.chunked(batch, MICROBATCHES)
        loss, found = models.eager(made.module, pieces, equal.valid_labels(made.shift, pieces), made.loss_of)
        losses.append(loss)
        expected = {key: item + expected.get(key, 0) for key, item in found.items()}
    plan = plan_of(made.graph, 1, team)
    bound = 1e-12 if master is None else 1e-5
    least = 1e-3 * max(torch.linalg.vector_norm(item) for item in expected.values())
    for own, found, sizes in pool.run(4, __file__, "gradients", plan, made.graph, made.state(), batches, zero, master,
                                      timeout=240.0):
        assert own == pytest.approx(losses, rel=bound)
        for key, item in expected.items():
            error = torch.linalg.vector_norm(found[key] - item)
            assert error <= bound * max(torch.linalg.vector_norm(item), least), f"{key} is off by {error}"
            assert sizes[key] <= item.numel() // 2 or item.shape[0] % 4, key


@pytest.mark.parametrize("optimizer, shard", [("muon", "gradients"), ("reg", True)])
def test_matrices_are_put_together_from_context_members(pool, tmp_path, optimizer, shard):
    """Of gradients in parts each device has its matrices put together; where they are whole, copies share them."""
    answers = run(pool, "llama", 1, COPIES, config_of(tmp_path, 2, shard, optimizer))
    check("llama", answers, 0, 2, optimizer)
