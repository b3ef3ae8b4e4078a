"""Merge recipes read from the YAML people write, and checked to the last key.

A file holds one recipe, or several separated by ``---``: each but the last has a ``name`` that later ones may use in
place of a model's path. Nothing unknown is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from mipipe.graphs.calibration.rule import check_calibration
from mipipe.graphs.errors import InputError
from mipipe.graphs.expressions import check_expression, substitute
from mipipe.graphs.merging.method_table.method_spec import Base
from mipipe.graphs.merging.method_table.methods import BY_NAME, RECIPE_NAMES
from mipipe.graphs.merging.recipes.forms import normal_form
from mipipe.graphs.merging.recipes.paths import beside_recipe
from mipipe.graphs.merging.recipes.recipe import (
    DTYPES,
    AdapterRule,
    Branch,
    MergeRecipe,
    NameRule,
    Parameters,
    RecipeModel,
    RecipeSlice,
    merged_models,
    same_model,
)
from mipipe.graphs.merging.recipes.value_checks import check_parameters
from mipipe.graphs.merging.tokens.chat_templates import NAMED
from mipipe.graphs.merging.tokens.tokenizer_rule import check_tokenizer_rule
from mipipe.graphs.serialize import from_data, yaml_documents


def read_recipes(path: str | Path) -> list[MergeRecipe]:
    """The recipes of a YAML file, in the order in which they run.

    Raises:
        InputError: no YAML, an unknown key, method or parameter, a value out of range, a missing or needless base.
    """
    documents = beside_recipe(yaml_documents(path), path)
    if not documents:
        raise InputError(f"{path}: is empty; expected a recipe with merge_method and models")
    recipes = [parse_recipe(item, f"{path}" if len(documents) == 1 else f"{path}, recipe {number}")
               for number, item in enumerate(documents, 1)]
    _check_names(recipes, path)
    unnamed = [number for number, recipe in enumerate(recipes[:-1], 1) if not recipe.name]
    if unnamed:
        raise InputError(f"{path}, recipe {unnamed[0]}: has no name, so no later recipe can use it; only the last may"
                         " go without")
    early = [recipe.name for recipe in recipes[:-1] if recipe.adapter is not None]
    if early:
        raise InputError(f"{path}: recipe {early[0]} makes an adapter; only the last recipe of a file may")
    return recipes


def _check_names(recipes: Sequence[MergeRecipe], path: str | Path) -> None:
    names = [recipe.name for recipe in recipes if recipe.name]
    for place, name in enumerate(names):
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"{path}: name: found {name!r}, expected letters, digits, dots and dashes")
        if name in names[:place]:
            raise InputError(f"{path}: two recipes have the name {name}")


def parse_recipe(data: Any, where: str) -> MergeRecipe:
    """A checked recipe from plain data; ``where`` opens error messages."""
    if not isinstance(data, dict):
        raise InputError(f"{where}: found a {type(data).__name__}, expected a mapping with merge_method and models")
    recipe = from_data(normal_form(data, where), MergeRecipe, where)
    if bool(recipe.models) == bool(recipe.slices):
        found = "both models and slices" if recipe.models else "neither models nor slices"
        raise InputError(f"{where}: has {found}; expected one of them")
    for key, value in (("dtype", recipe.dtype), ("out_dtype", recipe.out_dtype)):
        if value is not None and value not in DTYPES:
            raise InputError(f"{where}: {key}: found {value!r}, expected one of {', '.join(DTYPES)}")
    if recipe.chat_template not in (None, "auto", *NAMED) and not re.search(r"\{[{%]", str(recipe.chat_template)):
        raise InputError(f"{where}: chat_template: found {recipe.chat_template!r}, expected auto (the one most of the"
                         f" models have), {', '.join(NAMED)}, or the text of a Jinja template")
    if recipe.tokenizer_source is not None and recipe.tokenizer is not None:
        raise InputError(f"{where}: has both tokenizer_source and tokenizer; give tokenizer a source")
    if recipe.vocabulary is not None:
        check_tokenizer_rule(recipe.vocabulary, where)
    if recipe.adapter is not None:
        _check_adapter_rule(recipe, recipe.adapter, where)
    _check_calibration(recipe, where)
    for rules in (recipe.base_names, *(model.names for model in recipe.models)):
        _check_name_rules(rules, where)
    base = recipe.base_model or next((piece.base_model for piece in recipe.slices if piece.base_model), None)
    _check_method(recipe.merge_method, recipe.models, base, recipe.parameters, where)
    for number, piece in enumerate(recipe.slices):
        _check_slice(recipe, piece, f"{where}: slices[{number}]")
    for number, branch in enumerate(recipe.branches):
        _check_branch(recipe, branch, f"{where}: branches[{number}]")
    return recipe


def _check_calibration(recipe: MergeRecipe, where: str) -> None:
    own = [model.calibration for model in recipe.models if model.calibration]
    if recipe.calibration is None:
        if own:
            raise InputError(f"{where}: calibration of a model: found {own[0]!r}, expected the recipe to have a"
                             " calibration too (calibration: {samples: 100}), or none")
        return
    check_calibration(recipe.calibration, own, where)
    if recipe.slices or recipe.vocabulary is not None or recipe.align is not None or recipe.adapter is not None:
        raise InputError(f"{where}: calibration runs whole models of one shape and vocabulary; leave out slices,"
                         " tokenizer, align and adapter")


def _check_name_rules(rules: Literal["auto"] | tuple[NameRule, ...], where: str) -> None:
    for rule in rules if rules != "auto" else ():
        try:
            substitute(rule.source, rule.target, "")
        except (re.error, OverflowError, RecursionError, IndexError) as error:
            raise InputError(f"{where}: names: from {rule.source!r} to {rule.target!r} is no substitution of regular"
                             f" expressions: {error}") from None


def _check_adapter_rule(recipe: MergeRecipe, rule: AdapterRule, where: str) -> None:
    if rule.rank is not None and rule.rank < 1:
        raise InputError(f"{where}: adapter: rank: found {rule.rank}, expected at least 1")
    if rule.energy is not None and not 0 < rule.energy <= 1:
        raise InputError(f"{where}: adapter: energy: found {rule.energy}, expected a share above 0, up to 1")
    if recipe.slices or recipe.branches or recipe.vocabulary is not None or recipe.align is not None:
        raise InputError(f"{where}: adapter keeps adapters of one base low-rank; leave out slices, branches, tokenizer"
                         " and align")
    if recipe.base_model is None:
        raise InputError(f"{where}: adapter needs a base_model, the model that the adapters are of")


def _check_slice(recipe: MergeRecipe, piece: RecipeSlice, where: str) -> None:
    if not piece.sources:
        raise InputError(f"{where}: has no sources; expected models with a layer_range")
    lengths = set()
    for source in piece.sources:
        if source.layer_range is None:
            raise InputError(f"{where}: source {source.model} has no layer_range; expected [first, last + 1]")
        first, last = source.layer_range
        if not 0 <= first < last:
            raise InputError(f"{where}: layer_range [{first}, {last}] of {source.model}: expected 0 <= first < last")
        lengths.add(last - first)
    if len(lengths) > 1:
        raise InputError(f"{where}: its sources have {' and '.join(map(str, sorted(lengths)))} layers; expected equal"
                         " numbers")
    _check_method(recipe.merge_method, piece.sources, piece.base_model or recipe.base_model, piece.parameters, where)


def _check_branch(recipe: MergeRecipe, branch: Branch, where: str) -> None:
    check_expression(branch.tensors, f"{where}: tensors")
    if branch.merge_method != "drop":
        _check_method(branch.merge_method, branch.models or recipe.models, branch.base_model or recipe.base_model,
                      branch.parameters, where)


def _check_method(name: str, models: Sequence[RecipeModel], base: str | None, shared: Parameters, where: str) -> None:
    if name not in RECIPE_NAMES:
        raise InputError(f"{where}: merge_method: found {name!r}, expected one of {', '.join(RECIPE_NAMES)}")
    spec = BY_NAME[name]
    check_parameters(spec, shared, f"{where}: parameters")
    for model in models:
        check_parameters(spec, model.parameters, f"{where}: parameters of {model.model}", own=True)
    if spec.base is Base.REQUIRED and base is None:
        raise InputError(f"{where}: {name} works on task vectors and needs a base_model")
    if not models:
        return
    others = [model for model in models if not same_model(model, base)]
    count = len(merged_models(spec, models, base, [shared]))
    low, high = spec.min_models, spec.max_models
    if count < low or (high is not None and count > high):
        expected = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        raise InputError(f"{where}: {name} merges {expected} model{'' if high == 1 else 's'}, found {count}"
                         + ("" if len(others) == len(models) else " (the base is not counted)"))
