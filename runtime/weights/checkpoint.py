"""Checkpoints: torch.distributed.checkpoint in folders ``step-N``, whole or not there, readable under any plan.

Tensors go by the model's names, never by rank or stage, so a run may resume under another plan. Weights and optimizer
state are copied at once; a thread writes them, hashes them, and makes the folder visible while training goes on. What
the folder holds and when it counts is in `mipipe.runtime.weights.checkpoint_folder`.
"""

from __future__ import annotations

import io
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from mipipe.graphs.errors import InputError, MipipeError, RunError
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.train.processes import failure_of, first_of, gather, rank, world
from mipipe.runtime.weights import checkpoint_folder as folders
from mipipe.runtime.weights.checkpoint_tensors import load_tensors, model_tensors, optimizer_tensors


class Checkpoints:
    """The checkpoints of one run. `save` starts one, `finish` waits for the started one, `resume` loads the last.

    All ranks call every method, in the same order. ``timeout_s`` bounds every wait.
    """

    def __init__(self, folder: str | Path, engine: Engine, optimizer: torch.optim.Optimizer | None, *, keep: int = 2,
                 asynchronous: bool = True, timeout_s: float = 600.0) -> None:
        self.folder = Path(folder)
        self._engine, self._optimizer = engine, optimizer
        self._keep, self._timeout_s = keep, timeout_s
        self._pending: tuple[Path, Future[None]] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) \
            if dist.is_initialized() else None
        if self._group is None:  # which is meant, and DCP warns of at every save
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, data: dict[str, Any]) -> None:
        """Start writing the state after ``step`` steps, ``data`` (of this copy's loader) included; waits for the one
        before.

        Raises:
            RunError: the one before, or this one, cannot be written.
        """
        self.finish()
        folder = folders.partial(self.folder, step)
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        self._barrier()
        state = {"step": step, "copies": self._engine.mesh.num_copies, "seed": self._engine.options.seed,
                 "plan": self._engine.compiled.program.plan_digest, "graph": self._engine.plan.problem.graph_digest}
        tensors = {**model_tensors(self._engine), **optimizer_tensors(self._engine, self._optimizer)}
        loader = pack(data)
        if self._thread is None:
            self._write(folder, state, tensors, loader)
        else:
            copied = {name: item.to("cpu", copy=True) if isinstance(item, torch.Tensor) else item
                      for name, item in tensors.items()}
            self._pending = folder, self._thread.submit(self._write, folder, state, copied, loader)

    def finish(self, timeout_s: float | None = None) -> None:
        """Wait for the checkpoint being written.

        Raises:
            RunError: it cannot be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        patience = self._timeout_s if timeout_s is None else timeout_s
        try:
            pending[1].result(patience)
        except FutureTimeout:
            raise RunError(f"checkpoint {pending[0]}: not written within {patience:g} s; earlier checkpoints are"
                           " untouched") from None

    def resume(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint; its state with this copy's ``data``, or None where there is none.

        Raises:
            InputError: a file is damaged, or the checkpoint is of another model.
        """
        names = [None if (found := folders.latest(self.folder)) is None else found.name]
        if self._group is not None:
            dist.broadcast_object_list(names, src=0, group=self._group)  # the first rank's view of shared storage
        if names[0] is None:
            return None
        folder = self.folder / names[0]
        state = folders.read_state(folder)
        failure = first_of(gather(failure_of(lambda: folders.verify(folder, state, rank(), world())), self._group))
        if failure is not None:
            raise InputError(failure)
        load_tensors(folder, self._engine, self._optimizer)
        self._engine.steps_done = state["step"]
        copy = self._engine.mesh.copy % state["copies"]
        return {**state, "data": torch.load(folder / f"data-{copy}.pt", weights_only=True)}

    def _write(self, folder: Path, state: dict[str, Any], tensors: dict[str, Any], loader: bytes) -> None:
        """Write this rank's part, and make the checkpoint visible when all parts are on disk."""
        failure, files = None, {}
        try:
            dcp.save(tensors, checkpoint_id=folder, process_group=self._group, no_dist=self._group is None)
            mine = list(folder.glob(f"__{rank()}_*"))
            if self._engine.mesh.rank == 0:
                mine.append(folder / f"data-{self._engine.mesh.copy}.pt")
                mine[-1].write_bytes(loader)
            if rank() == 0:
                mine.append(folder / ".metadata")
            files = folders.seal(mine)
        except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
            failure = _reason(error)
        try:
            gathered = gather((failure, files), self._group)
            failure = first_of([text for text, _ in gathered])
            if failure is None and rank() == 0:
                try:
                    folders.publish(folder, state, {name: item for _, part in gathered for name, item in part.items()})
                    folders.forget(self.folder, self._keep)
                except OSError as error:
                    failure = _reason(error)
            failure = first_of(gather(failure, self._group))
        except RuntimeError as error:
            failure = _reason(error)
        if failure is not None:
            raise RunError(f"checkpoint {folder}: cannot be written: {failure}; earlier checkpoints are untouched")

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def pack(data: dict[str, Any]) -> bytes:
    """A loader's state as bytes that are read back without running any code from them.

    Raises:
        RunError: it holds more than tensors, numbers, texts, lists and dicts.
    """
    stream = io.BytesIO()
    torch.save(data, stream)
    stream.seek(0)
    try:
        torch.load(stream, weights_only=True)
    except Exception as error:
        raise RunError("data: the loader's state_dict() holds more than tensors, numbers, texts, lists and dicts, so it"
                       f" cannot be saved: {_reason(error)}") from None
    return stream.getvalue()


def _reason(error: BaseException) -> str:
    """One line: of an error that a rank caught for all, the rank's own; else the first."""
    if isinstance(error, MipipeError):
        return str(error)
    failures = getattr(error, "failures", None)  # CheckpointException of torch.distributed.checkpoint
    if isinstance(failures, dict) and failures:
        rank, wrapped = next(iter(failures.items()))
        return f"rank {rank}: {_reason(wrapped[0])}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
