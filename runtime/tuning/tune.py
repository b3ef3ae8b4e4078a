"""Searching a recipe's free values: merge, measure, write down, go on.

The work folder holds ``journal.jsonl`` (a line for each point with its scores), ``calibration`` (statistics, which do
not depend on the free values and are taken once), ``trial`` (the model merged last: of the next point, tensors whose
inputs and parameters are the same are kept as they are) and in the end ``best``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.recipes.paths import beside_recipe
from mipipe.graphs.merging.recipes.read import parse_recipe
from mipipe.graphs.merging.recipes.recipe import MergeRecipe
from mipipe.graphs.serialize import yaml_documents
from mipipe.graphs.tuning.space import SearchSpace, space_of
from mipipe.planner.merging.plan import MergePlan, plan_recipe
from mipipe.runtime.merge.calibrate import with_samples
from mipipe.runtime.merge.launching.launch import MergeOptions, Reuse, merge, run_plan
from mipipe.runtime.tuning.objectives import Measure, Objectives
from mipipe.runtime.tuning.search import KINDS, Values, make_search, total
from mipipe.runtime.tuning.surrogate import not_dominated

JOURNAL = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How to search: ``search`` is grid, cma or map; ``budget`` points at most (a grid has as many as it has),
    ``points`` of a range in a grid. ``weights``: of the scores in the sum that decides which point is best; none: equal
    ones."""

    search: str = "grid"
    budget: int = 40
    points: int = 5
    seed: int = 0
    weights: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if self.search not in KINDS:
            raise InputError(f"--search {self.search}: expected one of {', '.join(KINDS)}")
        if self.budget < 1 or self.points < 1:
            raise InputError(f"--budget {self.budget}, --points {self.points}: expected at least 1")


@dataclass(frozen=True, slots=True)
class Trial:
    """A measured point: values, scores as measured, seconds of merging and of measuring, and tensors merged anew."""

    values: Values
    scores: Mapping[str, float]
    merge_s: float = 0.0
    measure_s: float = 0.0
    merged: int = 0


@dataclass(frozen=True, slots=True)
class TuneResult:
    """All trials, which of them no other beats, and the best by the weighted sum."""

    names: tuple[str, ...]
    trials: tuple[Trial, ...]
    front: tuple[int, ...]
    best: int
    facts: Mapping[str, Any]
    folder: Path


def tune(recipe: Path, folder: Path, objectives: Objectives, options: TuneOptions | None = None,
         merging: MergeOptions | None = None, tell: Callable[[str], None] = lambda _line: None,
         progress: Callable[[int, Trial], None] = lambda _count, _trial: None) -> TuneResult:
    """Search the free values of a recipe file; ``folder/best`` is the best model in the end.

    Raises:
        InputError: a recipe without free values, a journal of another search, or what merging and measuring raise.
    """
    options, merging = options or TuneOptions(), merging or MergeOptions()
    space = space_of(beside_recipe(yaml_documents(recipe), recipe), str(recipe))
    for end in (0.0, 1.0):  # what is wrong at the ends of the ranges shall show before hours of search
        _recipes(space, space.point([end] * len(space.free)), str(recipe))
    measure = Measure(objectives)
    folder.mkdir(parents=True, exist_ok=True)
    journal = _Journal(folder / JOURNAL, space, objectives, options)
    search = make_search(options.search, space, options.budget, options.points, options.seed, dict(options.weights))
    runner = _Runner(space, str(recipe), folder, merging, measure, tell)
    trials: dict[Values, Trial] = {}
    while asked := search.ask():
        for values in asked:
            if values not in trials:
                found = journal.known.get(values)
                if found is None:
                    found = runner.run(values)
                    journal.add(found)
                trials[values] = found
                progress(len(trials), found)
        search.tell([(values, _signed(trials[values].scores, measure)) for values in asked])
    result = _result(space, list(trials.values()), measure, options, search.facts(), folder)
    runner.finish(result.trials[result.best].values)
    return result


def _signed(scores: Mapping[str, float], measure: Measure) -> dict[str, float]:
    """Scores of which higher is better."""
    return {name: -value if measure.lower_is_better(name) else value for name, value in scores.items()}


def _result(space: SearchSpace, trials: Sequence[Trial], measure: Measure, options: TuneOptions,
            facts: Mapping[str, Any], folder: Path) -> TuneResult:
    signed = [_signed(trial.scores, measure) for trial in trials]
    unknown = [name for name, _ in options.weights if name not in signed[0]]
    if unknown:
        raise InputError(f"--weight {unknown[0]}: is no score; expected {', '.join(signed[0])}")
    sums = [total(scores, dict(options.weights)) for scores in signed]
    front = not_dominated(np.array([list(scores.values()) for scores in signed]))
    return TuneResult(tuple(item.name for item in space.free), tuple(trials), tuple(front),
                      max(range(len(sums)), key=lambda index: sums[index]), dict(facts), folder)


def _recipes(space: SearchSpace, values: Values, where: str) -> list[MergeRecipe]:
    """The recipes at a point."""
    documents = space.documents_at(values)
    return [parse_recipe(item, where if len(documents) == 1 else f"{where}, recipe {number}")
            for number, item in enumerate(documents, 1)]


class _Journal:
    """The trials on disk: a first line that says of which search, then one for each."""

    def __init__(self, path: Path, space: SearchSpace, objectives: Objectives, options: TuneOptions) -> None:
        self._path = path
        head = {"recipe": json.loads(json.dumps(space.documents)), "objectives": _plain(objectives)}
        self.known: dict[Values, Trial] = {}
        if not path.exists():
            path.write_text(json.dumps(head) + "\n")
            return
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not lines or json.loads(lines[0]) != head:
            raise InputError(f"{path}: is of another search (recipe or measures differ); give another -o, or remove it")
        for line in lines[1:]:
            entry = json.loads(line)
            trial = Trial(tuple(entry["values"]), entry["scores"], entry["merge_s"], entry["measure_s"],
                          entry["merged"])
            self.known[trial.values] = trial
        path.write_text("".join(lines))

    def add(self, trial: Trial) -> None:
        """Write a trial down, to the disk."""
        with self._path.open("a") as stream:
            stream.write(json.dumps({"values": list(trial.values), "scores": dict(trial.scores),
                                     "merge_s": round(trial.merge_s, 3), "measure_s": round(trial.measure_s, 3),
                                     "merged": trial.merged}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _plain(objectives: Objectives) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(objectives)))
    return found


class _Runner:
    """Merges and measures points; keeps the last model, to change only what changes."""

    def __init__(self, space: SearchSpace, where: str, folder: Path, merging: MergeOptions, measure: Measure,
                 tell: Callable[[str], None]) -> None:
        self._space, self._where, self._folder, self._measure, self._tell = space, where, folder, measure, tell
        self._options = dataclasses.replace(merging, verify=False, calibration_cache=str(folder / "calibration"))
        self._verify = merging.verify
        self._trial = folder / "trial"
        self._last: MergePlan | None = None
        self._told: set[str] = set()
        for name in ("trial", "trial.partial", "trial.steps"):
            shutil.rmtree(folder / name, ignore_errors=True)

    def run(self, values: Values) -> Trial:
        """Merge at a point and measure."""
        began = time.monotonic()
        merged = self._merge(_recipes(self._space, values, self._where))
        between = time.monotonic()
        scores = self._measure.scores(self._trial)
        return Trial(values, scores, between - began, time.monotonic() - between, merged)

    def _merge(self, recipes: Sequence[MergeRecipe]) -> int:
        if len(recipes) > 1 or recipes[0].adapter is not None:
            shutil.rmtree(self._trial, ignore_errors=True)
            merge(recipes, self._trial, self._options, tell=self._say)
            return 0
        options = self._options
        plan = plan_recipe(recipes[0], self._where, self._trial, {}, options.num_ranks, options.memory_cap,
                           options.shard_bytes, options.dtype)
        for note in plan.graph.notes:
            self._say(note)
        plan, samples = with_samples(plan, options.loaders, self._where, self._say, self._folder / "learned")
        reuse, same = None, set[str]()
        if self._last is not None and self._last.shards == plan.shards:
            before = {unit.name: unit for unit in self._last.graph.units}
            same = {unit.name for unit in plan.graph.units if before.get(unit.name) == unit}
            os.rename(self._trial, self._folder / "before")
            reuse = Reuse(self._folder / "before", frozenset(same))
        run_plan(plan, self._trial, options, None, samples, reuse)
        shutil.rmtree(self._folder / "before", ignore_errors=True)
        self._last = plan
        return len(plan.graph.units) - len(same)

    def _say(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._tell(line)

    def finish(self, values: Values) -> None:
        """Make the best model, and remove the last one."""
        best = self._folder / "best"
        shutil.rmtree(best, ignore_errors=True)
        options = dataclasses.replace(self._options, verify=self._verify)
        merge(_recipes(self._space, values, self._where), best, options, tell=self._say)
        shutil.rmtree(self._trial, ignore_errors=True)
