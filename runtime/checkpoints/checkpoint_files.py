"""Tensors of a checkpoint on disk: one safetensors file for each rank that writes, each tensor in one of them.

Written from memory and read into memory without a copy between; nothing is unpickled. Every rank that holds a tensor
could write it: `share_out` gives each to one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.merging.checkpoints.files import StoredTensor, read_header
from mipipe.graphs.merging.layout import header_bytes
from mipipe.runtime.weights.reader import TORCH_DTYPES

DTYPES = {**TORCH_DTYPES, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64}
SPELLING = {dtype: name for name, dtype in DTYPES.items()}
PREFIX, SUFFIX = "tensors-", ".safetensors"


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor in a file."""

    place: StoredTensor
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.shape


def share_out(held: Sequence[Mapping[str, int]]) -> list[set[str]]:
    """Which names each rank writes, of what they hold (bytes by name): every name once, the bytes about even."""
    holders: dict[str, list[int]] = {}
    for number, names in enumerate(held):
        for name in names:
            holders.setdefault(name, []).append(number)
    load = [0] * len(held)
    mine: list[set[str]] = [set() for _ in held]
    for name, numbers in sorted(holders.items(), key=lambda item: (-held[item[1][0]][item[0]], item[0])):
        chosen = min(numbers, key=lambda number: (load[number], number))
        mine[chosen].add(name)
        load[chosen] += held[chosen][name]
    return mine


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Raise `RunError` where a tensor has a dtype that cannot be written."""
    for name, tensor in tensors.items():
        if tensor.dtype not in SPELLING:
            raise RunError(f"checkpoint: {name} is of {tensor.dtype}, which safetensors files do not hold")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors (on the CPU) as a safetensors file."""
    check_dtypes(tensors)
    with path.open("wb") as stream:
        stream.write(header_bytes([(name, SPELLING[item.dtype], tuple(item.shape), item.nbytes)
                                   for name, item in tensors.items()]))
        for item in tensors.values():
            stream.write(_bytes_of(item.contiguous()))


def stored_tensors(folder: Path, files: Iterable[str]) -> dict[str, CheckpointTensor]:
    """The tensors of a checkpoint by name, from the headers of its files.

    Raises:
        InputError: a header is damaged, a tensor is there twice or has a dtype that torch has not.
    """
    found: dict[str, CheckpointTensor] = {}
    for file in sorted(files):
        if not (file.startswith(PREFIX) and file.endswith(SUFFIX)):
            continue
        for place in read_header(folder / file)[0]:
            if place.name in found or place.dtype not in DTYPES:
                what = "is stored twice" if place.name in found else f"has dtype {place.dtype}, unknown here"
                raise InputError(f"checkpoint {folder}: {place.name} {what}")
            found[place.name] = CheckpointTensor(place, DTYPES[place.dtype])
    return found


def read_tensor(folder: Path, stored: CheckpointTensor, target: Tensor, first: int = 0) -> None:
    """Fill a tensor of the stored shape, in its own dtype and on its own device; ``first``: or of fewer rows, from that
    one on.

    Raises:
        InputError: the file cannot be read, or is too short.
    """
    straight = target.device.type == "cpu" and target.dtype == stored.dtype and target.is_contiguous()
    buffer = target.detach() if straight else torch.empty(target.shape, dtype=stored.dtype)
    view, place = _bytes_of(buffer), stored.place
    start = place.start + (first * (len(view) // target.shape[0]) if first else 0)
    done = 0
    try:
        handle = os.open(folder / place.file, os.O_RDONLY)
        try:
            while done < len(view) and (count := os.preadv(handle, [view[done:]], start + done)):
                done += count
        finally:
            os.close(handle)
    except OSError as error:
        raise InputError(f"checkpoint {folder}: {place.file} cannot be read: {error.strerror}") from None
    if done < len(view):
        raise InputError(f"checkpoint {folder}: {place.file} ends within {place.name}")
    if not straight:
        target.detach().copy_(buffer)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]
