"""Checkpoint folders on disk: which are whole and whose, what ``state.json`` says, sizes and SHA-256 of every file.

A checkpoint is written to ``step-N.partial`` and renamed when all of it is on disk. ``state.json``, written last, lists
every file's size and SHA-256; a folder without it is never loaded. Beside them ``run.json`` says whose folder it is.
Nothing here is unpickled: JSON, and safetensors files for the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT, load, save
from mipipe.runtime.checkpoints.checkpoint_run import RunIdentity, Start
from mipipe.runtime.weights import durable

STATE, OWNER = "state.json", "run.json"

Files = dict[str, tuple[int, str]]
"""Size and SHA-256 by file name."""


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """``state.json``: steps done, copies of the plan, digest of the plan that ran, whose run, every file, and what of
    the optimizer's state is no tensor."""

    FORMAT: ClassVar = "mipipe.checkpoint"
    VERSION: ClassVar = 3
    __pydantic_config__: ClassVar = STRICT
    step: int
    copies: int
    plan: str
    run: RunIdentity
    files: Files
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [name for name in self.files if Path(name).name != name or name in (STATE, "", "..")]
        if self.step < 1 or self.copies < 1 or wrong:
            raise InputError(f"{STATE}: step {self.step}, copies {self.copies}, files {wrong[:1]}; expected numbers"
                             " from 1 and plain file names")


def partial(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written."""
    return folder / f"step-{step}.partial"


def latest(folder: Path, run_id: str | None = None) -> Path | None:
    """The newest complete checkpoint in a folder, or the newest of one run.

    Raises:
        InputError: a newer one does not say whose it is.
    """
    return next((path for path in reversed(complete(folder))
                 if run_id is None or read_state(path).run.id == run_id), None)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, by their steps."""
    found = [(int(match[1]), path) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / STATE).exists()]
    return [path for _, path in sorted(found)]


def choose(folder: Path, start: Start, run_id: str | None = None) -> Path | None:
    """The checkpoint that a run begins with; None: from step 1. ``run_id``: the run that a restart is of.

    Raises:
        InputError: a fresh run in a folder with checkpoints, a resumed one in a folder without, or checkpoints of
            several runs of which none is known as the folder's.
    """
    found = complete(folder)
    if start is Start.FRESH:
        if found:
            raise InputError(f"checkpoint folder {folder}: has checkpoints already, up to {found[-1].name} of run"
                             f" {_run_id(found[-1]) or 'unknown'}; continue it with --resume, or give another folder")
        return None
    if start is Start.RESTART:
        return latest(folder, run_id)
    if not found:
        if start is Start.RESUME:
            there = "has no complete checkpoint" if folder.is_dir() else "no such folder"
            raise InputError(f"checkpoint folder {folder}: {there}, so --resume has nothing to continue; start without"
                             " it, or with --resume-if-any")
        return None
    owner = read_owner(folder)
    if owner is not None and (own := latest(folder, owner.id)) is not None:
        return own
    runs = sorted({_run_id(path) or "unknown" for path in found})
    if len(runs) > 1:
        raise InputError(f"checkpoint folder {folder}: has checkpoints of several runs ({', '.join(runs)}); move away"
                         " those that are not to be resumed")
    return found[-1]


def read_owner(folder: Path) -> RunIdentity | None:
    """The run that a folder belongs to, as far as it says."""
    return load(folder / OWNER, RunIdentity) if (folder / OWNER).exists() else None


def write_owner(folder: Path, run: RunIdentity) -> None:
    """Say whose folder it is, and remove what a killed run left half-written."""
    save(run, folder / OWNER)
    for path in folder.glob("step-*.partial"):
        clear(path)


def _run_id(folder: Path) -> str | None:
    """Whose checkpoint it is; None where it does not say in our words."""
    try:
        return read_state(folder).run.id
    except InputError:
        return None


def read_state(folder: Path) -> CheckpointState:
    """``state.json`` of a checkpoint.

    Raises:
        InputError: it cannot be read, is of another version or shape.
    """
    try:
        state = load(folder / STATE, CheckpointState)
    except InputError as error:
        raise InputError(f"checkpoint {folder}: {str(error).removeprefix(f'{folder}/')}; remove the folder to use an"
                         " earlier checkpoint") from None
    if folder.name not in (f"step-{state.step}", f"step-{state.step}.partial"):
        raise InputError(f"checkpoint {folder}: its {STATE} is of step {state.step}; remove the folder to use an"
                         " earlier checkpoint")
    return state


def verify(folder: Path, state: CheckpointState, part: int = 0, parts: int = 1) -> None:
    """Raise `InputError` unless every file (every ``parts``-th from ``part``) has the size and SHA-256 it was given."""
    for name, (size, digest) in sorted(state.files.items())[part::parts]:
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


def publish_checkpoint(folder: Path, state: CheckpointState) -> None:
    """Write ``state.json`` and rename ``step-N.partial`` to ``step-N``."""
    save(state, folder / STATE)
    target = folder.with_suffix("")
    clear(target)
    durable.publish(folder, target, [folder / STATE])


def forget(folder: Path, keep: int, run_id: str) -> None:
    """Remove all but the newest ``keep`` checkpoints of a run; those of other runs stay."""
    own = [path for path in complete(folder) if _run_id(path) == run_id]
    for path in own[:-keep]:
        (path / STATE).unlink(missing_ok=True)  # first, so that no half-removed folder looks whole
        shutil.rmtree(path, ignore_errors=True)


def clear(path: Path) -> None:
    """Remove what is in a checkpoint's place: a folder, or a file or link that somebody has put there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # what is written there next says what is wrong
            path.unlink()


def probe(folder: Path) -> None:
    """Make a folder and write a file in it.

    Raises:
        InputError: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as stream:
            stream.write(b"0" * 4096)
            stream.flush()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {error.strerror or error}; give another folder, or make room"
                         ) from None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
