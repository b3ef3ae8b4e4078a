"""Reading rows of tensors straight from safetensors files, with nothing but the rows in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from mipipe.graphs.errors import RunError
from mipipe.graphs.merging.checkpoints.files import StoredTensor

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                "BOOL": torch.bool}
"""torch's dtypes for what is computed on; other dtypes are only ever copied as bytes."""


Range = tuple[str, StoredTensor, int, int]
"""Folder, tensor, and bytes ``[start, stop)`` of it."""


class Shelf:
    """Open files of checkpoints; a context manager that closes them.

    Bytes read ahead with `fetch` and kept with `hold` are taken from memory, without a copy, until `drop`.
    """

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._held: dict[tuple[str, str], list[tuple[int, int, Tensor]]] = {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def open(self, ranges: Sequence[Range]) -> None:
        """Open the files of ranges, so that `fetch` may run in another thread."""
        for folder, tensor, _, _ in ranges:
            self._handle(folder, tensor)

    def fetch(self, ranges: Sequence[Range]) -> list[Tensor]:
        """The bytes of ranges whose files are open, read from them."""
        return [self._read(*item) for item in ranges]

    def hold(self, ranges: Sequence[Range], buffers: Sequence[Tensor]) -> None:
        """Keep fetched bytes."""
        for (folder, tensor, start, stop), buffer in zip(ranges, buffers, strict=True):
            self._held.setdefault((folder, tensor.name), []).append((start, stop, buffer))

    def drop(self, ranges: Sequence[Range]) -> None:
        """Forget bytes that were kept."""
        for folder, tensor, start, stop in ranges:
            held = self._held[folder, tensor.name]
            del held[next(place for place, item in enumerate(held) if item[:2] == (start, stop))]

    def read_bytes(self, folder: str, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Bytes ``[start, stop)`` of a tensor, uint8, in memory of their own or of what is held; not to be changed."""
        for first, last, buffer in self._held.get((folder, tensor.name), ()):
            if first <= start and stop <= last:
                return buffer[start - first:stop - first]
        return self._read(folder, tensor, start, stop)

    def _handle(self, folder: str, tensor: StoredTensor) -> int:
        path = f"{folder}/{tensor.file}"
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def _read(self, folder: str, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Bytes from the file, in a buffer that is aligned whatever the file's offsets."""
        handle = self._handle(folder, tensor)
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = os.preadv(handle, [view[done:]], tensor.start + start + done)
            if count == 0:
                raise RunError(f"{folder}/{tensor.file}: ends before tensor {tensor.name} does; it has changed since"
                               " the merge was planned")
            done += count
        return buffer

    def read_rows(self, folder: str, tensor: StoredTensor, start: int, stop: int, columns: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor seen as a table of ``columns``, in its stored dtype."""
        dtype = TORCH_DTYPES[tensor.dtype]
        width = columns * dtype.itemsize
        return self.read_bytes(folder, tensor, start * width, stop * width).view(dtype).reshape(stop - start, columns)
