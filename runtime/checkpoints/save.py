"""Trained weights as a Hugging Face folder that transformers' ``from_pretrained`` loads, written in place by all ranks.

The layout of the shards is known from shapes alone, so every rank writes its own tensors straight to their place in
files on shared storage: no rank holds more than it trains, but for one tensor at a time that a team divides, and puts
together for its first member. The folder has another name until it is whole. Names are those of published checkpoints
(experts one by one); ``config.json``, tokenizer and other small files come from where the model came from.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.merging.layout import Shard, index_json, lay_out
from mipipe.graphs.recipes.adapters import is_adapter
from mipipe.graphs.recipes.expansion import is_expansion
from mipipe.graphs.recipes.objective import REFERENCE
from mipipe.graphs.recipes.source import recipe_of
from mipipe.graphs.serialize import load_data
from mipipe.graphs.tracing.parameter_slices import parse_slice
from mipipe.graphs.units import parse_bytes
from mipipe.runtime.checkpoints.own_pieces import (
    StoredPiece,
    byte_slice,
    divided_names,
    own_pieces,
    put_together,
)
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import failures_of, first_of, rank
from mipipe.runtime.recipes.adapter_files import adapter_tensors, write_adapters
from mipipe.runtime.recipes.light import first_stage, is_second, merged
from mipipe.runtime.recipes.votes import fuser
from mipipe.runtime.train.config import TrainConfig
from mipipe.runtime.train.models import empty_module, plain_module, take_reference
from mipipe.runtime.weights.reader import TORCH_DTYPES
from mipipe.runtime.weights.stored_names import StoredView, is_transformers, stored_views
from mipipe.runtime.weights.stored_weights import INDEX, StoredWeights
from mipipe.runtime.weights.writer import Writer, partial_folder, prepare, publish_folder

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".index.json")
SMALL_BYTES = 64 * 2**20
"""Files beside the weights up to this size are copied: tokenizers have up to some 20 MB."""


@dataclass(frozen=True, slots=True)
class Target:
    """What to write: the folder, the largest size of one file, another floating dtype than the model's."""

    folder: Path
    shard_bytes: int
    dtype: torch.dtype | None = None


def save_weights(engine: Engine, module: nn.Module, target: Target, source: Path | None = None,
                 weights: StoredWeights | None = None, replace: bool = False, changed: bool = False,
                 fused: Callable[[str, Tensor], Tensor] | None = None) -> None:
    """Write the engine's weights as a Hugging Face folder. All ranks must call; each tensor is written by one.

    Args:
        engine: the trained engine.
        module: the model, on the meta device (`mipipe.runtime.train.models.empty_module`).
        target: where and how.
        source: folder whose small files are copied (configuration, tokenizer).
        weights: what the engine was loaded from; stored tensors of a folder that the graph does not use are copied.
        replace: an existing folder of that name is replaced.
        changed: the model is not what ``source``'s config.json says (``--set``), so that is written anew.
        fused: (name, whole weight) -> what is written of it; None: as the layers of the graph compute with it.

    Raises:
        InputError: the folder exists, or the model cannot be stored.
        RunError: the disk is full or failing.
    """
    views = plan_views(engine, module, target.dtype)
    leftover = unused_views(weights, {view.name for view in views})
    shards = lay_out([*views, *leftover], target.shard_bytes)
    job = f"mipipe train {engine.compiled.program.plan_digest} {engine.steps_done}"
    folder = partial_folder(_next(target.folder))
    on_first_rank(engine, lambda: _prepare(target.folder, shards, job, replace))
    made, mine, divided = fused or fuser(engine), own_pieces(engine), divided_names(engine)

    def write() -> None:
        whole = itertools.chain(mine.items(), put_together(engine, divided))
        _write_own(views, shards, folder, whole, made)
        if rank() == 0:
            _write_unused(weights, leftover, shards, folder)

    on_all_ranks(engine, write)
    on_first_rank(engine, lambda: _finish(module, target, source, shards, folder, changed))


def save_trained(engine: Engine, config: TrainConfig, weights: StoredWeights | None, replace: bool = False) -> None:
    """Save a finished run's weights as its configuration says (of a run of adapters, these alone; of Light-PEFT's
    second stage, the whole model with them): `save_weights`."""
    target, adapters = target_of(config), recipe_of(engine.graph).adapters
    if adapters is not None and not is_second(engine.graph):
        base = config.weights or str(engine.graph.source.get("source", ""))
        tensors = adapter_tensors(engine)
        on_first_rank(engine, lambda: write_adapters(tensors, adapters, target.folder, base, replace))
        return
    source = config.weights or config.model or engine.graph.source.get("source", "")
    folder = Path(source) if Path(source).is_dir() else Path(source).parent if Path(source).is_file() else None
    changed = bool(engine.graph.source.get("overrides"))
    if folder is None and "config" in engine.graph.source and rank() == 0:
        print(f"save: {source} is not there from here, so no tokenizer or other small file of it is copied",
              file=sys.stderr, flush=True)
    module, fused = empty_module(engine.graph, config), None
    if adapters is not None:
        module = plain_module(engine.graph, config)
        fused = merged(engine, empty_module(first_stage(engine.graph), config), module, adapters)
    save_weights(engine, module, target, folder, weights, replace, changed, fused)


def target_of(config: TrainConfig) -> Target:
    """What a run's configuration says about saving."""
    assert config.save is not None
    dtype = getattr(torch, config.save.dtype) if config.save.dtype else None
    return Target(Path(os.path.realpath(config.save.folder)), parse_bytes(config.save.shard, "save.shard"), dtype)


def plan_views(engine: Engine, module: nn.Module, dtype: torch.dtype | None = None) -> list[StoredView]:
    """The stored tensors of the graph's parameters and persistent buffers, the same on all ranks."""
    take_reference(module)
    shapes = {name: tuple(item.shape) for name, item in module.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for item in engine.graph.parameters:
        name, rows = parse_slice(item.fqn)
        frozen = name.startswith(f"{REFERENCE}.")
        added = is_expansion(name) or is_adapter(name)
        if item.tied_to is None and item.persistent and not frozen and not added and name not in tensors:
            shape = shapes.get(name, ()) if rows is not None else shapes.get(name, item.spec.shape)
            tensors[name] = torch.empty(shape, dtype=getattr(torch, item.spec.dtype), device="meta")
    return stored_views(module, tensors, DTYPE_NAMES, dtype)


def _write_own(views: Sequence[StoredView], shards: Sequence[Shard], folder: Path,
               mine: Iterable[tuple[StoredPiece, Tensor]], fused: Callable[[str, Tensor], Tensor]) -> None:
    """Write what this rank holds and no rank before it does, as ``fused`` makes it. All of ``mine`` is taken, whatever
    fails: members of a team put it together."""
    places: dict[str, list[StoredView]] = {}
    for view in views:
        places.setdefault(view.fqn, []).append(view)
    writer, failure = Writer(folder, shards, rank()), None
    try:
        for (name, rows), tensor in mine:
            try:
                if failure is None and name in places:
                    tensor = fused(name, tensor)
                for view in places.get(name, ()) if failure is None else ():
                    offset, part = byte_slice(view, rows, tensor)
                    if part is not None:
                        writer.write(view.name, offset, part)
            except Exception as error:
                failure = error
    finally:
        writer.close()
    if failure is not None:
        raise failure


def unused_views(weights: StoredWeights | None, names: set[str]) -> list[StoredView]:
    """Stored tensors of the source that the graph does not use, to be copied."""
    if weights is None:
        return []
    views = []
    for name in weights.unused():
        tensor = weights.read(name)
        if name not in names and tensor.dtype in DTYPE_NAMES:
            views.append(StoredView(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), "", (), 0, tensor.nbytes))
    return views


def _write_unused(weights: StoredWeights | None, views: Sequence[StoredView], shards: Sequence[Shard],
                  folder: Path) -> None:
    if weights is not None and views:
        writer = Writer(folder, shards, -1)
        for view in views:
            writer.write(view.name, 0, weights.read(view.name))
        writer.close()


def _prepare(out: Path, shards: Sequence[Shard], job: str, replace: bool) -> None:
    """Reserve the shards; what is left of an earlier save that was killed goes."""
    if out.exists() and not replace:
        raise InputError(f"{out}: exists already; give another folder to save to, or remove it")
    if out.exists() and not _is_saved(out):
        raise InputError(f"{out}: is no folder of saved weights, so a resumed run does not replace it; give another"
                         " folder to save to, or remove it")
    shutil.rmtree(partial_folder(_next(out)), ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    prepare(_next(out), shards, job)


def _is_saved(out: Path) -> bool:
    """Whether a folder is an earlier save: files alone, weights among them, or empty."""
    files = list(out.iterdir()) if out.is_dir() else None
    return files is not None and all(path.is_file() for path in files) and (
        not files or any(path.name.endswith(".safetensors") for path in files))


def _next(out: Path) -> Path:
    """A name of our own for what is being written, so that nobody else's unfinished folder is touched."""
    return out.with_name(out.name + ".next")


def _finish(module: nn.Module, target: Target, source: Path | None, shards: Sequence[Shard], folder: Path,
            changed: bool) -> None:
    """The small files, and the final name."""
    if len(shards) > 1:
        (folder / INDEX).write_text(index_json(shards))
    if source is not None and source.is_dir():
        for path in sorted(source.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHT_FILES) and path.stat().st_size <= SMALL_BYTES:
                shutil.copyfile(path, folder / path.name)
    if is_transformers(module):
        kinds = {tensor.dtype for shard in shards for tensor in shard.tensors}
        dtype = next((str(TORCH_DTYPES[kind]).removeprefix("torch.") for kind in ("BF16", "F16", "F32", "F64")
                      if kind in kinds), "float32")
        if changed:
            (folder / "config.json").unlink(missing_ok=True)
        _write_config(module, folder / "config.json", dtype)
    old = target.folder.with_name(target.folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.folder.exists():
        target.folder.rename(old)
    publish_folder(folder, target.folder, shards)
    shutil.rmtree(old, ignore_errors=True)


def _write_config(module: Any, path: Path, dtype: str) -> None:
    """``config.json``: the source's own, with the dtype that was saved; else what the model was built from."""
    if path.exists():
        data = load_data(path, foreign=True)
    else:
        data = json.loads(module.config.to_json_string())  # infinities as transformers writes them
        data.update(model_type=module.config.model_type, architectures=[type(module).__name__])
        data.pop("mipipe_expert_groups", None)
    data["torch_dtype" if "torch_dtype" in data else "dtype"] = dtype
    path.write_text(json.dumps(data, indent=2, sort_keys=True, default=str) + "\n")


def on_first_rank(engine: Engine, action: Callable[[], None]) -> None:
    """Do something on the first process; its failure is raised by all."""
    on_all_ranks(engine, action if rank() == 0 else lambda: None)


def on_all_ranks(engine: Engine, action: Callable[[], None]) -> None:
    """Do something, however long it takes (`failures_of`); where it fails on one rank, raise `RunError` on all."""
    failure = first_of(failures_of(action, engine.options.timeout_s))  # of any kind, or others would wait for this rank
    if failure is not None:
        raise RunError(f"weights cannot be saved: {failure}")
