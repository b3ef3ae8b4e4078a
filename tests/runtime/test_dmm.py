"""DMM: teachers distilled into one denoiser that a style steers."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import runtime_dags as dags
import torch
import yaml
from torch import nn

import mipipe
from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import InputError
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.dmm import (
    StyledDenoiser,
    StyleDistillation,
    batches,
    signal_shares,
    trained_styles,
    write_latents,
)

CHANNELS, WIDTH, TEXT = 4, 8, 6
CLUSTER = "examples/cluster_1cpu.yaml"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.time, self.text = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH), \
            nn.Linear(TEXT, WIDTH)

    def forward(self, x, time, text):
        return x + torch.tanh(self.conv(x) + (self.time(time) + self.text(text.mean(1)))[:, :, None, None])


class Denoiser(nn.Module):
    """With the names of diffusers' UNets."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.conv_in, self.conv_out = nn.Conv2d(CHANNELS, WIDTH, 1), nn.Conv2d(WIDTH, CHANNELS, 1)
        self.time_embedding = nn.Sequential(nn.Linear(2, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.down_blocks, self.mid_block, self.up_blocks = nn.ModuleList([Block()]), Block(), nn.ModuleList([Block()])

    def forward(self, latents, timesteps, text):
        angle = timesteps[:, None].to(latents.dtype) / 1000 * 3
        time = self.time_embedding(torch.cat([angle.sin(), angle.cos()], 1))
        x = self.conv_in(latents)
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            x = block(x, time, text)
        return (self.conv_out(x),)


def factory(teachers=2, rows=2, own_text=False, **options):
    """What a person would write: a student of the base, teachers, example inputs."""
    student = StyledDenoiser(Denoiser(0), teachers, WIDTH)
    made = StyleDistillation(student, [Denoiser(1 + number) for number in range(teachers)], **options)
    inputs = {"latents": torch.zeros(rows, CHANNELS, 4, 4), "timesteps": torch.zeros(rows, dtype=torch.int64),
              "text": torch.zeros(rows, 3, TEXT)}
    return made, inputs | ({"teacher_text": torch.zeros(rows, teachers, 3, TEXT)} if own_text else {})


def sample(rows=2, teachers=0):
    draw = torch.Generator().manual_seed(4)
    made = {"latents": torch.randn(rows, CHANNELS, 4, 4, generator=draw), "timesteps": torch.tensor([7, 900][:rows]),
            "text": torch.randn(rows, 3, TEXT, generator=draw)}
    return made | ({"teacher_text": torch.randn(rows, teachers, 3, TEXT, generator=draw)} if teachers else {})


def test_a_student_of_identical_teachers_costs_nothing():
    base = Denoiser(5)
    for distance in ("mse", "cosine"):
        made = StyleDistillation(StyledDenoiser(base, 2, WIDTH), [copy.deepcopy(base), copy.deepcopy(base)],
                                 distance=distance)
        assert made(**sample())["loss"].item() == pytest.approx(0, abs=1e-9)
    other = StyleDistillation(StyledDenoiser(base, 2, WIDTH), [copy.deepcopy(base), Denoiser(6)])
    assert other(**sample())["loss"].item() > 1e-4


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_the_loss_is_the_formula(distance):
    """Noise and blocks of every style against its teacher, each computed alone; the order of styles is no matter."""
    made, _ = factory(own_text=True, distance=distance, features=0.3)
    for part in made.student.mlp:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight)  # styles that differ
    given, total = sample(teachers=2), 0.0

    def outputs(denoiser, text, added):
        """Noise and blocks, the network written out once more."""
        angle = given["timesteps"][:, None] / 1000 * 3
        time = denoiser.time_embedding(torch.cat([angle.sin(), angle.cos()], 1)) + added
        x, found = denoiser.conv_in(given["latents"]), []
        for block in (*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks):
            x = block(x, time, text)
            found.append(x)
        return denoiser.conv_out(x), found

    for number, teacher in enumerate(made.teachers):
        mine = outputs(made.student.denoiser, given["text"], made.student.mlp(made.student.styles.weight[number]))
        wanted = outputs(teacher, given["teacher_text"][:, number], 0)
        apart = [((a - b) ** 2).mean() if distance == "mse"
                 else (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean()
                 for a, b in zip(mine[1], wanted[1], strict=True)]
        total += (((mine[0] - wanted[0]) ** 2).mean() + 0.3 * sum(apart) / 3).item() / 2
    assert made(**given)["loss"].item() == pytest.approx(total, rel=1e-5)
    turned = copy.deepcopy(made)
    turned.teachers = nn.ModuleList(list(turned.teachers)[::-1])
    with torch.no_grad():
        turned.student.styles.weight.copy_(made.student.styles.weight.flip(0))
    again = turned(**{**given, "teacher_text": given["teacher_text"].flip(1)})["loss"]
    assert again.item() == pytest.approx(total, rel=1e-5)


def test_styles_are_interpolated_and_hooks_leave_nothing_behind():
    student = StyledDenoiser(Denoiser(0), 2, WIDTH)
    nn.init.normal_(student.mlp[2].weight)
    given = sample()
    first, second, between = (student(**given, style=torch.tensor([row] * 2)) for row in
                              ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]))
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, between)
    row = student.styles.weight.detach().mean(0)
    alone = StyledDenoiser(student.denoiser, 1, WIDTH)
    alone.mlp = student.mlp
    with torch.no_grad():
        alone.styles.weight.copy_(row)
    assert torch.allclose(between, alone(**given, style=torch.ones(2, 1)), atol=1e-6)
    grown = student.with_more(1)
    assert not {id(item) for item in grown.parameters()} & {id(item) for item in student.parameters()}
    assert torch.equal(grown(**given, style=torch.tensor([[0.0, 1.0, 0.0]] * 2)), second)
    assert not student.denoiser.time_embedding._forward_hooks


def test_a_graph_has_the_loss_and_gradients_of_autograd():
    made, inputs = factory(own_text=True)
    graph = capture_module(made, inputs, granularity="module")
    engine = Engine(dags.random_plan(random.Random(0), graph, 1, 2), graph, made)
    pieces = [sample(teachers=2), {**sample(teachers=2), "timesteps": torch.tensor([1, 500])}]
    loss = engine.step(pieces)
    eager = sum(made(**piece)["loss"] for piece in pieces) / 2
    eager.backward()
    assert loss == pytest.approx(eager.item(), rel=1e-5)
    for name, item in engine.weights.parameters.items():
        wanted = made.get_parameter(name)
        assert item.requires_grad is wanted.requires_grad is name.startswith("student.")
        if item.requires_grad:
            assert torch.allclose(item.grad, wanted.grad, atol=1e-6), name


@pytest.mark.slow
def test_a_planned_run_learns_its_teachers_and_later_another(tmp_path, monkeypatch):
    """Captured, planned, trained and read again; teachers stay as they are; a new style leaves the old ones."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the run's processes
    draw = torch.Generator().manual_seed(1)
    write_latents(tmp_path / "data", torch.randn(12, CHANNELS, 4, 4, generator=draw),
                  torch.randn(12, 3, TEXT, generator=draw), torch.zeros(3, TEXT))

    def trained(options, steps, name):
        source = "test_dmm:factory"
        graph = mipipe.capture(source, overrides=options)
        plan = mipipe.plan(graph, cluster=CLUSTER, microbatches=2, costs=mipipe.profile(graph, groups=4, workers=1,
                                                                                       seconds=0.02),
                           time_limit_s=2).plan
        config = {"steps": steps, "model": source, "optimizer": {"name": "adamw", "lr": 3e-3},
                  "data": {"source": "mipipe.runtime.recipes.dmm:batches",
                           "options": {"folder": str(tmp_path / "data")}},
                  "metrics": str(tmp_path / f"{name}.jsonl"), "save": {"folder": str(tmp_path / name)}}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(config))
        return list(mipipe.train(plan, graph, tmp_path / "train.yaml", progress=False).losses)

    losses = trained({}, 40, "out")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    made, _ = factory()
    student = trained_styles(tmp_path / "out", StyledDenoiser(Denoiser(0), 2, WIDTH))
    given = sample()
    for number, teacher in enumerate(made.teachers):
        wanted = teacher(**given)[0]
        own, others = (student(**given, style=torch.eye(2)[[row] * 2]) for row in (number, 1 - number))
        assert nn.functional.mse_loss(own, wanted) < nn.functional.mse_loss(others, wanted)
    more = StyleDistillation(student.with_more(1), [Denoiser(9)], previous=copy.deepcopy(student))
    alone = StyleDistillation(student, [], previous=copy.deepcopy(student))
    assert alone(**given)["loss"].item() == pytest.approx(0, abs=1e-9)
    assert more(**given)["loss"].item() > 1e-5
    more(**given)["loss"].backward()
    assert all(item.grad is None for item in (*more.previous.parameters(), *more.teachers.parameters()))
    assert all(item.grad is not None for item in more.student.parameters())
    with pytest.raises(InputError, match="holds another student"):
        trained_styles(tmp_path / "out", StyledDenoiser(Denoiser(0), 3, WIDTH))


def test_a_student_that_goes_on_with_more_trains_whole():
    """Beside the previous one, which teaches, however often it has taught."""
    student = StyledDenoiser(Denoiser(0), 1, WIDTH)
    for _ in range(2):
        made = StyleDistillation(student.with_more(1), [Denoiser(1)], previous=student)
        made(**sample())["loss"].backward()
        assert all(item.requires_grad for item in made.student.parameters()) and made.student.denoiser.training
        assert made.student.denoiser.conv_in.weight.grad is not None
        assert not any(item.requires_grad for item in (*made.previous.parameters(), *made.teachers.parameters()))


def test_noise_and_captions_are_drawn_as_said(tmp_path):
    clean = torch.full((1, CHANNELS, 32, 32), 2.0)
    write_latents(tmp_path / "data", clean, torch.ones(1, 3, TEXT), torch.zeros(3, TEXT), torch.ones(1, 2, 3, TEXT),
                  torch.zeros(2, 3, TEXT))
    batch = next(batches(None, 400, 0, str(tmp_path / "data"), dropout=0.3))
    shares = signal_shares()
    assert shares[0] == pytest.approx(1 - 0.00085) and 0 < shares[-1] < 0.01
    share = shares[batch["timesteps"]].float()
    assert torch.allclose(batch["latents"].mean((1, 2, 3)), 2 * share.sqrt(), atol=0.1)
    assert torch.allclose(batch["latents"].var((1, 2, 3)), 1 - share, atol=0.1)
    bare = batch["text"].sum((1, 2)) == 0
    assert 0.2 < bare.float().mean() < 0.4
    assert torch.equal(bare, batch["teacher_text"].sum((1, 2, 3)) == 0)


def test_what_does_not_fit_is_one_line(tmp_path):
    base = Denoiser(0)
    student = StyledDenoiser(base, 1, WIDTH)
    cases = [(lambda: StyledDenoiser(Denoiser(0), 2, WIDTH, "clock"), "has no module clock"),
             (lambda: factory(0), "found no teacher|styles: found 0"),
             (lambda: StyleDistillation(StyledDenoiser(Denoiser(0), 3, WIDTH), [Denoiser(1)]),
              "the student has 3, but there are 1"),
             (lambda: StyleDistillation(StyledDenoiser(base, 1, WIDTH), [base]),
              r"the student's denoiser\.\S+ is also teacher 0's, .* a copy \(copy\.deepcopy\)"),
             (lambda: StyleDistillation(student, [], previous=student), "is also the previous student's"),
             (lambda: factory(distance="far"), "expected mse or cosine"),
             (lambda: factory(blocks="^stages"), "no module of a Denoiser matches"),
             (lambda: write_latents(tmp_path / "new", torch.zeros(2, 4, 4), torch.zeros(2, 3, 6), torch.zeros(3, 6)),
              "expected .N,C,H,W."),
             (lambda: next(batches(None, 2, 0, str(tmp_path / "none"))), "write_latents writes it"),
             (lambda: next(batches(None, 2, 0, str(tmp_path / "none"), dropout=2.0)), "a share from 0 to 1")]
    for call, text in cases:
        with pytest.raises(InputError, match=text) as error:
            call()
        assert "\n" not in str(error.value)
    assert all(item.requires_grad for item in student.parameters())
