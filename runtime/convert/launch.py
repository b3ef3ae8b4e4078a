"""From a conversion's recipe to a finished folder: the library form of ``mipipe convert``."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.calibration.rule import CalibrationRule, check_calibration
from mipipe.graphs.converting.recipe import (
    CompressExperts,
    ConvertRecipe,
    Dive,
    MergeExperts,
    Molae,
    PruneExperts,
    Ream,
    read_convert_recipe,
)
from mipipe.graphs.serialize import to_data
from mipipe.planner.merging.plan import SHARD_BYTES
from mipipe.runtime.calibration.tokens import Samples, draw_samples
from mipipe.runtime.convert import collect
from mipipe.runtime.convert.compress import plan_compress
from mipipe.runtime.convert.from_dense import plan_adaptation, plan_dive
from mipipe.runtime.convert.merge_experts import kept_config, plan_merge, plan_prune
from mipipe.runtime.convert.molae import plan_molae
from mipipe.runtime.convert.output import Conversion, write_conversion
from mipipe.runtime.convert.ream import Result, decide, plan_ream
from mipipe.runtime.convert.source import MoeLayer, Source, dense_layers, open_source
from mipipe.runtime.merge.launching.launch import check_target
from mipipe.runtime.merge.output.lock import only_one
from mipipe.runtime.weights.reader import Shelf


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
    with only_one(out), Shelf() as shelf:
        source = open_source(wanted.model, shelf, getattr(torch, wanted.dtype))
        texts = Calibrated(source, loaders, out.with_name(out.name + ".states"), progress)
        conversion = plan(wanted, source, texts)
        data = {"method": wanted.METHOD, **to_data(wanted)}
        job = hashlib.sha256(json.dumps([data, source.files.fingerprint, texts.digests], sort_keys=True).encode())
        record = write_conversion(conversion, source, out, data, job.hexdigest()[:16], shard_bytes,
                                  lambda done, total: progress(f"converting {done / max(1, total):.0%}"), verify)
    return ConvertResult(out, record, conversion.describe(record), time.monotonic() - began)


class Calibrated:
    """What texts do inside the source, each when it is asked for; ``scratch`` is a folder for states."""

    def __init__(self, source: Source, loaders: Collection[str], scratch: Path,
                 progress: Callable[[str], None]) -> None:
        self._source, self._loaders, self._scratch, self._progress = source, loaders, scratch, progress
        self.digests: list[str] = []

    def samples(self, rule: CalibrationRule, seed: int = 0) -> Samples:
        """The samples of a rule.

        Raises:
            InputError: as of `mipipe.runtime.calibration.tokens.draw_samples`.
        """
        check_calibration(rule, (), self._source.files.source)
        path = self._source.files.path
        found = draw_samples(rule.data, path, rule.samples, rule.length, seed,
                             int(self._source.files.config["vocab_size"]), self._loaders, self._source.files.source)
        self.digests.append(found.digest)
        return found

    def routing(self, samples: Samples, layers: Sequence[MoeLayer]) -> Mapping[int, collect.RoutingCounts]:
        self._progress("running the model on the texts")
        return collect.routing(self._source, samples, {layer.number: len(layer.experts) for layer in layers},
                               self._scratch)

    def merging(self, recipe: Ream, samples: Samples, layers: Sequence[MoeLayer], result: Result) -> None:
        self._progress("running the model on the texts, merging its layers")
        config = kept_config(self._source, recipe.kept(len(layers[0].experts)), recipe.experts_per_token)
        decide(recipe, self._source, samples, layers, result, config, self._scratch)

    def channels(self, samples: Samples, layers: Mapping[int, int]) -> Mapping[int, collect.ChannelMoments]:
        self._progress("running the model on the texts")
        return collect.channels(self._source, samples, layers, self._scratch)

    def model(self) -> Any:
        """The whole model."""
        self._progress("loading the model")
        return collect.load_model(self._source)


def plan(recipe: ConvertRecipe, source: Source, texts: Calibrated) -> Conversion:
    """The conversion of a recipe. What needs the texts runs the model only after recipe, model and texts were found to
    fit each other."""
    if isinstance(recipe, Molae):
        return plan_molae(recipe, source)
    if isinstance(recipe, Dive):
        inner = {number: parts["gate_proj"].shape[0] for number, parts in dense_layers(source).items()}
        return plan_dive(recipe, source, [texts.samples(item, recipe.seed) for item in recipe.domains],
                         lambda samples: texts.channels(samples, inner), texts.model)
    samples = texts.samples(recipe.calibration, 0 if isinstance(recipe, PruneExperts) else recipe.seed)
    routing = functools.partial(texts.routing, samples)
    if isinstance(recipe, MergeExperts):
        return plan_merge(recipe, source, routing)
    if isinstance(recipe, Ream):
        return plan_ream(recipe, source, functools.partial(texts.merging, recipe, samples))
    if isinstance(recipe, PruneExperts):
        return plan_prune(recipe, source, routing)
    if isinstance(recipe, CompressExperts):
        return plan_compress(recipe, source, samples, routing, texts.model)
    return plan_adaptation(recipe, source, lambda layers: texts.channels(samples, layers))
