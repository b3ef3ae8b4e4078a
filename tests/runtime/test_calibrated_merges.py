"""Merges whose methods run the models: against plain forward and backward passes and numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_fixtures import LENGTH, family, recipe, write_samples
from safetensors.torch import load_file

import mipipe
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.passes import is_whole
from mipipe.graphs.merging.recipes.read import parse_recipe

NEAR = {"rtol": 1e-6, "atol": 1e-8}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A base and two experts with samples of two lengths each."""
    root = tmp_path_factory.mktemp("llama")
    models = family(root, "llama")
    rows = {name: write_samples(root / f"{name}.jsonl", number, lengths=(LENGTH, 7))
            for number, name in enumerate("ab", 1)}
    return root, {name: model.double() for name, model in models.items()}, rows


def merged(root, out, *args, **named):
    mipipe.merge(recipe(root, *args, **named), out)
    return {name: value.double().numpy() for name, value in load_file(out / "model.safetensors").items()}


def weights(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def watch(model, rows, outputs=False):
    """What goes into (or comes out of) every module with a weight, all tokens of all rows below each other."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if "weight" in module._parameters:
            def hook(_module, given, out, name=name):
                value = out if outputs else given[0]
                if value.dim() < 3:  # token ids
                    return
                seen.setdefault(f"{name}.weight", []).append(value.detach().reshape(-1, value.shape[-1]))
            hooks.append(module.register_forward_hook(hook))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).numpy() for name, parts in seen.items()}


def gradients(model, rows):
    """Every sample's gradients of the mean next-token loss, by parameter."""
    found = []
    for row in rows:
        model.zero_grad()
        logits = model(torch.tensor([row])).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:])).backward()
        found.append({name: value.grad.numpy().copy() for name, value in model.named_parameters()})
    return found


def is_map(name):
    return "_proj" in name or "lm_head" in name


def test_regmean_solves_its_normal_equations(llama, tmp_path):
    root, models, rows = llama
    out = merged(root, tmp_path / "out", "regmean", ("a.jsonl", "b.jsonl"), {"reduce": 0.7, "ridge": 1e-13}, base=False)
    seen = [watch(models[f"expert{number}"], rows[name]) for number, name in ((1, "a"), (2, "b"))]
    ours = [weights(models[f"expert{number}"]) for number in (1, 2)]
    for name, value in out.items():
        if not is_map(name):
            assert np.allclose(value, (ours[0][name] + ours[1][name]) / 2, **NEAR)
            continue
        grams = [inputs[name].T @ inputs[name] / len(inputs[name]) for inputs in seen]
        grams = [0.7 * gram + 0.3 * np.diag(np.diag(gram)) for gram in grams]
        wanted = np.linalg.solve(sum(grams), sum(gram @ own[name].T for gram, own in zip(grams, ours, strict=True))).T
        assert np.allclose(value, wanted, **NEAR), name


def test_fisher_weighs_every_entry_by_squared_gradients(llama, tmp_path):
    root, models, rows = llama
    out = merged(root, tmp_path / "out", "fisher", parameters={"floor": 1e-12}, base=False)
    ours = [weights(models[f"expert{number}"]) for number in (1, 2)]
    mass = []
    for number, name in ((1, "a"), (2, "b")):
        found = gradients(models[f"expert{number}"], rows[name])
        mass.append({key: np.maximum(np.mean([item[key] ** 2 for item in found], 0), 1e-12) for key in found[0]})
    for name, value in out.items():
        share = [item[name] for item in mass] if "embed_tokens" not in name else [1.0, 1.0]
        wanted = (share[0] * ours[0][name] + share[1] * ours[1][name]) / (share[0] + share[1])
        assert np.allclose(value, wanted, **NEAR), name


@pytest.mark.parametrize("host", ["task_arithmetic", pytest.param("ties", marks=pytest.mark.slow)])
def test_aim_keeps_what_salient_inputs_see(llama, tmp_path, host):
    root, models, rows = llama
    parameters = {"host": host, "lambda": 0.8} | ({"density": 0.5, "normalize": True} if host == "ties" else {})
    out = merged(root, tmp_path / "out", "aim", parameters={**parameters, "omega": 0.3})
    plain = {**recipe(root, host, parameters={**parameters}), "calibration": None}
    plain["models"] = [{"model": item["model"]} for item in plain["models"]]
    plain["parameters"].pop("host")
    mipipe.merge({key: value for key, value in plain.items() if value is not None}, tmp_path / "plain")
    host_out = {name: value.double().numpy() for name, value in load_file(tmp_path / "plain/model.safetensors").items()}
    seen, base = watch(models["base"], rows["a"]), weights(models["base"])
    for name, value in out.items():
        wanted = host_out[name]
        if is_map(name):
            mean = np.abs(seen[name]).mean(0)
            wanted = base[name] + (wanted - base[name]) * (1 - mean / mean.max() * 0.7)
        assert np.allclose(value, wanted, **NEAR), name


def test_aim_works_tile_by_tile_and_knows_rows_of_inputs(tmp_path):
    """GPT-2 stores inputs by rows: a map's factor is of its inputs there too. What is stored as usual is never whole,
    so that a head takes no more memory than a few tiles."""
    models = family(tmp_path, "gpt2", 1)
    rows = write_samples(tmp_path / "a.jsonl", 1)
    data = recipe(tmp_path, "aim", ("a.jsonl",), {"lambda": 1.0, "omega": 0.0})
    mipipe.merge(data, tmp_path / "out")
    found, seen = load_file(tmp_path / "out/model.safetensors"), {}
    handles = [module.register_forward_pre_hook(lambda _module, inputs, name=name: seen.setdefault(name, []).append(
        inputs[0].detach().double().reshape(-1, inputs[0].shape[-1])))
        for name, module in models["base"].named_modules() if type(module).__name__ == "Conv1D"]
    with torch.no_grad():
        for row in rows:
            models["base"](input_ids=torch.tensor([row]))
    base, expert = (load_file(tmp_path / f"{name}/model.safetensors") for name in ("base", "expert1"))
    assert len(handles) == len(seen) == 8
    for name, values in seen.items():
        key = next(key for key in base if key.endswith(f"{name.removeprefix('transformer.')}.weight"))
        mean = torch.cat(values).abs().mean(0)
        wanted = base[key] + (expert[key].double() - base[key]) * (1 - mean / mean.max())[:, None]
        assert torch.allclose(found[key], wanted, atol=1e-5), name
    units = build(parse_recipe(data, "recipe")).units
    whole = {unit.name for unit in units if is_whole(unit)}
    assert whole == {unit.name for unit in units if unit.transposed and unit.method != "copy"} and len(whole) == 8


def test_acm_scales_by_the_information_of_outputs(llama, tmp_path):
    root, models, rows = llama
    out = merged(root, tmp_path / "out", "acm", parameters={"t": 1.5, "scale": 2.0})
    base = weights(models["base"])
    total = {name: value.copy() for name, value in base.items()}
    for number, data in ((1, "a"), (2, "b")):
        pair = [watch(models[name], rows[data], outputs=True) for name in ("base", f"expert{number}")]
        facts = {}
        for name in pair[0]:
            source = name
            if "input_layernorm" in name:
                source = name.replace("input_layernorm", "self_attn.q_proj")
            elif "post_attention_layernorm" in name:
                source = name.replace("post_attention_layernorm", "mlp.gate_proj")
            if name in ("model.norm.weight", "lm_head.weight"):
                continue
            facts[name] = information(pair[0][source], pair[1][source])
        largest = None
        head = watch_norm(models, number, rows[data])
        facts["lm_head.weight"] = head
        largest = max(facts.values())
        facts["model.norm.weight"] = np.mean([value for name, value in facts.items() if ".layers.1." in name])
        own = weights(models[f"expert{number}"])
        for name in base:
            total[name] += 2.0 / (1 + np.exp(1.5 * facts[name] / largest)) * (own[name] - base[name])
    for name, value in out.items():
        assert np.allclose(value, total[name], **NEAR), name


def watch_norm(models, number, rows):
    """The information of the final norm's outputs, which stand for the head's."""
    pair = [watch(models[name], rows, outputs=True)["model.norm.weight"] for name in ("base", f"expert{number}")]
    return information(*pair)


def information(one, other):
    """The mean over features of ``-0.5 ln(1 - rho^2)``."""
    rho = [np.corrcoef(one[:, j], other[:, j])[0, 1] for j in range(one.shape[1])]
    return np.mean([-0.5 * np.log(1 - min(r * r, 1 - 1e-6)) for r in rho])


def test_arm_turns_the_change_onto_the_merged_models_inputs(llama, tmp_path):
    root, models, rows = llama
    data = recipe(root, "arm", parameters={"eta": 0.6, "energy": 1.0})
    data["models"] = data["models"][1:]
    mipipe.merge(data, tmp_path / "out")
    out = {name: value.double().numpy() for name, value in load_file(tmp_path / "out/model.safetensors").items()}
    theta, phi = watch(models["base"], rows["b"]), watch(models["expert2"], rows["b"])
    base, own = weights(models["base"]), weights(models["expert2"])
    for name, value in out.items():
        delta = own[name] - base[name]
        if is_map(name):
            left, _, right = np.linalg.svd(phi[name].T @ theta[name])
            turn = left @ right
            assert np.allclose(turn.T @ turn, np.eye(len(turn)))
            delta = delta @ turn
        assert np.allclose(value, base[name] + 0.6 * delta, **NEAR), name


def test_sens_weighs_layers_by_gradient_times_weight(llama, tmp_path):
    root, models, rows = llama
    out = merged(root, tmp_path / "out", "sens", parameters={"alpha": 0.5, "temperature": 2.0})
    base = weights(models["base"])
    layers, owns = [], []
    for number, data in ((1, "a"), (2, "b")):
        own = weights(models[f"expert{number}"])
        found = gradients(models[f"expert{number}"], rows[data])
        layers.append([np.mean([sum(np.abs(item[name] * own[name]).sum() for name in item
                                    if f".layers.{layer}." in name) for item in found]) for layer in (0, 1)])
        owns.append(own)
    totals = np.array(layers).sum(1)
    powers = np.exp(totals / totals.mean() / 2.0)
    for name, value in out.items():
        wanted = base[name].copy()
        for number in (0, 1):
            layer = next((k for k in (0, 1) if f".layers.{k}." in name), None)
            share = 1.0 if layer is None else layers[number][layer] / np.mean(layers[number])
            wanted += 0.5 * share * 2 * powers[number] / powers.sum() * (owns[number][name] - base[name])
        assert np.allclose(value, wanted, **NEAR), name


def test_rcp_adds_the_domain_where_votes_outweigh_the_prior(llama, tmp_path):
    root, models, rows = llama
    out = merged(root, tmp_path / "out", "rcp", parameters={"strength": 50.0})
    base, reasoning, domain = (weights(models[name]) for name in ("base", "expert1", "expert2"))
    prior, votes = gradients(models["expert1"], rows["a"]), gradients(models["expert2"], rows["b"])
    changed = 0
    for name, value in out.items():
        if "embed_tokens" in name:
            assert np.allclose(value, reasoning[name], **NEAR)
            continue
        fisher = np.mean([(item[name] * reasoning[name]) ** 2 for item in prior], 0)
        bar = 50.0 * fisher * (reasoning[name] - domain[name]) ** 2
        total = sum(np.where(item[name] * domain[name] + bar <= 0, 1, -1) for item in votes)
        wanted = reasoning[name] + np.where(total > 0, domain[name] - base[name], 0)
        assert np.mean(np.abs(value - wanted) < 1e-5) > 0.999, name  # a vote may hang on the last bit
        changed += int((total > 0).sum())
    assert changed
