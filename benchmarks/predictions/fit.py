"""Few parameters of the cost model fitted so that predicted steps meet measured ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from predictions.build import Builder
from predictions.rows import Build, Run

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.errors import MipipeError
from mipipe.graphs.operator_graph import Role
from mipipe.planner.teams.evaluate import schedule_of
from mipipe.planner.teams.prices.pricing import Pricer
from mipipe.planner.teams.stages import cut_pieces, even_layers, stages_on

GENERATIONS = {"a100": "Ampere", "h100": "Hopper", "h100_hbm2e": "Hopper", "b200": "Blackwell", "b300": "Blackwell",
               "gb200": "Blackwell", "gb300": "Blackwell"}
"""Device kinds that are fitted, and which of them share parameters."""

PRIORS: dict[str, tuple[float, float]] = {
    "product": (0.5, 0.07), "product_fp8": (0.5, 0.07), "product_fp4": (0.5, 0.07), "expert_ns": (1.5, 0.4),
    "half": (0.7, 0.0), "attention": (0.3, 0.0), "grouped": (0.4, 0.0), "memory": (0.25, 0.0), "link": (0.1, 0.0),
    "hidden": (0.2, 0.0), "hidden_experts": (0.7, 0.0), "action_ns": (0.7, 0.0)}
"""What is fitted: how far (in logarithms) a generation may leave what is assumed, and its kinds the generation (0: they
have one value together). Kinds of one generation are one chip at different clocks: what one has too few rows for, the
others say."""

NOISE = 0.06
"""A step's relative noise: containers of one configuration differ by a median of 5.9 %."""
HUBER = 1.5
"""Residuals beyond so many times the noise count linearly."""
STEPS = 12
"""Newton's steps after a simulation, at most; each goes half a logarithm at most."""
STARTS = {"expert_ns": 500_000, "hidden_experts": 0.3}
"""Where ``hardware.yaml`` assumes nothing."""


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
        for name, (_, apart) in PRIORS.items():
            for kind in sorted(used):
                owner = kind if apart else GENERATIONS[kind]
                wanted = ((kind, name) in lows if name.startswith("product") else
                          (overlaps or not name.startswith("hidden")) and
                          (kind in experts or name not in ("expert_ns", "grouped", "hidden_experts")))
                if wanted and (name, owner) not in self.names:
                    self.names.append((name, owner))
        self.start = np.array([self._assumed(name, owner) for name, owner in self.names])
        self.precision = np.linalg.inv(np.array([
            [(one[0] == other[0]) * PRIORS[one[0]][0] ** 2 + (one == other) * PRIORS[one[0]][1] ** 2
             for other in self.names] for one in self.names]))
        self.most = np.array([math.inf if name == "half" or name.endswith("_ns") else 0.0 for name, _ in self.names])

    def _assumed(self, name: str, owner: str) -> float:
        """The logarithm of a parameter's first value."""
        kind = owner if owner in self.kinds else next(kind for kind, own in GENERATIONS.items() if own == owner)
        found = float(getattr(self.kinds[kind].achieved, name)) or STARTS[name]
        return math.log(1 - found if name == "hidden_experts" else found)

    def kind(self, name: str, values: np.ndarray) -> DeviceKind:
        """A device kind with the parameters."""
        shares: dict[str, Any] = {}
        for (parameter, owner), value in zip(self.names, values, strict=True):
            if owner in (name, GENERATIONS[name]):
                number = value_of(parameter, value)
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
            left = slopes.T @ (weights[:, None] * slopes) + self.precision
            right = slopes.T @ (weights * residuals) + self.precision @ (found - self.start)
            found = _bounded_step(left, right, found, self.most)
        return np.clip(found, values - 0.5, values + 0.5)

    def run(self, rounds: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parameters, the logarithms there, and their derivatives."""
        values = self.start.copy()
        for _ in range(rounds):
            self.simulate(values)
            for _ in range(STEPS):
                at, before = self.logs(values), values
                values = self.solve(values, at, self.slopes(values, at), np.ones(len(self.points)))
                if np.max(np.abs(values - before)) < 0.01:
                    break
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


def value_of(name: str, logarithm: float) -> float:
    """A parameter from the logarithm that is fitted; of what is hidden of all-to-alls that is what is seen."""
    return 1 - math.exp(logarithm) if name == "hidden_experts" else math.exp(logarithm)


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
    cuts = cut_pieces(model, build.layers or even_layers(len(model.layers), count))
    ranks = [(number % degrees.ranks,) for number in range(len(cuts))]
    for number, stage in enumerate(stages_on(costs, cuts, ranks, pricer.tied(degrees), pricer.machine, split=split,
                                             held=build.held)):
        loads[number % degrees.ranks] += microbatches * stage.load + stage.exposed_data + stage.optimizer
    return max(loads)
