"""Checkpoints: torch.distributed.checkpoint in folders ``step-N``, whole or not there, readable under any plan.

Tensors go by the model's names, never by rank or stage, so a run may resume under another plan. A checkpoint is written
to ``step-N.partial`` and renamed when all of it is on disk; ``state.json`` in it, written last, lists every file's size
and SHA-256 and the step, data position and plan digest. Anything without a complete ``state.json`` is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, TensorStorageMetadata

from mipipe.graphs.errors import InputError, RunError
from mipipe.runtime.engine import Engine
from mipipe.runtime.optim import local_optimizer

STATE = "state.json"
FORMAT, VERSION = "mipipe.checkpoint", 1


@dataclass(slots=True)
class Pending:
    """A checkpoint that is being written."""

    step: int
    folder: Path
    state: dict[str, Any]
    future: Future[Any] | None = None


class Checkpoints:
    """The checkpoints of one run. `save` starts one, `finish` makes the started one visible, `resume` loads the last.

    All ranks call every method, in the same order.
    """

    def __init__(self, folder: str | Path, engine: Engine, optimizer: torch.optim.Optimizer | None, *, keep: int = 2,
                 asynchronous: bool = True) -> None:
        self.folder = Path(folder)
        self._engine, self._optimizer = engine, optimizer
        self._keep, self._asynchronous = keep, asynchronous and dist.is_initialized()
        self._pending: Pending | None = None
        self._group = dist.new_group() if self._asynchronous else None
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, data: dict[str, Any]) -> None:
        """Start writing the state after ``step`` steps; waits for the one before."""
        self.finish()
        folder = self.folder / f"step-{step}.partial"
        if _first():
            shutil.rmtree(folder, ignore_errors=True)
        _barrier()
        state = {"format": FORMAT, "version": VERSION, "step": step, "data": data,
                 "plan": self._engine.compiled.program.plan_digest,
                 "graph": self._engine.plan.problem.graph_digest, "seed": self._engine.options.seed}
        tensors = {**model_tensors(self._engine), **optimizer_tensors(self._engine, self._optimizer)}
        pending = Pending(step, folder, state)
        try:
            if self._asynchronous:
                started = dcp.async_save(tensors, checkpoint_id=folder, process_group=self._group)
                pending.future = started if isinstance(started, Future) else started.upload_completion
            else:
                dcp.save(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
        except Exception as error:
            raise RunError(f"checkpoint {folder}: cannot be written: {_first_line(error)}; earlier checkpoints are"
                           " untouched") from error
        self._pending = pending
        if pending.future is None:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint being written, and rename it into place."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            if pending.future is not None:
                pending.future.result()
            _barrier()
            if _first():
                _publish(pending.folder, pending.state)
                self._forget()
        except Exception as error:
            raise RunError(f"checkpoint {pending.folder}: cannot be written: {_first_line(error)}; earlier checkpoints"
                           " are untouched") from error
        _barrier()

    def resume(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint; its state, or None where there is none.

        Raises:
            InputError: a file is damaged, or the checkpoint is of another model.
        """
        _barrier()
        folder = latest(self.folder)
        if folder is None:
            return None
        state = read_state(folder)
        if _first():
            verify(folder, state)
        _barrier()
        load_tensors(folder, self._engine, self._optimizer)
        self._engine.steps_done = state["step"]
        return state

    def _forget(self) -> None:
        """Remove all but the newest ``keep`` checkpoints."""
        for folder in _complete(self.folder)[:-self._keep or None]:
            shutil.rmtree(folder, ignore_errors=True)


def model_tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """``model.<name>`` -> tensor, for this rank's parameters and buffers."""
    tensors = {f"model.{name}": item.detach() for name, item in engine.weights.parameters.items()}
    tensors.update({f"model.{name}": item for name, item in engine.weights.buffers.items()})
    return tensors


def optimizer_tensors(engine: Engine, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """``optimizer.<name>.<key>`` -> state, for this rank's parameters."""
    found: dict[str, Any] = {}
    if optimizer is not None:
        state = local_optimizer(optimizer).state
        for name, parameter in engine.named_parameters():
            for key, item in state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = item
    return found


def load_tensors(folder: Path, engine: Engine, optimizer: torch.optim.Optimizer | None) -> None:
    """Fill the engine's weights and the optimizer's state from a checkpoint, whatever plan wrote it.

    Raises:
        InputError: a weight is missing, or has another shape.
    """
    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    wanted: dict[str, Any] = model_tensors(engine)
    for name, tensor in wanted.items():
        entry = stored.get(name)
        if not isinstance(entry, TensorStorageMetadata) or entry.size != tensor.shape:
            found = "absent" if entry is None else f"{tuple(getattr(entry, 'size', ()))}"
            raise InputError(f"checkpoint {folder}: {name} is {found}, expected shape {tuple(tensor.shape)}; it is of"
                             " another model")
    slots: list[tuple[torch.nn.Parameter, str, str]] = []
    local = local_optimizer(optimizer) if optimizer is not None else None
    mine = {id(item) for group in local.param_groups for item in group["params"]} if local is not None else set()
    for name, parameter in engine.named_parameters():
        if id(parameter) not in mine:
            continue
        prefix = f"optimizer.{name}."
        for key, entry in stored.items():
            if key.startswith(prefix) and "." not in key[len(prefix):]:
                slots.append((parameter, key[len(prefix):], key))
                if isinstance(entry, BytesStorageMetadata):
                    wanted[key] = None
                else:
                    wanted[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
    dcp.load(wanted, storage_reader=reader, no_dist=True)
    if local is not None:
        for parameter, key, name in slots:
            item = wanted[name]
            if isinstance(item, torch.Tensor) and item.dim():
                item = item.to(parameter.device)
            local.state[parameter][key] = item


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.iterdir()
             if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / STATE).exists()]
    return [path for _, path in sorted(found)]


def read_state(folder: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"checkpoint {folder}: {STATE} cannot be read: {error}; remove the folder to use an earlier"
                         " checkpoint") from None
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise InputError(f"checkpoint {folder}: found format {state.get('format')!r} version {state.get('version')!r},"
                         f" expected {FORMAT!r} version {VERSION}")
    return state


def verify(folder: Path, state: dict[str, Any]) -> None:
    """Raise `InputError` unless every file has the size and SHA-256 it was written with."""
    for name, (size, digest) in state["files"].items():
        path = folder / name
        if not path.exists() or path.stat().st_size != size or _sha256(path) != digest:
            raise InputError(f"checkpoint {folder}: {name} is damaged or incomplete; remove the folder to use an"
                             " earlier checkpoint")


def _publish(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state.json`` and rename ``step-N.partial`` to ``step-N``, everything synced before it is visible."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.name] = (path.stat().st_size, _sha256(path))
    with (folder / STATE).open("w") as stream:
        json.dump({**state, "files": files}, stream)
        stream.flush()
        os.fsync(stream.fileno())
    target = folder.with_suffix("")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(folder, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
