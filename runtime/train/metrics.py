"""Numbers of a run: one JSON line for each step and TensorBoard scalars, under torchtitan's names."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from mipipe.graphs.write_files import open_lines

Record = dict[str, float]


@dataclass(slots=True)
class Metrics:
    """The records of a run and where they go. Written by one rank."""

    file: str = ""
    stream: TextIO | None = None
    board: Any = None
    records: list[Record] = field(default_factory=list)
    fault: str = ""
    """Why a record could not be written; no later one is."""

    def write(self, record: Mapping[str, float]) -> None:
        self.records.append(dict(record))
        if self.stream is not None:
            try:
                self.stream.write(json.dumps(record) + "\n")
                self.stream.flush()
            except OSError as error:
                self.fault = f"metrics {self.file}: cannot be written: {error.strerror}"
                self._close_stream()
        if self.board is not None:
            for name, value in record.items():
                if name != "step":
                    self.board.add_scalar(name, value, int(record["step"]))

    def _close_stream(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError):  # what could not be written is still waiting to be
                stream.close()

    def close(self) -> None:
        self._close_stream()
        if self.board is not None:
            self.board.close()


def open_metrics(file: str | None, folder: str | None, start: int) -> Metrics:
    """Metrics that go to a JSONL file and a TensorBoard folder; what an earlier run wrote beyond ``start`` goes.

    A run that starts anew leaves an earlier run's file beside its own, as ``<file>.previous``. What is no regular file
    (a pipe, a device) is written as it is.

    Raises:
        InputError: the file cannot be written.
    """
    metrics = Metrics(file or "")
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not start and path.is_file() and path.stat().st_size:
            os.replace(path, path.with_name(path.name + ".previous"))
        metrics.stream = open_lines(path, "".join(line + "\n" for line in _records_before(path, start)))
    if folder:
        from torch.utils.tensorboard import SummaryWriter
        metrics.board = SummaryWriter(folder, purge_step=start + 1 if start else None)
    return metrics


def _records_before(path: Path, start: int) -> list[str]:
    """The lines of an earlier run that a resumed one keeps: steps up to ``start``."""
    if not start or not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break  # the line that was being written when the run was killed
    return kept


def forget_memory(device: torch.device) -> None:
    """Let `memory_record` count from here on, where memory is counted by the device's allocator: what building a model
    took for a moment is no step's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_record(device: torch.device) -> Record:
    """The most memory used so far: the allocator's on CUDA since `forget_memory`, else the process's resident size."""
    if device.type == "cuda":
        return {"memory/max_active(GiB)": torch.cuda.max_memory_allocated(device) / 2**30,
                "memory/max_reserved(GiB)": torch.cuda.max_memory_reserved(device) / 2**30}
    import resource
    scale = 1 if sys.platform == "darwin" else 1024
    return {"memory/max_resident(GiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30}
