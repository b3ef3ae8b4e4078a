"""Byte-level language models of different kinds of text, merged with and without data: who keeps what the experts can
do.

    python benchmarks/data_driven_merging.py train WORK          # five seeds of a base and five experts, half an hour
    python benchmarks/data_driven_merging.py merge WORK          # every method with its grid; some 20 minutes
    python benchmarks/data_driven_merging.py table WORK [-o FILE]

One base (1.3 M parameters) has read Python's docstrings and a little of everything; five experts went on from it, each
on one kind of text (`data_driven/texts.py`). A method's parameters are chosen by ``mipipe tune`` on validation text,
its score is taken on test text that nothing else has seen: the mean over the five kinds of the expert's perplexity over
the merged model's ("normalised", MergeBench's protocol), and how much worse than the base the model is at prose
("forgetting", nats per byte). Calibrated methods run each expert on 64 samples of its own training text. Errors are
standard errors over seeds; a difference of two methods is judged by its own standard error, seed by seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

import mipipe
from mipipe.runtime.merge.launch import MergeOptions
from mipipe.runtime.tuning.objectives import Objectives
from mipipe.runtime.tuning.protocol import Models, Task, evaluate_models, normalised_performance
from mipipe.runtime.tuning.tune import TuneOptions, tune

HERE = Path(__file__).resolve().parent
EXPERTS = ("code", "german", "russian", "logs", "numbers")
SEEDS = 5
VALIDATION = {"samples": 12, "length": 128}
TEST = {"samples": 32, "length": 128}
CALIBRATION = {"samples": 64, "length": 128, "batch": 16}


def choose(*values: Any) -> dict[str, Any]:
    return {"choose": list(values)}


LAMBDA = choose(0.2, 0.3, 0.4, 0.5)
METHODS: dict[str, dict[str, Any]] = {
    "average": {"merge_method": "linear"},
    "task arithmetic": {"merge_method": "task_arithmetic",
                        "parameters": {"lambda": choose(0.2, 0.3, 0.4, 0.5, 0.7, 1.0)}},
    "TIES": {"merge_method": "ties", "parameters": {"density": choose(0.2, 0.5), "lambda": choose(0.7, 1.0, 1.5, 2.0)}},
    "DARE": {"merge_method": "dare_linear",
             "parameters": {"density": choose(0.5, 0.9), "lambda": choose(0.3, 0.4, 0.5)}},
    "SCE": {"merge_method": "sce", "parameters": {"select_topk": choose(0.1, 0.5, 1.0)}},
    "TSVM": {"merge_method": "tsvm", "parameters": {"lambda": choose(0.5, 0.8, 1.0, 1.2)}},
    "Iso-C": {"merge_method": "iso_c", "parameters": {"lambda": choose(1.0, 1.5, 2.0, 2.5)}},
    "Iso-CTS": {"merge_method": "iso_cts", "parameters": {"lambda": choose(1.0, 1.5, 2.0, 2.5)}},
    "OptMerge": {"merge_method": "optmerge", "parameters": {"lambda": choose(0.3, 0.5, 0.8, 1.0)}},
    "WUDI": {"merge_method": "wudi", "parameters": {"solver": "ridge", "lambda": choose(0.3, 0.5, 0.8, 1.0)}},
    "WIDEN": {"merge_method": "widen", "parameters": {"calibrated_score": choose(0.2, 0.3, 0.5)}},
}
DATA: dict[str, dict[str, Any]] = {
    "RegMean": {"merge_method": "regmean", "parameters": {"reduce": choose(0.7, 0.9, 0.97, 1.0)}},
    "Fisher": {"merge_method": "fisher", "parameters": {"floor": choose(1e-10, 1e-8)}},
    "AIM": {"merge_method": "aim", "parameters": {"lambda": LAMBDA, "omega": choose(0.4, 0.8)}},
    "ACM": {"merge_method": "acm", "parameters": {"lambda": choose(0.4, 0.6, 0.8, 1.0), "t": choose(0.5, 2.0)}},
    "Sens-Merging": {"merge_method": "sens", "parameters": {"alpha": LAMBDA, "temperature": choose(1.0, 4.0)}},
    "Expert Merging": {"merge_method": "expert_merging", "parameters": {
        "learning_rate": choose(0.1, 0.3), "gamma": choose(0.0, 1.0), "start": 0.3, "epochs": 3, "accumulate": 5,
        "exclude": "norm"}},
}
SEARCHED = {"MAP (5 weights)": ("map", 42), "CMA-ES (5 x 3 weights)": ("cma", 56)}


def recipe(method: str, folder: Path, texts: Path) -> dict[str, Any]:
    """A method's recipe with its grid."""
    found: dict[str, Any] = {**(METHODS | DATA).get(method, {"merge_method": "task_arithmetic"}), "dtype": "float32"}
    models = [{"model": str(folder / name)} for name in EXPERTS]
    if method in SEARCHED:
        free = {"search": [0.0, 1.0]}
        for model in models:
            model["parameters"] = {"weight": free if "MAP" in method else [free, free, free]}
    if method in DATA:
        for model, name in zip(models, EXPERTS, strict=True):
            model["calibration"] = str(texts / name / "train" / "text.txt")
        few = {"samples": 8} if method == "Expert Merging" else {}
        found["calibration"] = {**CALIBRATION, **few, "data": str(texts / "base" / "train" / "text.txt")}
    found["models"] = models
    if found["merge_method"] not in ("linear", "regmean", "fisher"):
        found["base_model"] = str(folder / "base")
    return found


def merge_all(work: Path, seeds: int, methods: list[str]) -> None:
    """Tune and measure what is missing, every method on all seeds before the next; outcomes are kept in
    ``WORK/SEED/results.json``."""
    texts = work / "texts"
    folders = [work / str(seed) for seed in range(seeds)]
    folders = [folder for folder in folders
               if all((folder / name / "tokenizer.json").exists() for name in ("base", *EXPERTS))]
    for method in ("experts", *methods):
        for folder in folders:
            file = folder / "results.json"
            results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
            if method in results:
                continue
            if method == "experts":
                rows = measure(folder, texts, {})
                results["experts"] = {row.name: dict(row.scores) for row in rows if row.kind == "expert"}
                results["base"] = {"scores": dict(next(row for row in rows if row.kind == "base").scores)}
            else:
                results[method] = one(method, folder, texts, int(folder.name))
                print(f"seed {folder.name}, {method}: {score(results, method):.4f}", flush=True)
            file.write_text(json.dumps(results, indent=1))


def measure(folder: Path, texts: Path, merged: dict[str, str]) -> list[Any]:
    """Rows of MergeBench's protocol on test text."""
    domains = {name: Task(str(texts / name / "test.txt")) for name in EXPERTS}
    models = Models(merged or {"base": str(folder / "base")}, domains,
                    {name: str(folder / name) for name in EXPERTS} if not merged else {},
                    str(folder / "base") if not merged else "",
                    {"prose": Task(str(texts / "prose" / "test.txt"))}, **TEST)
    return evaluate_models(models, (), "models")


def one(method: str, folder: Path, texts: Path, seed: int) -> dict[str, Any]:
    """Tune a method on validation text, merge, and measure on test text."""
    began = time.monotonic()
    place = folder / "merged" / method.replace(" ", "-").replace("(", "").replace(")", "")
    place.mkdir(parents=True, exist_ok=True)
    data, chosen = recipe(method, folder, texts), {}
    file = place / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    if "choose" in file.read_text() or "search" in file.read_text():
        kind, budget = SEARCHED.get(method, ("grid", 0))
        objectives = Objectives(tuple(str(texts / name / "validation.txt") for name in EXPERTS), **VALIDATION)
        # all five files are called validation.txt, so scores go by their paths
        found = tune(file, place / "work", objectives, TuneOptions(kind, max(1, budget), seed=seed),
                     MergeOptions(verify=False))
        chosen = dict(zip(found.names, found.trials[found.best].values, strict=True))
        out, trials = place / "work" / "best", len(found.trials)
    else:
        out, trials = place / "out", 1
        if not out.exists():
            mipipe.merge(data, out, verify=False)
    row = measure(folder, texts, {method: str(out)})[-1]
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
    names = [name for name in ("base", *METHODS, *DATA, *SEARCHED) if all(name in results for results in every)]
    lines = [f"{len(every)} seeds; normalised = mean of the expert's perplexity over the merged model's on test text;"
             f" +- is"
             " the standard error", "",
             f"{'method':24} {'data':10} {'normalised':>18} {'forgetting':>18} {'points':>7} {'tune s':>7} "
             f" {' '.join(f'{n:>8}' for n in EXPERTS)}"]
    for name in names:
        kind = "-" if name in METHODS or name == "base" else "samples" if name in DATA else "scores"
        mean, error = spread([score(results, name) for results in every])
        drop, doubt = spread([forgetting(results, name) for results in every])
        trials = statistics.mean([results[name].get("trials", 0) for results in every])
        seconds = statistics.mean([results[name].get("seconds", 0) for results in every])
        shares = [statistics.mean([math.exp(results["experts"][kind][kind] - results[name]["scores"][kind])
                                   for results in every]) for kind in EXPERTS]
        lines.append(f"{name:24} {kind:10} {mean:9.4f} +- {error:.4f} {drop:+9.4f} +- {doubt:.4f} {trials:7.0f}"
                     f" {seconds:7.1f}  {' '.join(f'{share:8.3f}' for share in shares)}")
    lines += ["", *verdicts(every, names)]
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.write_text(text)


def verdicts(every: list[dict[str, Any]], names: list[str]) -> list[str]:
    """The claims of the literature, each with the difference measured seed by seed."""
    def mean(name: str) -> float:
        return statistics.mean([score(results, name) for results in every])

    free = max((name for name in names if name in METHODS and name not in ("average", "task arithmetic")), key=mean)
    samples = max((name for name in names if name in DATA), key=mean)
    data = max((name for name in names if name in DATA or name in SEARCHED), key=mean)
    claims = [("task arithmetic", "average"), (free, "task arithmetic"), (samples, free), (data, free)]
    lines = []
    for better, worse in dict.fromkeys(claims):
        value, error = spread([score(results, better) - score(results, worse) for results in every])
        least = max(2 * error, 1e-6)
        verdict = "holds" if value > least else "is the other way round" if value < -least else "is not shown"
        lines.append(f"{better} above {worse}: {value:+.4f} +- {error:.4f}, {verdict}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("step", choices=("train", "merge", "table"))
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", help="separated by commas; all if not given")
    given = parser.parse_args()
    if given.step == "train":
        for seed in range(given.seeds):
            script = HERE / "data_driven" / "train.py"
            subprocess.run([sys.executable, str(script), str(given.work), str(seed)], check=True)
    elif given.step == "merge":
        methods = given.methods.split(",") if given.methods else [*METHODS, *DATA, *SEARCHED]
        merge_all(given.work, given.seeds, methods)
    else:
        table(given.work, given.output)


if __name__ == "__main__":
    main()
