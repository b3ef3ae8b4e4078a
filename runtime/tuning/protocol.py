"""MergeBench's protocol (arXiv 2505.10833): normalised performance, forgetting, and what a merge took.

A file of models lists a base, an expert for each domain, merged models, and what is measured::

    base: ./base
    experts: {math: ./math, code: ./code}
    merged: {ties: ./ties, regmean: ./regmean}
    domains: {math: {perplexity: math.txt}, code: {evaluate: "my:score"}, facts: {lm_eval: arc_easy}}
    general: {prose: {perplexity: prose.txt}}

A merged model's normalised performance is the mean over domains of its score over the expert's; of a text, where lower
is better, the expert's perplexity over the merged model's. Forgetting is what it is worse than the base on general
tasks: a difference of scores, of texts of mean losses in nats.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mipipe.graphs.errors import InputError, RunError
from mipipe.graphs.serialize import STRICT, from_data, yaml_documents
from mipipe.runtime.merge.output.card import RECORD
from mipipe.runtime.tuning.objectives import Measure, Objectives


@dataclass(frozen=True, slots=True)
class Task:
    """What is measured of a domain: the loss on a text, or a number of a function's or of a task of
    lm-evaluation-harness (the higher the better)."""

    __pydantic_config__: ClassVar = STRICT
    perplexity: str = ""
    evaluate: str = ""
    lm_eval: str = ""

    @property
    def code(self) -> tuple[str, str]:
        """The code that measures it, and the flag that names it; nothing of a text."""
        return (self.evaluate, "--evaluate") if self.evaluate else (self.lm_eval, "--lm-eval")


@dataclass(frozen=True, slots=True)
class Models:
    """A file of models and tasks."""

    __pydantic_config__: ClassVar = STRICT
    merged: dict[str, str]
    domains: dict[str, Task]
    experts: dict[str, str] = field(default_factory=dict)
    base: str = ""
    general: dict[str, Task] = field(default_factory=dict)
    samples: int = 64
    length: int = 256


@dataclass(frozen=True, slots=True)
class Row:
    """A model's measured scores; of merged ones also what the protocol makes of them. ``seconds``: of its merge."""

    name: str
    kind: str
    scores: Mapping[str, float]
    normalised: float | None = None
    forgetting: float | None = None
    seconds: float | None = None


def read_models(path: Path) -> Models:
    """A file of models, its folders and texts looked for beside it first.

    Raises:
        InputError: unknown keys, a task that measures nothing or two things, domains without an expert.
    """
    documents = yaml_documents(path)
    if len(documents) != 1:
        raise InputError(f"{path}: has {len(documents)} documents, expected one with merged and domains")
    found = from_data(documents[0], Models, str(path))
    for name, task in {**found.domains, **found.general}.items():
        if sum(map(bool, (task.perplexity, task.evaluate, task.lm_eval))) != 1:
            raise InputError(f"{path}: {name}: expected perplexity: FILE, evaluate: package.module:function or lm_eval:"
                             " TASK, one of them")
    lost = [name for name in found.domains if name not in found.experts]
    if found.experts and lost:
        raise InputError(f"{path}: experts: none for the domain {lost[0]}; every domain needs one, to be measured"
                         f" against")
    if found.general and not found.base:
        raise InputError(f"{path}: general tasks tell what was forgotten since the base: give base")
    if not found.merged or not found.domains:
        raise InputError(f"{path}: has no {'merged models' if not found.merged else 'domains'}; expected some")
    return _beside(found, path.parent)


def _beside(found: Models, folder: Path) -> Models:
    def place(name: str) -> str:
        return os.path.normpath(folder / name) if name and (folder / name).exists() else name

    def placed(names: Mapping[str, str]) -> dict[str, str]:
        return {key: place(value) for key, value in names.items()}

    def tasks(given: Mapping[str, Task]) -> dict[str, Task]:
        return {key: Task(place(task.perplexity), task.evaluate, place(task.lm_eval)) for key, task in given.items()}

    return Models(placed(found.merged), tasks(found.domains), placed(found.experts), place(found.base),
                  tasks(found.general), found.samples, found.length)


def evaluate_models(models: Models, allowed: Collection[str], where: str,
                    progress: Callable[[str], None] = lambda _name: None,
                    experts_per_token: int | None = None) -> list[Row]:
    """Every model measured: base, experts, merged.

    Args:
        experts_per_token: of mixtures of experts, in place of their own number, for texts.
        allowed: functions and tasks that the person who evaluates has named.

    Raises:
        InputError: one that nobody named, or what measuring raises.
    """
    tasks = {**models.domains, **{f"general {name}": task for name, task in models.general.items()}}
    for name, task in tasks.items():
        code, flag = task.code
        if code and code not in allowed:
            raise InputError(f"{where}: {name}: a file calls no code; name it on the command line too ({flag} {code})")
    measures = {name: Measure(Objectives((task.perplexity,) if task.perplexity else (),
                                         (task.evaluate,) if task.evaluate else (), models.samples, models.length,
                                         experts_per_token=experts_per_token,
                                         tasks=(task.lm_eval,) if task.lm_eval else ()))
                for name, task in tasks.items()}
    rows: list[Row] = []
    for kind, group in (("base", {"base": models.base} if models.base else {}), ("expert", models.experts),
                        ("merged", models.merged)):
        for name, folder in group.items():
            progress(name)
            scores = {task: _one(measure.scores(Path(folder)), task) for task, measure in measures.items()}
            rows.append(Row(name, kind, scores, seconds=merge_seconds(Path(folder)) if kind == "merged" else None))
    return [_judged(row, rows, models) for row in rows]


def _one(scores: Mapping[str, float], task: str) -> float:
    if len(scores) != 1:
        raise RunError(f"{task}: its function gave {len(scores)} numbers, expected one")
    return next(iter(scores.values()))


def _judged(row: Row, rows: list[Row], models: Models) -> Row:
    """A row with what the protocol says of it."""
    experts = {other.name: other for other in rows if other.kind == "expert"}
    base = next((other for other in rows if other.kind == "base"), None)
    normalised = forgetting = None
    if experts:
        normalised = normalised_performance(row.scores, {name: experts[name].scores[name] for name in models.domains},
                                            {name for name, task in models.domains.items() if task.perplexity})
    if base is not None and models.general:
        losses = {f"general {name}" for name, task in models.general.items() if task.perplexity}
        drops = [(row.scores[name] - base.scores[name]) * (1 if name in losses else -1)
                 for name in row.scores if name.startswith("general ")]
        forgetting = sum(drops) / len(drops)
    return Row(row.name, row.kind, row.scores, normalised, forgetting, row.seconds)


def normalised_performance(scores: Mapping[str, float], experts: Mapping[str, float], losses: Collection[str]) -> float:
    """The mean over domains of a model's score over the expert's; of losses, of perplexities the other way round."""
    shares = [math.exp(best - scores[name]) if name in losses else scores[name] / best if best else float("nan")
              for name, best in experts.items()]
    return sum(shares) / len(shares)


def merge_seconds(folder: Path) -> float | None:
    """How long the slowest rank of a merge took, where mipipe made the folder."""
    record = folder / RECORD
    if not record.exists():
        return None
    found: Any = json.loads(record.read_text())
    return max((rank["seconds"] for rank in found.get("ranks", [])), default=None)
