"""The output folder while it is being made: shards written in place, a journal of what is done, one final rename.

Everything lives in ``<out>.partial`` until the last rank has finished; only then does the folder get its name. A
killed merge leaves that folder, and the same merge continues from its journal. Journal lines count only if the
operating system has not restarted since, because written pages survive the process but not the machine.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.merging.layout import Shard
from mipipe.graphs.serialize import load_data
from mipipe.graphs.units import format_bytes
from mipipe.runtime.weights import durable
from mipipe.runtime.weights.reader import TORCH_DTYPES

JOURNAL_BYTES = 2**26
"""The journal is brought up to date after this many bytes written (and at the end)."""


def partial_folder(out: Path) -> Path:
    """Where a merge into ``out`` lives until it is whole."""
    return out.with_name(out.name + ".partial")


def boot_id() -> str:
    """A text that changes when the machine restarts; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def prepare(out: Path, shards: Sequence[Shard], job: str) -> Path:
    """The partial folder with all shards at full size; an unfinished merge with the same ``job`` digest is continued.

    Raises:
        InputError: ``out`` exists, or the partial folder is another merge's or none at all.
        RunError: no space for the output.
    """
    folder = partial_folder(out)
    if out.exists():
        raise InputError(f"{out}: exists already; give another -o, or remove it")
    seal = folder / "job.json"
    if folder.exists():
        if not seal.exists():
            raise InputError(f"{folder}: exists and is no unfinished merge; remove it, or give another -o")
        found = load_data(seal)
        if found.get("job") != job:
            raise InputError(f"{folder}: holds an unfinished merge of another recipe or of other inputs; finish that"
                             " one, or remove the folder")
        if found.get("reserved") and found.get("boot") == boot_id() != "":
            return folder
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    seal.write_text(json.dumps({"job": job, "boot": boot_id(), "reserved": False}))
    try:
        for shard in shards:
            _reserve(folder / shard.file, shard)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        needed = sum(shard.num_bytes for shard in shards)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(folder.parent).free
            raise RunError(f"{out}: no space left: the merged model needs {format_bytes(needed)}, {format_bytes(free)}"
                           " are free") from None
        raise
    seal.write_text(json.dumps({"job": job, "boot": boot_id(), "reserved": True}))
    return folder


def _reserve(path: Path, shard: Shard) -> None:
    """Create a shard at its full size on disk, header written."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        os.posix_fallocate(handle, 0, shard.num_bytes)
        header = shard.header()
        os.pwrite(handle, header, 0)
    finally:
        os.close(handle)


class Writer:
    """Writes tensors of the shards in place and keeps this rank's journal. Closed by its user."""

    def __init__(self, folder: Path, shards: Sequence[Shard], rank: int) -> None:
        self._places = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._folder = folder
        self._files: dict[str, int] = {}
        self._journal = (folder / f"done-{rank}.txt").open("a")
        self._pending: list[str] = []
        self._unsaved = 0

    def write(self, name: str, offset: int, data: Tensor) -> int:
        """Write a tensor's bytes ``[offset, ...)`` in its output dtype; returns how many.

        Raises:
            RunError: the disk is full or failing.
        """
        place = self._places[name]
        if place.dtype in TORCH_DTYPES:
            data = data.to(TORCH_DTYPES[place.dtype]) if data.dtype != torch.uint8 else data
        view = memoryview(data.contiguous().cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        handle = self._open(place.file)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(handle, view[done:], place.start + offset + done)
        except OSError as error:
            raise RunError(f"{self._folder / place.file}: cannot be written: {error.strerror}") from None
        self._unsaved += done
        return done

    def finish(self, name: str) -> None:
        """Note that a tensor is complete."""
        self._pending.append(name)
        if self._unsaved >= JOURNAL_BYTES:
            self.save()

    def save(self) -> None:
        """Bring the journal up to date."""
        self._journal.write("".join(f"{name}\n" for name in self._pending))
        self._journal.flush()
        self._pending, self._unsaved = [], 0

    def close(self) -> None:
        self.save()
        self._journal.close()
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def _open(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = os.open(self._folder / file, os.O_RDWR)
        return self._files[file]


def finished(folder: Path) -> set[str]:
    """Tensors that earlier runs completed, by any number of ranks; a line cut off by a crash does not count."""
    names: set[str] = set()
    for journal in sorted(folder.glob("done-*.txt")):
        names.update(line[:-1] for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n"))
    return names


def publish_folder(folder: Path, out: Path, shards: Sequence[Shard]) -> None:
    """Make the partial folder the result: data on disk, bookkeeping gone, final name."""
    leftovers = [*folder.glob("done-*.txt"), *folder.glob("parts-*.partial"),
                 *(folder / name for name in ("job.json", "plan.json", "router.safetensors", "verify"))]
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    durable.publish(folder, out, [folder / shard.file for shard in shards])
