"""The recipes of the documentation's cookbook: each is read by `mipipe merge`'s own parser, and shown on its page."""

from pathlib import Path

import pytest

from mipipe.graphs.converting.recipe import METHODS, read_convert_recipe
from mipipe.graphs.merging.method_table.methods import RECIPE_NAMES
from mipipe.graphs.merging.moe_recipe import read_moe_recipe
from mipipe.graphs.merging.recipes.read import read_recipes

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPES = sorted((DOCS / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_parses_and_is_shown(path):
    if path.stem in ("mixture-from-dense", "mixture-with-shared-expert"):
        found = read_moe_recipe(path)
        assert found is not None and len(found.experts) == 2
    else:
        recipes = read_recipes(path)
        assert recipes and all(recipe.merge_method in RECIPE_NAMES for recipe in recipes)
    assert f'--8<-- "recipes/{path.name}"' in (DOCS / "recipes.md").read_text()


def test_every_conversion_has_a_recipe():
    recipes = {read_convert_recipe(path).METHOD: path for path in (DOCS / "recipes" / "convert").glob("*.yaml")}
    assert set(recipes) == set(METHODS)
    page = (DOCS / "converting.md").read_text()
    assert all(f'--8<-- "recipes/convert/{path.name}"' in page for path in recipes.values())


def test_the_cookbook_is_there():
    assert len(RECIPES) >= 24
