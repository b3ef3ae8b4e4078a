"""Methods that mergekit and fusion_bench have: values worked out in numpy from the published formulas."""

import dataclasses

import numpy as np
import pytest
import torch
from merge_numbers import deltas, merged, optmerge_loss

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.merging.method_table import methods
from mipipe.graphs.merging.method_table.method_spec import Parameter
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.in_memory import merge_state_dicts
from mipipe.runtime.merge.methods import own, spectral
from mipipe.runtime.merge.methods.method import Round
from mipipe.runtime.merge.methods.registry import BY_METHOD


def arrays(seed, *shape, count=2, scale=1.0):
    generator = np.random.default_rng(seed)
    return [scale * generator.normal(size=shape) for _ in range(count)]


def tensors(*values):
    return [torch.from_numpy(value) for value in values]


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_arcee_fusion_takes_the_entries_of_most_importance():
    base, change = arrays(1, 40, 30)
    model = base + 0.5 * change
    after, before = softmax(model) + 1e-8, softmax(base) + 1e-8
    weight = np.abs(model - base) * (after * np.log(after / before)).sum(-1, keepdims=True)
    ordered = np.sort(weight.ravel())
    lower, median, upper = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    chosen = weight >= median + 1.5 * (upper - lower)
    assert 0 < chosen.sum() < chosen.size
    np.testing.assert_allclose(merged("arcee_fusion", *tensors(base), tensors(model)), np.where(chosen, model, base))


def test_nearswap_goes_at_most_t():
    found = merged("nearswap", torch.tensor([0.0, 0.0, 1.0, 2.0]), [torch.tensor([0.05, -3.0, 1.0, 1.9])], t=0.1)
    torch.testing.assert_close(found, torch.tensor([0.05, -0.1, 1.0, 1.9]))


def test_ram_averages_shared_changes_and_keeps_unique_ones():
    one, two = torch.tensor([1.0, 2.0, 0.0, 1e-6]), torch.tensor([3.0, 0.0, 4.0, 0.0])
    torch.testing.assert_close(deltas("ram", one, two), torch.tensor([2.0, 2.0, 4.0, 0.0]))
    # one shared and one unique entry in each: lambda = 1 + r min(alpha, 1)
    torch.testing.assert_close(deltas("ramplus_tl", one, two, r=0.5, alpha=0.4), torch.tensor([2.0, 2.4, 4.8, 0.0]))
    torch.testing.assert_close(deltas("ramplus_tl", one, two, r=0.5, alpha=9.0), torch.tensor([2.0, 3.0, 6.0, 0.0]))


@pytest.mark.parametrize("with_base", [False, True])
def test_multislerp_is_the_scaled_mean_direction(with_base):
    base, *models = arrays(2, 6, 5, count=4)
    ends = [model - base if with_base else model for model in models]
    weight = np.array([1.0, 2.0, 0.5]) / 3.5
    mean = sum(share * end / np.linalg.norm(end) for share, end in zip(weight, ends, strict=True))
    length = sum(share * np.linalg.norm(end) for share, end in zip(weight, ends, strict=True))
    expected = length * mean / np.linalg.norm(mean) + (base if with_base else 0)
    found = merged("multislerp", torch.from_numpy(base) if with_base else None, tensors(*models), weight=[1.0, 2.0, .5])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_multislerp_of_opposite_models():
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(merged("multislerp", None, [one, -one]), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(RunError, match="directions cancel"):
        merged("multislerp", None, [one, -one, 2 * one, -2 * one])


def test_iso_c_makes_the_spectrum_flat():
    taus = arrays(3, 9, 6)
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    np.testing.assert_allclose(deltas("iso_c", *tensors(*taus)), s.mean() * u @ v, rtol=0, atol=1e-9)


def test_iso_cts_adds_each_tasks_own_directions():
    taus = arrays(4, 12, 10, count=3)
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    own_size = round((10 - int(10 * 0.5)) / 3)  # 2 for each of three tasks, 4 in common
    common = 10 - 3 * own_size
    assert spectral.common_size(10, 0.5, 3) == (common, own_size) == (4, 2)
    lefts, values, rights = [u[:, :common]], [s[:common]], [v[:common]]
    for tau in taus:
        left, value, right = np.linalg.svd(tau - u[:, :common] @ u[:, :common].T @ tau, full_matrices=False)
        lefts.append(left[:, :own_size])
        values.append(value[:own_size])
        rights.append(right[:own_size])
    polar = []
    for part in (np.concatenate(lefts, 1), np.concatenate(rights)):
        left, _, right = np.linalg.svd(part, full_matrices=False)
        polar.append(left @ right)
    expected = np.concatenate(values).mean() * polar[0] @ polar[1]
    found = deltas("iso_cts", *tensors(*taus), common_space_fraction=0.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_wudi_descends_from_the_sum_to_its_minimiser():
    taus = arrays(5, 8, 6, scale=0.1)
    gram = sum(tau.T @ tau / np.sum(tau**2) for tau in taus)
    best = sum(tau @ tau.T @ tau / np.sum(tau**2) for tau in taus) @ np.linalg.inv(gram)
    np.testing.assert_allclose(deltas("wudi", *tensors(*taus), solver="closed_form"), best, rtol=0, atol=1e-6)
    maps = [tau / tau.norm() for tau in tensors(*taus)]

    def loss(value):
        return optmerge_loss(value, tensors(*taus), maps)

    short = deltas("wudi", *tensors(*taus))
    longer = deltas("wudi", *tensors(*taus), learning_rate=1e-3, steps=2000)
    assert loss(sum(tensors(*taus))) > loss(short) > loss(longer) > loss(torch.from_numpy(best)) - 1e-12


@pytest.fixture
def halfway():
    """A method of one's own, with statistics; taken away again after the test."""
    def count(tile, _stats, **_params):
        return torch.tensor(tile.origin.numel(), dtype=torch.int64)

    @own.method("halfway", Parameter("share", 0.5, "how far"), rounds=(Round(count, lambda total, _stats, **_: total),))
    def apply(tile, stats, *, share):
        """Halfway to the mean, plus the number of entries."""
        return tile.origin + share * sum(tile.deltas()) / len(tile.models) + int(stats)

    yield apply
    for table in (methods.BY_NAME, BY_METHOD):
        del table["halfway"]
    methods.RECIPE_NAMES.remove("halfway")


def test_a_method_that_changes_the_shape_is_refused(halfway, monkeypatch):
    cut = dataclasses.replace(BY_METHOD["halfway"], apply=lambda tile, _stats, **_: tile.origin[:1])
    monkeypatch.setitem(BY_METHOD, "halfway", cut)
    recipe = {"merge_method": "halfway", "base_model": "a", "models": [{"model": "b"}]}
    with pytest.raises(RunError, match=r"w: halfway makes \[1, 3\] of tiles of shape \[4, 3\]"):
        merge_state_dicts(recipe, {"a": {"w": torch.ones(4, 3)}, "b": {"w": torch.zeros(4, 3)}})


def test_a_method_of_ones_own(halfway):
    base, one, two = tensors(*arrays(6, 3, 4, count=3))
    torch.testing.assert_close(merged("halfway", base, [one, two], share=0.25),
                               base + 0.25 * ((one + two) / 2 - base) + 12)
    recipe = parse_recipe({"merge_method": "halfway", "base_model": "a", "models": [{"model": "b"}],
                           "parameters": {"share": 0.1}}, "recipe")
    assert recipe.spec.title == "Halfway to the mean, plus the number of entries."
    with pytest.raises(InputError, match="one of that name already"):
        own.method("halfway")(halfway)
