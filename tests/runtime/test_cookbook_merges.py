"""The cookbook's recipes for models of one architecture, merged on tiny checkpoints of the names they use."""

import shutil
from pathlib import Path

import pytest
import torch
from merge_fixtures import read, state, write

from mipipe.graphs.merging.recipes.read import read_recipes
from mipipe.runtime.merge.launching.launch import merge

RECIPES = Path(__file__).resolve().parents[2] / "docs" / "recipes"
LAYERS = {"deeper-model": 32, "task-in-a-language": 8}
"""Layers that a recipe's layer numbers need; others take 2."""


@pytest.mark.parametrize("name", [
    "average", "two-models", "few-fine-tunes", "skills", "conflicting-skills", "redundant-skills", "many-skills",
    "one-flat-spectrum", "chat-models", "task-in-a-language", "deeper-model", "in-two-steps"])
def test_a_cookbook_recipe_merges(tmp_path, monkeypatch, name):
    shutil.copy(RECIPES / f"{name}.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    recipes = read_recipes(f"{name}.yaml")
    layers = LAYERS.get(name, 2)
    base = state(0, layers=layers)
    made = {recipe.name for recipe in recipes}
    models = [*(model for recipe in recipes for model in recipe.models),
              *(source for recipe in recipes for piece in recipe.slices for source in piece.sources)]
    folders = {model.model for model in models} | {recipe.base_model for recipe in recipes}
    for seed, folder in enumerate(sorted(folders - made - {None}), 1):
        write(tmp_path / folder, base if folder == "./base" else state(seed, base, layers=layers),
              {"num_hidden_layers": layers})
    merge(recipes, "out")
    found = read(tmp_path / "out")
    tensors = 3 + 9 * (48 if name == "deeper-model" else layers)
    assert len([value for value in found.values() if value.is_floating_point()]) == tensors
    assert all(value.isfinite().all() for value in found.values() if value.is_floating_point())
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(found[name].float(), base[name])
