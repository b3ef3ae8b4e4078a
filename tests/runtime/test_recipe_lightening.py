"""Light-PEFT: masks of ones and removed zeros change nothing, and a smaller model is captured and goes on."""

import random

import pytest
import runtime_dags as dags
import torch
from test_recipe_expansion import COUNT, ROWS, UNITS, WIDTH, Model

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.adapters import AdapterConfig, adapt
from mipipe.graphs.recipes.importance import Importance, add_masks, add_penalty, add_probes
from mipipe.graphs.recipes.lightening import choose_kept, cut, lighten, uncut
from mipipe.runtime.engine.engine import Engine

X = torch.randn(ROWS * COUNT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def made(rank=4):
    torch.manual_seed(0)
    model = Model().double()
    adapt(model, AdapterConfig(("up_proj", "down_proj"), rank=rank))
    return add_masks(model)


def test_masks_of_ones_and_fresh_adapters_change_nothing():
    torch.manual_seed(0)
    plain, model = Model().double(), made()
    with Importance(model) as watched:
        assert torch.allclose(model(X)["loss"], plain(X)["loss"], rtol=1e-14)
    assert set(watched.modules().values()) == {0.0} and len(watched.modules()) == 4
    trained = {name.rpartition(".")[2] for name, item in model.named_parameters() if item.requires_grad}
    assert trained == {"lora_A", "lora_B", "unit_mask"}


def test_the_penalty_is_the_gradient_of_absolute_values():
    model = made()
    model(X)["loss"].backward()
    before = {name: item.grad.clone() for name, item in model.named_parameters() if item.grad is not None}
    add_penalty(model.named_parameters(), 0.5)
    for name, item in model.named_parameters():
        if item.grad is not None:
            assert torch.allclose(item.grad - before[name], torch.full_like(item, 0.5 * name.endswith("unit_mask")))


def test_removing_what_a_mask_has_switched_off_changes_nothing():
    model = made()
    with torch.no_grad():
        for name, item in model.named_parameters():
            if "lora_B" in name:
                item.normal_()
        for number, layer in enumerate(model.layers):
            layer.down_proj.unit_mask[number::3] = 0.0
    expected = model(X)["loss"].detach()
    lighten(model, choose_kept(model, units=1 / 3))
    assert [layer.down_proj.in_features for layer in model.layers] == [UNITS * 2 // 3] * 2
    assert torch.allclose(model(X)["loss"], expected, rtol=1e-12)
    assert not any("mask" in name for name, _ in model.named_parameters())


def test_folded_masks_stay_in_the_weights():
    model = made()
    with torch.no_grad():
        for layer in model.layers:
            layer.down_proj.unit_mask.uniform_(0.2, 2.0)
            layer.down_proj.lora_B.normal_()
    expected = model(X)["loss"].detach()
    lighten(model, choose_kept(model, units=0.0), fold=True)
    assert torch.allclose(model(X)["loss"], expected, rtol=1e-12)


def test_adapters_and_ranks_go_by_importance():
    model = made()
    with torch.no_grad():
        model.layers[0].up_proj.lora_B.normal_()
        model.layers[1].down_proj.lora_B.normal_()
    with Importance(model) as watched:
        model(X)["loss"].backward()
        watched.after_backward({name: item.grad for name, item in model.named_parameters()})
    kept = choose_kept(model, watched, modules=0.5, ranks=0.5)
    stay = {name: places for name, places in kept.ranks.items() if places}
    assert set(stay) <= {"layers.0.up_proj", "layers.1.down_proj"} and sum(map(len, stay.values())) == 4
    ranks = watched.ranks()
    best = sorted((float(value), name, place) for name in ("layers.0.up_proj", "layers.1.down_proj")
                  for place, value in enumerate(ranks[name]))[4:]
    assert {(name, place) for _, name, place in best} == {(name, place) for name in stay for place in stay[name]}
    lighten(model, kept)
    left = {name for name, _ in model.named_parameters() if "lora" in name}
    assert left == {f"{name}.lora_{part}" for name in stay for part in "AB"}


def test_probes_of_a_run_are_what_is_watched_by_hand():
    """The gradient of a probe is the sum of ||dW x|| / ||W x|| over microbatches; outputs and other gradients stay."""
    model = made()
    with torch.no_grad():
        for name, item in model.named_parameters():
            if "lora_B" in name or "mask" in name:
                item.uniform_(0.5, 1.0)
    ratios = {}
    for piece in X.chunk(COUNT):
        with Importance(model) as watched:
            model(piece)
        for name, value in watched.modules().items():
            ratios[name] = ratios.get(name, 0.0) + value
    model(X)["loss"].backward()
    wanted = {name: item.grad for name, item in model.named_parameters()}
    add_probes(model)
    graph = capture_module(model, {"x": X[:ROWS]}, granularity="module")
    engine = Engine(dags.random_plan(random.Random(0), graph, 1, COUNT), graph, model)
    engine.step({"x": X})
    for name, item in engine.named_parameters():
        if name.endswith("probe"):
            assert float(item.grad) == pytest.approx(ratios[name.rpartition(".")[0]], rel=1e-12)
        else:
            assert torch.allclose(item.grad, wanted[name], rtol=1e-10, atol=1e-14), name
    assert len(ratios) == 4


def test_what_was_cut_is_put_back_as_zeros():
    whole = torch.arange(12.0).reshape(3, 4)
    cuts = ((0, [0, 2]), (1, [1, 3]))
    part = cut(whole, cuts)
    assert part.tolist() == [[1.0, 3.0], [9.0, 11.0]]
    back = uncut(part, (3, 4), cuts)
    assert torch.equal(cut(back, cuts), part) and float(back.sum()) == float(part.sum()) and back.shape == whole.shape


def test_a_smaller_model_is_captured_again_in_the_middle_of_a_run():
    """One run: a stage with masks, pruning, then the smaller graph under a plan of its own, as autograd has it."""
    model = made()
    for _ in range(2):
        graph = capture_module(model, {"x": X[:ROWS]}, granularity="module")
        engine = Engine(dags.random_plan(random.Random(0), graph, 1, COUNT), graph, model)
        loss = engine.step({"x": X})
        model.zero_grad(set_to_none=True)
        expected = model(X)["loss"]
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-12)
        named = dict(model.named_parameters())
        for name, item in engine.named_parameters():
            assert torch.allclose(item.grad, named[name].grad, rtol=1e-10, atol=1e-14), name
        before = sum(item.numel() for item in model.parameters())
        if any("mask" in name for name in named):
            lighten(model, choose_kept(model))
    assert sum(item.numel() for item in model.parameters()) == before < sum(p.numel() for p in made().parameters())


def test_heads_go_with_the_keys_they_share():
    """Two of six query heads share a key head: a third of the groups goes, and the model still runs."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=12, intermediate_size=9, num_hidden_layers=1, num_attention_heads=6,
                                      num_key_value_heads=3, head_dim=4, vocab_size=11)
    model = transformers.LlamaForCausalLM(config).double()
    add_masks(model)
    layer, ids = model.model.layers[0], torch.arange(5)[None]
    with torch.no_grad():
        layer.self_attn.o_proj.unit_mask[2:4] = 0.0
        layer.mlp.down_proj.unit_mask[:3] = 0.0
    expected = model(input_ids=ids).logits
    lighten(model, choose_kept(model))
    assert (layer.self_attn.q_proj.out_features, layer.self_attn.k_proj.out_features) == (16, 8)
    assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-6)


def test_a_share_of_all_is_refused():
    with pytest.raises(InputError, match=r"units: found 1\.0"):
        choose_kept(made(), units=1.0)
