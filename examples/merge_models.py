"""Train small digit readers on different tasks from one base, merge them with every method, and measure what is left.

    python examples/merge_models.py            # some minutes, no downloads
    python examples/merge_models.py --quick    # fewer methods and settings, about half a minute

The data are scikit-learn's 8 x 8 digits. One base learns upright digits (and a little of everything); five experts
continue from it on one task each: turned by 90 degrees, inverted, mirrored, odd or even, five or more. All share one
network with one head, whose outputs belong to the tasks, as CLIP's zero-shot heads do in the merging literature.

The protocol is MergeBench's (arXiv 2505.10833): each method's parameters are chosen on validation data from a small
grid; reported on test data are the accuracy per task, its mean relative to the single-task experts ("normalised"), the
loss on the base's own task ("forgetting"), and the time of the merge. Merges go through the same files and worker as
any: checkpoints on disk in, checkpoint on disk out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

import mipipe

WIDTH, LAYERS = 96, 4
DIGIT, PARITY, SIZE = slice(0, 10), slice(10, 12), slice(12, 14)
"""Which outputs answer which question."""


@dataclass(frozen=True)
class Task:
    """A view of the images and a question about them."""

    name: str
    view: Callable[[Tensor], Tensor]
    label: Callable[[Tensor], Tensor]
    outputs: slice


BASE_TASK = Task("upright", lambda x: x, lambda y: y, DIGIT)
TASKS = (
    Task("turned", lambda x: x.rot90(1, (1, 2)), lambda y: y, DIGIT),
    Task("inverted", lambda x: 1 - x, lambda y: y, DIGIT),
    Task("mirrored", lambda x: x.flip(2), lambda y: y, DIGIT),
    Task("odd or even", lambda x: x, lambda y: y % 2, PARITY),
    Task("five or more", lambda x: x, lambda y: (y >= 5).long(), SIZE),
)


class Block(nn.Module):
    """A residual MLP block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up_proj = nn.Linear(WIDTH, 2 * WIDTH)
        self.down_proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(torch.nn.functional.gelu(self.up_proj(self.norm(x))))


class Reader(nn.Module):
    """Pixels ``[batch, 8, 8]`` -> logits of all questions ``[batch, 14]``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 14, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


@dataclass(frozen=True)
class Data:
    """Images ``[n, 8, 8]`` in [0, 1] and their digits, split once."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_data(seed: int = 0) -> Data:
    """Digits shuffled and split 60 : 15 : 25."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([1078, 270, len(order) - 1348])
    return Data(*((images[part], labels[part]) for part in parts))


def fit(model: Reader, tasks: tuple[Task, ...], data: tuple[Tensor, Tensor], steps: int, rate: float, seed: int,
        frozen_head: bool) -> None:
    """Train on a mixture of tasks with Adam."""
    generator = torch.Generator().manual_seed(seed)
    model.lm_head.requires_grad_(not frozen_head)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], rate,
                                  weight_decay=0.01)
    images, labels = data
    for step in range(steps):
        task = tasks[step % len(tasks)]
        chosen = torch.randint(len(labels), (64,), generator=generator)
        logits = model(task.view(images[chosen]))[:, task.outputs]
        loss = nn.functional.cross_entropy(logits, task.label(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: Reader, task: Task, data: tuple[Tensor, Tensor]) -> float:
    """Share of right answers."""
    images, labels = data
    answers = model(task.view(images))[:, task.outputs].argmax(1)
    return float((answers == task.label(labels)).float().mean())


def save(model: Reader, folder: Path) -> None:
    """A checkpoint folder such as any model's."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "reader", "num_hidden_layers": LAYERS}))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def read(folder: Path) -> Reader:
    """The model of a checkpoint folder."""
    model = Reader()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


# Methods and the grids they are tuned on -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A row of the result: a method, the settings tried, and how it is used.

    ``pair``: it merges two models, so it is judged on the first two tasks. ``routed``: a router (here: the truth) names
    the task of every input, and the merge is made for that route.
    """

    method: str
    grid: tuple[dict[str, Any], ...] = ({},)
    pair: bool = False
    routed: bool = False
    label: str = ""


def grid(**choices: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """All combinations of parameter values; ``lambda_`` stands for lambda."""
    found: list[dict[str, Any]] = [{}]
    for name, values in choices.items():
        found = [{**entry, name.rstrip("_"): value} for entry in found for value in values]
    return tuple(found)


SCALES = (0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
ENTRIES = (
    Entry("linear", label="plain average"),
    Entry("task_arithmetic", grid(lambda_=SCALES)),
    Entry("ties", grid(density=(0.2, 0.5), lambda_=(0.6, 1.0, 1.5, 2.0))),
    Entry("ties", grid(density=(0.2, 0.5), lambda_=(1.0, 1.5, 2.0), scope=("model",)), label="ties, whole model"),
    Entry("dare_linear", grid(density=(0.5, 0.9), lambda_=SCALES[:4])),
    Entry("dare_ties", grid(density=(0.5, 0.9), lambda_=(0.3, 0.5, 0.8))),
    Entry("della_linear", grid(density=(0.5, 0.9), epsilon=(0.05,), lambda_=SCALES[:4])),
    Entry("della", grid(density=(0.5, 0.9), epsilon=(0.05,), lambda_=(0.6, 1.0, 1.5))),
    Entry("breadcrumbs", grid(density=(0.5, 0.9), lambda_=SCALES[:4])),
    Entry("breadcrumbs_ties", grid(density=(0.5, 0.9), lambda_=(0.3, 0.5, 0.8))),
    Entry("model_stock"),
    Entry("karcher"),
    Entry("sce", grid(select_topk=(0.1, 0.5, 1.0))),
    Entry("varm"),
    Entry("frank"),
    Entry("widen", grid(above_average_ratio=(0.5, 1.0), calibrated_score=(0.2, 0.5))),
    Entry("lore", grid(mu=(0.1,), lambda_=(1.0, 1.5), combine=("ties",), iterations=(5,))),
    Entry("tsvm", grid(lambda_=(0.5, 0.8, 1.0, 1.2))),
    Entry("rtsvm", grid(lambda_=(0.5, 0.8, 1.0, 1.2))),
    Entry("optmerge", grid(lambda_=(0.1, 0.2, 0.3, 0.5, 1.0))),
    Entry("wudi", grid(lambda_=(0.2, 0.4, 0.6, 1.0), solver=("adam", "ridge"))),
    Entry("iso_c", grid(lambda_=(0.5, 0.8, 1.0, 1.5))),
    Entry("iso_cts", grid(lambda_=(0.5, 0.8, 1.0, 1.5))),
    Entry("ram"), Entry("ramplus_tl"),
    Entry("multislerp"),
    Entry("doge", grid(eta=(0.07, 0.5, 1.0), density=(0.3, 0.5))),
    Entry("twin", grid(shared_scale=(0.2, 0.3, 0.4), density=(0.1, 0.2)), label="twin, no router"),
    Entry("passthrough", label="first expert alone"),
    Entry("slerp", grid(t=(0.3, 0.5, 0.7)), pair=True),
    Entry("nuslerp", grid(weight=(1.0,)), pair=True),
    Entry("layer_swapping", grid(bottom=(0, 1, 2), top=(0, 1), transition=(0, 1)), pair=True),
    Entry("twin", grid(shared_scale=(0.3,), density=(0.1, 0.2)), routed=True),
    Entry("rmm", grid(num_basis=(2, 4), rank=(16,)), routed=True),
    Entry("onebit", grid(others_weight=(0.0,)), routed=True),
)
QUICK = {"linear", "task_arithmetic", "ties", "tsvm"}


class Bench:
    """The trained models and their scores; merges and judges."""

    def __init__(self, root: Path, data: Data, steps: int) -> None:
        self.root, self.data, self.count = root, data, 0
        torch.manual_seed(0)
        base = Reader()
        fit(base, (BASE_TASK,) * 40 + TASKS, data.train, steps, 2e-3, 0, frozen_head=False)
        save(base, root / "base")
        self.base = base
        self.experts = []
        for number, task in enumerate(TASKS):
            expert = read(root / "base").train()
            fit(expert, (task,), data.train, steps, 1e-3, number + 1, frozen_head=True)
            save(expert, root / f"expert{number}")
            self.experts.append(expert)
        self.single = {split: [accuracy(expert, task, getattr(data, split))
                               for expert, task in zip(self.experts, TASKS, strict=True)]
                       for split in ("validation", "test")}

    def merge(self, entry: Entry, params: dict[str, Any], route: int | None = None) -> tuple[Reader, float]:
        """The merged model and the seconds it took."""
        self.count += 1
        out = self.root / f"out{self.count}"
        numbers = range(2 if entry.pair else 1 if entry.method == "passthrough" else len(TASKS))
        models: list[dict[str, Any]] = [{"model": str(self.root / f"expert{number}")} for number in numbers]
        params = dict(params)
        if route is not None and entry.method == "onebit":
            params["route"] = route
        elif route is not None:
            for number, model in enumerate(models):
                model["parameters"] = {"route": 1.0 if number == route else 0.0}
        data: dict[str, Any] = {"merge_method": entry.method, "models": models, "parameters": params}
        if entry.method not in ("linear", "passthrough", "slerp", "nuslerp", "karcher", "layer_swapping", "lore"):
            data["base_model"] = str(self.root / "base")
        began = time.perf_counter()
        mipipe.merge(data, out, verify=False)  # no model that transformers knows
        return read(out), time.perf_counter() - began

    def judge(self, entry: Entry, params: dict[str, Any], split: str) -> tuple[list[float], float, float]:
        """Accuracy per task, accuracy on the base's task, seconds."""
        data = getattr(self.data, split)
        tasks = TASKS[:2] if entry.pair else TASKS
        if not entry.routed:
            model, seconds = self.merge(entry, params)
            return [accuracy(model, task, data) for task in tasks], accuracy(model, BASE_TASK, data), seconds
        found, kept, seconds = [], [], 0.0
        for number, task in enumerate(tasks):
            model, took = self.merge(entry, params, number)
            found.append(accuracy(model, task, data))
            kept.append(accuracy(model, BASE_TASK, data))
            seconds += took
        return found, sum(kept) / len(kept), seconds / len(tasks)

    def normalised(self, found: list[float], split: str) -> float:
        """Mean over tasks of merged over single-task accuracy."""
        single = self.single[split][:len(found)]
        return sum(value / expert for value, expert in zip(found, single, strict=True)) / len(found)

    def tune(self, entry: Entry) -> dict[str, Any]:
        """The setting with the best normalised validation accuracy."""
        if len(entry.grid) == 1:
            return entry.grid[0]
        return max(entry.grid,
                   key=lambda params: self.normalised(self.judge(entry, params, "validation")[0], "validation"))


def run(root: Path, quick: bool, console: Console) -> list[dict[str, Any]]:
    """Train, merge, judge; returns one record per row."""
    data = load_data()
    bench = Bench(root, data, 400)
    upright = accuracy(bench.base, BASE_TASK, data.test)
    records = [{"row": "base", "accuracies": [accuracy(bench.base, task, data.test) for task in TASKS],
                "base_task": upright, "seconds": 0.0, "parameters": {}, "kind": "reference"},
               {"row": "experts", "accuracies": bench.single["test"], "seconds": 0.0, "parameters": {},
                "base_task": sum(accuracy(expert, BASE_TASK, data.test) for expert in bench.experts) / len(TASKS),
                "kind": "reference"}]
    for entry in ENTRIES:
        if quick and (entry.method not in QUICK or entry.label == "ties, whole model"):
            continue
        params = bench.tune(entry)
        found, kept, seconds = bench.judge(entry, params, "test")
        kind = "pair" if entry.pair else "routed" if entry.routed else "static"
        records.append({"row": entry.label or entry.method, "accuracies": found, "base_task": kept,
                        "seconds": seconds, "parameters": params, "kind": kind})
    for record in records:
        record["normalised"] = bench.normalised(record["accuracies"], "test")
        record["forgetting"] = upright - record["base_task"]
    show(records, console)
    return records


def show(records: list[dict[str, Any]], console: Console) -> None:
    """The table: static merges, then pairs, then routed ones, each sorted."""
    table = Table("merge", *(task.name for task in TASKS), "normalised", "forgetting", "seconds", "chosen parameters")
    for kind in ("reference", "static", "pair", "routed"):
        rows = [record for record in records if record["kind"] == kind]
        for record in sorted(rows, key=lambda record: -record["normalised"]) if kind != "reference" else rows:
            cells = [f"{value:.1%}" for value in record["accuracies"]]
            chosen = ", ".join(f"{key} {value}" for key, value in record["parameters"].items())
            table.add_row(record["row"] + {"pair": " (2 models)", "routed": " (routed)"}.get(kind, ""),
                          *cells, *[""] * (len(TASKS) - len(cells)), f"{record['normalised']:.1%}",
                          f"{record['forgetting']:+.1%}", f"{record['seconds']:.2f}", chosen)
        table.add_section()
    console.print(table)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="few methods and settings")
    parser.add_argument("--json", metavar="FILE", help="also write the records here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        records = run(Path(folder), arguments.quick, Console(width=180))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(records, indent=2))


if __name__ == "__main__":
    main()
