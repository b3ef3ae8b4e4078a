"""A model with a recipe: what `open_source` gives, with another loss, a frozen reference, and what a batch needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import GraphError, InputError
from mipipe.graphs.models import configuration, families
from mipipe.graphs.models.sources import ModelSource
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes.adapters import adapt
from mipipe.graphs.recipes.expansion import expand, read_pairs
from mipipe.graphs.recipes.importance import add_masks, add_probes
from mipipe.graphs.recipes.lightening import KeptUnits, lighten
from mipipe.graphs.recipes.objective import REFERENCE, RecipeLoss
from mipipe.graphs.recipes.options import LossConfig, RecipeConfig, ReferenceConfig
from mipipe.graphs.recipes.routers import RouterConfig, freeze_routers, with_z_loss
from mipipe.graphs.serialize import from_data, load, load_data, to_data


def with_recipe(source: ModelSource, recipe: RecipeConfig, recorded: Mapping[str, Any] | None = None,
                with_loss: bool = True) -> ModelSource:
    """The source of a model with what a recipe adds.

    ``recorded``: the record of a source that was made so before; what it holds (the configuration of the frozen model,
    the pairs of an expansion) is not read from files again.
    ``with_loss``: no, where only the modules matter: a loss may be code, which no file calls by its name.

    Raises:
        InputError: the model is none that the recipe goes with.
    """
    if source.task is None and (recipe.loss or recipe.reference or recipe.router):
        raise InputError(f"{source.record['source']}: a factory returns its loss itself; another loss, or a reference,"
                         " goes with transformers models")
    record = {**source.record, "recipe": to_data(recipe)}
    recorded = recorded or {}
    loss, data = source.loss, dict(recorded.get("reference_config", {}))
    pairs: Any = recorded.get("expand_pairs", {})
    if recipe.expand is not None:
        pairs = pairs or read_pairs(recipe.expand.votes)
        record["expand_pairs"] = {name: [list(side) for side in sides] for name, sides in pairs.items()}
    kept = _kept(recipe, recorded)
    if kept is not None:
        record["light_kept"] = to_data(kept)
    if recipe.reference is not None and recipe.reference.model != "self":
        data = data or _configuration(recipe.reference)
        record["reference_config"] = data
    if (recipe.loss is not None or recipe.router is not None) and with_loss:
        loss = _loss_of(source, recipe)

    def build(device: str) -> nn.Module:
        made = source.build(device)
        if recipe.adapters is not None:
            adapt(made, recipe.adapters)
            if kept is not None:
                lighten(made, kept)
            elif recipe.adapters.light is not None:
                add_masks(add_probes(made))
        if recipe.expand is not None:
            expand(made, pairs, device)
        if recipe.router is not None and recipe.router.freeze:
            freeze_routers(made)
        if recipe.router is not None and recipe.router.z:
            with_z_loss(made)
        if recipe.reference is not None:
            made.add_module(REFERENCE, _frozen(source, recipe.reference, data, device))
        return loss.prepare(made) if isinstance(loss, RecipeLoss) else made

    def inputs(device: str) -> dict[str, Tensor]:
        return {**source.inputs(device), **(loss.extra_inputs(device) if isinstance(loss, RecipeLoss) else {})}

    changed: dict[str, Any] = {"build": build, "inputs": inputs, "record": record}
    if isinstance(loss, RecipeLoss):
        changed |= {"loss": loss, "loss_info": loss.info, "withheld": loss.withheld, "constants": loss.constants}
    return replace(source, **changed)


def _loss_of(source: ModelSource, recipe: RecipeConfig) -> RecipeLoss:
    """The loss that a recipe names; the model's own where it only says something of routers.

    Raises:
        InputError: the model is no language model.
    """
    task, ids = source.task, source.inputs("meta").get("labels")
    wanted, router = recipe.loss or LossConfig("cross_entropy"), recipe.router or RouterConfig(freeze=True)
    if task is None or task.kind != "language" or ids is None:
        raise InputError(f"loss {wanted.name}: goes with language models, which give logits for every token;"
                         f" {source.name} is none")
    balance = task.coefficient if router.balance is None else router.balance
    constants = {**task.constants, **({"output_router_logits": True} if router.balance else {})}
    real = torch.float64 if source.record["dtype"] == "float64" else torch.float32
    return RecipeLoss(wanted, task.shift, ids.shape[0], ids.shape[1], balance, task.sharpness, router.z, constants,
                      recipe.reference is not None, real)


def recipe_of(graph: OperatorGraph) -> RecipeConfig:
    """What a graph was captured with.

    Raises:
        GraphError: the graph's record of it is none.
    """
    data = graph.source.get("recipe")
    if data is None:
        return RecipeConfig()
    if not isinstance(data, Mapping):
        raise GraphError(f"graph of {graph.model}: its record of a recipe is a {type(data).__name__}; capture it again")
    return from_data(dict(data), RecipeConfig, f"graph of {graph.model}, recipe")


def _kept(recipe: RecipeConfig, recorded: Mapping[str, Any]) -> KeptUnits | None:
    """What a second stage of Light-PEFT keeps; None in other graphs."""
    light = None if recipe.adapters is None else recipe.adapters.light
    if light is None or not light.second:
        return None
    if "light_kept" in recorded:
        return from_data(dict(recorded["light_kept"]), KeptUnits, "graph, light_kept")
    return load(Path(light.folder) / KEPT, KeptUnits)


KEPT, STAGE = "kept.json", "adapters.safetensors"
"""What a first stage of Light-PEFT leaves: its decisions, and its adapters before anything is cut."""


def _configuration(reference: ReferenceConfig) -> dict[str, Any]:
    """What the ``config.json`` of the frozen model's folder holds."""
    file = configuration.config_file(reference.model)
    if file is None:
        raise InputError(f"reference: {reference.model} has no config.json; expected 'self' or a folder with one")
    return dict(configuration.as_written(load_data(file, foreign=True)))


def _frozen(source: ModelSource, reference: ReferenceConfig, data: Mapping[str, Any], device: str) -> nn.Module:
    """The reference model: nothing in it trains, and it computes without dropout."""
    if reference.model == "self":
        made = source.build(device)
    else:
        config = configuration.read_model_config(Path(reference.model), {}, dict(data))
        made = families.build_model(config, device, getattr(torch, str(source.record["dtype"])))
    return made.eval().requires_grad_(False)
