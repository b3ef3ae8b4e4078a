"""A LoRA adapter extracted from whole models: the merge's change of every matrix, cut to few singular directions.

With one model and ``merge_method: task_arithmetic`` it is the adapter that stands for a fine-tune; with several it is
their merge. What is no matrix of a linear layer and changed (norms, embeddings, heads, biases) is stored whole, as PEFT
stores ``modules_to_save``. The best approximation of a rank in the Frobenius norm keeps the largest singular values
(Eckart and Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.graph import MergeGraph, MergeUnit
from mipipe.graphs.merging.method_table.method_spec import Scope
from mipipe.graphs.merging.participants import TOKEN_TABLES, tied_head
from mipipe.graphs.merging.passes import scope_of
from mipipe.graphs.merging.recipes.recipe import AdapterRule
from mipipe.runtime.merge.finite import as_stored, refuse_infinite
from mipipe.runtime.merge.methods.method import merge_piece
from mipipe.runtime.merge.methods.registry import BY_METHOD
from mipipe.runtime.merge.methods.spectral import svd
from mipipe.runtime.merge.sources import Surroundings, unit_pieces
from mipipe.runtime.merge.survey import unit_values
from mipipe.runtime.weights.reader import TORCH_DTYPES, Shelf


@dataclass
class Extracted:
    """An adapter's tensors, its config, ranks by module, and squared norms of all changes and of what was lost."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    whole: float = 0.0
    lost: float = 0.0

    def config(self, base: str) -> dict[str, Any]:
        """adapter_config.json: a scale of 1 for every module, whatever its rank."""
        largest = max(self.ranks.values())
        other = {module: rank for module, rank in self.ranks.items() if rank != largest}
        modules = sorted({name.removesuffix(".weight") for name in self.saved if name.endswith(".weight")})
        return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": largest,
                "lora_alpha": largest, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
                "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
                "bias": "all" if any(name.endswith("bias") for name in self.saved) else "none",
                "target_modules": sorted(self.ranks), "modules_to_save": modules or None, "rank_pattern": other,
                "alpha_pattern": dict(other)}


def extract(graph: MergeGraph, rule: AdapterRule) -> Extracted:
    """The adapter of a graph's merge.

    Raises:
        InputError: a method without a base or with statistics of several tensors, matrices stored transposed, other
            shapes than the base's, or a merge that changes no matrix.
        RunError: values that are not finite, or that the dtype cannot hold.
    """
    found = Extracted()
    tied = not any(unit.tensor_class is TensorClass.HEAD for unit in graph.units)
    with Shelf() as shelf, torch.no_grad():
        around = Surroundings(graph, shelf, torch.device("cpu"))
        for unit in graph.units:
            if unit.method == "copy":
                continue
            _check(unit)
            merged, base = _merged(unit, around)
            refuse_infinite(unit.name, merged)
            delta = merged - base
            if not bool(delta.any()):
                continue
            dtype = TORCH_DTYPES[unit.dtype]
            if unit.tensor_class is not TensorClass.MATRIX or len(unit.shape) != 2:
                saved = [unit.name]
                if tied and unit.name.endswith(TOKEN_TABLES):  # PEFT does not tie what it saves
                    saved.append(tied_head(unit.name))
                found.saved += saved
                for name in saved:
                    value = as_stored(unit.name, merged.reshape(unit.shape), dtype)
                    found.tensors[f"base_model.model.{name}"] = value
                continue
            up, down, total, lost = factors(delta, rule)
            found.whole, found.lost = found.whole + total, found.lost + lost
            module = unit.name.removesuffix(".weight")
            found.ranks[module] = len(down)
            found.tensors[f"base_model.model.{module}.lora_A.weight"] = as_stored(unit.name, down, dtype)
            found.tensors[f"base_model.model.{module}.lora_B.weight"] = as_stored(unit.name, up, dtype)
    for name in found.saved:
        module, _, end = name.rpartition(".")
        if end == "bias" and module in found.ranks:  # PEFT's wrapper has the module inside it
            found.tensors[f"base_model.model.{module}.base_layer.bias"] = found.tensors.pop(f"base_model.model.{name}")
    if not found.ranks:
        raise InputError("adapter: the merge changes no matrix of the base, so there is no adapter to make")
    _even_experts(found)
    return found


def _even_experts(found: Extracted) -> None:
    """Rows and columns of zeros up to the largest rank for experts and their router.

    transformers joins the experts of a block and renames it on loading, where ``rank_pattern`` does not follow.
    """
    largest = max(found.ranks.values())
    blocks = tuple({module[:module.index(".experts.") + 1] for module in found.ranks if ".experts." in module})
    for module in [module for module in found.ranks if module.startswith(blocks)] if blocks else ():
        for part in "AB":
            name = f"base_model.model.{module}.lora_{part}.weight"
            more = largest - found.ranks[module]
            found.tensors[name] = torch.nn.functional.pad(found.tensors[name], (0, more) if part == "B" else
                                                          (0, 0, 0, more))
        found.ranks[module] = largest


def factors(delta: Tensor, rule: AdapterRule) -> tuple[Tensor, Tensor, float, float]:
    """``[m, r]`` and ``[r, n]`` of a change, its squared norm, and how much of that they lack.

    The rank is the smallest that keeps ``rule.energy`` of the squared norm, and at most ``rule.rank``.
    """
    left, values, right = svd(delta)
    energies = values.double().square()
    total = float(energies.sum())
    rank = rule.rank or len(values)
    if rule.energy is not None:
        kept = energies.cumsum(0) >= rule.energy * total * (1 - 1e-12)
        rank = min(rank, int(kept.int().argmax()) + 1)
    rank = min(rank, len(values))
    root = values[:rank].sqrt()
    return left[:, :rank] * root, right[:rank] * root[:, None], total, float(energies[rank:].sum())


def _check(unit: MergeUnit) -> None:
    if unit.base is None:
        raise InputError(f"adapter: {unit.method} does not work on task vectors; take task_arithmetic, or another"
                         " method with a base")
    if scope_of(unit) is not Scope.PIECE:
        raise InputError(f"adapter: {unit.method} takes statistics of several tensors, which is not supported here")
    if unit.transposed or unit.vocabulary or unit.crop:
        raise InputError(f"adapter: {unit.name} is stored transposed or has another shape than the base's, which an"
                         " adapter cannot stand for")


def _merged(unit: MergeUnit, around: Surroundings) -> tuple[Tensor, Tensor]:
    """A unit's merged tensor and its base, as tables."""
    method, values = BY_METHOD[unit.method].handling(unit.tensor_class), unit_values(unit)
    pieces = unit_pieces(unit, around)
    merged = torch.cat([tile for piece in pieces for tile in merge_piece(method, piece, values)])
    base = torch.cat([tile.origin for piece in pieces for tile in piece.tiles(whole=True)])
    return merged, base


def is_whole(graph: MergeGraph) -> bool:
    """Whether some model of a graph is no adapter of the base."""
    return any(len({item.folder for item in unit.inputs}) > 1 for unit in graph.units)
