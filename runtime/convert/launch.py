"""From a conversion's recipe to a finished folder: the library form of ``mipipe convert``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.converting.recipe import (
    Calibration,
    CompressExperts,
    ConvertRecipe,
    Dive,
    MergeExperts,
    MoeAdaptation,
    Molae,
    PruneExperts,
    read_convert_recipe,
)
from mipipe.graphs.serialize import to_data
from mipipe.runtime.convert import collect
from mipipe.runtime.convert.compress import plan_compress
from mipipe.runtime.convert.from_dense import plan_adaptation, plan_dive
from mipipe.runtime.convert.merge_experts import plan_merge, plan_prune
from mipipe.runtime.convert.molae import plan_molae
from mipipe.runtime.convert.output import Conversion, write_conversion
from mipipe.runtime.convert.source import Source, open_source
from mipipe.runtime.convert.texts import token_rows
from mipipe.runtime.merge.launch import check_target
from mipipe.runtime.merge.output.lock import only_one
from mipipe.runtime.weights.reader import Shelf

SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """A finished conversion: the folder, its record (figures by layer), a line for people, seconds."""

    out: Path
    record: dict[str, Any]
    told: str
    seconds: float


def convert(recipe: str | Path | ConvertRecipe, out: str | Path, *, loaders: Collection[str] = (),
            shard_bytes: int = SHARD_BYTES, verify: bool = True,
            progress: Callable[[str], None] = lambda _line: None) -> ConvertResult:
    """Convert as a recipe says, into a new folder. An interrupted conversion continues where it was.

    Args:
        loaders: ``package.module:function`` names that the recipe may call for its texts.
        progress: called with a word on what is being done.

    Raises:
        InputError: the recipe or the model is wrong, or ``out`` exists.
        RunError: no space, or a result that would not load.
    """
    began, out = time.monotonic(), Path(out)
    wanted = read_convert_recipe(recipe) if isinstance(recipe, (str, Path)) else recipe
    check_target(out)
    torch.set_num_threads(max(1, torch.get_num_threads()))
    with only_one(out), Shelf() as shelf:
        source = open_source(wanted.model, shelf, getattr(torch, wanted.dtype))
        rows = Rows(source, loaders, progress)
        conversion = plan(wanted, source, rows)
        data = {"method": wanted.METHOD, **to_data(wanted)}
        job = hashlib.sha256(json.dumps([data, source.files.fingerprint, rows.digests], sort_keys=True).encode())
        record = write_conversion(conversion, source, out, data, job.hexdigest()[:16], shard_bytes,
                                  lambda done, total: progress(f"converting {done / max(1, total):.0%}"), verify)
    return ConvertResult(out, record, conversion.describe(record), time.monotonic() - began)


class Rows:
    """Token ids of calibrations and the model they run through, each made when it is first asked for."""

    def __init__(self, source: Source, loaders: Collection[str], progress: Callable[[str], None]) -> None:
        self._source, self._loaders, self._progress = source, loaders, progress
        self._model: Any = None
        self.digests: list[str] = []

    def of(self, calibration: Calibration) -> torch.Tensor:
        rows = token_rows(calibration, self._source.files.path, int(self._source.files.config["vocab_size"]),
                          self._loaders)
        self.digests.append(hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16])
        return rows

    @property
    def model(self) -> Any:
        if self._model is None:
            self._progress("loading the model")
            self._model = collect.load_model(self._source)
        self._progress("calibrating")
        return self._model

    def drop(self) -> None:
        """Forget the model."""
        self._model = None

    def routing(self, calibration: Calibration) -> Callable[[Sequence[int]], Mapping[int, collect.Routing]]:
        def run(layers: Sequence[int]) -> Mapping[int, collect.Routing]:
            rows = self.of(calibration)
            found = collect.routing(self.model, layers, rows)
            self.drop()
            return found
        return run


def plan(recipe: ConvertRecipe, source: Source, rows: Rows) -> Conversion:
    """The conversion of a recipe, after whatever calibration it needs."""
    if isinstance(recipe, Molae):
        return plan_molae(recipe, source)
    if isinstance(recipe, MergeExperts):
        return plan_merge(recipe, source, rows.routing(recipe.calibration))
    if isinstance(recipe, PruneExperts):
        return plan_prune(recipe, source, rows.routing(recipe.calibration))
    if isinstance(recipe, CompressExperts):
        return plan_compress(recipe, source, rows.of(recipe.calibration), lambda: rows.model)
    if isinstance(recipe, Dive):
        return plan_dive(recipe, source, [rows.of(item) for item in recipe.domains], rows.model)
    assert isinstance(recipe, MoeAdaptation)
    return plan_adaptation(recipe, source, rows.of(recipe.calibration), rows.model)


