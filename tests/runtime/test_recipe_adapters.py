"""LoRA, DoRA and BeamLoRA: closed forms, planned runs against autograd, PEFT and merged models."""

import random

import pytest
import runtime_dags as dags
import torch
from torch import nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.adapters import AdapterConfig, adapt, initial, is_adapter, peft_tensors, scores
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.recipes.beams import Beams, kept_share, pairs, pruned

ROWS, WIDTH, COUNT, COPIES = 4, 6, 3, 2
METHODS = ["lora", "dora", "beamlora"]


class Stack(nn.Module):
    """Three linear layers and a mean of squares."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=number != 1) for number in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": x.square().mean()}


def stack(method, seed=1, **options):
    torch.manual_seed(seed)
    module = Stack().double()
    adapt(module, AdapterConfig(r"re:layers\.[02]$", method, 4, **options))
    with torch.no_grad():
        for name, item in module.named_parameters():
            if is_adapter(name) and "magnitude" not in name:
                item.normal_(0.0, 0.3)
    return module


def test_beam_scores_and_pruning_numbers():
    """g = (.1, 0, 0, -.05), tau .05: scores (3.029, .410, .410, .151); beside a layer of ones p = .95 prunes two."""
    row = scores(torch.tensor([0.1, 0.0, 0.0, -0.05], dtype=torch.float64), 0.05)
    assert row.tolist() == pytest.approx([3.029, 0.410, 0.410, 0.151], abs=1e-3) and float(row.sum()) == \
        pytest.approx(4.0)
    weak = pruned({"a": row.tolist(), "b": [1.0] * 4}, 0.95)
    assert weak["b"] == [] and len(weak["a"]) == 2 and 3 in weak["a"]
    assert pruned({"a": row.tolist()}, 1.0 + 1e-9) == {"a": []}
    assert kept_share(0, 100, 0.95) == pytest.approx(0.95) and kept_share(100, 100, 0.95) == 1.0
    made = pairs(row.tolist(), [1, 3], torch.Generator().manual_seed(0))
    assert {weak for weak, _ in made} == {1, 3} and {strong for _, strong in made} == {0, 2}
    assert len(pairs(row.tolist(), [1, 2, 3], torch.Generator())) == 1  # no more partners than there are


def test_gates_of_zero_are_lora_and_folded_gates_change_nothing():
    module, config = stack("beamlora"), AdapterConfig(r"re:layers\.[02]$", "beamlora", 4)
    plain = stack("lora", alpha=8.0)
    plain.load_state_dict({name: item for name, item in module.state_dict().items() if "gate" not in name})
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    layer, other = module.layers[0], plain.layers[0]
    with torch.no_grad():
        layer.lora_gate.zero_()
        assert torch.equal(layer(x), other(x))
        layer.lora_gate.copy_(torch.tensor([0.1, 0.0, -0.02, -0.05]))
        names = {name: item for name, item in module.named_parameters() if is_adapter(name)}
        folded = peft_tensors(names, config)
        other.lora_A.copy_(folded["base_model.model.layers.0.lora_A.weight"])
        assert torch.allclose(layer(x), other(x), rtol=1e-14)


def test_fresh_adapters_change_nothing_and_follow_seed_and_name():
    for method in METHODS:
        torch.manual_seed(1)
        module = Stack().double()
        x = torch.randn(2, WIDTH, dtype=torch.float64)
        before = module(x)["loss"]
        adapt(module, AdapterConfig(("0", "2"), method, 4))
        assert float(module(x)["loss"].detach()) == pytest.approx(float(before.detach()), rel=1e-12)
        assert all(item.requires_grad == is_adapter(name) for name, item in module.named_parameters())
    like, config = torch.zeros(4, WIDTH), AdapterConfig(("0",))
    first, again, other = (initial(name, like, config, seed, {}.__getitem__)
                           for name, seed in (("a.lora_A", 0), ("a.lora_A", 0), ("b.lora_A", 0)))
    assert torch.equal(first, again) and not torch.equal(first, other) and float(first.abs().max()) <= WIDTH ** -0.5


def steps(cases, batch):
    """What a rank does: losses and gradients of its copy's rows."""
    answers = []
    for plan, graph, state in cases:
        engine = Engine(plan, graph, state)
        loss = engine.step({"x": batch.chunk(engine.mesh.num_copies)[engine.mesh.copy]})
        answers.append((loss, {name: item.grad for name, item in engine.named_parameters()}))
    return answers


def test_adapters_on_two_ranks_and_two_copies_equal_autograd(pool):
    batch = torch.randn(ROWS * COUNT * COPIES, WIDTH, dtype=torch.float64)
    work, wanted = [], []
    for number, method in enumerate(METHODS):
        module = stack(method)
        graph = capture_module(module, {"x": batch[:ROWS]}, granularity="module")
        state = {name: item.detach().clone() for name, item in module.named_parameters()}
        work.append((dags.random_plan(random.Random(number), graph, 2, COUNT), graph, state))
        loss = module(batch)["loss"]
        loss.backward()
        wanted.append((loss.item(), {name: item.grad for name, item in module.named_parameters()}))
    for answers in pool.run(4, __file__, "steps", work, batch):
        for (own, gradients), (loss, expected) in zip(answers, wanted, strict=True):
            assert own == pytest.approx(loss, rel=1e-12)
            assert all(is_adapter(name) for name in gradients)
            for name, gradient in gradients.items():
                assert torch.allclose(gradient, expected[name], rtol=1e-11, atol=1e-15), name


def grow(plan, graph, state, batch):
    """What a rank does: steps with AdamW and growing; the adapters after them, and how many ranks were grown."""
    engine = Engine(plan, graph, state)
    named = engine.named_parameters()
    optimizer = torch.optim.AdamW([item for _, item in named], lr=1e-2) if named else None
    beams = Beams(engine, AdapterConfig(r"re:layers\.[02]$", "beamlora", 4, tau=0.05, period=2, keep=0.7), optimizer, 8,
                  0)
    grown, before = 0, {}
    for number in range(8):
        engine.step({"x": batch})
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        grown += beams.after(number + 1)
        if number == 0:
            before = {name: item.detach().clone() for name, item in named}
    return {name: item.detach() for name, item in named}, grown, before


def test_growing_is_the_same_on_one_rank_and_on_two(pool):
    module = stack("beamlora")
    with torch.no_grad():
        for layer in (module.layers[0], module.layers[2]):
            layer.lora_gate.copy_(torch.tensor([0.1, 0.0, -0.02, -0.05]))
    batch = torch.randn(ROWS * COUNT, WIDTH, dtype=torch.float64)
    graph = capture_module(module, {"x": batch[:ROWS]}, granularity="module")
    state = {name: item.detach().clone() for name, item in module.named_parameters()}
    alone, grown, _ = grow(dags.random_plan(random.Random(0), graph, 1, COUNT), graph, state, batch)
    assert grown
    found = {}
    answers = pool.run(2, __file__, "grow", dags.random_plan(random.Random(2), graph, 2, COUNT), graph, state, batch)
    for part, _, _ in answers:
        found.update(part)
    assert set(found) == set(alone) and sum(number for _, number, _ in answers) >= grown
    for name, item in alone.items():
        assert torch.allclose(item, found[name], rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("make, text", [
    (lambda: adapt(Stack(), AdapterConfig(("q_proj",))), "matches no module of the model; its linear layers are 0, 1"),
    (lambda: adapt(Stack(), AdapterConfig("re:layers$")), "names layers, a ModuleList; its linear layers are"),
    (lambda: AdapterConfig("q_proj"), "expected a list of names such as"),
    (lambda: AdapterConfig("re:("), "is no regular expression"),
    (lambda: AdapterConfig(("a",), rank=0), "rank 0"),
    (lambda: AdapterConfig(("a",), "lora", period=4), "period goes with beamlora, not lora"),
    (lambda: AdapterConfig(("a",), "beamlora", period=3), "expected an even number of steps"),
])
def test_what_cannot_be_adapted_is_one_line(make, text):
    with pytest.raises(InputError, match=text) as error:
        make()
    assert "\n" not in str(error.value)
