"""Merged values that cannot be stored: not finite, or beyond what the dtype holds."""

from __future__ import annotations

import torch
from torch import Tensor

from mipipe.graphs.errors import RunError
from mipipe.graphs.merging.graph import MergeUnit
from mipipe.runtime.merge.sources import UnitPiece


def refuse_overflow(name: str, values: Tensor, dtype: torch.dtype) -> None:
    """Raise where finite values become infinite in the dtype they are written in.

    Raises:
        RunError: naming the tensor and its largest magnitude.
    """
    limit = torch.finfo(dtype).max
    if limit >= torch.finfo(values.dtype).max:
        return
    largest = values.abs().amax()
    if float(largest) > limit and not bool(torch.isfinite(largest.to(dtype))):
        word = str(dtype).removeprefix("torch.")
        raise RunError(f"{name}: has values up to {float(largest):.6g}, which {word} (up to {limit:.6g}) cannot hold;"
                       " choose another dtype (out_dtype, --dtype)")


def as_stored(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in the dtype in which they are written, contiguous and their own.

    Raises:
        RunError: some are not finite, or the dtype cannot hold them.
    """
    refuse_infinite(name, values)
    refuse_overflow(name, values, dtype)
    return values.to(dtype, copy=True).contiguous()


def refuse_infinite(name: str, values: Tensor) -> None:
    """Raise for values that are not finite, of whichever input they are.

    Raises:
        RunError: naming the tensor.
    """
    if not bool(torch.isfinite(values).all()):
        raise RunError(f"{name}: comes out with values that are not finite numbers; look for them in the models, or"
                       " check the method's parameters")


def refuse_nonfinite(unit: MergeUnit, piece: UnitPiece) -> None:
    """Raise for a tensor that came out with NaN or infinite values, naming the input at fault if there is one."""
    for tile in piece.tiles(whole=False):
        tensors = ([] if tile.base is None else [tile.base]) + list(tile.models)
        for item, tensor in zip(unit.inputs, tensors, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise RunError(f"{item.folder}: tensor {item.tensor.name} holds values that are not finite numbers")
    raise RunError(f"{unit.name}: {unit.method} gives values that are not finite numbers; check its parameters")
