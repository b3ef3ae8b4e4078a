"""Experts stored one by one and as banks are the same experts."""

import pytest
import torch
from merge_fixtures import read, state, write

from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, merge

MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def singles(banks, mixtral):
    """A state's banks taken apart, in numpy's order of rows: gate above up."""
    found = {}
    for name, value in banks.items():
        block, _, part = name.partition(".experts.")
        if mixtral:
            block = block.replace(".mlp", ".block_sparse_moe")
        if not part:
            found[name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name] = value
            continue
        halves = value.chunk(2, 1) if part == "gate_up_proj" else (value,)
        for half, own in zip(halves, ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",), strict=True):
            for expert in range(len(half)):
                found[f"{block}.experts.{expert}.{MIXTRAL[own] if mixtral else own}.weight"] = half[expert].clone()
    return found


@pytest.mark.parametrize("mixtral", [False, True])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_banks_and_single_experts_are_averaged(tmp_path, order, mixtral):
    config = {"num_experts": 3, "model_type": "mixtral" if mixtral else "qwen3_moe"}
    one, two = singles(state(1, experts=3), mixtral), state(2, experts=3)
    write(tmp_path / "a", one, config)
    write(tmp_path / "b", two, config)
    data = {"merge_method": "linear", "models": [{"model": f"{tmp_path}/{name}"} for name in order]}
    merge([parse_recipe(data, "recipe")], tmp_path / "out", MergeOptions(verify=False))
    apart, found = singles(two, mixtral), read(tmp_path / "out")
    assert set(found) == set(one)
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (one[name] + apart[name]) / 2)
