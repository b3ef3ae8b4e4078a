"""APEX: votes, mixtures that start as nothing, fused weights that compute the same, and two ranks equal to one."""

import random

import pytest
import runtime_dags as dags
import torch
from torch import nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.expansion import (
    ActivationVotes,
    VoteFile,
    chosen_units,
    expand,
    feed_forward_layers,
    fuse,
    monarch,
    read_pairs,
)
from mipipe.graphs.serialize import save
from mipipe.runtime.engine.engine import Engine

WIDTH, UNITS, ROWS, COUNT = 5, 24, 4, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, UNITS, bias=False), nn.Linear(WIDTH, UNITS, bias=False)
        self.down_proj = nn.Linear(UNITS, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return {"loss": x.square().mean()}


def made(trained=True):
    """A model in its first stage, its mixtures moved away from where they start."""
    torch.manual_seed(0)
    model = Model().double()
    with ActivationVotes(model) as votes, torch.no_grad():
        for _ in range(5):
            model(torch.randn(6, WIDTH, dtype=torch.float64))
    expand(model, votes)
    if trained:
        with torch.no_grad():
            for item in model.parameters():
                if item.requires_grad:
                    item.add_(torch.randn_like(item) * 0.1)
    return model, votes


def test_units_of_a_stage():
    assert [chosen_units(64, 0.375, stage) for stage in (0, 1)] == [12, 6]
    with pytest.raises(InputError, match="expected a ratio above 0"):
        chosen_units(64, 1.5, 0)
    with pytest.raises(InputError, match="has no feed-forward layers"):
        feed_forward_layers(nn.Linear(2, 2))


def test_votes_count_the_largest_and_the_smallest_and_keep_them_apart():
    votes = ActivationVotes(Model())
    votes.add("layers.0", torch.arange(UNITS).double())
    votes.add("layers.0", torch.arange(UNITS).double())
    assert votes.pairs()["layers.0"] == ([0, 1, 2, 3], [23, 22, 21, 20])
    assert votes.counts["layers.0"].tolist() == [-2] * 4 + [0] * 16 + [2] * 4


def test_a_monarch_matrix_mixes_every_row_with_few_numbers():
    first, second = (torch.randn(3, 3, 3, dtype=torch.float64) for _ in range(2))
    dense = monarch(first, second, torch.eye(9, dtype=torch.float64))
    x = torch.randn(9, 4, dtype=torch.float64)
    assert torch.allclose(dense @ x, monarch(first, second, x)) and (dense != 0).all()
    assert torch.allclose(dense[:7, :7] @ x[:7], monarch(first, second, x[:7]))


def test_expansion_starts_as_nothing_and_fusing_changes_nothing():
    torch.manual_seed(0)
    before = Model().double()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    fresh, _ = made(trained=False)
    assert torch.equal(fresh(x)["loss"], before(x)["loss"])
    model, _ = made()
    expected = model(x)["loss"].detach()
    assert abs(float(expected - before(x)["loss"].detach())) > 1e-6
    trained = {name for name, item in model.named_parameters() if item.requires_grad}
    assert trained and all("apex_" in name for name in trained)
    fuse(model)
    assert torch.allclose(model(x)["loss"], expected, rtol=1e-12)
    assert set(model.state_dict()) == set(before.state_dict()) and type(model.layers[0].up_proj) is nn.Linear


def step(plan, graph, state, batch):
    engine = Engine(plan, graph, state)
    loss = engine.step({"x": batch})
    return loss, {name: item.grad for name, item in engine.named_parameters()}


@pytest.mark.slow
def test_two_ranks_train_mixtures_as_autograd_does(pool):
    model, _ = made()
    batch = torch.randn(ROWS * COUNT, WIDTH, dtype=torch.float64)
    graph = capture_module(model, {"x": batch[:ROWS]}, granularity="module")
    state = {name: item.detach().clone() for name, item in (*model.named_parameters(), *model.named_buffers())}
    loss = model(batch)["loss"]
    loss.backward()
    wanted = {name: item.grad for name, item in model.named_parameters() if item.requires_grad}
    found = {}
    for own, gradients in pool.run(2, __file__, "step", dags.random_plan(random.Random(0), graph, 2, COUNT), graph,
                                   state, batch):
        assert own == pytest.approx(loss.item(), rel=1e-12)
        found |= gradients
    assert set(found) == set(wanted)
    for name, gradient in found.items():
        assert torch.allclose(gradient, wanted[name], rtol=1e-10, atol=1e-14), name


def test_votes_of_a_file_expand_the_same_units_and_others_are_refused(tmp_path):
    _, votes = made()
    file = tmp_path / "votes.json"
    save(VoteFile({name: counts.tolist() for name, counts in votes.counts.items()}, 0.375, 0), file)
    assert read_pairs(file) == votes.pairs()
    for pairs, text in (({}, "are of another model"), ({name: ([0], [UNITS]) for name in votes.counts},
                                                                          "are of another model"),
                        ({name: ([0], [0]) for name in votes.counts}, "are of another model"),
                        ({name: ([], []) for name in votes.counts}, "too few for this ratio and stage")):
        with pytest.raises(InputError, match=text):
            expand(Model(), pairs)
    file.write_text("{}")
    with pytest.raises(InputError, match=r"votes\.json"):
        read_pairs(file)
