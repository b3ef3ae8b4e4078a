"""Task vectors kept apart in little space: how they are compressed, stored, and brought back.

For the methods that need not collapse their experts into one model: 1bit-Merging (signs and a scale per matrix),
Twin-Merging (rank-compressed differences from a shared model) and RMM (a basis the experts share).
`mipipe.runtime.merge.launching.store` writes and rebuilds whole models; here are its tensors.

A parts folder holds ``parts.json``, for Twin-Merging the shared model under ``shared``, and files of tensors named
``<piece>/<expert>/<part>`` (``<piece>/<part>`` where experts share it). Deltas that are not compressed are kept in the
dtype of the model they come from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.errors import RunError
from mipipe.graphs.merging.checkpoints.files import read_header
from mipipe.graphs.merging.checkpoints.tensor_classes import TensorClass
from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.serialize import STRICT
from mipipe.runtime.merge.methods.low_rank import canonical_factors, rmm_compress, rmm_reconstruct, twin_rank
from mipipe.runtime.merge.methods.method import Tile
from mipipe.runtime.merge.methods.one_bit import pack_signs, scale_of, unpack_signs
from mipipe.runtime.merge.methods.spectral import svd

STORABLE = ("onebit", "twin", "rmm")
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


def compress(tile: Tile, _stats: Any, *, of: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """The stored parts of all experts for one piece.

    ``values`` are the parameters of the method ``of``, the dtypes of what is not compressed, and whether the method
    works on the transposed matrix.
    """
    deltas, params = tile.deltas(), values
    if params["turned"]:
        deltas = [delta.T.contiguous() for delta in deltas]
    matrix = tile.tensor_class is TensorClass.MATRIX
    if of == "rmm" and matrix:
        return _rmm_parts(tile.key, deltas, params)
    found: dict[str, Tensor] = {}
    for expert, delta in enumerate(deltas):
        at, kind = f"{tile.key}/{expert}", getattr(torch, params["dtypes"][expert])
        if of == "onebit" and matrix and not params["full_precision"][expert]:
            found |= {f"{at}/signs": pack_signs(delta), f"{at}/scale": scale_of(delta).float().reshape(1)}
        elif of == "twin" and delta.dim() == 2:
            rank = twin_rank(delta.shape, params["density"])
            left, singular, right = svd(delta)
            found |= {f"{at}/left": (left[:, :rank] * singular[:rank]).to(kind), f"{at}/right": right[:rank].to(kind)}
        else:
            found[f"{at}/delta"] = delta.to(kind)
    return {name: value.contiguous().cpu() for name, value in found.items()}


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


def rebuild_delta(key: str, expert: int, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> Tensor:
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


def reconstruct(tile: Tile, _stats: Any, *, folder: str, route: Sequence[float], turned: bool) -> Tensor:
    """``base + sum_t route_t delta_t`` of one piece, from the parts in a folder."""
    stored = _opened(folder, Path(folder, "parts.json").stat().st_mtime_ns)
    merged = tile.origin.clone()
    shape = merged.T.shape if turned else merged.shape
    for expert, share in enumerate(route):
        if share:
            delta = rebuild_delta(tile.key, expert, shape, stored).to(merged)
            merged.add_(delta.T if turned else delta, alpha=share)
    return merged


@functools.lru_cache(maxsize=1)
def _opened(folder: str, _written: int) -> StoredParts:
    return StoredParts(Path(folder))


def describe_parts(graph: MergeGraph, folder: Path) -> Parts:
    """What a folder of finished parts holds; ``graph`` is the one they were stored by."""
    units = []
    for unit in graph.units:
        values = dict(unit.parameters.get("values", {}))
        for key in ("dtypes", "turned"):
            values.pop(key, None)
        stored = unit.method == "store"
        units.append(dataclasses.replace(unit, method=unit.parameters["of"], parameters=values) if stored else unit)
    first = next(unit for unit in units if unit.method != "copy")
    labels = tuple(graph.models[item.model].label for item in first.models)
    return Parts(first.method, dataclasses.replace(graph, units=tuple(units)), labels, stored_bytes(folder))


def stored_bytes(folder: Path) -> int:
    """The bytes of all parts in a folder.

    Raises:
        InputError: a file that is cut or damaged.
    """
    return sum(tensor.num_bytes for file in sorted(folder.glob("parts-*.safetensors"))
               for tensor in read_header(file)[0])


class PartsWriter:
    """Writes this rank's parts into files and keeps its journal; takes the place of `output.Writer`."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._files = len(list(folder.glob(f"parts-{rank:04d}-*.safetensors")))
        self._journal = (folder / f"done-{rank}.txt").open("a")
        self._current: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}
        self._pending: list[str] = []

    def write(self, _name: str, _offset: int, data: Any) -> int:
        """Take the parts of one piece; tensors that are copied come from the base when a model is rebuilt."""
        self._current |= data if isinstance(data, dict) else {}
        return 0

    def finish(self, name: str) -> None:
        """Note that a tensor is complete, and write a file if there is enough for one."""
        self._whole |= self._current
        self._current = {}
        self._pending.append(name)
        if sum(value.nbytes for value in self._whole.values()) > FILE_BYTES:
            self.save()

    def save(self) -> None:
        """Write what is complete, and bring the journal up to date.

        Raises:
            RunError: the disk is full or failing.
        """
        if self._whole:
            file = self._folder / f"parts-{self._rank:04d}-{self._files + 1:05d}.safetensors"
            try:
                save_file(self._whole, file.with_suffix(".partial"))
                file.with_suffix(".partial").rename(file)
            except Exception as error:
                raise RunError(f"{file}: cannot be written: {error}") from None
            self._files, self._whole = self._files + 1, {}
        self._journal.write("".join(f"{name}\n" for name in self._pending))
        self._journal.flush()
        self._pending = []

    def close(self) -> None:
        self.save()
        self._journal.close()


class StoredParts(Mapping[str, Tensor]):
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
