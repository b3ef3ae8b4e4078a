"""PLeaS: units of two models matched and merged; permuted models are found to be the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_fixtures import SMALL, make, write_samples
from safetensors.torch import load_file

import mipipe
from mipipe.graphs.errors import InputError
from mipipe.runtime.merge.methods.closed_forms import pleas
from mipipe.runtime.merge.methods.method import Tile
from mipipe.runtime.merge.programs.pleas import assignment

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

    found = pleas(Tile(None, (one, other), measured=Given()), None, weight=(1.0, 1.0), ridge=1e-14)
    inputs, outputs = (first + second) / 2, (first @ one.T + second @ other.T) / 2
    assert torch.allclose(found.T, torch.linalg.lstsq(inputs, outputs).solution)
    alike = pleas(Tile(None, (one, one), measured=Given()), None, weight=(1.0, 1.0), ridge=1e-14)
    assert torch.allclose(alike, one)


def test_other_names_are_refused(tmp_path):
    for seed, name in enumerate(("one", "other")):
        make("gpt2", seed).save_pretrained(tmp_path / name)
    data = recipe(tmp_path, matching="weights", least_squares=False)
    del data["calibration"]
    with pytest.raises(InputError, match="with the names of Llama's family; found the tensor"):
        mipipe.merge(data, tmp_path / "out")
