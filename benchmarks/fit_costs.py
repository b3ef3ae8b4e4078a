"""Shares of the peaks that published runs show, for every device kind with enough of them.

    python benchmarks/fit_costs.py --runs runs.csv [--write] [--only Hopper Ampere ...]

A row of `benchmarks/predictions/rows.py` is predicted by the product; parameters are fitted so that the logarithms of
predicted and measured steps agree. There are few: a share of products for every device kind and type of products; what
a layer of experts costs the host, for every kind; and for every generation the size at half of the best share, shares
of attention, grouped products, memory and links, what is hidden of collectives, and the overhead of an action. Each
starts at the value that ``hardware.yaml`` assumes and is held to it, and kinds of one generation are held to each
other, with the weights `predictions.fit.PRIORS` says, so that rows say only what they can; a share is 1 at most.
Configurations that were measured in several versions count once; far residuals count by their size, not its square
(Huber, "Robust estimation of a location parameter", 1964).

Between simulations a step follows the busiest rank's work, and so it does beyond two rounds of microbatches; the fit is
repeated from a simulation at what was fitted.
Cross-validation leaves out a model (all rows of its name) at a time and predicts it with the rest, by the derivatives
at the fit. ``--write`` puts the values into ``graphs/achieved.yaml``, from where every plan takes them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from predictions.build import Builder, measured_step
from predictions.fit import GENERATIONS, Fit, Point, has_experts, value_of
from predictions.rows import Run, read_runs
from rich.console import Console

from mipipe.graphs.cluster import shipped_kinds
from mipipe.graphs.efficiency import Evidence
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.serialize import load_data, to_data, write_text, yaml_text

SAME_CHIP = {"a100_40": "a100", "h200": "h100", "h800": "h100", "gh200": "h100"}
"""Kinds without enough runs that have the chip of a fitted kind: its shares are assumed for them."""

APART = ("sailor_sosp25",)
"""Groups that are predicted, not fitted: eager kernels of another framework."""


def points_of(runs: Sequence[Run], builder: Builder, console: Console) -> list[Point]:
    """One point for each configuration, of the mean of its measured steps."""
    found: dict[str, Point] = {}
    for run in runs:
        build = run.build
        if build is None:
            continue
        try:
            measured = measured_step(run, builder)
            if measured is None:
                continue
            point = found.setdefault(repr(build), Point(build, family(run.model), [], 0.0))
        except MipipeError as error:
            console.print(f"{run.name}: {error}", soft_wrap=True, markup=False)
            continue
        point.runs.append(run)
        point.measured = (point.measured * (len(point.runs) - 1) + measured) / len(point.runs)
    return list(found.values())


def family(model: str) -> str:
    """A model's name without how it was run: rows of one model are left out together."""
    text = model.lower().replace("_", " ").replace("-", " ").split("(")[0]
    for old, new in (("llama3.1", "llama3"), ("llama 3.1", "llama3"), ("llama 3", "llama3")):
        text = text.replace(old, new)
    return " ".join(text.split())


def evidence(points: Sequence[Point], held: np.ndarray, builder: Builder) -> Evidence:
    """What fitted shares rest on."""
    models = [builder.pricer(point.build).model for point in points]
    sizes = [model.parameters() for model in models]
    kinds = {"experts" if has_experts(builder.pricer(point.build)) else "dense" for point in points}
    devices, tokens = ([getattr(point.build, name) for point in points] for name in ("devices", "seq"))
    by_products: dict[str, set[str]] = {}
    for point in points:
        by_products.setdefault(point.build.low or "16 bits", set()).add(point.model)
    return Evidence(sum(len(point.runs) for point in points), round(float(np.mean(np.abs(np.expm1(held)))), 4),
                    (min(devices), max(devices)), (min(sizes), max(sizes)), (min(tokens), max(tokens)),
                    tuple(sorted(by_products)), tuple(sorted(kinds)),
                    tuple(sorted(products for products, own in by_products.items() if len(own) == 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=sorted(set(GENERATIONS.values())), help="generations to fit")
    parser.add_argument("--rounds", type=int, default=2, help="simulations of all rows, each with a fit after it")
    parser.add_argument("--write", action="store_true", help="put the values into graphs/achieved.yaml")
    options = parser.parse_args()
    console, builder = Console(width=140), Builder()
    try:
        runs = [run for run in read_runs(options.runs) if run.build is not None and run.group not in APART]
        written: dict[str, Any] = {}
        kinds = shipped_kinds(fitted=False)
        for generation in options.only or sorted(set(GENERATIONS.values())):
            points = points_of([run for run in runs if run.build is not None
                                and GENERATIONS.get(run.build.kind) == generation], builder, console)
            if points:
                written |= fit_generation(Fit(builder, kinds, points), generation, options.rounds, console)
    except (OSError, MipipeError) as error:
        sys.exit(f"fit_costs: {error}")
    if options.write:
        _write(written)


def fit_generation(fit: Fit, generation: str, rounds: int, console: Console) -> dict[str, Any]:
    """Fits, prints, and returns what ``graphs/achieved.yaml`` gets."""
    values, at, slopes = fit.run(rounds)
    held = fit.held_out(values, at, slopes)
    for line in fit.left:
        console.print(f"not built: {line}", soft_wrap=True, markup=False)
    console.print(f"\n{generation}: {len(fit.points)} configurations of {sum(len(p.runs) for p in fit.points)} rows,"
                  f" {len(fit.names)} parameters")
    for (name, owner), value, start in zip(fit.names, values, fit.start, strict=True):
        console.print(f"  {name:12} {owner:10} {value_of(name, value):12.4g}   assumed {value_of(name, start):.4g}")
    console.print("  predicted / measured: fitted, and with the model held out")
    for point, own, other in sorted(zip(fit.points, at, held, strict=True), key=lambda item: item[0].runs[0].name):
        degrees = point.build.degrees
        console.print(f"  {point.runs[0].name:8} {point.runs[0].model[:24]:24} {point.build.kind:10}"
                      f" {point.build.low or '16 bits':8} {degrees.text()[:60]:60} {math.exp(own):.3f}"
                      f" {math.exp(other):.3f}", soft_wrap=True)
    written = {}
    for name in sorted({point.build.kind for point in fit.points}):
        chosen = np.array([point.build.kind == name for point in fit.points])
        points = [point for point, mine in zip(fit.points, chosen, strict=True) if mine]
        found = evidence(points, held[chosen], fit.builder)
        own_error = float(np.mean(np.abs(np.expm1(at[chosen]))))
        console.print(f"  {name}: {found.runs} rows, mean error {own_error:.1%}, cross-validated {found.error:.1%}")
        groups = sorted({run.group for point in points for run in point.runs})
        achieved = fit.kind(name, values).achieved.but(origin="fitted", source=", ".join(groups))
        written[name] = to_data(replace(achieved, evidence=found))
        for other, chip in SAME_CHIP.items():
            if chip == name:
                source = f"those fitted for {name}, the same chip"
                written[other] = to_data(achieved.but(origin="assumed", source=source))
    return written


def _write(written: Mapping[str, Any]) -> None:
    """The values in place of those of the same kinds; kinds that were not fitted now keep theirs."""
    path = Path(__file__).resolve().parent.parent / "graphs" / "achieved.yaml"
    text = ("# Shares of the peaks that published runs show (mipipe.graphs.efficiency), written by\n"
            "# benchmarks/fit_costs.py; they take the place of those that hardware.yaml assumes.\n")
    known = load_data(path) if path.exists() else {}
    write_text(path, text + yaml_text(known | dict(written)))


if __name__ == "__main__":
    main()
