"""Expert Merging: learned coefficients, their parts, and what stays the base's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_fixtures import family, recipe, write_samples
from safetensors.torch import load_file

import mipipe
from mipipe.graphs.errors import InputError
from mipipe.runtime.merge.expert_merging import Fit, Teacher, answers, chunk_counts, whole_state
from mipipe.runtime.merge.methods.directed import chunk_bounds, merged_tensor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    models = family(root, "llama")
    for number, name in enumerate("ab", 1):
        write_samples(root / f"{name}.jsonl", number, count=3)
    return root, models


def coefficients(root, out):
    """Each map's coefficients, from what was merged, base and experts by least squares."""
    base, found = load_file(root / "base/model.safetensors"), load_file(out / "model.safetensors")
    experts = [load_file(root / f"expert{number}/model.safetensors") for number in (1, 2)]
    result = {}
    for name, value in found.items():
        deltas = torch.stack([(expert[name].double() - base[name].double()).flatten() for expert in experts], 1)
        result[name] = torch.linalg.lstsq(deltas, (value.double() - base[name].double()).flatten()).solution.numpy()
    return result


def test_chunks():
    """Published: I = (.5, .3, .2), B = 4."""
    assert chunk_counts([.5, .3, .2], 4, 1.0) == [2, 1, 0]
    assert chunk_counts([.5, .3, .2], 4, 2.0) == [2, 0, 0]
    assert chunk_bounds(6, 4) == [0, 2, 3, 4, 6] and chunk_bounds(5, 4)[-1] == 5  # no part is empty
    base, deltas = torch.zeros(2, 3), [torch.ones(2, 3), torch.full((2, 3), 2.0)]
    equal = merged_tensor(base, deltas, torch.tensor([[.5, .5], [.25, .25]]))
    assert torch.equal(equal, merged_tensor(base, deltas, torch.tensor([[.5], [.25]])))
    assert merged_tensor(base, deltas, torch.tensor([[1., 0.], [0., 0.]])).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_coefficients_begin_at_a_tenth_and_rise_to_the_expert(place, tmp_path):
    root, _ = place
    few = recipe(root, "expert_merging", parameters={"learning_rate": 1e-6})
    mipipe.merge(few, tmp_path / "few")
    started = coefficients(root, tmp_path / "few")
    for name, value in started.items():
        kept = any(part in name for part in ("embed", "lm_head", "norm"))
        assert value == pytest.approx([0.0, 0.0] if kept else [0.1, 0.1], abs=1e-4), name
    more = recipe(root, "expert_merging", parameters={"learning_rate": 0.3, "epochs": 20, "gamma": 0.0,
                                                      "accumulate": 2})
    mipipe.merge(more, tmp_path / "more")
    assert np.mean([value for name, value in coefficients(root, tmp_path / "more").items() if "_proj" in name]) > 0.15
    del few["models"][1]["calibration"]
    few["calibration"]["data"] = ""
    with pytest.raises(InputError, match="has no data for some models that expert_merging runs"):
        mipipe.merge(few, tmp_path / "none")


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.0, 1.2])
def test_ranks_do_not_show(place, tmp_path, budget):
    root, _ = place
    data = recipe(root, "expert_merging", parameters={"learning_rate": 0.1, "budget": budget})
    outs = []
    for ranks in (1, 2):
        mipipe.merge(data, tmp_path / str(ranks), ranks=ranks)
        outs.append((tmp_path / str(ranks) / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_the_loss_is_what_it_says_and_a_zero_change_has_no_gradient(place):
    """Against transformers' own forward of the merged weights; the gradient against differences."""
    from mipipe.graphs.merging.recipes.read import parse_recipe
    from mipipe.planner.merging.plan import plan_recipe
    from mipipe.runtime.merge.calibrate import open_decoder
    from mipipe.runtime.merge.sources import Surroundings
    from mipipe.runtime.weights.reader import Shelf
    root, models = place
    data = parse_recipe(recipe(root, "expert_merging"), "recipe")
    plan = plan_recipe(data, "recipe", root / "out", {}, 1, None, 10**9)
    with Shelf() as shelf:
        around = Surroundings(plan.graph, shelf, torch.device("cpu"))
        unit = next(unit for unit in plan.graph.units if unit.method == "expert_merging")
        decoders = [open_decoder(plan.graph, item.model, around) for item in unit.inputs]
        states = [whole_state(decoder) for decoder in decoders]
    ids = torch.tensor([3, 1, 4, 1, 5])
    with torch.no_grad():
        teacher = Teacher(ids, *answers(decoders[0], states[1], ids))
    values = {"start": 0.1, "exclude": "lm_head|embed|norm", "hidden": 0.5, "temperature": 2.0, "gamma": 3.0,
              "learning_rate": 0.1, "epochs": 1, "accumulate": 1}
    fit = Fit(decoders[0], states[0], [states[1], states[0]], [[teacher], [teacher]], values, 0)
    free = {name: torch.full((2, 1), -1.0, dtype=torch.float64, requires_grad=True) for name in fit.names}
    loss = fit.loss(free, 0, 0)
    loss.backward()
    share = float(torch.sigmoid(torch.tensor(-1.0, dtype=torch.float64)))
    merged = models["base"].double()
    kept = {name: value.clone() for name, value in merged.state_dict().items()}
    merged.load_state_dict({name: kept[name] + share * (states[1][name].double() - kept[name]) if name in fit.names
                            else kept[name] for name in kept})
    with torch.no_grad():
        found = merged(input_ids=ids[None], output_hidden_states=True)
        expert = models["expert1"].double()(input_ids=ids[None], output_hidden_states=True)
    merged.load_state_dict(kept)
    hidden = np.mean([float(((a - b) ** 2).mean()) for a, b in
                      zip(found.hidden_states[1:], expert.hidden_states[1:], strict=True)])
    word = -float((torch.softmax(expert.logits[0] / 2, -1) * torch.log_softmax(found.logits[0] / 2, -1)).sum(-1).mean())
    assert float(loss.detach()) == pytest.approx(0.5 * hidden + 4 * word + 3 * 2 * (share - 0.1), rel=1e-5)
    for name, value in free.items():  # the second expert is the base: only the pull to the start moves it
        assert float(value.grad[1, 0]) == pytest.approx(3 * share * (1 - share) / len(fit.names), rel=1e-4), name
