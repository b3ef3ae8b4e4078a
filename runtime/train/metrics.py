"""Numbers of a run: one JSON line for each step and TensorBoard scalars, under torchtitan's names.

Where one of them cannot be written, the run is to end after the step, with what was done saved: `Metrics.fault`.
"""

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
    folder: str = ""
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
            try:
                for name, value in record.items():
                    if name != "step":
                        self.board.add_scalar(name, value, int(record["step"]))
                self.board.flush()  # its thread else finds out about a full disk when nobody asks any more
            except OSError as error:
                self.fault = f"tensorboard {self.folder}: cannot be written: {error.strerror}"
                self._close_board()

    def _close_stream(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError):  # what could not be written is still waiting to be
                stream.close()

    def _close_board(self) -> None:
        board, self.board = self.board, None
        if board is not None:
            with contextlib.suppress(OSError):
                board.close()

    def close(self) -> None:
        self._close_stream()
        self._close_board()


def open_metrics(file: str | None, folder: str | None, start: int, again: bool = False) -> Metrics:
    """Metrics that go to a JSONL file and a TensorBoard folder; what an earlier run wrote beyond ``start`` goes.

    A run that starts anew leaves an earlier run's file beside its own, as ``<file>.previous``; ``again``: the file is
    that of the run itself, which is started again. What is no regular file (a pipe, a device) is written as it is.

    Raises:
        InputError: the file cannot be written.
    """
    metrics = Metrics(file or "", folder or "")
    if file:
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not start and not again and path.is_file() and path.stat().st_size:
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
    for line in path.read_bytes().split(b"\n"):
        try:
            if json.loads(line)["step"] <= start:
                kept.append(line.decode())
        except (ValueError, KeyError, TypeError, RecursionError):
            break  # the line that was being written when the run was killed, or what a disk has made of it
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
