"""Numbers and laws of the methods that run models, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from calibration_fixtures import family, recipe, write_samples
from safetensors.torch import load_file

import mipipe
from mipipe.runtime.calibration.gradients import RcpVotes
from mipipe.runtime.calibration.results import information
from mipipe.runtime.merge.methods.closed_forms import regmean
from mipipe.runtime.merge.methods.directed import rcp, rotation
from mipipe.runtime.merge.methods.informed import acm_coefficient, softmax
from mipipe.runtime.merge.methods.method import Tile


class Given:
    """Measured fields by (statistic, model)."""

    name = "w"

    def __init__(self, found):
        self.found = found

    def fields(self, statistic, model):
        return self.found.get((statistic, model), {})


def correlated(rho, count=40_000):
    """Sums of moments of two features with a correlation of exactly rho."""
    generator = np.random.default_rng(0)
    one, noise = generator.standard_normal((2, count))
    one, noise = (one - one.mean()) / one.std(), noise - noise.mean()
    noise -= one * (one @ noise) / (one @ one)
    other = rho * one + math.sqrt(1 - rho**2) * noise / noise.std()
    sums = {"a": one, "b": other, "aa": one * one, "bb": other * other, "ab": one * other}
    return {key: torch.tensor([value.sum()]) for key, value in sums.items()} | {"count": torch.tensor([float(count)])}


@pytest.mark.parametrize(("rho", "nats", "coefficient"), [(0.0, 0.0, 0.5), (0.5, 0.143841, 0.464102),
                                                          (0.9, 0.830366, 0.303568)])
def test_acm_information_and_coefficient(rho, nats, coefficient):
    found = information(correlated(rho))
    assert found == pytest.approx(nats, abs=1e-6)
    assert acm_coefficient(found, 1.0, 1.0) == pytest.approx(coefficient, abs=1e-6)


def test_information_does_not_see_affine_maps_and_leaves_constants_out():
    plain = correlated(0.7)
    count = plain["count"]
    scaled = {**plain, "a": 3 * plain["a"] + 2 * count, "ab": 3 * plain["ab"] + 2 * plain["b"],
              "aa": 9 * plain["aa"] + 12 * plain["a"] + 4 * count}
    assert information(scaled) == pytest.approx(information(plain))
    constant = {key: torch.cat([plain[key], value]) for key, value in
                {"a": count, "b": count, "aa": count, "bb": count, "ab": count}.items()} | {"count": count}
    assert information(constant) == pytest.approx(information(plain))


def test_a_rotation_is_found_again_and_equal_inputs_turn_nothing():
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    assert torch.allclose(rotation((theta @ turn.T).T @ theta, 1.0), turn)
    assert torch.allclose(rotation(theta.T @ theta, 1.0), torch.eye(6, dtype=torch.float64))
    few = theta[:3]  # fewer tokens than inputs: the identity outside, and orthogonal all the same
    for energy in (1.0, 0.8):
        found = rotation(few.T @ few, energy)
        assert torch.allclose(found, torch.eye(6, dtype=torch.float64))
        skew = rotation((few @ turn.T).T @ few, energy)
        assert torch.allclose(skew.T @ skew, torch.eye(6, dtype=torch.float64))


def test_streaming_towards_one_checkpoint():
    """``1 - (1 - eta)^3`` of the way after three steps without rotation."""
    from mipipe.runtime.merge.methods.directed import arm
    theta, phi = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    for _ in range(3):
        theta = arm(Tile(theta, (phi,), measured=Given({})), None, eta=0.3, energy=1.0)
    assert torch.allclose(theta, torch.full((2, 2), 0.657, dtype=torch.float64))


def test_rcp_votes():
    """The worked example: scores, votes, result."""
    reasoning, domain, base = (torch.tensor(values, dtype=torch.float64) for values in
                               ([1, 1, 1], [1.5, .5, 2], [1, 0, 1.5]))
    fisher = torch.tensor([.01, 0, .5], dtype=torch.float64)
    votes = RcpVotes([{"w": reasoning}, {"w": domain}], 1000.0)
    votes.add(0, {"w": (fisher.sqrt() / reasoning, reasoning)})
    for signed in ([-2, 1, -400], [-3, -1, -600], [1, -1, -700]):
        votes.add(1, {"w": (torch.tensor(signed, dtype=torch.float64) / domain, domain)})
    total = votes.result()["w", "sum"]
    assert total.tolist() == [-1, 1, 1]
    measured = Given({("votes:1000.0", 1): {"sum": total}})
    merged = rcp(Tile(base, (reasoning, domain), measured=measured), None, strength=1000.0)
    assert merged.tolist() == [1, 1.5, 1.5]


def test_regmean_with_equal_inputs_is_the_average_and_fits_what_it_can():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)  # 3 tokens each, 4 inputs

    def merge(first, second, ridge=1e-12):
        fields = {("gram", number): {"sum": part.T @ part, "count": torch.tensor(3.0)}
                  for number, part in enumerate((first, second))}
        tile = Tile(None, (one, other), measured=Given(fields))
        return regmean(tile, None, weight=(1.0, 1.0), reduce=1.0, ridge=ridge)

    assert torch.allclose(merge(inputs[0], inputs[0], 1e-6), (one + other) / 2)
    found = merge(inputs[0][:2], inputs[1][:2])  # four tokens in all: both models' outputs can be kept exactly
    assert torch.allclose(inputs[0][:2] @ found.T, inputs[0][:2] @ one.T, atol=1e-5)
    assert torch.allclose(inputs[1][:2] @ found.T, inputs[1][:2] @ other.T, atol=1e-5)


def test_softmax():
    assert softmax([1.0, 1.0, 1.0], 2.0) == pytest.approx([1 / 3] * 3)
    assert softmax([2.0, 0.0], 2.0)[0] == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("laws")
    family(root, "llama")
    for number, name in enumerate("ab", 1):
        write_samples(root / f"{name}.jsonl", number, count=3)
    return root


AGREE = {"regmean": {}, "fisher": {}, "aim": {"normalize": True, "omega": 1.0}}
"""Methods by which equal models give that model, and the parameters with which they do."""
OTHERS = {"acm": {}, "sens": {}, "arm": {"eta": 1.0}, "rcp": {}}


def check(place, out, method, parameters, base, experts, wanted):
    data = recipe(place, method, parameters=parameters, base=False)
    for item in data["models"]:
        item["model"] = str(place / experts)
    if base:
        data["base_model"] = str(place / base)
    mipipe.merge(data, out)
    wanted, found = load_file(place / wanted / "model.safetensors"), load_file(out / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name].double(), atol=1e-6) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("method", AGREE)
def test_models_that_agree_give_that_model(place, tmp_path, method):
    check(place, tmp_path / "out", method, AGREE[method], "base" if method == "aim" else "", "expert1", "expert1")


@pytest.mark.slow
@pytest.mark.parametrize("method", [*OTHERS, "aim"])
def test_experts_that_are_the_base_give_the_base(place, tmp_path, method):
    if not (place / "same").exists():
        (place / "same").symlink_to(place / "base")  # a base among the models by its own name would be left out
    check(place, tmp_path / "out", method, {**OTHERS, **AGREE}[method], "same", "base", "base")
