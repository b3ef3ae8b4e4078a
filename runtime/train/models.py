"""Initial weights of a run: from safetensors files, or a random initialisation that every rank repeats alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mipipe.graphs.errors import InputError
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
    source = config.model or graph.source.get("source")
    if config.model is None and isinstance(graph.source.get("config"), Mapping):
        known["config"] = graph.source["config"]
    if source is None:
        raise InputError(f"graph of {graph.model}: captured from a module in memory, so its weights are unknown; set"
                         " 'model' in the train config to package.module:factory")
    return open_source(source, **known).build("cpu")
