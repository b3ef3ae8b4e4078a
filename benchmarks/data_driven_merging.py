"""Byte-level language models of different kinds of text, merged with and without data: who keeps what the experts can
do.

    python benchmarks/data_driven_merging.py run WORK [--seeds 5]   # trains and merges, some forty minutes on a core
    python benchmarks/data_driven_merging.py run WORK2 --mixture    # of mixtures of experts
    python benchmarks/data_driven_merging.py table WORK [-o FILE]

One base (0.9 M parameters; a mixture of experts has 0.6 M) has read Python's docstrings and a little of everything; for
every seed five experts go on from it, each on one kind of text (`data_driven/texts.py`). A method's parameters are
chosen by ``mipipe tune`` on validation text (`data_driven/methods.py` has the grids), its score is taken on test text
that nothing else has seen:
the mean over the five kinds of the expert's perplexity over the merged model's ("normalised", MergeBench's protocol),
and how much worse than the base the model is at prose ("forgetting", nats per byte). Calibrated methods run each expert
on samples of its own training text. Errors are standard errors over seeds; a difference of two methods is judged by its
own standard error, seed by seed. What is in WORK already, models and outcomes, is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

import mipipe
from mipipe.runtime.merge.launching.launch import MergeOptions
from mipipe.runtime.tuning.objectives import Objectives
from mipipe.runtime.tuning.protocol import Models, Task, evaluate_models, normalised_performance
from mipipe.runtime.tuning.tune import TuneOptions, tune

sys.path.insert(0, str(Path(__file__).resolve().parent))
from data_driven.methods import DATA, EVERY, EXPERTS, FREE, OF_MIXTURES, ROUTED, SEARCHED, kind, recipe
from data_driven.train import train

VALIDATION = {"samples": 12, "length": 128}
TEST = {"samples": 48, "length": 128}


def run(work: Path, seed: int, methods: list[str], mixture: bool = False) -> None:
    """Train what is missing of a seed, tune and measure the methods that ``WORK/SEED/results.json`` lacks."""
    train(work, seed, mixture)
    file = work / str(seed) / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in ("experts", *methods):
        if name in results:
            continue
        if name == "experts":
            rows = measure(work, seed, {})
            results["experts"] = {row.name: dict(row.scores) for row in rows if row.kind == "expert"}
            results["base"] = {"scores": dict(next(row for row in rows if row.kind == "base").scores)}
        else:
            results[name] = one(name, work, seed)
            print(f"seed {seed}, {name}: {score(results, name):.4f} {results[name]['chosen']}", flush=True)
        file.write_text(json.dumps(results, indent=1))


def measure(work: Path, seed: int, merged: dict[str, str]) -> list[Any]:
    """Rows of MergeBench's protocol on test text."""
    texts, base = work / "texts", str(work / "base")
    domains = {name: Task(str(texts / name / "test.txt")) for name in EXPERTS}
    models = Models(merged or {"base": base}, domains,
                    {name: str(work / str(seed) / name) for name in EXPERTS} if not merged else {},
                    base if not merged else "", {"prose": Task(str(texts / "prose" / "test.txt"))}, **TEST)
    return evaluate_models(models, (), "models")


def one(name: str, work: Path, seed: int) -> dict[str, Any]:
    """Tune a method on validation text, merge, and measure on test text."""
    began = time.monotonic()
    place = work / str(seed) / "merged" / "".join(letter if letter.isalnum() else "-" for letter in name)
    place.mkdir(parents=True, exist_ok=True)
    texts = work / "texts"
    data, chosen = recipe(name, work / "base", work / str(seed), texts), {}
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump_all(data))
    if "choose" in file.read_text() or "search" in file.read_text():
        search, budget = SEARCHED.get(name, ("grid", 0))
        # all five files are called validation.txt, so scores go by their paths
        objectives = Objectives(tuple(str(texts / text / "validation.txt") for text in EXPERTS), seed=seed,
                                **VALIDATION)
        found = tune(file, place / "work", objectives, TuneOptions(search, max(1, budget), seed=seed),
                     MergeOptions(verify=False))
        chosen = dict(zip(found.names, found.trials[found.best].values, strict=True))
        out, trials = place / "work" / "best", len(found.trials)
    else:
        out, trials = place / "out", 1
        if not out.exists():
            mipipe.merge(file, out, verify=False)
    row = measure(work, seed, {name: str(out)})[-1]
    return {"scores": dict(row.scores), "chosen": chosen, "trials": trials, "merge_s": row.seconds,
            "seconds": round(time.monotonic() - began, 1)}


def score(results: dict[str, Any], method: str) -> float:
    """Normalised performance on test text."""
    scores = results[method]["scores"]
    experts = {name: results["experts"][name][name] for name in EXPERTS}
    return normalised_performance(scores, experts, EXPERTS)


def forgetting(results: dict[str, Any], method: str) -> float:
    return float(results[method]["scores"]["general prose"] - results["base"]["scores"]["general prose"])


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else float("nan")
    return statistics.mean(values), error


def table(work: Path, out: Path | None) -> None:
    """Write the table, and which differences hold beyond two standard errors."""
    every = [json.loads(file.read_text()) for file in sorted(work.glob("[0-9]*/results.json"))]
    rows = [name for name in ("base", *EVERY, *ROUTED) if sum(name in results for results in every) > 1]
    wide = max(map(len, ("method", *rows)))  # one seed says no error
    lines = ["normalised = mean of the expert's perplexity over the merged model's on test text; above TA = difference"
             " from task", "arithmetic, seed by seed; +- is the standard error over the seeds counted", "",
             f"{'method':{wide}} {'data':8} {'seeds':>5} {'normalised':>17} {'above TA':>18} {'forgetting':>18}"
             f" {'points':>6} {'tune s':>7}  {' '.join(f'{name:>8}' for name in EXPERTS)}"]
    for name in rows:
        found = [results for results in every if name in results]
        mean, error = spread([score(results, name) for results in found])
        apart, unsure = spread([score(results, name) - score(results, "task arithmetic") for results in found])
        drop, doubt = spread([forgetting(results, name) for results in found])
        trials = statistics.mean([results[name].get("trials", 0) for results in found])
        seconds = statistics.mean([results[name].get("seconds", 0) for results in found])
        shares = [statistics.mean([math.exp(results["experts"][text][text] - results[name]["scores"][text])
                                   for results in found]) for text in EXPERTS]
        lines.append(f"{name:{wide}} {kind(name):8} {len(found):5} {mean:7.4f} +- {error:.4f} {apart:+8.4f}"
                     f" +- {unsure:.4f} {drop:+8.4f} +- {doubt:.4f} {trials:6.0f} {seconds:7.1f}"
                     f"  {' '.join(f'{share:8.3f}' for share in shares)}")
    lines += ["", *verdicts(every, [name for name in (*EVERY, *ROUTED) if all(name in results for results in every)])]
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)


def verdicts(every: list[dict[str, Any]], names: list[str]) -> list[str]:
    """The claims of the literature, each with the difference measured seed by seed."""
    def mean(name: str) -> float:
        return statistics.mean([score(results, name) for results in every])

    def best(chosen: list[str]) -> str:
        return max(chosen, key=mean, default="")

    free = best([name for name in names if name in FREE and name not in ("average", "task arithmetic")])
    samples, data = best([name for name in names if name in DATA]), best([name for name in names if name not in FREE])
    claims = [("task arithmetic", "average"), (free, "task arithmetic"), (samples, free), (data, free),
              *ROUTED.items()]
    lines = []
    for better, worse in dict.fromkeys(claims):
        if better not in names or worse not in names:
            continue
        value, error = spread([score(results, better) - score(results, worse) for results in every])
        least = max(2 * error, 1e-6)
        verdict = "holds" if value > least else "is the other way round" if value < -least else "is not shown"
        lines.append(f"{better} above {worse}: {value:+.4f} +- {error:.4f}, {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("step", choices=("run", "table"))
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", help="separated by commas; all if not given")
    parser.add_argument("--mixture", action="store_true", help="of mixtures of experts; a folder of their own")
    given = parser.parse_args()
    if given.step == "table":
        table(given.work, given.output)
        return
    torch.set_num_threads(1)
    methods = given.methods.split(",") if given.methods else OF_MIXTURES if given.mixture else EVERY
    for name in methods:  # a method on all seeds before the next
        for seed in range(given.seeds):
            run(given.work, seed, [name], given.mixture)


if __name__ == "__main__":
    main()
