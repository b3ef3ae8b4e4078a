"""The training loop in the pool: equal to one process over several steps, resumable under any plan, measured."""

import functools
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import pytest
import runtime_dags as dags
import runtime_equal as equal
import runtime_models as models
import torch

from mipipe.graphs.errors import InputError, RunError
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.simulate import simulate
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.options import EngineOptions
from mipipe.runtime.train import metrics, training
from mipipe.runtime.train.config import (
    CheckpointConfig,
    ExpertsConfig,
    GroupConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from mipipe.runtime.train.data import Batches
from mipipe.runtime.train.launching import devices
from mipipe.runtime.train.optim import learning_rate_factor, parameter_groups, with_fused
from mipipe.runtime.train.trace import measured_timeline
from mipipe.runtime.train.training import Trainer

pytestmark = pytest.mark.distributed

COUNT = 3
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "train_loop.py"


def plan(seed, ranks=2):
    return dags.random_plan(random.Random(seed), equal.case("skip").graph, ranks, COUNT)


def batches():
    """An endless loader of different batches."""
    number = 0
    while True:
        yield models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 11, seed=100 + number)
        number += 1


def train(made, graph, state, config, resume=False):
    """What a rank does: losses, parameters, and the rank's number of steps done before."""
    engine = Engine(made, graph, state, options=EngineOptions(seed=config.seed, barrier=config.barrier == "step"))
    trainer = Trainer(engine, config, Batches(batches()))
    start = trainer.resume() if resume else 0
    losses = trainer.run(start)
    return losses, {name: item.detach() for name, item in engine.named_parameters()}, start


def run(pool, made, config, resume=False):
    case = equal.case("skip")
    answers = pool.run(made.problem.num_ranks, __file__, "train", made, case.graph, case.state(), config, resume)
    weights = {}
    for _, mine, _ in answers:
        weights.update(mine)
    return answers[0][0], weights, answers[0][2]


@functools.cache
def alone(steps, clip):
    """The same training with the model's own forward, autograd and torch's AdamW."""
    module = models.skip_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _, batch in zip(range(steps), batches(), strict=False):
        pieces = models.chunked(batch, COUNT)
        loss, _ = models.eager(module, pieces, equal.valid_labels(False, pieces))
        losses.append(loss)
        if clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return losses, {name: item.detach() for name, item in module.named_parameters()}


def config(steps, **more):
    return TrainConfig(steps, optimizer=OptimizerConfig("adamw", 1e-2), **more)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("seed", [3, 4])
def test_steps_of_adamw_equal_the_single_process(pool, seed, clip):
    """Tied and replicated parameters stay equal on all holders, count once in clipping, and move as alone."""
    losses, weights, _ = run(pool, plan(seed), config(4, clip=clip))
    expected, final = alone(4, clip)
    assert losses == pytest.approx(expected, rel=1e-9)
    for name, tensor in weights.items():
        assert torch.linalg.vector_norm(tensor - final[name]) <= 1e-8 * torch.linalg.vector_norm(final[name]), name


@functools.cache
def alone_by_the_last_norm(steps, clip):
    """The same by hand, gradients scaled by the norm of the step before; the first by its own."""
    module = models.skip_module()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses, last = [], None
    for _, batch in zip(range(steps), batches(), strict=False):
        optimizer.zero_grad()
        pieces = models.chunked(batch, COUNT)
        loss, _ = models.eager(module, pieces, equal.valid_labels(False, pieces))
        losses.append(loss)
        norm = torch.sqrt(sum(item.grad.double().square().sum() for item in module.parameters())).item()
        chosen, last = norm if last is None else last, norm
        if clip is not None and chosen > clip:
            for item in module.parameters():
                item.grad.mul_(clip / (chosen + 1e-6))
        optimizer.step()
    return losses


def test_steps_without_a_barrier_are_bitwise_those_with_one(pool, tmp_path):
    """Losses of all steps, each told a step later; the same weights, metrics of every step, and checkpoints."""
    whole, weights, _ = run(pool, plan(3), config(5))
    told, own, _ = run(pool, plan(3), config(5, barrier="none", metrics=str(tmp_path / "m.jsonl")))
    assert told == whole and all(torch.equal(weights[name], own[name]) for name in weights)
    records = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["loss_metrics/global_avg_loss"] for record in records] == whole
    assert all(record["grad_norm"] > 0 for record in records)


def first_step(made, graph, state, batch, barrier):
    """When a rank's first step is over, and its optimizer's: that of the last rank takes a while."""
    updated = []

    def update():
        time.sleep(1.0 * engine.mesh.rank)
        updated.append(time.monotonic())

    engine = Engine(made, graph, state, options=EngineOptions(barrier=barrier), on_update=update)
    told = engine.step(batch)
    over = time.monotonic()
    return over, updated[0], told, told if barrier else engine.finish()


@pytest.mark.parametrize("barrier", [True, False])
def test_only_with_a_barrier_does_a_step_wait_for_the_last_ranks_end(pool, barrier):
    case, made = equal.case("skip"), plan(3)
    batch = models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 11, seed=1)
    (over, _, told, loss), (_, slowest, _, other) = pool.run(2, __file__, "first_step", made, case.graph, case.state(),
                                                             batch, barrier)
    assert (over >= slowest) is barrier
    assert loss == other and (told == loss if barrier else told is None)


def test_without_a_barrier_gradients_are_clipped_by_the_last_norm(pool):
    losses, _, _ = run(pool, plan(4), config(4, clip=0.1, barrier="none"))
    assert losses == pytest.approx(alone_by_the_last_norm(4, 0.1), rel=1e-9)
    assert losses != pytest.approx(alone(4, 0.1)[0], rel=1e-9)  # clipping by the own norm is another run


def test_a_barrier_is_needed_where_all_ranks_sum_up_after_every_step():
    with pytest.raises(InputError, match="barrier none does not go with experts"):
        TrainConfig(2, barrier="none", experts=ExpertsConfig())


@pytest.mark.slow
def test_resume_is_bitwise(pool, tmp_path):
    """Six steps at once, and three, a checkpoint, three more: the same losses and weights to the last bit."""
    whole, weights, _ = run(pool, plan(3), config(6))
    saved = CheckpointConfig(str(tmp_path / "c"), every=3)
    first, _, _ = run(pool, plan(3), config(3, checkpoint=saved))
    rest, resumed, start = run(pool, plan(3), config(6, checkpoint=saved), resume=True)
    assert start == 3
    assert first + rest == whole
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)


def train_deterministic(made, graph, state, config, resume=False):
    """`train` as a worker does it with ``deterministic: true``."""
    assert config.deterministic
    devices.deterministic()
    try:
        engine = Engine(made, graph, state, options=EngineOptions(seed=config.seed))
        trainer = Trainer(engine, config, Batches(token_batches()))
        losses = trainer.run(trainer.resume() if resume else 0)
        return losses, {name: item.detach() for name, item in engine.named_parameters()}
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def token_batches():
    """An endless loader for the models with 64 tokens."""
    number = 0
    while True:
        yield models.token_batch(equal.ROWS * COUNT, equal.LENGTH, 64, seed=100 + number)
        number += 1


@pytest.mark.slow
def test_deterministic_runs_and_resumes_are_bitwise_equal(pool, tmp_path):
    """A mixture in float32 on two ranks, with clipping: twice from the start, and once more from its middle."""
    case = equal.case("moe", torch.float32)
    made = dags.random_plan(random.Random(7), case.graph, 2, COUNT)

    def once(steps, resume=False, **more):
        answers = pool.run(2, __file__, "train_deterministic", made, case.graph, case.state(),
                           config(steps, clip=0.5, deterministic=True, **more), resume)
        weights = {}
        for _, mine in answers:
            weights.update(mine)
        return answers[0][0], weights

    saved = CheckpointConfig(str(tmp_path / "c"), every=2)
    first, weights = once(4, checkpoint=saved)
    again, same = once(4)
    shutil.rmtree(tmp_path / "c" / "step-4")
    rest, resumed = once(4, resume=True, checkpoint=saved)
    assert first == again and rest == first[2:]
    for name, tensor in weights.items():
        assert torch.equal(tensor, same[name]) and torch.equal(tensor, resumed[name]), name


def test_resume_under_another_plan(pool, tmp_path):
    """Other ranks, other stages: the losses go on as in one process, Adam's moments included."""
    saved = CheckpointConfig(str(tmp_path / "c"), every=2)
    first, _, _ = run(pool, plan(3, ranks=2), config(2, checkpoint=saved))
    rest, _, start = run(pool, plan(5, ranks=4), config(4, checkpoint=saved), resume=True)
    assert start == 2
    assert first + rest == pytest.approx(alone(4, None)[0], rel=1e-9)


def test_a_training_loop_of_ones_own(pool):
    """The example's loop on two ranks equals the single process; it stands in docs/training.md as it is."""
    case = equal.case("skip")
    few = list(itertools.islice(batches(), 4))
    losses, _ = pool.run(2, str(EXAMPLE), "train", plan(3), case.graph, case.state(), few, 4)
    assert losses == pytest.approx(alone(4, 1.0)[0], rel=1e-9)
    code = EXAMPLE.read_text()
    assert code[code.index("def train("):code.index("def main(")].strip() in \
        (EXAMPLE.parent.parent / "docs" / "training.md").read_text()


def test_optimizers_are_fused_on_cuda_unless_another_way_is_asked_for():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert with_fused(torch.optim.AdamW, {"lr": 1.0}, cuda) == {"lr": 1.0, "fused": True}
    assert with_fused(torch.optim.AdamW, {"foreach": True}, cuda) == {"foreach": True}
    assert with_fused(torch.optim.AdamW, {}, cpu) == with_fused(torch.optim.Adagrad, {}, cuda) == {}


def test_optimizer_groups_and_schedules():
    """Norms take no weight decay; warm-up, stable part and decay as said."""
    named = [(name, torch.nn.Parameter(torch.ones(1))) for name in ("a.norm.weight", "a.weight", "b.bias")]
    made = parameter_groups(named, [GroupConfig(r"norm|bias", {"weight_decay": 0.0})])
    assert [len(group["params"]) for group in made] == [2, 1] and made[0]["weight_decay"] == 0.0

    def factors(steps, **options):
        factor = learning_rate_factor(ScheduleConfig(**options), steps)
        return [round(factor(step), 4) for step in range(steps)]

    assert factors(4, name="linear", warmup=2) == [0.5, 1.0, 1.0, 0.5]
    assert factors(6, name="cosine", minimum=0.5)[3] == 0.75
    assert factors(8, name="sqrt", warmup=2, decay=4) == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.2929, 0.134]
    assert factors(3, name="constant") == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("barrier", ["step", "none"])
def test_the_loss_is_checked(pool, barrier):
    """A loss that is not finite ends the run and names the step."""
    case = equal.case("skip")
    state = {name: tensor * float("nan") if name == "norm.weight" else tensor for name, tensor in case.state().items()}
    for text in pool.run(2, __file__, "fails", plan(3), case.graph, state, config(2, barrier=barrier)):
        assert "is nan" in text and "lower the learning rate" in text


def fails(*arguments):
    with pytest.raises(RunError) as caught:
        train(*arguments)
    return str(caught.value)


def measure(made, graph, state, batch):
    engine = Engine(made, graph, state, options=EngineOptions(track_memory=True))
    engine.step(batch)
    return measured_timeline(engine)


def test_the_measured_timeline_has_every_action(pool):
    """As many spans as the simulated one, in the order of the program on every rank, on one clock."""
    case, made = equal.case("skip"), plan(3, ranks=4)
    timeline, *others = pool.run(4, __file__, "measure", made, case.graph, case.state(), case.batch(COUNT))
    assert others == [None] * 3
    simulated = simulate(made, lower(made))
    assert sorted(span.label for span in timeline.spans if span.microbatch >= 0) == \
        sorted(span.label for span in simulated.spans if span.microbatch >= 0)
    for rank in range(4):
        mine = [span for span in timeline.spans if span.rank == rank and span.peer is None and span.stage >= 0]
        assert all(a.end_ns <= b.start_ns for a, b in itertools.pairwise(mine))
    ends = {(span.rank, span.label): span.end_ns for span in timeline.spans}
    assert min(span.start_ns for span in timeline.spans) == 0
    assert 0 < timeline.bubble_ratio < 1 and ends and max(map(timeline.peak_bytes, range(4))) > 0


def evaluate(made, graph, state, batch):
    engine = Engine(made, graph, state)
    loss = engine.evaluate(batch)
    return loss, engine.outputs.get("logits", {}), any(item.grad is not None for item in engine.parameters())


def test_evaluation_runs_forward_only(pool):
    """The loss of a step without gradients, and the other outputs where they are made."""
    case, made = equal.case("skip"), plan(4)
    batch = case.batch(COUNT)
    logits = {}
    losses = set()
    for loss, found, graded in pool.run(2, __file__, "evaluate", made, case.graph, case.state(), batch):
        logits.update(found)
        losses.add(loss)
        assert not graded
    pieces = models.chunked(batch, COUNT)
    expected, _ = models.eager(case.module, pieces, equal.valid_labels(False, pieces))
    assert len(losses) == 1 and losses.pop() == pytest.approx(expected, rel=1e-12)
    for number, piece in enumerate(pieces):
        torch.testing.assert_close(logits[number], case.module(**piece)["logits"], rtol=1e-12, atol=1e-12)


def test_a_metrics_file_has_one_line_for_each_step(pool, tmp_path):
    """Names as torchtitan's; a resumed run drops what the checkpoint does not know."""
    path = tmp_path / "metrics.jsonl"
    losses, _, _ = run(pool, plan(3), config(2, metrics=str(path)))
    import json
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert [record["loss_metrics/global_avg_loss"] for record in records] == losses
    assert {"step", "grad_norm", "lr", "throughput(tps)", "time_metrics/end_to_end(s)"} <= set(records[0])
    assert 0 <= records[-1]["bubble_ratio/measured"] < 1


def test_memory_is_counted_from_the_first_step(monkeypatch):
    """What building the model took for a moment is no step's; a resident size has no such count."""
    asked, reset = [], []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    case = equal.case("skip")
    engine = Engine(plan(1, ranks=1), case.graph, case.state())
    monkeypatch.setattr(training, "forget_memory", lambda device: asked.append((device, engine.steps_done)))
    Trainer(engine, config(2), Batches(batches())).run()
    assert asked == [(torch.device("cpu"), 0)]
    for device in (torch.device("cpu"), torch.device("cuda", 3)):
        metrics.forget_memory(device)
    assert reset == [torch.device("cuda", 3)]
