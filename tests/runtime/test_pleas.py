"""PLeaS: units of two models matched and merged; permuted models are found to be the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from calibration_fixtures import SMALL, make, write_samples
from safetensors.torch import load_file

import mipipe
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.graphs.merging.unit_groups import apart_within, unit_groups
from mipipe.runtime.merge.in_memory import merge_state_dicts
from mipipe.runtime.merge.methods.closed_forms import pleas
from mipipe.runtime.merge.methods.method import Tile
from mipipe.runtime.merge.pleas import assignment, by_weights

HEADS, GROUPS, WIDTH = SMALL["num_attention_heads"], SMALL["num_key_value_heads"], 4


def permuted(model, seed):
    """The same function with all its units in another order."""
    generator = np.random.default_rng(seed)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    residual = generator.permutation(SMALL["hidden_size"])
    for layer in range(SMALL["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        inner = generator.permutation(SMALL["intermediate_size"])
        groups, inside = generator.permutation(GROUPS), HEADS // GROUPS
        heads = np.concatenate([group * inside + generator.permutation(inside) for group in groups])

        def spread(order):
            return np.concatenate([np.arange(WIDTH) + head * WIDTH for head in order])

        for name, rows in (("q_proj", spread(heads)), ("k_proj", spread(groups)), ("v_proj", spread(groups))):
            state[f"{at}self_attn.{name}.weight"] = state[f"{at}self_attn.{name}.weight"][rows][:, residual]
        state[f"{at}self_attn.o_proj.weight"] = state[f"{at}self_attn.o_proj.weight"][residual][:, spread(heads)]
        for name in ("gate_proj", "up_proj"):
            state[f"{at}mlp.{name}.weight"] = state[f"{at}mlp.{name}.weight"][inner][:, residual]
        state[f"{at}mlp.down_proj.weight"] = state[f"{at}mlp.down_proj.weight"][residual][:, inner]
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{at}{name}.weight"] = state[f"{at}{name}.weight"][residual]
    state["model.norm.weight"] = state["model.norm.weight"][residual]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:, residual]
    other = make("llama", 0)
    other.load_state_dict(state)
    return other


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("pleas")
    one = make("llama", 3)
    other = permuted(one, 5)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(one(ids).logits, other(ids).logits, atol=1e-4)
    one.save_pretrained(root / "one")
    other.save_pretrained(root / "other")
    make("llama", 8).save_pretrained(root / "stranger")
    write_samples(root / "a.jsonl", 1, count=8)
    return root


def recipe(root, second="other", **parameters):
    return {"merge_method": "pleas", "models": [{"model": str(root / "one")}, {"model": str(root / second)}],
            "parameters": parameters, "dtype": "float64",
            "calibration": {"data": str(root / "a.jsonl"), "samples": 8, "length": 12}}


@pytest.mark.parametrize("parameters", [
    {"matching": "weights", "least_squares": False}, {"matching": "activations"},
    *(pytest.param(item, marks=pytest.mark.slow)
      for item in ({"matching": "activations", "least_squares": False}, {"matching": "weights"}))])
def test_a_permuted_model_is_the_same_model(place, tmp_path, parameters):
    data = recipe(place, **parameters)
    if parameters.get("least_squares") is False and parameters["matching"] == "weights":
        del data["calibration"]  # from weights alone
    mipipe.merge(data, tmp_path / "out")
    found, wanted = load_file(tmp_path / "out/model.safetensors"), load_file(place / "one/model.safetensors")
    assert all(torch.allclose(found[name], wanted[name].double(), atol=1e-6) for name in found)


@pytest.mark.slow
def test_ranks_do_not_show(place, tmp_path):
    outs = []
    for ranks in (1, 2):
        mipipe.merge(recipe(place, "stranger"), tmp_path / str(ranks), ranks=ranks)
        outs.append((tmp_path / str(ranks) / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_matching_by_hand():
    """Published: rows in the order (2, 0, 1) give this score matrix and assignment."""
    one = torch.tensor([[1., 0.], [0., 1.], [1., 1.]])
    scores = one @ one[[2, 0, 1]].T
    assert scores.tolist() == [[1, 1, 0], [1, 0, 1], [2, 1, 1]]
    assert assignment(scores).tolist() == [1, 2, 0]
    assert torch.equal(one[[2, 0, 1]][assignment(scores)], one)


def test_least_squares_finds_exact_weights_and_its_normal_equations():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    first, second = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)

    class Given:
        def fields(self, _statistic, _model):
            both = torch.cat([first, second], 1)
            return {"sum": both.T @ both, "count": torch.tensor(50.0)}

        def columns(self, _model):
            return None

        units = columns

    found = pleas(Tile(None, (one, other), measured=Given()), None, weight=(1.0, 1.0), ridge=1e-14)
    inputs, outputs = (first + second) / 2, (first @ one.T + second @ other.T) / 2
    assert torch.allclose(found.T, torch.linalg.lstsq(inputs, outputs).solution)
    alike = pleas(Tile(None, (one, one), measured=Given()), None, weight=(1.0, 1.0), ridge=1e-14)
    assert torch.allclose(alike, one)


# Partial merging -----------------------------------------------------------------------------------------------------


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("parameters", [
    {"matching": "weights", "least_squares": False, "separate": 0.5, "separate_heads": 1.0},
    *(pytest.param(item, marks=pytest.mark.slow)
      for item in ({"separate": 0.3}, {"separate": 1.0, "separate_heads": 1.0}, {"budget": 1.4}))])
def test_a_permuted_model_kept_apart_in_part_computes_the_same(place, tmp_path, parameters):
    mipipe.merge(recipe(place, **parameters), tmp_path / "out")
    made, one = opened(tmp_path / "out"), opened(place / "one")
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, one(ids).logits, atol=1e-6)
    config = made.config
    if "separate" in parameters:
        assert config.intermediate_size == 24 + int(24 * parameters["separate"])
        assert config.num_key_value_heads == GROUPS + int(GROUPS * parameters.get("separate_heads", 0))
        assert config.num_attention_heads == config.num_key_value_heads * (HEADS // GROUPS)
    else:
        work = [sum(value.numel() for name, value in model.named_parameters() if value.dim() == 2
                    and "embed" not in name) for model in (made, one)]
        assert 1.25 < work[0] / work[1] <= 1.4


def test_state_dicts_in_memory_are_matched_and_widened_too(place, tmp_path):
    data = recipe(place, matching="weights", least_squares=False, separate=0.5)
    calibration = data.pop("calibration")
    mipipe.merge(data, tmp_path / "out")
    states = {item["model"]: load_file(f"{item['model']}/model.safetensors") for item in data["models"]}
    config = json.loads((place / "one/config.json").read_text())
    found, wanted = merge_state_dicts(data, states, config), load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    run = {"calibration": calibration, "parameters": {"matching": "activations"}}
    for given, sizes, text in ((run, config, "pleas runs the models on samples"),
                               ({}, {}, "needs the first model's config.json, which has no num_attention_heads")):
        with pytest.raises(InputError, match=text):
            merge_state_dicts({**data, **given}, states, sizes)


def test_half_of_the_heads_in_a_class_that_takes_them(place, tmp_path):
    """Six heads of a stream that is 16 wide: not Llama's, but Mistral's."""
    for name in ("one", "other"):
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=None))
        model.load_state_dict(load_file(place / name / "model.safetensors"))
        model.save_pretrained(tmp_path / name)
    data = recipe(tmp_path, matching="weights", least_squares=False, separate_heads=0.5)
    del data["calibration"]
    mipipe.merge(data, tmp_path / "out")
    made, one = opened(tmp_path / "out"), opened(tmp_path / "one")
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, one(ids).logits, atol=1e-6)
    assert (made.config.num_attention_heads, made.config.num_key_value_heads, made.config.head_dim) == (6, 3, 4)


def test_all_kept_apart_computes_the_mean_of_both(place, tmp_path):
    """Where only the widened parts differ, so that the residual streams are one."""
    one, other = make("llama", 3), make("llama", 8)
    state = one.state_dict()
    inner = {name: value for name, value in other.state_dict().items() if "mlp" in name or "_proj" in name}
    other.load_state_dict({**state, **inner})
    other.save_pretrained(tmp_path / "other")
    data = recipe(place, matching="weights", least_squares=False, separate=1.0, separate_heads=1.0)
    data["models"][1]["model"] = str(tmp_path / "other")
    del data["calibration"]
    with torch.no_grad():  # the streams are matched one to one by far
        other.model.embed_tokens.weight.mul_(100)
        one.model.embed_tokens.weight.mul_(100)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    data["models"][0]["model"] = str(tmp_path / "one")
    mipipe.merge(data, tmp_path / "out")
    made, one, other = (opened(tmp_path / name) for name in ("out", "one", "other"))
    x = torch.randn(1, 5, SMALL["hidden_size"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        places = made.model.rotary_emb(x, torch.arange(5)[None])
        for layers in zip(*(model.model.layers for model in (made, one, other)), strict=True):
            for part in (lambda layer: layer.mlp(x), lambda layer: layer.self_attn(x, places, None)[0]):
                wide, first, second = map(part, layers)
                assert torch.allclose(wide, (first + second) / 2, atol=1e-9)


def test_blocks_are_those_of_the_paper(place, tmp_path):
    """Every block of a widened pair of matrices, from the matching, by loops."""
    data = recipe(place, "stranger", matching="weights", least_squares=False, separate=0.5)
    del data["calibration"]
    mipipe.merge(data, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    one, other = (load_file(place / name / "model.safetensors") for name in ("one", "stranger"))
    graph = build(parse_recipe(data, "recipe"))
    units = unit_groups(graph.units, graph.source_config)
    known = by_weights(units, lambda number, name: (one, other)[number][name].double())
    residual = known["residual", -1].order.tolist()
    for layer in range(SMALL["num_hidden_layers"]):
        fit = known["mlp", layer]
        best = sorted(range(24), key=lambda unit: -float(fit.scores[unit]))
        together, apart = sorted(best[:12]), sorted(best[12:])
        name = f"model.layers.{layer}.mlp."
        up, down = found[f"{name}up_proj.weight"], found[f"{name}down_proj.weight"]
        ups, downs = ([model[f"{name}{part}_proj.weight"].double() for model in (one, other)]
                      for part in ("up", "down"))
        for place_, unit in enumerate(together + apart + apart):
            theirs = int(fit.order[unit])
            mean = (ups[0][unit] + ups[1][theirs][residual]) / 2, (downs[0][:, unit] + downs[1][residual, theirs]) / 2
            first, second = (ups[0][unit], downs[0][:, unit] / 2), (ups[1][theirs][residual],
                                                                   downs[1][residual, theirs] / 2)
            wanted = mean if place_ < 12 else first if place_ < 24 else second
            assert torch.allclose(up[place_], wanted[0], atol=1e-7)
            assert torch.allclose(down[:, place_], wanted[1], atol=1e-7)


def test_least_squares_keeps_blocks_of_zeros():
    """Row by row against numpy's lstsq over the columns that are free; both sides partly apart."""
    draw = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, 300, 5, generator=draw, dtype=torch.float64)
    one, other = torch.randn(2, 4, 5, generator=draw, dtype=torch.float64)
    columns = torch.tensor([0, 1, 4, 2, 3, -1, -1]), torch.tensor([4, 0, 1, -1, -1, 3, 2])
    rows = torch.tensor([1, 3, 0, 2, -1, -1]), torch.tensor([0, 2, -1, -1, 1, 3])

    def wide(value, mine, places):
        value = value[rows[mine].clamp_min(0)]
        return torch.where(places < 0, 0, value[:, places.clamp_min(0)])

    views = [wide(one, 0, columns[0]), wide(other, 1, columns[1])]
    views[1][2:4], views[0][4:] = views[0][2:4], views[1][4:]

    class Given:
        def fields(self, _statistic, _model):
            both = torch.cat([first, second], 1)
            return {"sum": both.T @ both, "count": torch.tensor(300.0)}

        def columns(self, model):
            return columns[model]

        def units(self, model):
            return rows[model]

    found = pleas(Tile(None, tuple(views), measured=Given()), None, weight=(1.0, 1.0), ridge=1e-14)
    y = [torch.where(places < 0, 0, x[:, places.clamp_min(0)])
         for x, places in ((first, columns[0]), (second, columns[1]))]
    inputs = (y[0] + y[1]) * torch.tensor([0.5] * 3 + [1.0] * 4)
    outputs = [first @ one.T, second @ other.T]
    for row in range(6):
        a, b = rows[0][row], rows[1][row]
        target = (outputs[0][:, a] + outputs[1][:, b]) / 2 if row < 2 else \
            outputs[0][:, a] if row < 4 else outputs[1][:, b]
        free = np.arange(7) if row < 2 else np.r_[0:5] if row < 4 else np.r_[0:3, 5:7]
        wanted = np.zeros(7)
        wanted[free] = np.linalg.lstsq(inputs[:, free].numpy(), target.numpy(), rcond=None)[0]
        assert np.allclose(found[row].numpy(), wanted, atol=1e-9)
    plain = pleas(Tile(None, tuple(views), measured=Given()), None, weight=(1.0, 1.0), ridge=1e-14,
                  least_squares=False)
    assert torch.allclose(plain, (views[0] + views[1]) / 2)


@pytest.mark.parametrize("budget", [1.0, 1.2, 1.55, 1.8, 2.0])
def test_shares_are_the_best_within_a_budget(budget):
    """Against all pairs of a grid."""
    for fixed, mlp, heads, worth in ((10, 100, 50, 1.0), (0, 70, 90, 2.0), (30, 80, 20, 0.1), (5, 60, 60, 0.0)):
        def work(a, b, sizes=(fixed, mlp, heads)):
            return sizes[0] + sizes[1] * (1 + a) + sizes[2] * (1 + b)

        for choices in (np.linspace(0, 1, 9), [0.0, 1.0]):
            shares = apart_within(budget, fixed, mlp, heads, worth, choices)
            assert 0 <= shares[0] <= 1 and shares[1] in choices
            assert work(*shares) <= budget * work(0, 0) * (1 + 1e-9)
            best = max(a + worth * b for a in np.linspace(0, 1, 201) for b in choices
                       if work(a, b) <= budget * work(0, 0) * (1 + 1e-12))
            assert shares[0] + worth * shares[1] >= best - 1e-9


@pytest.mark.slow
def test_ranks_do_not_show_in_wide_models(place, tmp_path):
    outs = []
    for ranks in (1, 2):
        mipipe.merge(recipe(place, "stranger", separate=0.4, separate_heads=1.0), tmp_path / str(ranks), ranks=ranks)
        outs.append((tmp_path / str(ranks) / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_what_cannot_be_wide_is_one_line(place, tmp_path):
    cases = [({"budget": 1.5, "separate": 0.5}, "budget finds separate"), ({"budget": 3.0}, "budget"),
             ({"separate_heads": 0.5}, "makes 6 heads, of which a llama config wants .* expected 0, 1$"),
             ({"separate": [{"filter": "mlp", "value": 0.5}, {"value": 0.0}]}, "of the whole model; found several")]
    for parameters, text in cases:
        with pytest.raises(InputError, match=text) as error:
            mipipe.merge(recipe(place, **parameters), tmp_path / "out")
        assert "\n" not in str(error.value)
    for name in ("one", "other"):
        transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SMALL)).save_pretrained(tmp_path / name)
    data = recipe(tmp_path, matching="weights", least_squares=False, separate_heads=0.5)
    del data["calibration"]
    with pytest.raises(InputError, match="normalises all heads together"):
        mipipe.merge(data, tmp_path / "out")


def test_other_names_are_refused(tmp_path):
    for seed, name in enumerate(("one", "other")):
        make("gpt2", seed).save_pretrained(tmp_path / name)
    data = recipe(tmp_path, matching="weights", least_squares=False)
    del data["calibration"]
    with pytest.raises(InputError, match="with the names of Llama's family; found the tensor"):
        mipipe.merge(data, tmp_path / "out")
