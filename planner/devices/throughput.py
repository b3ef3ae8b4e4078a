"""The throughput problem of a workload: a contiguous start, annealing from it, the MIP's proof.

1. Cut linear orders into intervals (`mipipe.planner.devices.linear`): a start within tenths of a second, without
   kernels, for the contiguous and the unrestricted search alike. Nothing worse is ever kept.
2. Anneal from the best known and afresh, on pieces (`mipipe.planner.devices.coarse`) and then on their classes, and on
   the instance contracted at several thresholds, a few seconds in all: operator graphs are solved by then.
3. Prove by MIP with the best value as the cutoff, part by part (`mipipe.planner.devices.instances.contract.parts`),
   where the contracted instance is small enough for that to end; of a larger one HiGHS gets one thread for a short
   while, for a bound better than the average load.
4. Anneal on until the time is over: afresh in runs as long as the time left, then, a little warmed, from the best.
   Layer graphs are load balancing, which the MIP hardly improves, and one slow cooling beats several fast ones.

While kernels are compiled (`mipipe.planner.devices.compiled`) step 3 runs first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count, takewhile

import numpy as np

from mipipe.graphs.errors import TimeUpError
from mipipe.planner import clock
from mipipe.planner.devices.coarse import coarsen
from mipipe.planner.devices.compiled import compiling
from mipipe.planner.devices.cooling import LAYERS, OPERATORS, Cooling, Moves, cool
from mipipe.planner.devices.instances.contract import Region, average_bound, merge_above, parts, transfer_budget
from mipipe.planner.devices.instances.instance import PlaceInstance
from mipipe.planner.devices.linear import best_intervals
from mipipe.planner.devices.result import TOLERANCE, PlaceResult
from mipipe.planner.devices.starts import fits, max_load
from mipipe.planner.devices.workers import TimedJob, run_jobs

PROVABLE = 900
"""Classes times devices of a contracted instance up to which HiGHS usually ends within a minute."""

PATIENCE = 40
"""Short annealing runs without improvement after which the MIP is next."""

SHARE = 0.25
"""Of the time left: for the first annealing runs, and for a bound where no proof is in reach."""

HOT, WARM = 0.1, 0.01
"""Temperatures to begin with, afresh and from an assignment that is to be improved."""


def place_throughput(instance: PlaceInstance, contiguous: bool, time_limit_s: float, seed: int, threads: int,
                     report: Callable[[float, str], None]) -> PlaceResult:
    """The best assignment found within the time limit.

    Raises:
        TimeUpError: no assignment that fits was found in time.
    """
    return _Search(instance, contiguous, time_limit_s, seed, threads, report).solve()


class _Search:
    """One solve: the best assignment so far and the rungs that improve it."""

    def __init__(self, instance: PlaceInstance, contiguous: bool, time_limit_s: float, seed: int, threads: int,
                 report: Callable[[float, str], None]) -> None:
        self.instance, self.contiguous, self.seed, self.threads = instance, contiguous, seed, threads
        self.report = report
        self.began = time.monotonic()
        self.time_limit_s = time_limit_s
        self.best: np.ndarray | None = None
        self.value = np.inf
        self.bound = 0.0
        self.method = ""
        self.contracted = instance.num_classes
        self.runs = count()
        self.quiet = 0  # annealing runs since the last improvement

    @property
    def left(self) -> float:
        return self.time_limit_s - (time.monotonic() - self.began)

    def _proven(self) -> bool:
        return self.value <= self.bound * (1 + TOLERANCE)

    def solve(self) -> PlaceResult:
        self.bound = average_bound(self.instance)
        try:
            for device in best_intervals(self.instance, lambda: self.left):
                self._offer(device, "intervals of an order")
            if not self._proven():
                self._improve()
        except KeyboardInterrupt:
            if self.best is None:
                raise
        if self.best is None:
            raise TimeUpError(f"{self.instance.name}: no assignment that fits was found in {self.time_limit_s:g} s;"
                              " give more time")
        labels = {str(node): self.instance.label(int(self.best[c]))
                  for node, c in zip(self.instance.node_ids, self.instance.node_class, strict=True)}
        return PlaceResult(self.value, min(self.bound, self.value), time.monotonic() - self.began, labels, self.method,
                           self.instance.num_classes, self.contracted)

    def _improve(self) -> None:
        with compiling() as ready:
            while not ready() and self.left > 0 and not self._proven():
                if not self._prove(until=ready):
                    time.sleep(0.05)
            if not ready():
                return
            self._run(self._first(), SHARE * self.left)
            while self.left > 0.1 and not self._proven() and self._provable() and self._prove():
                pass
            if not self._proven():
                self._run(self._longer(), self.left)

    def _run(self, jobs: Iterator[TimedJob], seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        run_jobs(jobs, threads=self.threads, seconds=seconds, enough=lambda: self._proven() or until())

    def _offer(self, device: np.ndarray, method: str) -> None:
        if fits(self.instance, device):
            value = max_load(self.instance, device)
            if value < self.value * (1 - 1e-12):
                self.best, self.value, self.method, self.quiet = device, value, method, 0
                self.report(value, method)

    def _first(self) -> Iterator[TimedJob]:
        """Short runs at rising contraction thresholds, the most contracted and quickest first, with pieces of the best
        and afresh between; then at what the budget allows, afresh, from the best, and on pieces."""
        mean = self.instance.acc.sum() / max(self.instance.num_accelerators, 1)
        for place, threshold in enumerate((mean / 8, mean / 4, mean / 2, np.inf)):
            for hot in (HOT, WARM):
                yield self._annealing(threshold, hot, 500, OPERATORS)
            if place < 2:
                yield self._on_pieces(None if place else self.best)
        for number in takewhile(lambda _: self.quiet < PATIENCE and self._provable(), count()):
            if self.best is not None and number % 4 == 3:
                yield self._on_pieces(self.best if number % 8 == 3 else None)
            elif number % 4 or self.best is None:
                yield self._annealing(self._budget() / 2, (0.01, 0.03)[number % 2], 1000, OPERATORS)
            else:
                yield self._annealing(self._budget() / 2, 0.03, 1000, OPERATORS, self.best)

    def _longer(self) -> Iterator[TimedJob]:
        """Long runs without end, the first one of every thread afresh, then every second one from the best; beside the
        first ones the MIP over the whole, for its bound."""
        if not self._provable():
            part = Region(*merge_above(self.instance, self._budget(), self.value))
            yield self._proving(part, self.value, SHARE * self.left, self._raise_bound)
        for number in count():
            if number < self.threads or number % 2:
                yield self._annealing(self._budget() / 2, 0.006, None, LAYERS)
            else:
                yield self._annealing(self._budget() / 2, 0.0005, None, LAYERS, self.best)

    def _budget(self) -> float:
        """What transfers may cost in an assignment as good as the best one."""
        return np.inf if self.best is None else transfer_budget(self.instance, self.value)

    def _raise_bound(self, bound: float) -> None:
        self.bound = max(self.bound, min(bound, self.value))

    def _cooling(self, moves: Moves, hot: float, effort: int | None) -> Cooling:
        return Cooling(moves, hot, effort, self.instance.num_classes, self.contiguous,
                       self.seed * 1000 + next(self.runs))

    def _annealing(self, threshold: float, hot: float, effort: int | None, moves: Moves,
                   known: np.ndarray | None = None) -> TimedJob:
        """A run on the contracted instance, from ``known`` or from a packed start: of ``effort`` steps per class, or as
        long as the time left allows."""
        run = self._cooling(moves, hot, effort)

        def job(stop: np.ndarray) -> Callable[[], None]:
            device = cool(*merge_above(self.instance, threshold), known, run, lambda: self.left, stop)
            return lambda: self._take(device, "annealing")
        return job

    def _on_pieces(self, known: np.ndarray | None) -> TimedJob:
        """A run on pieces, which can all hold ``known`` if there is one, and a warm one on the classes from there."""
        coarse, fine = self._cooling(OPERATORS, WARM if known is not None else HOT, 500), self._cooling(
            OPERATORS, WARM, 500)
        threshold = self._budget() / 2

        def job(stop: np.ndarray) -> Callable[[], None]:
            rough = cool(*coarsen(self.instance, known), known, coarse, lambda: self.left, stop)
            device = cool(*merge_above(self.instance, threshold), rough, fine, lambda: self.left, stop)

            def take() -> None:
                self._offer(rough, "annealing of pieces")
                self._take(device, "annealing of pieces")
            return take
        return job

    def _take(self, device: np.ndarray, method: str) -> None:
        self.quiet += 1
        self._offer(device, method)

    def _provable(self) -> bool:
        small, _ = merge_above(self.instance, self._budget(), self.value)
        return self.best is None or small.num_classes * small.num_devices < PROVABLE

    def _prove(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Solve all parts of the contracted instance: improves, or proves. Whether something better was found."""
        before, instance = self.value, self.instance
        worst = instance.acc.sum() + instance.cpu.sum() + (instance.num_devices + 1) * instance.value_cost.sum()
        target = float(worst) + 1.0 if self.best is None else before * (1 - 1e-6)
        pieces = parts(instance, target)
        self.contracted = max(part.instance.num_classes for part in pieces)
        bounds: list[float] = []
        self._run((self._proving(part, target, self.left, bounds.append) for part in pieces), self.left, until)
        if len(bounds) == len(pieces):
            self._raise_bound(min(bounds))
        return self.value < before

    def _proving(self, part: Region, target: float, seconds: float, settle: Callable[[float], None]) -> TimedJob:
        """The MIP over a part: a better assignment is offered, a bound given to ``settle``."""
        from mipipe.planner.milp import device_placement
        from mipipe.planner.milp.highs import SolverStatus

        def job(stop: np.ndarray) -> Callable[[], None]:
            try:
                with clock.watched(lambda: -1.0 if stop[0] else self.left):
                    found, outcome = device_placement.solve_part(part, target, time_limit_s=seconds, seed=self.seed,
                                                     contiguous=self.contiguous, stop=lambda: bool(stop[0]))
            except clock.OutOfTimeError:
                return lambda: None

            def take() -> None:
                if found is not None:
                    self._offer(found[part.merged], "MIP")
                if outcome.termination is SolverStatus.INFEASIBLE:
                    settle(target)
                elif outcome.bound is not None:
                    settle(outcome.bound)
            return take
        return job
