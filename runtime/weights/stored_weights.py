"""A folder of safetensors files as a mapping from the model's names to tensors, each read when it is asked for.

A rank asks for its own parameters only, so it opens only the files that hold them. Names come from the index; of a
folder without an index every file's header is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import read_index
from mipipe.graphs.tracing.parameter_slices import parse_slice
from mipipe.runtime.weights.pieces import Piece
from mipipe.runtime.weights.stored_names import TensorRecipe, recipes

INDEX = "model.safetensors.index.json"


class StoredWeights(Mapping[str, Tensor]):
    """The weights of ``module`` in a folder (or one file), by the model's names and their slices ``bank[0:16]``.

    ``module`` has its parameters on the meta device and its buffers filled: those that no file holds come from there.
    ``tied``: other names of a tensor, tried where the first is not stored.
    """

    def __init__(self, folder: Path, module: nn.Module, tied: Mapping[str, tuple[str, ...]] | None = None) -> None:
        self.folder, self._module = folder, module
        self._places = stored_places(folder)
        self._tied = tied or {}
        self._recipes = recipes(self._places, module)
        self._shapes = {name: tuple(item.shape) for name, item in module.state_dict().items()}
        self._buffers = {name: item for name, item in module.named_buffers() if name not in self._recipes}
        self._files: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        base, rows = parse_slice(name)
        if base in self._buffers:
            return self._buffers[base]
        for candidate in (base, *self._tied.get(base, ())):
            if candidate in self._recipes:
                return self._make(candidate, rows)
        raise InputError(f"weights {self.folder}: no stored tensor makes {base}; the folder is of another model")

    def piece(self, name: str, piece: Piece) -> Tensor:
        """A piece of a parameter, of which no more is read than it takes; the whole one where that has not the piece's
        shape."""
        base, rows = parse_slice(name)
        candidates = [item for item in (base, *self._tied.get(base, ())) if item in self._recipes]
        plain = rows is None and candidates and self._recipes[candidates[0]].converter is None
        if not plain:
            found = self._some_rows(base, piece) if rows is None else None
            if found is not None:
                return found
            whole = self[name]
            return piece.cut(whole) if tuple(whole.shape) == piece.shape else whole
        (sources,) = self._recipes[candidates[0]].sources.values()
        return self.read_piece(sources[0], piece)

    def _some_rows(self, name: str, piece: Piece) -> Tensor | None:
        """A piece of rows alone (experts) that are stored one by one; None where it is not such."""
        ranges = piece.ranges.get(0, ())
        if set(piece.ranges) != {0} or len(ranges) != 1 or name not in self._recipes:
            return None
        return self._make(name, ranges[0])

    def read_piece(self, stored: str, piece: Piece) -> Tensor:
        """A piece of one stored tensor."""
        from safetensors import SafetensorError
        try:
            view = self._file(stored).get_slice(stored)
            if tuple(view.get_shape()) != piece.shape:
                return self.read(stored)
            blocks = piece.blocks()
            if len(blocks) == 1:
                found: Tensor = view[blocks[0][0]]
                return found
            made: Tensor | None = None
            for there, here in blocks:
                part = view[there]
                made = torch.empty(piece.local_shape, dtype=part.dtype) if made is None else made
                made[here] = part
            assert made is not None
            return made
        except (OSError, SafetensorError) as error:
            raise InputError(f"weights: {self._places[stored]}: {stored} cannot be read: {error}") from None

    def _file(self, stored: str) -> Any:
        """The open file of a stored tensor."""
        from safetensors import safe_open
        path = self._places[stored]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._recipes, **self._buffers})

    def __len__(self) -> int:
        return len({**self._recipes, **self._buffers})

    def unused(self) -> list[str]:
        """Stored names that make no parameter or buffer of the model."""
        used = {name for recipe in self._recipes.values() for names in recipe.sources.values() for name in names}
        return sorted(set(self._places) - used)

    def _make(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        recipe: TensorRecipe = self._recipes[name]
        if rows is None:
            return recipe.make(self.read, self._module)[name]
        if recipe.converter is None:
            return recipe.make(lambda stored: self.read(stored, rows), self._module)[name]
        part = recipe.rows_of(rows, self._shapes[name][0])
        if part is not None:
            return part.make(self.read, self._module)[name]
        return recipe.make(self.read, self._module)[name][slice(*rows)]

    def read(self, stored: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One stored tensor, or some of its rows."""
        from safetensors import SafetensorError
        try:
            if rows is None:
                return self._file(stored).get_tensor(stored)
            return self._file(stored).get_slice(stored)[rows[0]:rows[1]]
        except (OSError, SafetensorError) as error:
            raise InputError(f"weights: {self._places[stored]}: {stored} cannot be read: {error}") from None


def stored_places(folder: Path) -> dict[str, Path]:
    """The file of every stored tensor: from the index, else from the headers of all files.

    Raises:
        InputError: there is no such file, or one that the index names is missing.
    """
    from safetensors import SafetensorError, safe_open
    index = folder / INDEX
    if index.exists():
        found = {name: folder / file for name, file in read_index(index).items()}
        missing = sorted(path.name for path in set(found.values()) if not path.exists())
        if missing:
            raise InputError(f"weights: {index} names {missing[0]}, which is not there")
        return found
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"weights: {folder} holds no .safetensors file")
    places: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as stream:
                places.update(dict.fromkeys(stream.keys(), path))
        except (OSError, SafetensorError) as error:
            raise InputError(f"weights: {path} is no safetensors file, or damaged: {error}") from None
    return places


def parameters_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """A registration hook of torch's modules: parameters go to the meta device as soon as they are made.

    So a module of any size is built with real buffers and no weights; the memory of one parameter at a time is
    reserved and never touched.
    """
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
