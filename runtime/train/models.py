"""Initial weights of a run: from safetensors files, or a random initialisation that every rank repeats alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.models.sources import open_source
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.weights.stored_weights import StoredWeights, parameters_on_meta

_SOURCE_OPTIONS = ("seq", "batch", "dtype", "overrides", "images", "image", "frames", "expert_groups", "freeze")


def initial_weights(graph: OperatorGraph, config: TrainConfig) -> Mapping[str, torch.Tensor]:
    """All parameters and buffers by FQN (tied names share one tensor), before the first step.

    Those of a folder (``weights``) are read one by one when they are asked for; without, the whole model is made.

    Raises:
        InputError: the weights cannot be read, or the graph does not say where its model came from.
    """
    if config.weights:
        return StoredWeights(Path(config.weights), empty_module(graph, config), tied_names(graph))
    torch.manual_seed(config.seed)
    module = build_module(graph, config)
    state = {name: item.detach() for name, item in module.named_parameters(remove_duplicate=False)}
    state.update(dict(module.named_buffers(remove_duplicate=False)))
    return state


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


def build_module(graph: OperatorGraph, config: TrainConfig) -> nn.Module:
    """The model on the CPU, initialised from torch's generator: made again as the graph records, or as ``model`` says.

    Raises:
        InputError: the graph was captured from a module in memory, or its source is not there any more.
    """
    known = {key: graph.source[key] for key in _SOURCE_OPTIONS if key in graph.source}
    if config.model is None and isinstance(graph.source.get("config"), Mapping):
        known["config"] = graph.source["config"]
    return open_source(source_of(graph, config), **known).build("cpu")


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
