"""Evo-Merging's served model: the factors of LoRA adapters added apart."""

from __future__ import annotations

import json

import pytest
import torch
from merge_fixtures import CONFIG, state, write
from safetensors.torch import load_file, save_file

import mipipe
from mipipe.graphs.errors import InputError
from mipipe.runtime.merge.methods.low_rank import largest

MODULES = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.1.mlp.down_proj": (8, 16)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("factors")
    write(root / "base", state(0), {**CONFIG})
    factors = {}
    for number, rank in (("one", 2), ("two", 2), ("wide", 3)):
        generator = torch.Generator().manual_seed(len(factors))
        (root / number).mkdir()
        found = {module: (torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))
                 for module, (rows, columns) in MODULES.items() if not (number == "two" and "down" in module)}
        save_file({f"base_model.model.{module}.lora_{side}.weight": value for module, pair in found.items()
                   for side, value in zip("AB", pair, strict=True)}, root / number / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4}
        (root / number / "adapter_config.json").write_text(json.dumps(settings))
        factors[number] = found
    return root, factors


def merged(root, out, models, **parameters):
    mipipe.merge({"merge_method": "evo", "base_model": str(root / "base"), "dtype": "float64",
                  "models": [{"model": f"{root}/base+{root}/{name}", "parameters": own} for name, own in models],
                  "parameters": parameters}, out, verify=False)
    return load_file(out / "model.safetensors")


def test_what_is_kept():
    """Published: keep .5 of [3, -1, 2, .5]; ties stay, a share of nothing is nothing, else one entry stays."""
    values = torch.tensor([3., -1., 2., .5])
    assert largest(values, 0.5).tolist() == [3, 0, 2, 0]
    assert largest(values, 0.0).tolist() == [0, 0, 0, 0] and largest(values, 0.01).tolist() == [3, 0, 0, 0]
    assert largest(torch.tensor([1., -1., 1.]), 0.3).tolist() == [1, -1, 1]


def test_factors_are_added_apart(place, tmp_path):
    root, factors = place
    found = merged(root, tmp_path / "out", [("one", {"weight": 0.7, "keep": 0.5}), ("two", {"weight": -0.4})])
    base = load_file(root / "base/model.safetensors")
    for name, value in found.items():
        module, wanted = name.removesuffix(".weight"), base[name]
        if module in MODULES:
            pairs = [(share, keep, factors[key][module]) for share, keep, key in
                     ((0.7, 0.5, "one"), (-0.4, 1.0, "two")) if module in factors[key]]
            down = sum(share * largest(pair[0].double(), keep) for share, keep, pair in pairs)
            up = sum(share * pair[1].double() * 2 for share, _, pair in pairs)
            wanted = wanted.double() + up @ down
        assert torch.allclose(value, wanted.to(value.dtype), atol=1e-9), name


def test_an_adapter_alone_and_equal_ones(place, tmp_path):
    """Alone it is scaled by the square of its weight, whatever the sign; equal ones with equal weights are one."""
    root, factors = place
    base = load_file(root / "base/model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    down, up = factors["one"][name]
    for number, (models, share) in enumerate((([("one", {})], 1.0), ([("one", {"weight": -0.5})], 0.25),
                                              ([("one", {}), ("one", {})], 1.0))):
        found = merged(root, tmp_path / str(number), models)
        wanted = base[f"{name}.weight"].double() + share * 2 * up.double() @ down.double()
        assert torch.allclose(found[f"{name}.weight"], wanted)


def test_adapters_of_different_ranks_are_refused(place, tmp_path):
    root, _ = place
    with pytest.raises(InputError, match="must have one rank; found 2 and 3"):
        merged(root, tmp_path / "out", [("one", {}), ("wide", {})])
