"""Which expert a prompt is for: the router of Twin-Merging (arXiv 2406.15479) and 1bit-Merging (arXiv 2502.10743).

`task_features` runs a model (the shared expert, or the base) over prompts of every task and keeps the means of their
last hidden states; `factory` and `batches` make of them a model and data that ``mipipe train`` takes; `task_shares`
says how much of each expert a prompt wants, in the order of the tasks, for ``mipipe merge PARTS --route``.

The classifier is Twin-Merging's: three linear layers of width 2d with dropout between them. Left out: its batch norms,
whose statistics would depend on how a step is cut into microbatches; features are normalised once, instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.models.configuration import first_line
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import load_data
from mipipe.runtime.calibration.tokens import draw_samples, load_tokenizer
from mipipe.runtime.engine.batches import Batch
from mipipe.runtime.recipes.tables import read_tables

TENSORS, FACTS = "features.safetensors", "features.json"


def task_features(model: str | Path, texts: Mapping[str, str | Path], out: str | Path, *, samples: int = 200,
                  length: int = 256, seed: int = 0) -> None:
    """Write a folder of features [N,d] and tasks [N], and of their mean and spread.

    Args:
        model: a folder that transformers loads.
        texts: for every task a text or JSONL file, in the order of the experts.
        samples, length: how many of each, and their most tokens.

    Raises:
        InputError: fewer than two tasks, the model or a text cannot be read, or ``out`` exists.
    """
    folder = Path(out)
    if samples < 1 or length < 2:
        raise InputError(f"task features: samples {samples} and length {length}: expected at least 1, and 2")
    if len(texts) < 2:
        raise InputError(f"task features: found {len(texts)} tasks, expected two or more to choose from")
    if folder.exists():
        raise InputError(f"{folder}: exists already; give another folder, or remove it")
    from mipipe.runtime.calibration.whole_model import load_model
    loaded = load_model(Path(model))
    vocabulary = loaded.config.get_text_config().vocab_size
    found, tasks = [], []
    for number, text in enumerate(texts.values()):
        rows = draw_samples(str(text), str(model), samples, length, seed, vocabulary, where="task features")
        for ids, size in zip(rows.ids, rows.lengths, strict=True):
            found.append(_feature(loaded, ids[:size].tolist()))
            tasks.append(number)
    features = torch.stack(found)
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file({"features": features, "tasks": torch.tensor(tasks), "mean": features.mean(0),
               "spread": features.std(0).clamp(min=1e-6)}, partial / TENSORS)
    (partial / FACTS).write_text(json.dumps({"model": str(model), "tasks": list(texts)}) + "\n")
    os.rename(partial, folder)


@torch.no_grad()
def _feature(model: Any, ids: Sequence[int]) -> Tensor:
    """The mean of a text's last hidden states [d]."""
    output = model(input_ids=torch.tensor([list(ids)]), use_cache=False, output_hidden_states=True)
    state: Tensor = output.hidden_states[-1][0].float().mean(0)
    return state


def _read(folder: str | Path) -> dict[str, Tensor]:
    found = read_tables(Path(folder) / TENSORS, "task_features", {"features": 2, "tasks": 1, "mean": 1, "spread": 1})
    counts = [len(found["features"]), len(found["tasks"])], [found["features"].shape[1], *found["mean"].shape]
    if not counts[0][0] or any(len(set(numbers)) > 1 for numbers in counts) or int(found["tasks"].min()) < 0:
        raise InputError(f"{Path(folder) / TENSORS}: has no row, or tensors that do not fit each other; make it again"
                         " with mipipe.runtime.task_features")
    return found


def _facts(folder: str | Path) -> tuple[str, list[str]]:
    """The model whose features they are, and the names of the tasks."""
    path = Path(folder) / FACTS
    data = load_data(path, foreign=True)
    model, tasks = data.get("model"), data.get("tasks")
    if not isinstance(model, str) or not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise InputError(f"{path}: expected model and tasks, as mipipe.runtime.task_features writes them")
    return model, tasks


class TaskRouter(nn.Module):
    """Features [B,d] of prompts, normalised, to the logits of tasks [B,T]; with ``tasks`` [B] to their mean
    cross-entropy."""

    def __init__(self, width: int, tasks: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 2 * width), nn.LeakyReLU(), nn.Dropout(dropout),
                                    nn.Linear(2 * width, 2 * width), nn.LeakyReLU(), nn.Dropout(dropout),
                                    nn.Linear(2 * width, tasks))

    def forward(self, features: Tensor, tasks: Tensor | None = None) -> Any:
        logits = self.layers(features)
        return logits if tasks is None else {"loss": nn.functional.cross_entropy(logits, tasks)}


def factory(folder: str, rows: int = 32, dropout: float = 0.5) -> tuple[nn.Module, dict[str, Tensor]]:
    """A router for a folder of features, and example inputs: for ``mipipe capture`` and ``mipipe train --model``."""
    found = _read(folder)
    width, count = found["features"].shape[1], int(found["tasks"].max()) + 1
    return TaskRouter(width, count, dropout), {"features": torch.zeros(rows, width),
                                               "tasks": torch.zeros(rows, dtype=torch.int64)}


def batches(graph: OperatorGraph, rows: int, seed: int, folder: str, copy: int = 0) -> Iterator[Batch]:
    """Endless random batches of a folder of features, as a loader of ``train.yaml``."""
    found = _read(folder)
    features = (found["features"] - found["mean"]) / found["spread"]
    draw = torch.Generator().manual_seed((seed << 16) + copy)
    while True:
        chosen = torch.randint(0, len(features), (rows,), generator=draw)
        yield {"features": features[chosen], "tasks": found["tasks"][chosen]}


def task_shares(router: str | Path, folder: str | Path, prompt: str) -> dict[str, float]:
    """How much of every expert a prompt wants: the softmax of a trained router's logits, by task.

    Args:
        router: what ``mipipe train`` saved. folder: the features it was trained on.

    Raises:
        InputError: a router of other features, features of a model that is not there, or a prompt without tokens.
    """
    from mipipe.runtime.calibration.whole_model import load_model
    found, (model, tasks) = _read(folder), _facts(folder)
    made, _ = factory(str(folder))
    file = Path(router) / "model.safetensors"
    weights = read_tables(file, "task_features' factory, trained by mipipe train,", {})
    try:
        made.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{router}: is no router of {folder} ({first_line(error)})") from None
    ids = load_tokenizer(Path(model))(prompt, add_special_tokens=False)["input_ids"]
    loaded = load_model(Path(model))
    known = loaded.get_input_embeddings().num_embeddings
    if not ids or max(ids) >= known:
        raise InputError("task shares: the prompt has no token" if not ids else
                         f"{model}: its tokenizer has the token {max(ids)}, its embedding {known} rows")
    feature = (_feature(loaded, ids) - found["mean"]) / found["spread"]
    with torch.no_grad():
        shares = made.eval()(feature[None])[0].softmax(-1)
    if len(shares) != len(tasks):
        raise InputError(f"{folder}: names {len(tasks)} tasks in {FACTS}, but has features of {len(shares)}")
    return dict(zip(tasks, shares.tolist(), strict=True))
