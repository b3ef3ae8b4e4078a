"""What can fail when trained weights are saved is found before the first step; what fails then loses nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.recipes.source import recipe_of
from mipipe.graphs.units import format_bytes
from mipipe.runtime.checkpoints.checkpoint_tensors import held_pieces
from mipipe.runtime.checkpoints.own_pieces import StoredPiece, byte_slice, divided_names, divided_shapes, own_pieces
from mipipe.runtime.checkpoints.save import plan_views, save_trained, target_of, unused_views
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import failure_of, failures_of, first_of, gather, rank
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.models import empty_module
from mipipe.runtime.weights.stored_weights import StoredWeights


def check_save(engine: Engine, config: TrainConfig, weights: StoredWeights | None) -> None:
    """Do all of saving but the writing, before training starts. All ranks must call.

    Raises:
        InputError: the weights could not be saved as the configuration says (a dtype or form that is not stored, no
            place for them, no room).
    """
    if config.save is None:
        return
    target, mine = target_of(config), own_pieces(engine)
    mine |= divided_shapes(engine, divided_names(engine))
    adapters = recipe_of(engine.graph).adapters

    def rehearse() -> None:
        if adapters is not None:
            check_room(target.folder, sum(item.nbytes for name, item in engine.named_parameters()))
            return
        views = plan_views(engine, empty_module(engine.graph, config), target.dtype)
        pieces = [(name, rows, tensor) for (name, rows), tensor in mine.items()]
        for view in views:
            for name, rows, tensor in pieces:
                if name == view.fqn:
                    byte_slice(view, rows, tensor)
        if rank() == 0:
            whole = [*views, *unused_views(weights, {view.name for view in views})]
            check_room(target.folder, sum(view.write_bytes for view in whole))

    failure = first_of(gather(failure_of(rehearse, Exception)))
    if failure is not None:
        raise InputError(f"train config: this run could not save its weights in the end: {failure}")


def check_room(folder: Path, num_bytes: int) -> None:
    """Raise `InputError` where a folder cannot be made with that many bytes in it."""
    place = folder.absolute().parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"save.folder {folder}: {place} is no folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"save.folder {folder}: {place} is not writable")
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise InputError(f"save.folder {folder}: needs {format_bytes(num_bytes)}, {format_bytes(free)} are free")


def save_or_rescue(engine: Engine, config: TrainConfig, weights: StoredWeights | None, replace: bool = False) -> None:
    """`save_trained`; where it fails, every rank writes its tensors as they are beside the folder. All ranks must call.

    Raises:
        RunError: the weights could not be saved; says where they are instead.
    """
    assert config.save is not None
    try:
        save_trained(engine, config, weights, replace)
    except Exception as error:
        folder = Path(config.save.folder)
        rescue = folder.with_name(folder.name + ".rescued")
        mine = own_pieces(engine)
        failed = first_of(failures_of(lambda: _write_plain(engine, mine, rescue), engine.options.timeout_s))
        left = (f"nor as they are: {failed}" if failed else
                f"they are in {rescue} as torch.save wrote them, one file for each rank, by the names of the graph")
        raise RunError(f"{error}; {left}") from error


def _write_plain(engine: Engine, mine: Mapping[StoredPiece, torch.Tensor], folder: Path) -> None:
    """What this rank writes, as torch.save does; names have the rows where a parameter is held in parts."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name if rows is None else f"{name}[{rows[0]}:{rows[1]}]": tensor.cpu()
               for (name, rows), tensor in mine.items()}
    for name, piece in held_pieces(engine).items():
        tensor = engine.weights.parameters.get(name, engine.weights.buffers.get(name))
        if tensor is not None:
            tensors[name + piece.suffix] = tensor.detach().cpu()
    torch.save(tensors, folder / f"rank-{rank()}.pt")
