"""Initial weights of a run: from safetensors files, or a random initialisation that a process of each host makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.models.sources import open_source
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes.adapters import initial, is_adapter
from mipipe.graphs.recipes.expansion import first_value, is_expansion
from mipipe.graphs.recipes.importance import MASK, is_light
from mipipe.graphs.recipes.objective import REFERENCE
from mipipe.graphs.recipes.options import LossConfig, RecipeConfig
from mipipe.graphs.recipes.source import recipe_of, with_recipe
from mipipe.runtime.ranks.processes import world
from mipipe.runtime.recipes.light import CutWeights, cuts_in, first_stage, is_second
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.weights.host_weights import HostWeights
from mipipe.runtime.weights.stored_weights import StoredWeights, parameters_on_meta

SOURCE_OPTIONS = ("seq", "batch", "dtype", "overrides", "images", "image", "frames", "expert_groups", "freeze")


def initial_weights(graph: OperatorGraph, config: TrainConfig) -> Mapping[str, torch.Tensor]:
    """All parameters and buffers by FQN (tied names share one tensor), before the first step.

    Those of a folder (``weights``) are read one by one when they are asked for; without, the whole model is made.

    Raises:
        InputError: the weights cannot be read, or the graph does not say where its model came from.
    """
    recipe = recipe_of(graph)
    if is_second(graph):
        assert recipe.adapters is not None and recipe.adapters.light is not None
        before = first_stage(graph)
        return CutWeights(initial_weights(before, config), Path(recipe.adapters.light.folder),
                          cuts_in(graph, empty_module(before, config)))
    if config.weights:
        module = empty_module(graph, config)
        frozen = take_reference(module)
        stored = StoredWeights(Path(config.weights), module, tied_names(graph))
        if not recipe:
            return stored
        return _layered(graph, config, module, frozen, stored)
    torch.manual_seed(config.seed)
    module = build_module(graph, config)
    frozen = take_reference(module)
    base = {name: item.detach() for name, item in module.named_parameters(remove_duplicate=False)}
    base.update(dict(module.named_buffers(remove_duplicate=False)))
    return base if not recipe else _layered(graph, config, module, frozen, base)


def weights_for_host(graph: OperatorGraph, config: TrainConfig) -> Mapping[str, torch.Tensor] | HostWeights:
    """`initial_weights` for all processes of this host, which all call it: those of a folder each reads for itself, a
    random initialisation the first one makes for all."""
    if config.weights or world() == 1:
        return initial_weights(graph, config)
    torch.manual_seed(config.seed)
    return HostWeights(partial(initial_weights, graph, config), config.timeout_s)


def _layered(graph: OperatorGraph, config: TrainConfig, module: nn.Module, frozen: nn.Module | None,
             base: Mapping[str, torch.Tensor]) -> LayeredWeights:
    """The model's weights with what a recipe adds to them."""
    reference = {} if frozen is None else _reference_weights(graph, config, frozen, base)
    adapters = recipe_of(graph).adapters
    made = {} if adapters is None else {
        name: initial(name, item, adapters, config.seed, base.__getitem__)
        for name, item in module.named_parameters() if is_adapter(name)}
    made |= {name: first_value(name, item) for name, item in module.named_parameters() if is_expansion(name)}
    made |= {name: torch.full(item.shape, float(name.endswith(MASK)), dtype=item.dtype)
             for name, item in module.named_parameters() if is_light(name)}
    return LayeredWeights(base, reference, made)


class LayeredWeights(Mapping[str, torch.Tensor]):
    """The weights of a model, ``base``, with those of its frozen reference and of its adapters."""

    def __init__(self, base: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor],
                 adapters: Mapping[str, torch.Tensor]) -> None:
        self.base, self.reference, self.adapters = base, reference, adapters

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.adapters:
            return self.adapters[name]
        own = name.removeprefix(f"{REFERENCE}.")
        return self.base[name] if own == name else self.reference[own]

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self.base if name not in self.adapters)
        yield from self.adapters
        yield from (f"{REFERENCE}.{name}" for name in self.reference)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def take_reference(module: nn.Module) -> nn.Module | None:
    """The frozen model in a module, taken out of it; None where there is none."""
    found = getattr(module, REFERENCE, None)
    if isinstance(found, nn.Module):
        delattr(module, REFERENCE)
        return found
    return None


def _reference_weights(graph: OperatorGraph, config: TrainConfig, module: nn.Module,
                       own: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The frozen model's weights: of its folder, or those that training starts from.

    Raises:
        InputError: no folder has them.
    """
    given = config.reference or recipe_of(graph).reference
    assert given is not None
    folder = given.weights or (None if given.model == "self" else given.model)
    if folder is None:
        return own
    if not Path(folder).exists():
        raise InputError(f"train config: reference: {folder}: no such folder")
    return StoredWeights(Path(folder), module, {})


def check_recipe(graph: OperatorGraph, config: TrainConfig) -> None:
    """Raise `InputError` where a run's file wants another loss or reference than its graph has."""
    wanted, has = config.recipe, recipe_of(graph)
    for what in ("loss", "reference", "adapters", "router", "expand"):
        one, other = getattr(wanted, what), getattr(has, what)
        if what == "reference" and one is not None and other is not None:
            one, other = one.model, other.model
        if (one is None and what == "loss") or one == other:
            continue
        raise InputError(f"train config: {what}: found {_told(one)}, but the graph was captured with {_told(other)};"
                         " capture it again with --config, and plan again")


def _told(item: object) -> str:
    return "none" if item is None else shown(str(getattr(item, "name", item)), quoted=False, most=300) \
        + (f" {item.options or ''}" if isinstance(item, LossConfig) else "")


def tied_names(graph: OperatorGraph) -> dict[str, tuple[str, ...]]:
    """The other names of every tied parameter, by its first."""
    found: dict[str, tuple[str, ...]] = {}
    for item in graph.parameters:
        if item.tied_to is not None:
            found[item.tied_to] = (*found.get(item.tied_to, ()), item.fqn)
    return found


def empty_module(graph: OperatorGraph, config: TrainConfig) -> nn.Module:
    """The model with its parameters on the meta device and its buffers filled."""
    handle = register_module_parameter_registration_hook(parameters_on_meta)  # type: ignore[arg-type]
    try:
        return build_module(graph, config)
    finally:
        handle.remove()


def plain_module(graph: OperatorGraph, config: TrainConfig) -> nn.Module:
    """`empty_module` without what a recipe adds."""
    source = {name: item for name, item in graph.source.items() if name not in ("recipe", "light_kept")}
    return empty_module(replace(graph, source=source), config)


def build_module(graph: OperatorGraph, config: TrainConfig) -> nn.Module:
    """The model on the CPU, initialised from torch's generator: made again as the graph records, or as ``model`` says.

    Raises:
        InputError: the graph was captured from a module in memory, or its source is not there any more.
    """
    known = {key: graph.source[key] for key in SOURCE_OPTIONS if key in graph.source}
    if config.model is None and isinstance(graph.source.get("config"), Mapping):
        known["config"] = graph.source["config"]
    opened = open_source(source_of(graph, config), **known)
    recipe = recipe_of(graph)
    if recipe != RecipeConfig(recipe.loss):
        opened = with_recipe(opened, recipe, graph.source, with_loss=False)
    return opened.build("cpu")


def source_of(graph: OperatorGraph, config: TrainConfig) -> str:
    """Where the model comes from: what the person who trains names, else the folder or class that the graph records.

    A graph is data from anywhere: code that it names is not called until somebody names it too.

    Raises:
        InputError: the graph was captured from a module in memory, or from code that nobody has named yet.
    """
    if config.model is not None:
        return config.model
    source = graph.source.get("source")
    if isinstance(source, str) and ":" in source:
        raise InputError(f"graph of {graph.model}: was captured from {shown(source)}, code that a file may not call by"
                         f" itself; if you trust it, name it: mipipe train --model {shown(source, quoted=False)} (or"
                         " 'model' in the train config)")
    if not isinstance(source, str):
        raise InputError(f"graph of {graph.model}: captured from a module in memory, so its weights are unknown; set"
                         " 'model' in the train config to package.module:factory")
    return source
