"""Storing a recipe's experts as parts, and rebuilding models from them: planned and run like any merge.

`store` writes a parts folder once; `rebuild` makes an ordinary checkpoint for one expert or a mixture, whenever a
router asks for it. What is stored: `mipipe.runtime.merge.methods.parts`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.build import build
from mipipe.graphs.merging.checkpoints.files import CheckpointFiles, read_checkpoint
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeUnit
from mipipe.graphs.merging.layout import as_checkpoint
from mipipe.graphs.merging.method_table.methods import BY_NAME
from mipipe.graphs.merging.recipes.recipe import MergeRecipe
from mipipe.graphs.serialize import load
from mipipe.planner.merging.plan import MergePlan, plan_graph, plan_recipe
from mipipe.runtime.merge.launching.launch import MergeOptions, check_target, made_by, run_plan
from mipipe.runtime.merge.methods.parts import STORABLE, Parts, stored_bytes
from mipipe.runtime.merge.output.lock import only_one
from mipipe.runtime.weights.reader import TORCH_DTYPES

SHARED = "shared"
"""The folder of Twin-Merging's shared model inside a parts folder."""


def store(recipe: MergeRecipe, out: Path, where: str = "recipe", options: MergeOptions | None = None) -> Parts:
    """Write the experts of a recipe as parts into a new folder.

    Raises:
        InputError: a method that leaves one model, a recipe that changes shapes, or what `build` raises.
    """
    options = options or MergeOptions()
    check_target(out)
    _check(recipe, where)
    with only_one(out):
        return _store(recipe, out, where, options)


def _store(recipe: MergeRecipe, out: Path, where: str, options: MergeOptions) -> Parts:
    steps = out.with_name(out.name + ".steps")
    if recipe.merge_method == "twin":
        steps.mkdir(exist_ok=True)
        plan = _plan_shared(recipe, where, out, options)
        if not ((steps / SHARED).exists() and made_by(steps / SHARED, plan)):
            run_plan(plan, steps / SHARED, options)
        recipe = dataclasses.replace(recipe, base_model=str(steps / SHARED))
    run_plan(_plan_parts(recipe, where, out, options, {}), out, options)
    if recipe.merge_method == "twin":
        os.rename(steps / SHARED, out / SHARED)
        with contextlib.suppress(OSError):
            steps.rmdir()
    return load(out / "parts.json", Parts)


def plan_store(recipe: MergeRecipe, out: Path, where: str, options: MergeOptions) -> list[MergePlan]:
    """The plans of `store`, of which none has run."""
    _check(recipe, where)
    if recipe.merge_method != "twin":
        return [_plan_parts(recipe, where, out, options, {})]
    shared = _plan_shared(recipe, where, out, options)
    known = {SHARED: as_checkpoint(shared.graph, shared.shards)}
    return [shared, _plan_parts(dataclasses.replace(recipe, base_model=SHARED), where, out, options, known)]


def _check(recipe: MergeRecipe, where: str) -> None:
    if recipe.merge_method not in STORABLE:
        raise InputError(f"{where}: {recipe.merge_method} leaves one model and no parts to store; expected one of"
                         f" {', '.join(STORABLE)}")
    if recipe.branches or recipe.slices or recipe.align or recipe.vocabulary or recipe.adapter:
        raise InputError(f"{where}: parts are stored for whole models of one shape; leave out branches, slices, align,"
                         " adapter and tokenizer")


def _plan_shared(recipe: MergeRecipe, where: str, out: Path, options: MergeOptions) -> MergePlan:
    scale = float(recipe.parameters.get("shared_scale", 0.29))
    shared = dataclasses.replace(recipe, merge_method="task_arithmetic", parameters={"lambda": scale})
    return plan_recipe(shared, where, out, {}, options.num_ranks, options.memory_cap, options.shard_bytes)


def _plan_parts(recipe: MergeRecipe, where: str, out: Path, options: MergeOptions,
                known: Mapping[str, CheckpointFiles]) -> MergePlan:
    graph = _with_folders(build(recipe, where, known), os.path.abspath)  # may be rebuilt from anywhere
    units = []
    for unit in graph.units:
        if unit.method == "copy":  # comes from the base again
            units.append(unit)
            continue
        turned = unit.transposed and BY_NAME[unit.method].oriented
        dtypes = [str(TORCH_DTYPES[item.tensor.dtype]).removeprefix("torch.") for item in unit.models]
        units.append(dataclasses.replace(unit, method="store", parameters={
            "of": unit.method, "values": {**unit.parameters, "dtypes": dtypes, "turned": turned}}))
    graph = dataclasses.replace(graph, units=tuple(units))
    return plan_graph(graph, out, options.num_ranks, options.memory_cap, options.shard_bytes)


def rebuild(folder: Path, out: Path, route: Sequence[float], options: MergeOptions | None = None) -> Parts:
    """An ordinary checkpoint from a parts folder: base (or shared model) plus ``sum_t route_t delta_t``.

    Raises:
        InputError: no parts folder, damaged or missing parts, a route of another length, a base that has changed.
    """
    options = options or MergeOptions()
    check_target(out)
    with only_one(out):
        run_plan(plan_rebuild(folder, out, route, options), out, options)
    return load(folder / "parts.json", Parts)


def plan_rebuild(folder: Path, out: Path, route: Sequence[float], options: MergeOptions) -> MergePlan:
    """The plan of `rebuild`."""
    if not (folder / "parts.json").exists():
        raise InputError(f"{folder}: holds no stored parts; --route rebuilds a model from a folder that --store made")
    parts = load(folder / "parts.json", Parts)
    if len(route) != len(parts.experts):
        raise InputError(f"--route: found {len(route)} weights, expected {len(parts.experts)}, one for each of"
                         f" {', '.join(parts.experts)}")
    if not all(math.isfinite(weight) for weight in route):
        raise InputError(f"--route: found {', '.join(map(str, route))}, expected finite numbers")
    if stored_bytes(folder) != parts.num_bytes:
        raise InputError(f"{folder}: holds {stored_bytes(folder)} bytes of parts, expected {parts.num_bytes}: files are"
                         " missing or of another merge; store them again")
    graph = _at_home(parts.graph, folder)
    units = tuple(_rebuilt(unit, folder, route) for unit in graph.units)
    return plan_graph(dataclasses.replace(graph, units=units), out, options.num_ranks, options.memory_cap,
                      options.shard_bytes)


def _rebuilt(unit: MergeUnit, folder: Path, route: Sequence[float]) -> MergeUnit:
    if unit.method == "copy":
        return unit
    turned = unit.transposed and BY_NAME[unit.method].oriented
    return dataclasses.replace(unit, method="rebuild", models=(), parameters={
        "folder": str(folder), "route": list(route), "turned": turned})


def _at_home(graph: MergeGraph, folder: Path) -> MergeGraph:
    """The graph with its shared model where it is now, after a check that base or shared model are unchanged."""
    shared = folder / SHARED
    base = next(unit.base for unit in graph.units if unit.base is not None)
    place = str(shared) if shared.is_dir() else base.folder
    if not graph.models[base.model].fingerprint.startswith(read_checkpoint(place).fingerprint):
        raise InputError(f"{place}: has changed since the parts in {folder} were made from it; store them again")
    return _with_folders(graph, lambda name: place if name == base.folder else name)


def _with_folders(graph: MergeGraph, place: Callable[[str], str]) -> MergeGraph:
    """The graph with every model's folder where ``place`` says it is."""
    def moved(item: Input) -> Input:
        adapters = tuple(dataclasses.replace(adapter, folder=place(adapter.folder)) for adapter in item.adapters)
        return dataclasses.replace(item, folder=place(item.folder), adapters=adapters)

    units = tuple(dataclasses.replace(unit, base=None if unit.base is None else moved(unit.base),
                                      models=tuple(map(moved, unit.models))) for unit in graph.units)
    models = tuple(dataclasses.replace(model, folder=place(model.folder)) for model in graph.models)
    return dataclasses.replace(graph, units=units, models=models, tokenizer_from=place(graph.tokenizer_from))
