"""Merges that become LoRA adapters: of adapters, whose result stays low-rank, and of whole models (`extract`).

Linear methods join the factors, ``sum_i w_i s_i B_i A_i = [w_1 s_1 B_1 ... w_T s_T B_T] [A_1; ...; A_T]``, which is
exact at rank ``sum r_i``; averaging A and B apart would add cross terms ``B_i A_j``. Other methods on task vectors
merge the products, and the result is cut to the wanted rank: the best approximation of that rank in the Frobenius
norm (Eckart and Young, 1936).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import read_checkpoint
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeUnit, pieces_of
from mipipe.graphs.merging.method_table.method_spec import Base, Scope
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.passes import scope_of
from mipipe.graphs.merging.recipes.recipe import AdapterRule
from mipipe.graphs.serialize import write_text
from mipipe.runtime.merge.finite import as_stored, refuse_infinite
from mipipe.runtime.merge.methods.method import merge_tensors
from mipipe.runtime.merge.methods.registry import BY_METHOD
from mipipe.runtime.merge.methods.spectral import svd
from mipipe.runtime.merge.output.card import graph_card
from mipipe.runtime.merge.programs.extract import extract
from mipipe.runtime.weights import durable
from mipipe.runtime.weights.reader import TORCH_DTYPES, Shelf
from mipipe.runtime.weights.writer import partial_folder

LINEAR = ("linear", "task_arithmetic")
NOT_OF_DELTAS = ("widen",)
"""Methods with a base whose result depends on more than the task vectors."""


@dataclass(frozen=True, slots=True)
class KeptAdapter:
    """A written adapter: ranks by module, bytes, and the share of the squared norm of the merged deltas it has."""

    ranks: dict[str, int]
    num_bytes: int
    kept: float


def keep_adapters(graph: MergeGraph, rank: int | None, out: Path) -> KeptAdapter:
    """Write the merge of a graph whose models are all adapters of its base as an adapter, in a new folder.

    Args:
        rank: largest rank of the result; None: as large as it takes to be exact, for linear methods.

    Raises:
        InputError: a model that is no adapter, a method that cannot be kept low-rank, no rank where one is needed.
        RunError: values that are not finite, or that the dtype cannot hold.
    """
    units = [unit for unit in graph.units if any(item.adapters for item in unit.inputs)]
    if not units:
        raise InputError("adapter: none of the models is a LoRA adapter, so there is nothing to keep low-rank")
    for unit in graph.units:
        _check(graph, unit, rank)
    _check_free(out)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    whole = lost = 0.0
    with Shelf() as shelf, torch.no_grad():
        for unit in units:
            up, down = _merged(unit, graph, shelf)
            refuse_infinite(unit.name, up)
            refuse_infinite(unit.name, down)
            total = float((up.T @ up @ (down @ down.T)).trace())
            up, down = truncate(up, down, min(rank or len(down), len(down), *unit.shape))
            whole, lost = whole + total, lost + max(0.0, total - float((up.T @ up @ (down @ down.T)).trace()))
            module = unit.name.removesuffix(".weight")
            ranks[module] = len(down)
            dtype = TORCH_DTYPES[unit.dtype]
            tensors[f"base_model.model.{module}.lora_A.weight"] = as_stored(unit.name, down, dtype)
            tensors[f"base_model.model.{module}.lora_B.weight"] = as_stored(unit.name, up, dtype)
    _write(graph, tensors, _config(units, ranks), out)
    return KeptAdapter(ranks, sum(value.nbytes for value in tensors.values()), 1.0 - lost / whole if whole else 1.0)


def extract_adapter(graph: MergeGraph, rule: AdapterRule, out: Path) -> KeptAdapter:
    """Write the merge of a graph of whole models as an adapter of its base, in a new folder.

    Raises:
        InputError: no rank or energy, or what `mipipe.runtime.merge.programs.extract.extract` raises.
    """
    if rule.rank is None and rule.energy is None:
        raise InputError("adapter: the change of whole models has full rank; give adapter a rank, or an energy such as"
                         " 0.9, the share of the squared norm to keep")
    _check_free(out)
    found = extract(graph, rule)
    base = next(unit.base for unit in graph.units if unit.base is not None)
    _write(graph, found.tensors, found.config(graph.models[base.model].label), out)
    return KeptAdapter(found.ranks, sum(value.nbytes for value in found.tensors.values()),
                       1.0 - found.lost / found.whole)


def _check_free(out: Path) -> None:
    if out.exists() or partial_folder(out).exists():
        raise InputError(f"{out}: exists already (or its .partial folder does); give another -o, or remove it")


def _write(graph: MergeGraph, tensors: dict[str, Tensor], config: dict[str, object], out: Path) -> None:
    """Make the adapter's folder, whole or not at all."""
    folder = partial_folder(out)
    folder.mkdir(parents=True)
    try:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "README.md", graph_card(graph, out.name, len(tensors)))
        durable.publish(folder, out, list(folder.iterdir()))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def truncate(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``up @ down`` (``[m, r]``, ``[r, n]``) of a rank; themselves if they fit."""
    if rank >= len(down):
        return up, down
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, values, v = svd(left_core @ right_core.T)
    root = values[:rank].sqrt()
    return left @ (u[:, :rank] * root), (v[:rank] * root[:, None]) @ right.T


def _check(graph: MergeGraph, unit: MergeUnit, rank: int | None) -> None:
    """Raise unless a unit's merge can be kept low-rank."""
    dora = next((item for given in unit.inputs for item in given.adapters if item.magnitude is not None), None)
    if dora is not None:
        raise InputError(f"adapter: {dora.folder} is a DoRA adapter, whose task vectors have full rank; merge into the"
                         " model (leave out adapter)")
    started = next((item for given in unit.inputs for item in given.adapters if item.start), None)
    if started is not None:
        raise InputError(f"adapter: {started.folder} was started from the base's own weights ({started.start}), which"
                         " the result would have to lose too; merge into the model (leave out adapter)")
    turned = next((item for given in unit.inputs for item in given.adapters if item.transposed), None)
    if turned is not None:
        raise InputError(f"adapter: {turned.folder} adapts {unit.name}, which is stored transposed, as embeddings are;"
                         " merge into the model (leave out adapter)")
    folders = {item.folder for item in unit.inputs}
    if len(folders) > 1:
        label = graph.models[unit.inputs[-1].model].label
        raise InputError(f"adapter: {label} is a whole model; only adapters of one base can be kept low-rank")
    if not any(item.adapters for item in unit.inputs):
        return
    if unit.base is not None and unit.base.adapters:
        raise InputError(f"adapter: the base {graph.models[unit.base.model].label} has an adapter of its own; give the"
                         " plain base")
    spec, parameters = BY_NAME[unit.method], unit.parameters
    if unit.method == "linear" and not parameters["normalize"] and not math.isclose(sum(parameters["weight"]), 1.0):
        raise InputError("adapter: linear weights that do not add up to 1 change the base too; set normalize: true")
    if unit.method in LINEAR:
        return
    if spec.base is not Base.REQUIRED or unit.method in NOT_OF_DELTAS or scope_of(unit) is not Scope.PIECE:
        raise InputError(f"adapter: {unit.method} does not merge tensor by tensor from task vectors alone, so its"
                         " result cannot be kept low-rank; merge into the model (leave out adapter)")
    if rank is None:
        raise InputError(f"adapter: what {unit.method} makes of low-rank task vectors has full rank; give adapter a"
                         " rank")


def _merged(unit: MergeUnit, graph: MergeGraph, shelf: Shelf) -> tuple[Tensor, Tensor]:
    """Factors ``[m, r]`` and ``[r, n]`` of a unit's merged task vector, float64."""
    models = [_factors(item, unit, shelf) for item in unit.models]
    if unit.method in LINEAR:
        weight = list(unit.parameters["weight"])
        scale = 1.0 / sum(weight) if unit.parameters["normalize"] else 1.0
        scale *= unit.parameters.get("lambda", 1.0)
        return (torch.cat([factor * scale * up for factor, (up, _) in zip(weight, models, strict=True)], 1),
                torch.cat([down for _, down in models]))
    deltas = [(up @ down).float() for up, down in models]
    for delta in deltas:
        refuse_infinite(unit.name, delta)
    blocks = []
    for piece in pieces_of(unit, graph.source_config):
        rows = [delta[piece.start:piece.stop] for delta in deltas]
        blocks.append(merge_tensors(BY_METHOD[unit.method], torch.zeros_like(rows[0]), rows, unit.parameters,
                                    key=piece.key, seed=graph.seed, layer=unit.layer, num_layers=unit.num_layers,
                                    tensor_class=unit.tensor_class))
    left, values, right = svd(torch.cat(blocks).double())
    root = values.sqrt()
    return left * root, right * root[:, None]


def _factors(item: Input, unit: MergeUnit, shelf: Shelf) -> tuple[Tensor, Tensor]:
    """All adapters of an input as one: ``[m, r]`` with their scales, and ``[r, n]``; rank 0 where it has none."""
    ups, downs = [torch.zeros(unit.shape[0], 0, dtype=torch.float64)], [torch.zeros(0, unit.shape[1]).double()]
    for adapter in item.adapters:
        rank = adapter.down.shape[0]
        ups.append(adapter.scale * shelf.read_rows(adapter.folder, adapter.up, 0, unit.shape[0], rank).double())
        downs.append(shelf.read_rows(adapter.folder, adapter.down, 0, rank, unit.shape[1]).double())
    return torch.cat(ups, 1), torch.cat(downs)


def _config(units: Sequence[MergeUnit], ranks: dict[str, int]) -> dict[str, object]:
    """The adapter's config: the first one's, with a scale of 1 for every module, whatever its rank."""
    first = next(adapter for unit in units for item in unit.inputs for adapter in item.adapters)
    config = dict(read_checkpoint(first.folder).adapter)
    largest = max(ranks.values())
    other = {module: rank for module, rank in ranks.items() if rank != largest}
    config.update(r=largest, lora_alpha=largest, use_rslora=False, rank_pattern=other, alpha_pattern=dict(other),
                  init_lora_weights=True, modules_to_save=None, bias="none", target_modules=sorted(ranks),
                  inference_mode=True, base_model_name_or_path=units[0].inputs[0].folder)
    return config
