"""Tensors that the makers of data leave in a safetensors file, read by whoever trains on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import read_header


def read_tables(path: Path, maker: str, wanted: Mapping[str, int]) -> dict[str, Tensor]:
    """The tensors of a file, with the number of axes that each is to have.

    Args:
        maker: the function that writes such files, for errors.

    Raises:
        InputError: no such file, one that is damaged, or without these tensors, or of different numbers of rows.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; mipipe.runtime.{maker} writes it")
    shapes = {tensor.name: tensor.shape for tensor in read_header(path)[0]}
    for name, axes in wanted.items():
        if len(shapes.get(name, ())) != axes:
            found = f"{name} of shape {list(shapes[name])}" if name in shapes else f"no {name}"
            raise InputError(f"{path}: found {found}, expected what mipipe.runtime.{maker} writes: {name} with"
                             f" {axes} ax{'i' if axes == 1 else 'e'}s")
    return load_file(path)
