"""Task vectors kept apart in little space, and models rebuilt from them for a route.

For the methods that need not collapse their experts into one model: 1bit-Merging (signs and a scale per matrix),
Twin-Merging (rank-compressed differences from a shared model) and RMM (a basis the experts share). `store` writes a
parts folder once; `rebuild` makes an ordinary checkpoint for one expert or a mixture, whenever a router asks for it.

A parts folder holds ``parts.json``, for Twin-Merging the shared model under ``shared``, and files of tensors named
``<piece>/<expert>/<part>`` (``<piece>/<part>`` where experts share it). Deltas that are not compressed are kept in the
dtype of the model they come from.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.checkpoint_files import read_checkpoint
from mipipe.graphs.errors import InputError
from mipipe.graphs.merge_build import build
from mipipe.graphs.merge_graph import MergeGraph, MergeUnit
from mipipe.graphs.recipe import MergeRecipe
from mipipe.graphs.serialize import STRICT, load, save
from mipipe.graphs.tensor_classes import TensorClass
from mipipe.planner.merge_plan import SHARD_BYTES, plan_graph
from mipipe.runtime.merge.card import write_companions
from mipipe.runtime.merge.execute import copy_unit
from mipipe.runtime.merge.launch import merge
from mipipe.runtime.merge.low_rank import canonical_factors, rmm_compress, rmm_reconstruct, twin_rank
from mipipe.runtime.merge.method import Tile
from mipipe.runtime.merge.one_bit import pack_signs, scale_of, unpack_signs
from mipipe.runtime.merge.output import Writer, partial_folder, prepare, publish
from mipipe.runtime.merge.shelf import TORCH_DTYPES, Shelf
from mipipe.runtime.merge.sources import Surroundings, unit_pieces
from mipipe.runtime.merge.spectral import svd

METHODS = ("onebit", "twin", "rmm")
"""The methods whose parts can be stored."""
FILE_BYTES = 2**30
"""A parts file is closed at this size."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a parts folder holds: the graph of base (or shared model) and experts, and the experts' labels."""

    FORMAT: ClassVar = "mipipe.merge_parts"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    method: str
    graph: MergeGraph
    experts: tuple[str, ...]
    num_bytes: int


def store(recipe: MergeRecipe, out: Path, where: str = "recipe") -> Parts:
    """Write the experts of a recipe as parts into a new folder.

    Raises:
        InputError: a method that leaves one model, a recipe that changes shapes, or what `build` raises.
    """
    if recipe.merge_method not in METHODS:
        raise InputError(f"{where}: {recipe.merge_method} leaves one model and no parts to store; expected one of"
                         f" {', '.join(METHODS)}")
    if recipe.branches or recipe.slices or recipe.align or recipe.vocabulary:
        raise InputError(f"{where}: parts are stored for whole models of one shape; leave out branches, slices, align"
                         " and tokenizer")
    if out.exists():
        raise InputError(f"{out}: exists already; give another -o, or remove it")
    folder = partial_folder(out)
    if folder.exists():
        raise InputError(f"{folder}: exists, perhaps from parts that were not finished; remove it, or give another -o")
    folder.mkdir(parents=True)
    if recipe.merge_method == "twin":
        scale = float(recipe.parameters.get("shared_scale", 0.29))
        shared = dataclasses.replace(recipe, merge_method="task_arithmetic", parameters={"lambda": scale})
        merge([shared], folder / "shared")
        recipe = dataclasses.replace(recipe, base_model=str(folder / "shared"))
    graph = build(recipe, where)
    buffer: dict[str, Tensor] = {}
    files = total = 0
    with Shelf() as shelf, torch.no_grad():
        around = Surroundings(graph, shelf, torch.device("cpu"))
        for unit in graph.units:
            for piece in unit_pieces(unit, around) if unit.method != "copy" else ():
                for tile in piece.tiles(whole=True):
                    buffer |= compress(unit, tile)
            size = sum(value.nbytes for value in buffer.values())
            if size > FILE_BYTES or (unit is graph.units[-1] and buffer):
                files, total = files + 1, total + size
                save_file(buffer, folder / f"parts-{files:05d}.safetensors")
                buffer = {}
    merged = next(unit for unit in graph.units if unit.method != "copy")
    labels = tuple(graph.models[item.model].label for item in merged.models)
    parts = Parts(recipe.merge_method, graph, labels, total)
    save(parts, folder / "parts.json")
    os.rename(folder, out)
    return parts


def compress(unit: MergeUnit, tile: Tile) -> dict[str, Tensor]:
    """The stored parts of all experts for one piece."""
    deltas, params = tile.deltas(), unit.parameters
    found: dict[str, Tensor] = {}
    matrix = unit.tensor_class is TensorClass.MATRIX
    if unit.method == "rmm" and matrix:
        return _rmm_parts(tile.key, deltas, params)
    for expert, delta in enumerate(deltas):
        at = f"{tile.key}/{expert}"
        if unit.method == "onebit" and matrix and not params["full_precision"][expert]:
            found |= {f"{at}/signs": pack_signs(delta), f"{at}/scale": scale_of(delta).float().reshape(1)}
        elif unit.method == "twin" and delta.dim() == 2:
            rank = twin_rank(delta.shape, params["density"])
            left, values, right = svd(delta)
            kind = TORCH_DTYPES[unit.models[expert].tensor.dtype]
            found |= {f"{at}/left": (left[:, :rank] * values[:rank]).to(kind), f"{at}/right": right[:rank].to(kind)}
        else:
            found[f"{at}/delta"] = delta.to(TORCH_DTYPES[unit.models[expert].tensor.dtype])
    return {name: value.contiguous() for name, value in found.items()}


def _rmm_parts(key: str, deltas: Sequence[Tensor], params: Mapping[str, Any]) -> dict[str, Tensor]:
    rank = min(params["rank"], *deltas[0].shape)
    lefts, rights = [], []
    for delta in deltas:
        left, values, right = svd(delta)
        out, into = canonical_factors(left[:, :rank] * values[:rank], right[:rank], rank)
        lefts.append(out.T)
        rights.append(into)
    found = {}
    for side, vectors in (("left", torch.stack(lefts, 1)), ("right", torch.stack(rights, 1))):
        basis = min(params["num_basis"], len(deltas))
        for part, value in zip(("mean", "basis", "coefficients"), rmm_compress(vectors, basis), strict=True):
            found[f"{key}/{side}-{part}"] = value.contiguous()
    return found


def expand(key: str, expert: int, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Tensor:
    """One expert's delta of a piece, float32 in the piece's shape."""
    at = f"{key}/{expert}"
    if f"{at}/signs" in tensors:
        return unpack_signs(tensors[f"{at}/signs"], shape) * tensors[f"{at}/scale"]
    if f"{at}/left" in tensors:
        return tensors[f"{at}/left"].float() @ tensors[f"{at}/right"].float()
    if f"{at}/delta" in tensors:
        return tensors[f"{at}/delta"].float()
    left, right = (rmm_reconstruct(*(tensors[f"{key}/{side}-{part}"] for part in ("mean", "basis", "coefficients")))
                   [:, expert] for side in ("left", "right"))
    return left.T @ right


def rebuild(folder: Path, out: Path, route: Sequence[float]) -> Parts:
    """An ordinary checkpoint from a parts folder: base (or shared model) plus ``sum_t route_t delta_t``.

    Raises:
        InputError: no parts folder, a route of another length, a base that has changed.
    """
    parts = load(folder / "parts.json", Parts)
    if len(route) != len(parts.experts):
        raise InputError(f"--route: found {len(route)} weights, expected {len(parts.experts)}, one for each of"
                         f" {', '.join(parts.experts)}")
    graph = _at_home(parts.graph, folder)
    plan = plan_graph(graph, out, 1, None, SHARD_BYTES)
    target = prepare(out, plan.shards, f"{plan.job_digest()}{list(route)}")
    stored = Stored(folder)
    writer = Writer(target, plan.shards, 0)
    with Shelf() as shelf, torch.no_grad():
        around = Surroundings(graph, shelf, torch.device("cpu"))
        for unit in graph.units:
            if unit.method == "copy":
                copy_unit(unit, around, writer)
                continue
            offset = 0
            for piece in unit_pieces(dataclasses.replace(unit, models=()), around):
                for tile in piece.tiles(whole=True):
                    merged = tile.origin.clone()
                    for expert, share in enumerate(route):
                        if share:
                            delta = expand(tile.key, expert, merged.shape, stored)
                            merged.add_(delta.to(merged.dtype), alpha=share)
                    offset += writer.write(unit.name, offset, merged)
            writer.finish(unit.name)
    writer.close()
    write_companions(plan, target)
    publish(target, out, plan.shards)
    return parts


def _at_home(graph: MergeGraph, folder: Path) -> MergeGraph:
    """The graph with its shared model where it is now, after a check that base or shared model are unchanged."""
    shared = folder / "shared"
    base = next(unit.base for unit in graph.units if unit.base is not None)
    place = str(shared) if shared.is_dir() else base.folder
    if not graph.models[base.model].fingerprint.startswith(read_checkpoint(place).fingerprint):
        raise InputError(f"{place}: has changed since the parts in {folder} were made from it; store them again")
    units = tuple(dataclasses.replace(
        unit, base=None if unit.base is None else dataclasses.replace(unit.base, folder=place),
        models=tuple(dataclasses.replace(item, folder=place) if item.model == base.model else item
                     for item in unit.models)) for unit in graph.units)
    home = place if graph.tokenizer_from == base.folder else graph.tokenizer_from
    return dataclasses.replace(graph, units=units, tokenizer_from=home)


class Stored(Mapping[str, Tensor]):
    """The tensors of a parts folder by name, each read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        for file in sorted(folder.glob("parts-*.safetensors")):
            opened = safe_open(file, "pt")
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Any:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)
