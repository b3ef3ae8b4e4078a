"""The methods that are compared, each with the values its grid tries; `recipe` writes a method's recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EXPERTS = ("code", "german", "russian", "logs", "numbers")
CALIBRATION = {"samples": 48, "length": 128, "batch": 16}


def choose(*values: Any) -> dict[str, Any]:
    return {"choose": list(values)}


def method(name: str, **parameters: Any) -> dict[str, Any]:
    """A recipe's method; ``by`` stands for ``lambda``, which is a word of Python's."""
    named = {"lambda" if key == "by" else key: value for key, value in parameters.items()}
    return {"merge_method": name, **({"parameters": named} if named else {})}


SUM = choose(0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Of methods that add task vectors: from half of the average (0.2) to all of every one."""
FEW = choose(0.15, 0.2, 0.3, 0.4, 0.55, 0.8)
LONG = choose(0.3, 0.5, 0.7, 0.9, 1.2, 1.6)
"""Of methods that make task vectors disturb each other less before they add them."""
MEAN = choose(0.5, 1.0, 1.5, 2.0, 3.0)
"""Of methods that average."""
WHOLE = choose(0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Of methods that make one vector of all and give it a length."""
FREE: dict[str, dict[str, Any]] = {
    "average": method("linear"),
    "task arithmetic": method("task_arithmetic", by=SUM),
    "TIES": method("ties", density=choose(0.3, 0.6, 1.0), by=choose(0.25, 0.5, 0.75, 1.0)),
    "DARE": method("dare_linear", density=choose(0.5, 0.9), by=FEW),
    "DELLA": method("della", density=choose(0.5, 0.8), by=MEAN),  # density -+ 0.15 (epsilon) inside (0, 1)
    "Breadcrumbs": method("breadcrumbs", density=choose(0.7, 0.95), by=FEW),
    "Model Stock": method("model_stock", filter_wise=choose(False, True)),
    "SCE": method("sce", select_topk=choose(0.1, 0.3, 0.6, 1.0)),
    "TSVM": method("tsvm", by=WHOLE),
    "Iso-C": method("iso_c", by=WHOLE),
    "Iso-CTS": method("iso_cts", by=WHOLE),
    "OptMerge": method("optmerge", by=LONG),
    "WUDI": method("wudi", solver="ridge", by=LONG),
    "WIDEN": method("widen", calibrated_score=choose(0.2, 0.3, 0.5, 0.8)),
}
DATA: dict[str, dict[str, Any]] = {
    "RegMean": method("regmean", reduce=choose(0.5, 0.7, 0.9, 0.97, 1.0)),
    "Fisher": method("fisher", floor=choose(1e-12, 1e-10, 1e-8)),
    "AIM": method("aim", by=FEW, omega=choose(0.4, 0.8)),
    "ACM": method("acm", by=choose(0.4, 0.6, 0.8, 1.0, 1.5, 2.0), t=choose(0.5, 2.0)),
    "Sens-Merging": method("sens", alpha=FEW, temperature=choose(1.0, 4.0)),
    "Expert Merging": method("expert_merging", learning_rate=choose(0.1, 0.3, 0.6), gamma=0.0, start=0.3, epochs=3,
                             accumulate=5, exclude="norm"),
}
ARM = "ARM (one after another)"
CHAINS = {ARM: method("arm", eta={**choose(0.1, 0.2, 0.3, 0.5, 0.7), "as": "eta"})}
"""One step length for the whole chain."""
ROUTED = {f"{name}, routers calibrated": name for name in ("average", "task arithmetic", "RegMean")}
"""Of mixtures of experts: merged by a method, then the routers solved for."""
SEARCHED = {"MAP (5 weights)": ("map", 42), "CMA-ES (5 weights)": ("cma", 40), "CMA-ES (5 x 3 weights)": ("cma", 72)}
"""Weights of task arithmetic, per model (and per third of the layers), and how many points are tried."""
EVERY = (*FREE, *DATA, *CHAINS, *SEARCHED)
OF_MIXTURES = ("average", "task arithmetic", "Iso-C", "RegMean", *ROUTED)
"""The methods that are compared on mixtures of experts."""


def kind(name: str) -> str:
    """What a method needs beside weights."""
    return "-" if name in FREE or name == "base" else "scores" if name in SEARCHED else "samples"


def recipe(name: str, base: Path, folder: Path, texts: Path) -> list[dict[str, Any]]:
    """A method's recipe with its grid: one document, or a chain of them."""
    if name in CHAINS:
        return _chain(CHAINS[name], base, folder, texts)
    if name in ROUTED:
        merged = recipe(ROUTED[name], base, folder, texts)[0]
        models = [{"model": str(folder / expert), "calibration": str(texts / expert / "train" / "text.txt")}
                  for expert in EXPERTS]
        return [{**merged, "name": "merged"}, {
            **method("router_calibration"), "dtype": "float32", "base_model": "merged", "models": models,
            "calibration": {**CALIBRATION, "data": str(texts / "base" / "train" / "text.txt")}}]
    found: dict[str, Any] = {**(FREE | DATA).get(name, {"merge_method": "task_arithmetic"}), "dtype": "float32"}
    models: list[dict[str, Any]] = [{"model": str(folder / expert)} for expert in EXPERTS]
    if name in SEARCHED:
        free = {"search": [0.0, 1.0]}
        for model in models:
            model["parameters"] = {"weight": [free, free, free] if "3" in name else free}
    if name in DATA:
        for model, expert in zip(models, EXPERTS, strict=True):
            model["calibration"] = str(texts / expert / "train" / "text.txt")
        few = {"samples": 8} if name == "Expert Merging" else {}
        found["calibration"] = {**CALIBRATION, **few, "data": str(texts / "base" / "train" / "text.txt")}
    found["models"] = models
    if found["merge_method"] not in ("linear", "regmean", "fisher"):
        found["base_model"] = str(base)
    return [found]


def _chain(given: dict[str, Any], base: Path, folder: Path, texts: Path) -> list[dict[str, Any]]:
    """Every expert merged into what is merged so far."""
    found: list[dict[str, Any]] = []
    for number, expert in enumerate(EXPERTS):
        found.append({**given, "dtype": "float32", "base_model": f"step{number - 1}" if number else str(base),
                      "models": [{"model": str(folder / expert)}],
                      "calibration": {**CALIBRATION, "data": str(texts / expert / "train" / "text.txt")},
                      **({"name": f"step{number}"} if number + 1 < len(EXPERTS) else {})})
    return found
