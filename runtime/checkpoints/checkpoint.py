"""Checkpoints: folders ``step-N``, whole or not there, readable under any plan.

Tensors go by the model's names, never by rank or stage, so a run may resume under another plan. What a rank writes of
weights and optimizer state is copied at once; a thread writes it, hashes it, and makes the folder visible while
training goes on. What the folder holds and when it counts is in `mipipe.runtime.checkpoints.checkpoint_folder`, whose
it is in `mipipe.runtime.checkpoints.checkpoint_run`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mipipe.graphs.errors import InputError, MipipeError, RunError
from mipipe.runtime.checkpoints import checkpoint_folder as folders
from mipipe.runtime.checkpoints.checkpoint_files import PREFIX, SUFFIX, check_dtypes, share_out, write_tensors
from mipipe.runtime.checkpoints.checkpoint_run import RunIdentity, Start, check_same, named, new_id
from mipipe.runtime.checkpoints.checkpoint_tensors import host_copies, load_tensors, model_tensors, optimizer_tensors
from mipipe.runtime.checkpoints.data_state import pack_state, pack_values, read_loader, reason
from mipipe.runtime.checkpoints.folder_lock import LAST_BREATH_S, FolderLock
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import failure_of, first_of, gather, rank, world


@dataclass(frozen=True, slots=True)
class Restored:
    """A checkpoint that was loaded: where from, and what it says."""

    folder: Path
    state: folders.CheckpointState

    def loader(self, copy: int) -> dict[str, Any]:
        """The state of the loader of a copy of the plan."""
        name = f"data-{copy}.pt"
        if name not in self.state.files:
            raise InputError(f"checkpoint {self.folder}: {folders.STATE} does not list {name}; remove the folder to use"
                             " an earlier checkpoint")
        return read_loader(self.folder / name)


class Checkpoints:
    """The checkpoints of one run. `begin` comes first; `save` starts one, `finish` waits for the started one.

    All ranks call every method, in the same order. While a checkpoint is being written, its thread has the group of
    processes to itself: a method that asks the other ranks waits for it first. ``timeout_s`` bounds every wait.
    ``run``: the run's identity (without one, only the graph and the seed count); ``accept``: what may differ from it
    in a checkpoint.

    Raises:
        InputError: the folder cannot be written, or another job uses it.
    """

    def __init__(self, folder: str | Path, engine: Engine, optimizer: torch.optim.Optimizer | None, *, keep: int = 2,
                 asynchronous: bool = True, timeout_s: float = 600.0, run: RunIdentity | None = None,
                 accept: Collection[str] = ()) -> None:
        self.folder = Path(folder)
        self._engine, self._optimizer = engine, optimizer
        self._keep, self._timeout_s, self._accept = keep, timeout_s, accept
        self.run = run or RunIdentity("", engine.options.seed, engine.plan.problem.graph_digest, "")
        self.saved: Path | None = None
        self._pending: tuple[Path, Future[None]] | None = None
        self._shares: tuple[list[str], set[str]] | None = None
        self._lock: FolderLock | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) \
            if dist.is_initialized() else None

    def begin(self, start: Start, run_id: str | None = None) -> Restored | None:
        """Take the folder for this run, and load the checkpoint it begins with; None: it begins with step 1.

        ``run_id``: the run that a restart is of.

        Raises:
            InputError: the folder cannot be written, another job uses it, or it has not what ``start`` needs; a file of
                the checkpoint is damaged, or it is of another run or model.
        """
        chosen: list[Path | None] = [None]

        def decide() -> None:
            folders.choose(self.folder, start, run_id)  # one that is not there is not made to resume in
            folders.probe(self.folder)
            self._lock = FolderLock(self.folder, LAST_BREATH_S if start is Start.RESTART else 0.0)
            chosen[0] = folders.choose(self.folder, start, run_id)  # what it holds now that nobody else writes there

        self._together(decide if rank() == 0 else lambda: None)
        self._together(lambda: folders.probe(self.folder))
        self._together(lambda: check_dtypes(model_tensors(self._engine)), RunError)
        found = gather(chosen[0], self._group)[0]  # the first rank's view of shared storage
        restored = None if found is None else self._load(self.folder / found.name)
        made = gather(run_id or new_id(), self._group)[0]
        self.run = named(self.run, made if restored is None else restored.state.run.id)
        self._together(lambda: folders.write_owner(self.folder, self.run) if rank() == 0 else None)
        return restored

    def rehearse(self, data: dict[str, Any]) -> None:
        """Raise `RunError` now where `save` would at the end of a long run: what cannot be written as data in the state
        of this copy's loader or of the optimizer, once both have one. Waits for a started one."""
        self.finish()
        held = optimizer_tensors(self._engine, self._optimizer)

        def pack() -> None:
            pack_state(data)
            pack_values({name: item for name, item in held.items() if not isinstance(item, torch.Tensor)})

        self._together(pack, RunError)

    def save(self, step: int, data: dict[str, Any]) -> None:
        """Start writing the state after ``step`` steps, ``data`` (of this copy's loader) included; waits for the one
        before.

        Raises:
            RunError: the one before, or this one, cannot be written; a weight is not finite.
        """
        self.finish()
        folder = folders.partial(self.folder, step)
        if rank() == 0:
            folders.clear(folder)
        held = {**model_tensors(self._engine), **optimizer_tensors(self._engine, self._optimizer)}
        loader = b""

        def prepare() -> None:
            nonlocal loader
            check_finite(self._engine, self._optimizer, step)
            loader = pack_state(data)

        self._together(prepare, RunError)
        tensors = {name: item for name, item in held.items() if isinstance(item, torch.Tensor)}
        mine = self._share({name: item.nbytes for name, item in tensors.items()})
        values = {name: item for name, item in held.items() if name not in tensors}
        tensors = {name: item for name, item in tensors.items() if name in mine}
        engine = self._engine
        made = folders.CheckpointState(step, engine.mesh.num_copies, engine.compiled.program.plan_digest, self.run, {})
        self._together(lambda: folder.mkdir(parents=True, exist_ok=True), RunError)
        if self._thread is None:
            self._write(folder, made, {name: item.cpu() for name, item in tensors.items()}, lambda: None, values,
                        loader)
        else:
            copies, copied = host_copies(tensors)
            self._pending = folder, self._thread.submit(self._write, folder, made, copies, copied, values, loader)

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

    def close(self) -> None:
        """Give the folder to the next job."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _load(self, folder: Path) -> Restored:
        state = folders.read_state(folder)
        check_same(state.run, self.run, str(folder), self._accept)
        self._together(lambda: folders.verify(folder, state, rank(), world()))
        alike = not self.run.optimizer or state.run.optimizer == self.run.optimizer
        load_tensors(folder, state, self._engine, self._optimizer if alike else None)
        self._engine.steps_done = state.step
        self.saved = folder
        return Restored(folder, state)

    def _share(self, held: Mapping[str, int]) -> set[str]:
        """The names this rank writes; shared out anew only where what some rank holds has changed."""
        seal = hashlib.sha256(json.dumps(sorted(held.items())).encode()).hexdigest()
        seals = gather(seal, self._group)
        if self._shares is None or self._shares[0] != seals:
            self._shares = seals, share_out(gather(dict(held), self._group))[rank()]
        return self._shares[1]

    def _write(self, folder: Path, state: folders.CheckpointState, tensors: dict[str, torch.Tensor],
               copied: Callable[[], None], values: dict[str, Any], loader: bytes) -> None:
        """Write this rank's part once it is ``copied``, and make the checkpoint visible when all are on disk."""
        failure, files = None, {}
        try:
            pack_values(values)
            copied()
            mine = [folder / f"{PREFIX}{rank()}{SUFFIX}"]
            write_tensors(mine[0], tensors)
            if self._engine.mesh.leads:
                mine.append(folder / f"data-{self._engine.mesh.copy}.pt")
                mine[-1].write_bytes(loader)
            files = folders.seal(mine)
        except Exception as error:
            failure = reason(error)
        try:
            gathered = gather((failure, files, values), self._group)
            failure = first_of([text for text, _, _ in gathered])
            if failure is None and rank() == 0:
                try:
                    whole = folders.CheckpointState(state.step, state.copies, state.plan, state.run,
                                          {name: item for _, part, _ in gathered for name, item in part.items()},
                                          {name: item for _, _, part in gathered for name, item in part.items()})
                    folders.publish_checkpoint(folder, whole)
                    folders.forget(self.folder, self._keep, self.run.id)
                except (OSError, MipipeError) as error:
                    failure = reason(error)
            failure = first_of(gather(failure, self._group))
        except RuntimeError as error:
            failure = reason(error)
        if failure is not None:
            raise RunError(f"checkpoint {folder}: cannot be written: {failure}; earlier checkpoints are untouched")
        self.saved = folder.with_suffix("")

    def _together(self, action: Any, kind: type[MipipeError] = InputError) -> None:
        """Do something on every rank; where it fails on one, raise on all."""
        failure = first_of(gather(failure_of(action), self._group))
        if failure is not None:
            raise kind(failure)


def check_finite(engine: Engine, optimizer: torch.optim.Optimizer | None, step: int) -> None:
    """Raise `RunError` where a trained weight, or a moment of it, is not finite: nothing good comes of such a
    checkpoint."""
    state = optimizer_tensors(engine, optimizer)
    trained = {name: item.detach() for name, item in engine.named_parameters()}
    sizes = {item.shape for item in trained.values()}
    moments = {name: item for name, item in state.items() if isinstance(item, torch.Tensor) and item.shape in sizes}
    tensors = {name: item for name, item in (*trained.items(), *moments.items())
               if item.is_floating_point() and item.numel()}
    if not tensors:
        return
    norms = torch._foreach_norm(list(tensors.values()), float("inf"))
    finite = torch.stack([norm.double().to(engine.mesh.device) for norm in norms]).isfinite().tolist()
    if not all(finite):
        name = next(name for name, good in zip(tensors, finite, strict=True) if not good)
        raise RunError(f"step {step}: {name} is not finite after the update, so no checkpoint is made of it; lower the"
                       " learning rate, or clip gradients, and resume from an earlier checkpoint")
