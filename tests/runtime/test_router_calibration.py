"""Routers of merged mixtures of experts, against a dense solve and by what they do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibration_fixtures import family, recipe, write_samples
from safetensors.torch import load_file

import mipipe
from mipipe.runtime.merge.methods.closed_forms import conjugate_gradients


@pytest.fixture(scope="module", params=["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def place(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    models = family(root, request.param)
    rows = {name: write_samples(root / f"{name}.jsonl", number) for number, name in enumerate("ab", 1)}
    for model in models.values():
        model.double().set_experts_implementation("eager")
    mipipe.merge({"merge_method": "linear", "models": [{"model": str(root / f"expert{number}")} for number in (1, 2)]},
                 root / "merged")
    return root, models, rows


def routers(model, rows):
    """Every router's inputs and logits, all tokens below each other."""
    seen, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            def hook(module, given, _out, name=name):
                flat = given[0].detach().reshape(-1, given[0].shape[-1])
                seen.setdefault(name, []).append((flat, flat @ module.weight.detach().T))
            hooks.append(module.register_forward_hook(hook))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    for hook in hooks:
        hook.remove()
    return {name: [torch.cat(parts).numpy() for parts in zip(*found, strict=True)] for name, found in seen.items()}


def test_the_closed_form_and_what_it_mends(place, tmp_path):
    import transformers
    root, models, rows = place
    data = recipe(root, "router_calibration", parameters={"ridge": 1e-6})
    data["base_model"] = str(root / "merged")
    mipipe.merge(data, tmp_path / "out")
    found, before = load_file(tmp_path / "out/model.safetensors"), load_file(root / "merged/model.safetensors")

    def opened(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        model.set_experts_implementation("eager")
        return model

    merged = opened(root / "merged")
    ours = {name: routers(merged, rows[name]) for name in "ab"}
    theirs = {name: routers(models[f"expert{number}"], rows[name]) for number, name in enumerate("ab", 1)}
    for key in ours["a"]:
        stored = next(name for name in found if name.replace("block_sparse_moe", "mlp") == f"{key}.weight")
        left, right, size = 0.0, 0.0, 0.0
        for name in "ab":
            inputs, logits = ours[name][key][0], theirs[name][key][1]
            shares = np.exp(logits - logits.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
            bend = (np.diag(shares.sum(0)) - shares.T @ shares) / len(shares)
            gram = inputs.T @ inputs / len(inputs)
            left = left + np.kron(bend, gram)
            right = right + bend @ (logits.T @ inputs / len(inputs))
            size += np.diag(bend).mean() * np.diag(gram).mean()
        pull, base = 1e-6 * size, before[stored].double().numpy()
        dense = np.linalg.solve(left + pull * np.eye(left.shape[0]), (right + pull * base).flatten())
        assert np.allclose(found[stored].numpy(), dense.reshape(base.shape), rtol=1e-4, atol=1e-6)
    routed = [name for name in found if not torch.equal(found[name], before[name].to(found[name].dtype))]
    assert len(routed) == 2 and all("gate" in name for name in routed)

    def distance(folder):
        model, total = opened(folder), 0.0
        for name in "ab":
            for key, (_, logits) in routers(model, rows[name]).items():
                wanted = torch.softmax(torch.from_numpy(theirs[name][key][1]), -1)
                total -= float((wanted * torch.log_softmax(torch.from_numpy(logits), -1)).sum(-1).mean())
        return total

    assert distance(tmp_path / "out") < distance(root / "merged")


def test_a_model_that_was_not_merged_keeps_its_router(place, tmp_path):
    root, _, _ = place
    data = recipe(root, "router_calibration")
    (root / "same").exists() or (root / "same").symlink_to(root / "expert1")
    data["models"] = [{**data["models"][0], "model": str(root / "same")}]
    data["base_model"] = str(root / "expert1")
    mipipe.merge(data, tmp_path / "out")
    wanted, found = load_file(root / "expert1/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert all(torch.allclose(found[name], wanted[name].double(), atol=1e-6) for name in found)


def test_conjugate_gradients():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, right = root @ root.T + torch.eye(6), torch.randn(6, 3, generator=generator, dtype=torch.float64)
    found = conjugate_gradients(lambda value: matrix @ value, right, torch.zeros_like(right))
    assert torch.allclose(found, torch.linalg.solve(matrix, right))
