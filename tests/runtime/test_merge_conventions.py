"""Methods mean what mergekit's recipes mean, and their defaults do not blow up; values from numpy."""

import numpy as np
import pytest
import torch
from merge_fixtures import state, trio, write
from merge_numbers import deltas, merged, optmerge_loss

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.methods import projective
from mipipe.runtime.merge.methods.disentangle import ranks, scores


def arrays(seed, *shape, count=2):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape) for _ in range(count)]


def slerp(first, second, t):
    """Along an arc of directions, numpy in float64."""
    phi = np.arccos(np.clip(first @ second / np.linalg.norm(first) / np.linalg.norm(second), -1, 1))
    return (np.sin((1 - t) * phi) * first + np.sin(t * phi) * second) / np.sin(phi)


@pytest.mark.parametrize(("flags", "axis"), [
    ({"nuslerp_flatten": False}, 1), ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, 0),
    ({"nuslerp_row_wise": True}, None), ({}, None)])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_nuslerp_flags_as_mergekit_reads_them(flags, axis, scale):
    """Not flattened: along the last axis, or the first if row-wise; also for models that differ by little."""
    first, noise = arrays(1, 6, 5)
    second = first + scale * noise
    found = merged("nuslerp", None, [torch.from_numpy(first), torch.from_numpy(second)], weight=[1, 3], **flags)
    if axis is None:
        expected = slerp(first.ravel(), second.ravel(), 0.75).reshape(6, 5)
    else:
        pairs = zip(*(array if axis == 1 else array.T for array in (first, second)), strict=True)
        expected = np.stack([slerp(one, other, 0.75) for one, other in pairs])
        expected = expected if axis == 1 else expected.T
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_model_stock_filter_wise_takes_one_ratio_for_a_vector():
    one, two = arrays(2, 50)
    cos = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    found = deltas("model_stock", torch.from_numpy(one), torch.from_numpy(two), filter_wise=True)
    np.testing.assert_allclose(found, 2 * cos / (1 + cos) * (one + two) / 2, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("density", "gamma"), [(1.0, 0.1), (0.95, 0.1), (0.5, 0.1), (0.0, 0.1)])
def test_breadcrumbs_keeps_the_density(density, gamma):
    tau = arrays(3, 200, count=1)[0]
    keep = int(density * 200)
    drop = min(int(gamma * 200), 200 - keep)
    order = np.argsort(-np.abs(tau))
    expected = np.zeros(200)
    expected[order[drop:drop + keep]] = tau[order[drop:drop + keep]]
    np.testing.assert_allclose(deltas("breadcrumbs", torch.from_numpy(tau), density=density, gamma=gamma), expected)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs"])
def test_density_zero_drops_everything(method):
    tau = torch.randn(4, 30)
    assert not deltas(method, tau, density=0.0).any()


def test_della_keeps_entries_with_density_minus_to_plus_epsilon():
    tau = torch.linspace(0.1, 1.0, 40).repeat(4000, 1)
    stays = (deltas("della_linear", tau, density=0.6, epsilon=0.3) != 0).double().mean(0)
    np.testing.assert_allclose(stays, np.linspace(0.3, 0.9, 40), rtol=0, atol=0.05)
    whole = torch.randn(3, 8)
    torch.testing.assert_close(deltas("della", whole, density=1.0), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.1), (0.9, 0.15), (0.1, 0.1), (0.5, 0.5)])
def test_epsilons_that_leave_the_range_are_refused(tmp_path, density, epsilon):
    trio(tmp_path)
    data = {"merge_method": "della", "base_model": f"{tmp_path}/base", "models": [{"model": f"{tmp_path}/expert1"}],
            "parameters": {"density": density, "epsilon": epsilon}}
    with pytest.raises(InputError, match=r"density -\+ epsilon inside"):
        build(parse_recipe(data, "recipe"))


def test_karcher_merges_a_base_model(tmp_path):
    trio(tmp_path)
    data = {"merge_method": "karcher", "models": [{"model": f"{tmp_path}/expert{seed}"} for seed in (1, 2)]}
    plain = build(parse_recipe(data, "recipe"))
    graph = build(parse_recipe({**data, "base_model": f"{tmp_path}/base"}, "recipe"))
    assert {len(unit.models) for unit in plain.units if unit.method != "copy"} == {2}
    assert {(len(unit.models), unit.base) for unit in graph.units if unit.method != "copy"} == {(3, None)}
    assert graph.notes == ()


def test_a_base_model_that_is_not_read_is_said(tmp_path):
    trio(tmp_path)
    graph = build(parse_recipe({"merge_method": "linear", "base_model": f"{tmp_path}/base", "models": [
        {"model": f"{tmp_path}/expert{seed}"} for seed in (1, 2)]}, "recipe"))
    assert graph.notes == (f"recipe: linear does not read base_model {tmp_path}/base; only its config and names count",)


@pytest.mark.parametrize("columns", [7, 49, 99, 1001])
def test_widen_leaves_the_median_column_uncalibrated(columns):
    """Ranks 0 .. n - 1 have the median as their mean: exactly the columns above it are calibrated."""
    values = torch.from_numpy(np.stack(arrays(5, columns, count=3))).float()
    found = scores(ranks(values), 1.0, 9.0, counted=True)
    for row, value in zip(found.numpy(), values.numpy(), strict=True):
        order = np.argsort(np.argsort(value, kind="stable"))
        np.testing.assert_array_equal(row == 9.0, order > (columns - 1) // 2)


def test_optmerge_by_default_stays_near_the_sum_and_beats_the_average():
    """Full-rank task vectors: the plain minimiser is tens of times too long, the default no longer than the sum."""
    torch.manual_seed(0)
    taus = [0.05 * torch.randn(64, 48) for _ in range(3)]
    targets, maps = projective.optmerge_targets(taus, 16, True)
    found = deltas("optmerge", *taus)
    assert deltas("optmerge", *taus, solver="closed_form").norm() > 5 * sum(taus).norm() > 5 * found.norm()
    loss = optmerge_loss(found, targets, maps)
    assert loss < 0.8 * optmerge_loss(sum(taus) / 3, targets, maps)
    gram = sum(part.T.double() @ part.double() for part in maps).numpy()
    pulled = sum(target.double() @ part.T.double() @ part.double() for target, part in zip(targets, maps, strict=True))
    pull = np.trace(gram) / 48
    expected = (pulled.numpy() + pull * sum(taus).double().numpy()) @ np.linalg.inv(gram + pull * np.eye(48))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_parameters_of_other_methods_are_mentioned_and_misspelt_ones_refused(tmp_path):
    trio(tmp_path)
    data = {"merge_method": "linear", "dtype": "bf16", "out_dtype": "fp16", "parameters": {"t": 0.5, "density": 0.3},
            "models": [{"model": f"{tmp_path}/expert1", "parameters": {"weight": 1.0, "epsilon": 0.1}}]}
    recipe = parse_recipe(data, "recipe")
    assert (recipe.dtype, recipe.out_dtype) == ("bfloat16", "float16")
    assert build(recipe).notes == tuple(f"recipe: linear does not use the parameter {name}"
                                        for name in ("t", "density", "epsilon"))
    with pytest.raises(InputError, match="no parameter 'wieght'"):
        parse_recipe({**data, "parameters": {"wieght": 1.0}}, "recipe")


def test_density_may_reach_zero_along_a_gradient(tmp_path):
    trio(tmp_path)
    data = {"merge_method": "ties", "base_model": f"{tmp_path}/base", "parameters": {"density": [0, 1]},
            "models": [{"model": f"{tmp_path}/expert1"}]}
    found = {unit.name: unit.parameters["density"] for unit in build(parse_recipe(data, "recipe")).units
             if unit.method != "copy"}
    assert found["model.layers.0.mlp.up_proj.weight"] == [0.0] and found["model.layers.1.mlp.up_proj.weight"] == [1.0]


def test_models_that_compute_differently_are_one_line(tmp_path):
    for name, theta in (("a", 1e4), ("b", 5e5)):
        write(tmp_path / name, state(0), {"rope_theta": theta, "rms_norm_eps": 1e-6})
    graph = build(parse_recipe({"merge_method": "linear", "models": [
        {"model": f"{tmp_path}/{name}"} for name in "ab"]}, "recipe"))
    assert graph.notes == (f"{tmp_path}/b and {tmp_path}/a differ in rope_theta 500000.0 and 10000.0; the result has"
                           f" those of {tmp_path}/a",)


@pytest.mark.parametrize("method", ["della", "della_linear"])
def test_della_restores_the_norm_or_divides_by_the_probability(method):
    """As mergekit: what stays has the L1 norm of the whole; as the paper: every entry is divided by its chance."""
    tau = torch.from_numpy(arrays(7, 400, 50, count=1)[0])
    by_norm = deltas(method, tau, density=0.6, epsilon=0.2, weight=1.0)
    np.testing.assert_allclose(by_norm.abs().sum(), tau.abs().sum(), rtol=1e-6)
    stays = by_norm != 0
    ratio = (by_norm / tau)[stays]
    assert float(ratio.max() - ratio.min()) < 1e-6
    expected = deltas(method, tau, density=0.6, epsilon=0.2, rescale_norm="expected")
    chance = 0.4 + 0.4 * tau.abs().argsort(1).argsort(1) / 49
    torch.testing.assert_close(expected[stays], (tau / chance)[stays], rtol=1e-5, atol=1e-6)
    assert torch.equal(deltas(method, tau, density=0.6, epsilon=0.2, rescale=False), torch.where(stays, tau, 0.0))


@pytest.mark.parametrize(("method", "more"), [
    ("ties", {}), ("ties", {"scope": "model"}), ("ties", {"zero_sum": "majority"}), ("breadcrumbs", {"gamma": 0.1}),
    ("breadcrumbs_ties", {"gamma": 0.1})])
@pytest.mark.parametrize("coarse", [False, True])
def test_rescale_restores_the_l1_norm_of_what_is_trimmed(method, more, coarse):
    """mergekit's ``rescale``: what stays times the sum of magnitudes before, over that after; also where magnitudes are
    equal, so that only some of them stay."""
    tau = arrays(8, 300, count=1)[0]
    tau = torch.from_numpy(np.sign(tau) * np.ceil(4 * np.abs(tau)) / 4 if coarse else tau)
    plain = deltas(method, tau, density=0.3, **more)
    found = deltas(method, tau, density=0.3, rescale=True, **more)
    factor = float(tau.abs().sum() / plain.abs().sum())
    assert factor > 1.5
    np.testing.assert_allclose(found, factor * plain, rtol=1e-6)
    assert torch.equal(deltas(method, tau, density=1.0, rescale=True), deltas(method, tau, density=1.0))


def test_filters_of_a_model_see_the_names_it_has_itself(tmp_path):
    """In slices another layer's, as in mergekit; values that the merge has once go by the result's names."""
    trio(tmp_path, layers=4)
    sources = [{"model": f"{tmp_path}/expert1", "layer_range": [2, 4],
                "parameters": {"weight": [{"filter": "layers.3.", "value": 5.0}]}},
               {"model": f"{tmp_path}/expert2", "layer_range": [0, 2]}]
    graph = build(parse_recipe({"merge_method": "task_arithmetic", "slices": [
        {"base_model": f"{tmp_path}/expert3", "sources": [*sources, {"model": f"{tmp_path}/expert3",
                                                                     "layer_range": [1, 3]}]}], "parameters": {
        "weight": [{"filter": "layers.0.", "value": 0.5}, {"value": 1.0}],
        "lambda": [{"filter": "layers.1.", "value": 2.0}, {"value": 3.0}]}}, "recipe"))
    values = {unit.layer: unit.parameters for unit in graph.units if unit.name.endswith("up_proj.weight")}
    assert [values[layer]["weight"] for layer in (0, 1)] == [[1.0, 0.5], [5.0, 1.0]]
    assert [values[layer]["lambda"] for layer in (0, 1)] == [3.0, 2.0]


@pytest.mark.parametrize(("changes", "count"), [
    ({"parameters": {"weight": 0.5}}, 3), ({}, 2),
    ({"models": None, "parameters": {"weight": 0.5}, "slices": [[("expert1", 0), ("expert2", 0)]]}, 2)])
def test_linear_merges_a_base_model_by_the_weight_of_all(tmp_path, changes, count):
    """As mergekit, which adds the base to whole models, so that it needs a weight; of slices the sources count."""
    trio(tmp_path)
    data = {"merge_method": "linear", "base_model": f"{tmp_path}/base",
            "models": [{"model": f"{tmp_path}/expert{seed}"} for seed in (1, 2)], **changes}
    data = {key: value for key, value in data.items() if value is not None}
    data["slices"] = [{"sources": [{"model": f"{tmp_path}/{name}", "layer_range": [first, first + 2]}
                                   for name, first in piece]} for piece in data.get("slices", [])]
    graph = build(parse_recipe(data, "recipe"))
    assert {len(unit.models) for unit in graph.units if unit.method != "copy"} == {count}
    assert any("does not read base_model" in note for note in graph.notes) == (count == 2)


def test_a_filter_for_a_head_that_is_the_embedding_is_a_line(tmp_path):
    for seed, name in enumerate("ab"):
        tensors = {key: value for key, value in state(seed).items() if key != "lm_head.weight"}
        write(tmp_path / name, tensors, {"tie_word_embeddings": True})
    data = {"merge_method": "linear", "models": [{"model": f"{tmp_path}/{name}"} for name in "ab"]}
    found = build(parse_recipe({**data, "parameters": {"weight": [{"filter": "lm_head", "value": 2.0},
                                                                  {"value": 1.0}]}}, "recipe"))
    assert found.notes == ("recipe: filter 'lm_head' does nothing: the models' head is their embedding",)
    with pytest.raises(InputError, match="filter 'lm_haed' matches no tensor"):
        build(parse_recipe({**data, "parameters": {"weight": [{"filter": "lm_haed", "value": 2.0}, {"value": 1.0}]}},
                           "recipe"))
