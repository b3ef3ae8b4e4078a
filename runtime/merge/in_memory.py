"""Merging state dicts that are in memory, by the same recipes, units and methods as checkpoints on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, StoredTensor
from mipipe.graphs.merging.graph import MergeUnit
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.graphs.merging.recipes.recipe import MergeRecipe
from mipipe.planner.merging.costs import MergeRates
from mipipe.planner.merging.lower import lower_rank
from mipipe.planner.merging.plan import plan_merge
from mipipe.runtime.merge.align import match_experts
from mipipe.runtime.merge.engine import MergeEngine
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.pleas import ordered
from mipipe.runtime.merge.sources import Surroundings
from mipipe.runtime.merge.survey import Survey
from mipipe.runtime.weights.reader import TORCH_DTYPES, Range, Shelf

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def merge_state_dicts(recipe: MergeRecipe | Mapping[str, Any], models: Mapping[str, Mapping[str, Tensor]],
                      config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The merged state dict; the models' tensors are read and never changed.

    Args:
        recipe: its content, or parsed; models are named by the keys of ``models``.
        models: a state dict for every name; tensors on any device, merged where the first is.
        config: a config.json's content, where the merge needs one (fused projections, tied heads).

    Raises:
        InputError: the recipe or a model is wrong, or the recipe needs files (vocabularies, adapters, models to run).
    """
    parsed = recipe if isinstance(recipe, MergeRecipe) else parse_recipe(dict(recipe), "recipe")
    if parsed.vocabulary is not None or parsed.adapter is not None:
        raise InputError("recipe: state dicts in memory have no tokenizers or adapters; leave these keys out")
    known = {label: _described(label, state, config or {}) for label, state in models.items()}
    graph = build(parsed, "recipe", known)
    running = next((unit.method for unit in graph.units if (spec := BY_NAME.get(unit.method)) is not None
                    and (spec.learned or spec.needs(unit.parameters))), None)
    if running is not None:
        raise InputError(f"recipe: {running} runs the models on samples, which state dicts in memory are not enough"
                         " for; merge folders (mipipe.merge)")
    plan = plan_merge(graph, 1, MergeRates(1e9, 1e9, 1e9, 1e9))
    device = next((tensor.device for state in models.values() for tensor in state.values()), torch.device("cpu"))
    around = Surroundings(graph, _MemoryShelf(models), device,
                          {(item.model, unit.name): item for unit in graph.units for item in unit.inputs})
    ranks = MergeRanks.alone()
    if graph.align_experts:
        around = match_experts(around, graph.units, ranks)
    around = ordered(graph, around, None)
    sink = _Collected(graph.units)
    MergeEngine(plan, around, Survey(graph.units, ranks), sink, frozenset()).run(lower_rank(plan, 0))
    return {name: tensor.to(device) for name, tensor in sink.tensors.items()}


def _described(label: str, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> CheckpointFiles:
    """A state dict as if it were a checkpoint; every tensor is a file of its own."""
    tensors = {}
    for name, tensor in state.items():
        if tensor.dtype not in _NAMES:
            raise InputError(f"{label}: tensor {name} has dtype {tensor.dtype}, which cannot be merged")
        tensors[name] = StoredTensor(name, _NAMES[tensor.dtype], tuple(tensor.shape), name, 0, tensor.nbytes)
    return CheckpointFiles(label, dict(config), tensors, "memory")


class _MemoryShelf(Shelf):
    """Rows of tensors that are in memory."""

    def __init__(self, models: Mapping[str, Mapping[str, Tensor]]) -> None:
        super().__init__()
        self._models = models
        self._flat: dict[tuple[str, str], Tensor] = {}

    def open(self, ranges: Sequence[Range]) -> None:
        """Nothing is to be opened."""

    def _read(self, folder: str, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        key = folder, tensor.file
        if key not in self._flat:
            whole = self._models[folder][tensor.file].detach().cpu().contiguous()
            self._flat[key] = whole.reshape(-1).view(torch.uint8)
        return self._flat[key][tensor.start + start:tensor.start + stop]


class _Collected:
    """Where merged tiles go: tensors of their final shapes."""

    def __init__(self, units: Sequence[MergeUnit]) -> None:
        self.tensors = {unit.name: torch.empty(unit.shape, dtype=TORCH_DTYPES[unit.dtype]) for unit in units}

    def write(self, name: str, offset: int, data: Any) -> int:
        """Put the bytes that belong at an offset of a tensor there."""
        raw: Tensor = data.contiguous().cpu().reshape(-1).view(torch.uint8)
        self.tensors[name].reshape(-1).view(torch.uint8)[offset:offset + len(raw)] = raw
        return len(raw)

    def finish(self, name: str) -> None:
        """Nothing is left to do for a tensor."""
