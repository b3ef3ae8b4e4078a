"""Residual streams of all samples between two layers, in a file.

Read and written by rows, not mapped into memory: mapped pages would count as the process's, whatever the budget. What
fits is kept by the system's cache anyway.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mipipe.graphs.errors import RunError


class States:
    """``[samples, length, hidden]`` in the compute dtype."""

    def __init__(self, path: Path, length: int, hidden: int, dtype: torch.dtype) -> None:
        self.path, self._shape, self._dtype = path, (length, hidden), dtype
        self._row = length * hidden * dtype.itemsize

    def write(self, first: int, states: Tensor) -> None:
        """Put samples from ``first`` on.

        Raises:
            RunError: the disk is full or failing.
        """
        data = memoryview(states.detach().contiguous().numpy().tobytes())
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                done = 0
                while done < len(data):
                    done += os.pwrite(handle, data[done:], first * self._row + done)
            finally:
                os.close(handle)
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error.strerror}; calibration keeps the states between two"
                           " layers there") from None

    def read(self, first: int, stop: int) -> Tensor:
        """Samples ``[first, stop)``."""
        count = (stop - first) * self._row // self._dtype.itemsize
        kind = np.float64 if self._dtype is torch.float64 else np.float32
        with self.path.open("rb") as stream:
            stream.seek(first * self._row)
            found = np.fromfile(stream, dtype=kind, count=count)
        if len(found) < count:
            raise RunError(f"{self.path}: ends early; remove the unfinished merge's folder and run it again")
        return torch.from_numpy(found).reshape(stop - first, *self._shape)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
