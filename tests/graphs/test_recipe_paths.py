"""A recipe's models are looked for beside the recipe first: recipe and models move together."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipipe.graphs.merging.moe_recipe import read_moe_recipe
from mipipe.graphs.merging.recipes.read import read_recipes
from mipipe.graphs.merging.recipes.recipe import MergeRecipe

FOLDERS = ("base", "math", "code", "lora")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """recipes/ with four model folders, called from the folder above."""
    for name in FOLDERS:
        (tmp_path / "recipes" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "recipes"


def recipes(place: Path, text: str) -> list[MergeRecipe]:
    (place / "recipe.yaml").write_text(text)
    return read_recipes("recipes/recipe.yaml")


TIES = """
merge_method: ties
base_model: ./base
models:
  - {model: math, parameters: {weight: 0.5, density: 0.5}}
  - {model: base+lora, parameters: {weight: 0.5, density: 0.5}}
tokenizer: {source: math}
architecture: code
"""


def test_every_key_that_names_a_model(place: Path) -> None:
    found = recipes(place, TIES)[0]
    assert found.base_model == "recipes/base"
    assert [model.model for model in found.models] == ["recipes/math", "recipes/base+recipes/lora"]
    assert found.tokenizer is not None and found.tokenizer.source == "recipes/math"
    assert found.architecture == "recipes/code"


def test_what_is_not_beside_the_recipe_stays(place: Path) -> None:
    """Absolute paths, folders of the current folder, names of earlier recipes (even if a folder has it), words."""
    (place.parent / "here").mkdir()
    text = f"""
name: math
merge_method: linear
models: [{{model: {place / "code"}, parameters: {{weight: 1}}}}, {{model: here, parameters: {{weight: 1}}}}]
---
merge_method: linear
models: [{{model: math, parameters: {{weight: 1}}}}, {{model: ../here, parameters: {{weight: 1}}}}]
tokenizer_source: union
"""
    first, second = recipes(place, text)
    assert [model.model for model in first.models] == [str(place / "code"), "here"]
    assert [model.model for model in second.models] == ["math", "here"] and second.tokenizer_source == "union"


def test_nothing_changes_where_the_recipe_is_called(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "recipe.yaml").write_text(TIES)
    monkeypatch.chdir(place)
    assert read_recipes("recipe.yaml")[0].base_model == "./base"


def test_assemblies_of_experts(place: Path) -> None:
    (place / "moe.yaml").write_text("""
base_model: base
gate_mode: random
experts: [{source_model: math}, {source_model: code}]
""")
    found = read_moe_recipe("recipes/moe.yaml")
    assert found is not None and found.base_model == "recipes/base"
    assert [expert.source_model for expert in found.experts] == ["recipes/math", "recipes/code"]


@pytest.mark.parametrize("tokenizer", ["tokenizer_source: base", "tokenizer: {source: base}",
                                       "tokenizer_source: union"])
def test_words_of_the_recipe_are_no_folders(place: Path, tokenizer: str) -> None:
    """A folder beside the recipe may be called base, union or mixtral; a token's source is always a model."""
    (place / "union").mkdir()
    found = recipes(place, f"merge_method: ties\nbase_model: base\nmodels: [{{model: math}}]\n{tokenizer}\n")[0]
    assert found.base_model == "recipes/base"
    assert found.vocabulary is not None and found.vocabulary.source == tokenizer.split(": ")[-1].rstrip("}")
    tokens = recipes(place, "merge_method: linear\nmodels: [{model: math}, {model: base}]\n"
                            "tokenizer: {source: union, tokens: {x: {source: base}}}\n")[0].vocabulary
    assert tokens is not None and tokens.source == "union" and tokens.tokens["x"].source == "recipes/base"
    (place / "mixtral").mkdir()
    (place / "moe.yaml").write_text("base_model: base\ngate_mode: random\narchitecture: mixtral\n"
                                    "experts: [{source_model: math}, {source_model: code}]\n")
    made = read_moe_recipe("recipes/moe.yaml")
    assert made is not None and made.architecture == "mixtral" and made.base_model == "recipes/base"
