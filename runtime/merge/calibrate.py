"""Calibration inside a merge: samples drawn before it is planned, models run by its ranks, results for its methods."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor

from mipipe.graphs.calibration.rule import CalibrationRule
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import DTYPE_BITS
from mipipe.graphs.merging.checkpoints.tensor_classes import TableRows
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeUnit
from mipipe.graphs.merging.participants import TOKEN_TABLES
from mipipe.graphs.serialize import digest, from_data
from mipipe.planner.merging.plan import MergePlan
from mipipe.runtime.calibration.calibrator import Calibrator
from mipipe.runtime.calibration.decoder import Decoder
from mipipe.runtime.calibration.files import FOLDER, samples_file
from mipipe.runtime.calibration.results import Results
from mipipe.runtime.calibration.tokens import Samples, draw_samples
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.expert_merging import METHOD, learn
from mipipe.runtime.merge.pleas import ordered
from mipipe.runtime.merge.sources import Surroundings, UnitPiece
from mipipe.runtime.weights.reader import Shelf


def with_samples(plan: MergePlan, loaders: Collection[str], where: str, tell: Callable[[str], None],
                 folder: Path) -> tuple[MergePlan, dict[str, Samples]]:
    """The plan with the digests of its samples, and the samples by data source; nothing to do without calibration.

    Where coefficients are learned, they are: ``folder`` keeps them.

    Raises:
        InputError: see `mipipe.runtime.calibration.tokens.draw_samples`.
    """
    if plan.graph.recipe.get("merge_method") == METHOD:
        return _learned(plan, loaders, where, tell, folder), {}
    calibration = plan.graph.calibration
    if calibration is None:
        return plan, {}
    vocabulary = _vocabulary(plan.graph)
    found = {source: draw_samples(source, plan.graph.tokenizer_from, calibration.samples, calibration.length,
                                  calibration.seed, vocabulary, loaders, where) for source in calibration.sources}
    for source, samples in found.items():
        if len(samples.ids) < calibration.samples:
            tell(f"{where}: calibration: {source} gives {len(samples.ids)} samples of {calibration.length} tokens, of"
                 f" {calibration.samples} asked for")
    calibration = dataclasses.replace(calibration, digests={name: item.digest for name, item in found.items()})
    return dataclasses.replace(plan, graph=dataclasses.replace(plan.graph, calibration=calibration)), found


def _vocabulary(graph: MergeGraph) -> int:
    table = next((unit for unit in graph.units if unit.name.endswith(TOKEN_TABLES)), None)
    return table.shape[0] if table is not None else 2**31 - 1


def _learned(plan: MergePlan, loaders: Collection[str], where: str, tell: Callable[[str], None],
             folder: Path) -> MergePlan:
    """The plan with learned coefficients in its units."""
    graph = plan.graph
    unit = next(unit for unit in graph.units if unit.method == METHOD)
    assert unit.base is not None
    rule = from_data(graph.recipe["calibration"], CalibrationRule, where)
    own = {item["model"]: item.get("calibration") or rule.data for item in graph.recipe["models"]}
    sources = [own[graph.models[item.model].label] for item in unit.models]
    if not all(sources):
        raise InputError(f"{where}: calibration: has no data for some models that {METHOD} runs; give it data, or every"
                         " model a calibration of its own")
    drawn = [draw_samples(source, graph.tokenizer_from, rule.samples, rule.length, graph.seed, _vocabulary(graph),
                          loaders, where) for source in sources]
    tell(f"{where}: {METHOD} holds all {len(sources) + 1} models in memory while it learns")
    with Shelf() as shelf:
        around = Surroundings(graph, shelf, torch.device("cpu"))
        decoders = [open_decoder(graph, item.model, around) for item in unit.inputs]
        graph = learn(graph, decoders, drawn, unit.parameters, folder)
    return dataclasses.replace(plan, graph=graph)


def write_samples(plan: MergePlan, samples: dict[str, Samples], folder: Path, cache: str | None = None) -> None:
    """Put the samples where the ranks read them.

    Args:
        cache: a folder that keeps what is found, for merges of the same models on the same samples.
    """
    calibration = plan.graph.calibration
    if calibration is None:
        return
    if cache is None:
        (folder / FOLDER).mkdir(exist_ok=True)
    elif not (folder / FOLDER).exists():
        prints = [model.fingerprint for model in plan.graph.models]
        text = "/".join((digest(calibration), *prints, plan.graph.compute_dtype))
        kept = Path(cache).absolute() / hashlib.sha256(text.encode()).hexdigest()[:16]
        kept.mkdir(parents=True, exist_ok=True)
        (folder / FOLDER).symlink_to(kept)
    for source, found in samples.items():
        target = samples_file(folder, calibration, source)
        found.save(target.with_suffix(".partial"))
        os.replace(target.with_suffix(".partial"), target)


def forget_calibration(folder: Path) -> None:
    """Remove what calibration left, before the result is published."""
    if (folder / FOLDER).is_symlink():
        (folder / FOLDER).unlink()
    shutil.rmtree(folder / FOLDER, ignore_errors=True)


class RankCalibration:
    """A rank's part of running the models."""

    def __init__(self, plan: MergePlan, folder: Path, around: Surroundings, exchange: MergeRanks) -> None:
        assert plan.graph.calibration is not None
        self._graph, self._folder, self._exchange = plan.graph, folder, exchange
        here = dataclasses.replace(around, device=torch.device("cpu"))  # models run on the host, whatever merges
        self._calibrator = Calibrator(plan.graph.calibration, folder,
                                      lambda model: open_decoder(plan.graph, model, here), here.dtype)

    def run(self, stream: int, step: int) -> None:
        """Run a step of a stream."""
        self._calibrator.step(stream, step)

    def finish(self, around: Surroundings) -> Surroundings:
        """Wait for all ranks, and add what they found to what tiles are read with."""
        self._exchange.barrier()
        assert self._graph.calibration is not None
        results = Results(self._graph.calibration, self._folder, around.dtype)
        return ordered(self._graph, dataclasses.replace(around, results=results), results)


def open_decoder(graph: MergeGraph, model: int, around: Surroundings) -> Decoder:
    """A model of the merge, to be run layer by layer."""
    items: dict[str, tuple[MergeUnit, Input]] = {}
    for unit in graph.units:
        for item in unit.inputs:
            if item.model == model and item.tensor.dtype in DTYPE_BITS:
                items[unit.name] = unit, item

    def piece(name: str) -> tuple[UnitPiece, Input]:
        unit, item = items[name]
        return UnitPiece(unit, TableRows(name, 0, 0), around), item

    def read(name: str) -> Tensor:
        reader, item = piece(name)
        value = reader.whole(item)
        return value if value.is_floating_point() else value.to(torch.float32)

    def rows(name: str, numbers: Tensor) -> Tensor:
        reader, item = piece(name)
        return reader.picked(item, numbers)

    found = graph.models[model]
    return Decoder(found.label, found.folder, {name: item.tensor for name, (_, item) in items.items()}, read, rows,
                   around.dtype)
