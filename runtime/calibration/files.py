"""The files of a calibration.

Under the merge's partial folder, ``calibration`` holds the samples (``samples-N.npz``), and for every stream a folder
with the residual streams between layers (``states-MEMBER-LAYER``), gradients (``gradients-MEMBER-LAYER``), the
statistics of each layer (``forward-LAYER.safetensors``, ``backward-LAYER.safetensors``) and a mark for each finished
step.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mipipe.graphs.calibration.streams import CalibrationPlan
from mipipe.graphs.errors import RunError
from mipipe.runtime.calibration.statistics import Fields

FOLDER = "calibration"
"""The folder inside a merge's partial folder."""


def samples_file(folder: Path, calibration: CalibrationPlan, data: str) -> Path:
    """Where the samples of a data source are."""
    return folder / FOLDER / f"samples-{calibration.sources.index(data)}.npz"


def stream_folder(folder: Path, index: int) -> Path:
    """Where a stream's files are."""
    return folder / FOLDER / f"stream-{index}"


def keep(file: Path, names: Sequence[str], found: Sequence[Any]) -> None:
    """Write a step's statistics, whole or not at all.

    Args:
        names: of the statistics, in the order of ``found``, which may be empty.

    Raises:
        RunError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for statistic, made in zip(names, found, strict=bool(found)) if found else ():
        fields: Fields = made.result()
        tensors |= {f"{name}|{statistic}|{item}": value.contiguous() for (name, item), value in fields.items()}
    if tensors:
        try:
            save_file(tensors, file.with_suffix(".partial"))
            file.with_suffix(".partial").rename(file)
        except OSError as error:
            raise RunError(f"{file}: cannot be written: {error.strerror}") from None


class States:
    """Residual streams of all samples between two layers, ``[samples, length, hidden]`` in the compute dtype.

    Read and written by rows, not mapped into memory: mapped pages would count as the process's, whatever the budget.
    What fits is kept by the system's cache anyway.
    """

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
