"""Reading rows of tensors straight from safetensors files, with nothing but the rows in memory."""

from __future__ import annotations

import os
from types import TracebackType

import torch
from torch import Tensor

from mipipe.graphs.checkpoint_files import StoredTensor
from mipipe.graphs.errors import RunError

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
                "BOOL": torch.bool}
"""torch's dtypes for what is computed on; other dtypes are only ever copied as bytes."""


class Shelf:
    """Open files of checkpoints; a context manager that closes them."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def read_bytes(self, folder: str, tensor: StoredTensor, start: int, stop: int) -> Tensor:
        """Bytes ``[start, stop)`` of a tensor, uint8, in memory of their own (aligned, whatever the file's offsets)."""
        path = f"{folder}/{tensor.file}"
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        buffer = torch.empty(stop - start, dtype=torch.uint8)
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        done = 0
        while done < len(view):
            count = os.preadv(self._files[path], [view[done:]], tensor.start + start + done)
            if count == 0:
                raise RunError(f"{path}: ends before tensor {tensor.name} does; it has changed since the merge was"
                               " planned")
            done += count
        return buffer

    def read_rows(self, folder: str, tensor: StoredTensor, start: int, stop: int, columns: int) -> Tensor:
        """Rows ``[start, stop)`` of a tensor seen as a table of ``columns``, in its stored dtype."""
        dtype = TORCH_DTYPES[tensor.dtype]
        width = columns * dtype.itemsize
        return self.read_bytes(folder, tensor, start * width, stop * width).view(dtype).reshape(stop - start, columns)
