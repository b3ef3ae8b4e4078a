"""Shares of the peaks that published runs show, for every device kind with enough of them.

    python benchmarks/fit_costs.py --runs runs.csv [--write] [--only Hopper Ampere ...]

A row of `benchmarks/published_runs.py` is predicted by the product; parameters are fitted so that the logarithms of
predicted and measured steps agree. There are few: a share of products for every device kind and type of products; what
a layer of experts costs the host, for every kind; and for every generation the size at half of the best share, shares
of attention, grouped products, memory and links, and the overhead of an action. Each starts at the value that
``hardware.yaml`` assumes and is held to it with the weight `PRIORS` says, so that rows say only what they can; a share
is 1 at most. Configurations that were measured in several versions count once; far residuals count by their size, not
its square (Huber, "Robust estimation of a location parameter", 1964).

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from published_runs import Build, Builder, Run, measured_step, read_runs
from rich.console import Console

from mipipe.graphs.cluster import DeviceKind, shipped_kinds
from mipipe.graphs.costs.efficiency import Evidence
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.operator_graph import Role
from mipipe.graphs.serialize import to_data, write_text, yaml_text
from mipipe.planner.teams.evaluate import schedule_of
from mipipe.planner.teams.pricing import Pricer
from mipipe.planner.teams.stages import cut_pieces, even_layers, stage_cost

GENERATIONS = {"a100": "Ampere", "h100": "Hopper", "h100_hbm2e": "Hopper", "b200": "Blackwell", "b300": "Blackwell",
               "gb200": "Blackwell", "gb300": "Blackwell"}
"""Device kinds that are fitted, and which of them share parameters."""

PRIORS: dict[str, tuple[str, float]] = {
    "product": ("kind", 0.5), "product_fp8": ("kind", 0.5), "product_fp4": ("kind", 0.5), "expert_ns": ("kind", 1.5),
    "half": ("generation", 0.7), "attention": ("generation", 0.3), "grouped": ("generation", 0.4),
    "memory": ("generation", 0.25), "link": ("generation", 0.1), "hidden": ("generation", 0.2),
    "action_ns": ("generation", 0.7)}
"""What is fitted, whether a kind or a generation has it, and how far (in logarithms) it may leave what is assumed."""

SAME_CHIP = {"a100_40": "a100", "h200": "h100", "h800": "h100", "gh200": "h100"}
"""Kinds without enough runs that have the chip of a fitted kind: its shares are assumed for them."""

NOISE = 0.06
"""A step's relative noise: containers of one configuration differ by a median of 5.9 %."""
HUBER = 1.5
"""Residuals beyond so many times the noise count linearly."""
APART = ("sailor_sosp25",)
"""Groups that are predicted, not fitted: eager kernels of another framework."""
START_EXPERT_NS = 500_000


@dataclass
class Point:
    """One configuration: its rows' mean measured step, its own parameters, and what was simulated where."""

    build: Build
    model: str
    runs: list[Run]
    measured: float
    simulated: float = 0.0
    busy: float = 0.0


class Fit:
    """All parameters as logarithms, by (name, kind or generation)."""

    def __init__(self, builder: Builder, kinds: Mapping[str, DeviceKind], points: Sequence[Point]) -> None:
        self.builder, self.kinds, self.points = builder, kinds, points
        self.left: list[str] = []
        self.names: list[tuple[str, str]] = []
        used = {point.build.kind for point in points}
        lows = {(point.build.kind, {None: "product", "float8": "product_fp8", "float4": "product_fp4"}[point.build.low])
                for point in points}
        overlaps = any(point.build.overlap for point in points)
        experts = {point.build.kind for point in points if has_experts(builder.pricer(point.build))}
        for name, (scope, _) in PRIORS.items():
            for kind in sorted(used):
                owner = kind if scope == "kind" else GENERATIONS[kind]
                wanted = ((kind, name) in lows if name.startswith("product") else kind in experts
                          if name in ("expert_ns", "grouped") else name != "hidden" or overlaps)
                if wanted and (name, owner) not in self.names:
                    self.names.append((name, owner))
        self.start = np.array([math.log(self._assumed(name, owner)) for name, owner in self.names])
        self.width = np.array([PRIORS[name][1] for name, _ in self.names])
        self.most = np.array([math.inf if name == "half" or name.endswith("_ns") else 0.0 for name, _ in self.names])

    def _assumed(self, name: str, owner: str) -> float:
        kind = owner if owner in self.kinds else next(kind for kind, own in GENERATIONS.items() if own == owner)
        return float(getattr(self.kinds[kind].achieved, name)) or START_EXPERT_NS

    def kind(self, name: str, values: np.ndarray) -> DeviceKind:
        """A device kind with the parameters."""
        shares: dict[str, Any] = {}
        for (parameter, owner), value in zip(self.names, values, strict=True):
            if owner in (name, GENERATIONS[name]):
                number = math.exp(value)
                shares[parameter] = round(number) if parameter.endswith("_ns") else round(number, 4)
        base = self.kinds[name].achieved
        if "attention" in shares:
            shares["attention_backward"] = round(base.attention_backward * shares["attention"] / base.attention, 4)
        return replace(self.kinds[name], achieved=base.but(**shares))

    def simulate(self, values: np.ndarray) -> None:
        """Evaluates every configuration with the parameters."""
        kept = []
        for point in self.points:
            kind = self.kind(point.build.kind, values)
            pricer, few = self.builder.pricer(point.build, kind), with_few(point.build)
            try:
                point.simulated = self.builder.evaluate(few, kind).seconds - busiest(pricer, few)
            except MipipeError as error:
                self.left.append(f"{point.runs[0].name}: {error}")
                continue
            point.busy = busiest(pricer, point.build)
            point.simulated += point.busy
            kept.append(point)
        self.points = kept

    def logs(self, values: np.ndarray) -> np.ndarray:
        """The logarithms of predicted over measured steps, as the busiest rank's work says."""
        kinds = {name: self.kind(name, values) for name in {point.build.kind for point in self.points}}
        return np.array([math.log(point.simulated * busiest(self.builder.pricer(point.build, kinds[point.build.kind]),
                                                            point.build) / point.busy / point.measured)
                         for point in self.points])

    def slopes(self, values: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Derivatives of `logs`: [points, parameters]."""
        step, columns = -0.05, []
        for number in range(len(values)):
            moved = values.copy()
            moved[number] += step
            columns.append((self.logs(moved) - at) / step)
        return np.array(columns).T

    def solve(self, values: np.ndarray, at: np.ndarray, slopes: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        """The parameters that suit the chosen points best, where logarithms go as the derivatives say."""
        found = values.copy()
        for _ in range(30):
            residuals = at + slopes @ (found - values)
            weights = chosen * np.minimum(1.0, HUBER * NOISE / np.maximum(np.abs(residuals), 1e-9)) / NOISE ** 2
            left = slopes.T @ (weights[:, None] * slopes) + np.diag(self.width ** -2.0)
            right = slopes.T @ (weights * residuals) + (found - self.start) * self.width ** -2.0
            found = _bounded_step(left, right, found, self.most)
        return np.clip(found, values - 0.5, values + 0.5)

    def run(self, rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parameters, the logarithms there, and their derivatives."""
        values = self.start.copy()
        for _ in range(rounds):
            self.simulate(values)
            for _ in range(3):
                at = self.logs(values)
                values = self.solve(values, at, self.slopes(values, at), np.ones(len(self.points)))
        at = self.logs(values)
        return values, at, self.slopes(values, at)

    def held_out(self, values: np.ndarray, at: np.ndarray, slopes: np.ndarray) -> np.ndarray:
        """The logarithms of predicted over measured, each model predicted by the fit on all others."""
        found = np.zeros(len(self.points))
        for model in {point.model for point in self.points}:
            own = np.array([point.model == model for point in self.points])
            other = self.solve(values, at, slopes, ~own * 1.0)
            found[own] = (at + slopes @ (other - values))[own]
        return found


def _bounded_step(left: np.ndarray, right: np.ndarray, found: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Newton's step that stays at or below ``most``: parameters that would go beyond are held there, the others solved
    for again."""
    free, step = np.ones(len(found), dtype=bool), np.zeros(len(found))
    while True:
        rest = right[free] + left[np.ix_(free, ~free)] @ step[~free]
        step[free] = -np.linalg.solve(left[np.ix_(free, free)], rest)
        over = free & (found + step > most)
        if not over.any():
            return found + step
        step[over] = (most - found)[over]
        free &= ~over


def has_experts(pricer: Pricer) -> bool:
    """Whether a model has layers of experts."""
    return any(segment.tags.role is Role.EXPERTS for segment in pricer.model.graph.segments)


def with_few(build: Build) -> Build:
    """A build with two rounds of microbatches at most: from there on each adds what the busiest rank does of it."""
    one = build.degrees.copies * build.degrees.microbatch
    return replace(build, global_batch=min(build.global_batch, one * 2 * build.degrees.ranks))


def busiest(pricer: Pricer, build: Build) -> float:
    """Seconds of work of the busiest rank in a step."""
    degrees, model = build.degrees, pricer.model
    costs = pricer.costs(degrees)
    microbatches = build.global_batch // (degrees.copies * degrees.microbatch)
    baseline, split = schedule_of(build.schedule, degrees)
    count = degrees.ranks * degrees.chunks if "Interleaved" in build.schedule else degrees.ranks
    if baseline.name in ("DualPipe", "ZB-V", "DualPipeV"):
        count = degrees.ranks
    loads = [0.0] * degrees.ranks
    for number, members in enumerate(cut_pieces(model, build.layers or even_layers(len(model.layers), count))):
        stage = stage_cost(costs, members, pricer.machine, split=split, first_chunk=number < degrees.ranks,
                           held=build.held)
        loads[number % degrees.ranks] += microbatches * stage.load + stage.exposed_data + stage.optimizer
    return max(loads)


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
        console.print(f"  {name:12} {owner:10} {math.exp(value):12.4g}   assumed {math.exp(start):.4g}")
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
    path = Path(__file__).resolve().parent.parent / "graphs" / "achieved.yaml"
    text = ("# Shares of the peaks that published runs show (mipipe.graphs.costs.efficiency), written by\n"
            "# benchmarks/fit_costs.py; they take the place of those that hardware.yaml assumes.\n")
    write_text(path, text + yaml_text(dict(written)))


if __name__ == "__main__":
    main()
