"""Checkpoint folders on disk: which are whole, what ``state.json`` says, sizes and SHA-256 of every file.

A checkpoint is written to ``step-N.partial`` and renamed when all of it is on disk. ``state.json``, written last, lists
every file's size and SHA-256; a folder without it is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mipipe.graphs.errors import InputError
from mipipe.runtime.weights import durable

STATE = "state.json"
FORMAT, VERSION = "mipipe.checkpoint", 2

Files = dict[str, tuple[int, str]]
"""Size and SHA-256 by file name."""


def partial(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f"step-{step}.partial"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder."""
    found = complete(folder)
    return found[-1] if found else None


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir()
             if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / STATE).exists()]
    return [path for _, path in sorted(found)]


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint.

    Raises:
        InputError: it cannot be read, or is of another version.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {folder}: {STATE} cannot be read: {error}; remove the folder to use an earlier"
                         " checkpoint") from None
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise InputError(f"checkpoint {folder}: found format {state.get('format')!r} version {state.get('version')!r},"
                         f" expected {FORMAT!r} version {VERSION}")
    return state


def verify(folder: Path, state: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Raise `InputError` unless every file (every ``parts``-th from ``part``) has the size and SHA-256 it was given."""
    for name, (size, digest) in sorted(state["files"].items())[part::parts]:
        path = folder / name
        if not path.exists() or path.stat().st_size != size or _sha256(path) != digest:
            raise InputError(f"checkpoint {folder}: {name} is damaged or incomplete; remove the folder to use an"
                             " earlier checkpoint")


def seal(paths: Iterable[Path]) -> Files:
    """Size and SHA-256 of files, each on disk when this returns."""
    files: Files = {}
    for path in paths:
        durable.sync(path)
        files[path.name] = (path.stat().st_size, _sha256(path))
    return files


def publish(folder: Path, state: dict[str, Any], files: Files) -> None:
    """Write ``state.json`` and rename ``step-N.partial`` to ``step-N``."""
    (folder / STATE).write_text(json.dumps({**state, "format": FORMAT, "version": VERSION, "files": files}))
    target = folder.with_suffix("")
    shutil.rmtree(target, ignore_errors=True)
    durable.publish(folder, target, [folder / STATE])


def forget(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for path in complete(folder)[:-keep]:
        (path / STATE).unlink(missing_ok=True)  # first, so that no half-removed folder looks whole
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
