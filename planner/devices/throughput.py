"""The throughput problem of `mipipe.planner.devices.instance`: annealing finds the assignment, the MIP proves it.

1. Anneal on the instance contracted at several thresholds, a few seconds in all: operator graphs are solved by then.
2. Prove by MIP, part by part (`mipipe.planner.devices.contract.parts`), where the contracted instance is small enough
   for that to end; of a larger one HiGHS gets one thread for a short while, for a bound better than the average load.
3. Anneal on until the time is over: afresh in runs as long as the time left, then, a little warmed, from the best.
   Layer graphs are load balancing, which the MIP hardly improves, and one slow cooling beats several fast ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count, takewhile
from typing import NamedTuple

import networkx as nx
import numpy as np

from mipipe.graphs.errors import TimeUpError
from mipipe.planner.devices import kernels
from mipipe.planner.devices.contract import Region, merge_above, parts, transfer_budget
from mipipe.planner.devices.instance import PlaceInstance
from mipipe.planner.devices.result import TOLERANCE, PlaceResult
from mipipe.planner.devices.workers import TimedJob, run_jobs

PROVABLE = 900
"""Classes times devices of a contracted instance up to which HiGHS usually ends within a minute."""


class Moves(NamedTuple):
    """How to anneal: the share of exchanges, how many of them are of large pieces and the most classes of the others,
    the norm's exponent (a power of two), the last temperature."""

    exchanges: float
    large: float
    small: int
    doublings: int
    cold: float


OPERATORS, LAYERS = Moves(0.5, 0.5, 1, 4, 1e-4), Moves(0.7, 0.2, 5, 8, 1e-5)
"""Transfers that cost much want a low norm; plain load balancing a high one, a long end and exchanges of a few
classes."""

PATIENCE = 40
"""Short annealing runs without improvement after which the MIP is next."""

FIRST_SHARE, BOUND_SHARE = 0.25, 0.25
"""Shares of the time limit for the first annealing runs, and for a bound where no proof is in reach."""

PROBE, LONGEST = 2_000, 500_000
"""Steps per class that say how fast a long run is; it takes the time left, and at most so many steps per class."""


def place_throughput(instance: PlaceInstance, contiguous: bool, time_limit_s: float, seed: int, threads: int,
                     report: Callable[[float, str], None]) -> PlaceResult:
    """The best assignment found within the time limit.

    Raises:
        TimeUpError: no assignment that fits was found in time.
    """
    return _Search(instance, contiguous, time_limit_s, seed, threads, report).solve()


def max_load(instance: PlaceInstance, device: np.ndarray) -> float:
    """The largest load of an assignment."""
    return float(kernels.all_loads(kernels.workload_of(instance), device).max())


def pack_first(instance: PlaceInstance) -> np.ndarray | None:
    """A start that fits memory: classes in topological order, each accelerator filled before the next; the rest on CPU.

    None where nothing fits.
    """
    device = np.zeros(instance.num_classes, dtype=np.int64)
    used = np.zeros(instance.num_accelerators)
    current = 0
    share = instance.size.sum() / max(instance.num_accelerators, 1) * 1.02
    for c in range(instance.num_classes):
        room = [d for d in range(instance.num_accelerators)
                if instance.supported[c] and used[d] + instance.size[c] <= instance.memory]
        if current + 1 < instance.num_accelerators and used[current] >= share > 0:
            current += 1
        if current in room:
            choice = current
        elif room:
            choice = room[0]
        elif instance.num_cpus:
            choice = instance.num_accelerators
        else:
            return None
        device[c] = choice
        if choice < instance.num_accelerators:
            used[choice] += instance.size[c]
    return device


def fill_in_order(instance: PlaceInstance) -> np.ndarray | None:
    """A contiguous start: accelerators filled one after another with an equal share of the time, as paths go.

    Classes on a cycle of forward edges stay together, so no path returns. None where memory or support forbid it.
    """
    forward = ~instance.node_backward[instance.edges].any(axis=1)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(instance.num_classes))
    graph.add_edges_from(instance.node_class[instance.edges[forward]].tolist())
    whole = nx.condensation(graph)
    if not instance.num_accelerators or not instance.supported.all():
        return None
    device = np.zeros(instance.num_classes, dtype=np.int64)
    share = instance.acc.sum() / instance.num_accelerators
    current, taken, used = 0, 0.0, 0.0
    for component in nx.lexicographical_topological_sort(whole, key=lambda c: min(whole.nodes[c]["members"])):
        members = sorted(whole.nodes[component]["members"])
        taking, size = instance.acc[members].sum(), instance.size[members].sum()
        last = current + 1 == instance.num_accelerators
        if taken and not last and (taken + taking / 2 > share or used + size > instance.memory):
            current, taken, used = current + 1, 0.0, 0.0
        taken, used = taken + taking, used + size
        if used > instance.memory:
            return None
        device[members] = current
    return device


def contracted(device: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """An assignment of the contracted classes that follows ``device`` where that is possible."""
    small = np.zeros(int(merged.max()) + 1, dtype=np.int64)
    small[merged] = device
    return small


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
        self.bound = self._average_bound()
        try:
            self._run(self._first(), self.left - (1 - FIRST_SHARE) * self.time_limit_s)
            while self.left > 1 and not self._proven() and self._provable() and self._prove():
                pass
            if not self._proven():
                self._run(self._longer(), self.left)
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

    def _run(self, jobs: Iterator[TimedJob], seconds: float) -> None:
        run_jobs(jobs, threads=self.threads, seconds=seconds, enough=self._proven)

    def _offer(self, device: np.ndarray, method: str) -> None:
        if self._fits(device):
            value = max_load(self.instance, device)
            if value < self.value * (1 - 1e-12):
                self.best, self.value, self.method, self.quiet = device, value, method, 0
                self.report(value, method)

    def _fits(self, device: np.ndarray) -> bool:
        instance = self.instance
        used = np.bincount(device, instance.size, instance.num_devices)[:instance.num_accelerators]
        return bool((used <= instance.memory).all()) and not (
            ~instance.supported & (device < instance.num_accelerators)).any()

    def _average_bound(self) -> float:
        """The smallest T whose transfer budget is not negative: all compute spread perfectly, transfers free."""
        low, high = 0.0, float(self.instance.acc.sum() + self.instance.cpu.sum())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if transfer_budget(self.instance, middle) >= 0 else (middle, high)
        return low

    def _first(self) -> Iterator[TimedJob]:
        """Short runs at falling contraction thresholds, then at what the budget allows: afresh and from the best."""
        mean = self.instance.acc.sum() / max(self.instance.num_accelerators, 1)
        for threshold in (np.inf, mean / 2, mean / 4, mean / 8):
            for hot in (0.1, 0.01):
                yield self._annealing(threshold, hot, 500, OPERATORS)
        for number in takewhile(lambda _: self.quiet < PATIENCE and self._provable(), count()):
            if number % 3 or self.best is None:
                yield self._annealing(self._budget() / 2, (0.01, 0.03)[number % 2], 1000, OPERATORS)
            else:
                yield self._annealing(self._budget() / 2, 0.03, 1000, OPERATORS, self.best)

    def _longer(self) -> Iterator[TimedJob]:
        """Long runs without end, the first one of every thread afresh, then every second one from the best; beside the
        first ones the MIP over the whole, for its bound."""
        if not self._provable():
            part = Region(*merge_above(self.instance, self._budget(), self.value))
            yield self._proving(part, self.value, BOUND_SHARE * self.left, self._raise_bound)
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

    def _annealing(self, threshold: float, hot: float, effort: int | None, moves: Moves,
                   known: np.ndarray | None = None) -> TimedJob:
        """A run on the contracted instance, from ``known`` or from a packed start: of ``effort`` steps per class, or as
        long as the time left allows."""
        number = next(self.runs)

        def job(stop: np.ndarray) -> Callable[[], None]:
            small, merged = merge_above(self.instance, threshold)
            workload = kernels.workload_of(small)
            start = (contracted(known, merged) if known is not None else
                     fill_in_order(small) if self.contiguous else pack_first(small))
            if start is None or (self.contiguous and not all(kernels.is_contiguous(workload, d, start)
                                                             for d in range(small.num_devices))):
                start = np.full(small.num_classes, small.num_accelerators if small.num_cpus else 0, dtype=np.int64)
            scale = float(small.acc.sum()) / max(small.num_accelerators, 1)
            heat = (hot * scale, moves.cold * scale, moves.exchanges, moves.large, moves.small, moves.doublings,
                    self.seed * 1000 + number, stop)
            count = self.instance.num_classes
            steps = PROBE * count if effort is None else effort * count // (4 if self.contiguous else 1)
            began = time.monotonic()
            device, _ = kernels.anneal_throughput(workload, start, self.contiguous, steps, *heat)
            if effort is None:
                pace = steps / max(time.monotonic() - began, 1e-3)
                steps = int(min(max(self.left * pace, steps), LONGEST * count))
                device, _ = kernels.anneal_throughput(workload, start, self.contiguous, steps, *heat)

            def take() -> None:
                self.quiet += 1
                self._offer(device[merged], "annealing")
            return take
        return job

    def _provable(self) -> bool:
        small, _ = merge_above(self.instance, self._budget(), self.value)
        return self.best is None or small.num_classes * small.num_devices < PROVABLE

    def _prove(self) -> bool:
        """Solve all parts of the contracted instance: improves, or proves. Whether something better was found."""
        before, instance = self.value, self.instance
        worst = instance.acc.sum() + instance.cpu.sum() + (instance.num_devices + 1) * instance.value_cost.sum()
        target = float(worst) + 1.0 if self.best is None else before * (1 - 1e-6)
        pieces = parts(instance, target)
        self.contracted = max(part.instance.num_classes for part in pieces)
        bounds: list[float] = []
        self._run((self._proving(part, target, self.left, bounds.append) for part in pieces), self.left)
        if len(bounds) == len(pieces):
            self._raise_bound(min(bounds))
        return self.value < before

    def _proving(self, part: Region, target: float, seconds: float, settle: Callable[[float], None]) -> TimedJob:
        """The MIP over a part: a better assignment is offered, a bound given to ``settle``."""
        from mipipe.planner.milp import device_placement as milp
        from mipipe.planner.milp.highs import SolverStatus

        def job(stop: np.ndarray) -> Callable[[], None]:
            found, outcome = milp.solve_part(part, target, time_limit_s=seconds, seed=self.seed,
                                             contiguous=self.contiguous,
                                             stop=lambda: bool(stop[0]))

            def take() -> None:
                if found is not None:
                    self._offer(found[part.merged], "MIP")
                if outcome.termination is SolverStatus.INFEASIBLE:
                    settle(target)
                elif outcome.bound is not None:
                    settle(outcome.bound)
            return take
        return job
