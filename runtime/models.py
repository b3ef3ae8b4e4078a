"""Initial weights of a run: from safetensors files, or a random initialisation that every rank repeats alike."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.sources import open_source
from mipipe.runtime.config import TrainConfig

_SOURCE_OPTIONS = ("seq", "batch", "dtype", "overrides", "images", "image", "expert_groups", "freeze")


def initial_weights(graph: OperatorGraph, config: TrainConfig) -> dict[str, torch.Tensor]:
    """All parameters and buffers by FQN (tied names share one tensor), before the first step.

    Raises:
        InputError: the weights cannot be read, or the graph does not say where its model came from.
    """
    torch.manual_seed(config.seed)
    module = build_module(graph, config)
    state = {name: item.detach() for name, item in module.named_parameters(remove_duplicate=False)}
    state.update(dict(module.named_buffers(remove_duplicate=False)))
    if config.weights:
        state.update(read_safetensors(Path(config.weights)))
    return state


def build_module(graph: OperatorGraph, config: TrainConfig) -> nn.Module:
    """The model on the CPU, initialised from torch's generator: made again as the graph records, or as ``model`` says.

    Raises:
        InputError: the graph was captured from a module in memory, or its source is not there any more.
    """
    known = {key: graph.source[key] for key in _SOURCE_OPTIONS if key in graph.source}
    source = config.model or graph.source.get("source")
    if source is None:
        raise InputError(f"graph of {graph.model}: captured from a module in memory, so its weights are unknown; set"
                         " 'model' in the train config to package.module:factory")
    return open_source(source, **known).build("cpu")


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files in a folder (or of one file), by name.

    Raises:
        InputError: there is no such file.
    """
    from safetensors import safe_open
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"weights: {folder} holds no .safetensors file")
    state: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as stream:
            names = stream.keys()
            state.update({name: stream.get_tensor(name) for name in names})
    return state
