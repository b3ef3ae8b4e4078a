"""`place`: a workload on accelerators and CPU cores, with its objective, a bound and the gap.

Throughput: anneal on the instance contracted at several thresholds, contract by the transfer budget of the value found,
then prove or improve by MIP; where the whole MIP is too large, improve devices by twos and threes (fix-and-optimise).
Latency: anneal over subgraphs; the bound is the critical path with every node on its faster kind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mipipe.graphs.errors import InfeasibleError, TimeUpError
from mipipe.planner import place_kernels as kernels
from mipipe.planner.place_contract import merge_above, transfer_budget
from mipipe.planner.place_instance import PlaceInstance

Progress = Callable[[float, str], None]
TOLERANCE = 2e-6


@dataclass(frozen=True, slots=True)
class PlaceResult:
    """An assignment (node id -> ``acc0``, ``cpu0``, for latency ``acc0/2``: the subgraph) and what is known of it.

    ``method`` names the rung that found it.
    """

    objective: float
    bound: float
    seconds: float
    assignment: dict[str, str]
    method: str
    classes: int
    contracted_classes: int

    @property
    def gap(self) -> float:
        """``(objective - bound) / objective``; 0 up to the solver's tolerance of 2e-6, which counts as proven."""
        gap = (self.objective - self.bound) / self.objective if self.objective else 0.0
        return gap if gap > TOLERANCE else 0.0


def place(instance: PlaceInstance, *, objective: Literal["throughput", "latency"] = "throughput",
          contiguous: bool = False, time_limit_s: float = 60.0, seed: int = 0,
          on_progress: Progress | None = None) -> PlaceResult:
    """The best assignment found within the time limit.

    Raises:
        InfeasibleError: memory or devices do not suffice; the smallest memory that would do is named.
        TimeUpError: no assignment that fits was found in time.
    """
    check_feasible(instance)
    report = on_progress or (lambda value, method: None)
    if objective == "latency":
        from mipipe.planner.place_latency import place_latency

        return place_latency(instance, time_limit_s, seed, report)
    return _Throughput(instance, contiguous, time_limit_s, seed, report).solve()


def check_feasible(instance: PlaceInstance) -> None:
    """Raise `InfeasibleError` where no assignment can exist, for memory or for want of devices."""
    if instance.num_cpus:
        return
    if not instance.num_accelerators:
        raise InfeasibleError(f"{instance.name}: no devices (maxFPGAs and maxCPUs are 0); give at least one")
    stuck = np.flatnonzero(~instance.supported)
    if len(stuck):
        node = instance.node_ids[int(np.flatnonzero(instance.node_class == stuck[0])[0])]
        raise InfeasibleError(f"{instance.name}: node {node} is not supported on accelerators, and maxCPUs is 0;"
                              " allow at least 1 core")
    least = max(instance.size.max(), instance.size.sum() / instance.num_accelerators)
    if least > instance.memory:
        raise InfeasibleError(f"{instance.name}: {instance.size.sum():.6g} bytes do not fit {instance.num_accelerators}"
                              f" accelerators of {instance.memory:.6g}, and there is no core; maxSizePerFPGA must be at"
                              f" least {least:.6g}")


def touching(instance: PlaceInstance) -> tuple[np.ndarray, np.ndarray]:
    """The values each class makes or reads, as (starts [class + 1], values)."""
    lists: list[list[int]] = [[] for _ in range(instance.num_classes)]
    for v, source in enumerate(instance.value_source.tolist()):
        for c in {source, *instance.readers[instance.reader_start[v]:instance.reader_start[v + 1]].tolist()}:
            lists[c].append(v)
    return (np.cumsum([0, *map(len, lists)]).astype(np.int64),
            np.array([v for row in lists for v in row], dtype=np.int64))


def max_load(instance: PlaceInstance, device: np.ndarray) -> float:
    """The largest load of an assignment."""
    return float(kernels.all_loads(device, instance.acc, instance.cpu, instance.value_source, instance.value_cost,
                                   instance.reader_start, instance.readers, instance.num_accelerators,
                                   instance.num_devices).max())


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


class _Throughput:
    """One solve: the best assignment so far and the rungs that improve it."""

    def __init__(self, instance: PlaceInstance, contiguous: bool, time_limit_s: float, seed: int,
                 report: Progress) -> None:
        self.instance, self.contiguous, self.seed, self.report = instance, contiguous, seed, report
        self.began = time.monotonic()
        self.time_limit_s = time_limit_s
        self.best: np.ndarray | None = None
        self.value = np.inf
        self.bound = 0.0
        self.method = ""
        self.contracted = instance.num_classes

    @property
    def left(self) -> float:
        return self.time_limit_s - (time.monotonic() - self.began)

    @property
    def _proven(self) -> bool:
        return self.value <= self.bound * (1 + TOLERANCE)

    def solve(self) -> PlaceResult:
        self.bound = self._average_bound()
        try:
            self._anneal_all()
            if self.best is not None:
                self._prove()
                self._improve_parts()
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

    def _offer(self, device: np.ndarray, method: str) -> None:
        value = max_load(self.instance, device)
        if value < self.value * (1 - 1e-12):
            self.best, self.value, self.method = device, value, method
            self.report(value, method)

    def _average_bound(self) -> float:
        """The smallest T whose transfer budget is not negative: all compute spread perfectly, transfers free."""
        low, high = 0.0, float(self.instance.acc.sum() + self.instance.cpu.sum())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if transfer_budget(self.instance, middle) >= 0 else (middle, high)
        return low

    def _anneal_all(self) -> None:
        """Anneal at falling contraction thresholds; later passes start from what the budget allows."""
        mean = self.instance.acc.sum() / max(self.instance.num_accelerators, 1)
        for number, threshold in enumerate((np.inf, mean / 2, mean / 4, mean / 8, mean / 6, mean / 5)):
            for hot in (0.1, 0.02, 0.004):
                if self.left > 0.85 * self.time_limit_s:
                    self._anneal(threshold, hot, 500, number)
        spent = 0
        while self.left > 0.75 * self.time_limit_s and spent < 12:
            budget = transfer_budget(self.instance, self.value)
            self._anneal(budget / 2, (0.02, 0.004)[spent % 2], 2000, 100 + spent)
            spent += 1

    def _anneal(self, threshold: float, hot: float, effort: int, number: int) -> None:
        """One annealing run of ``effort`` steps per class, from a packed start at the given contraction."""
        small, merged = merge_above(self.instance, threshold)
        steps = effort * self.instance.num_classes
        start = pack_first(small)
        if start is None or (self.contiguous and not self._contiguous(small, start)):
            start = np.full(small.num_classes, small.num_accelerators if small.num_cpus else 0, dtype=np.int64)
        starts, touched = touching(small)
        scale = float(small.acc.sum()) / max(small.num_accelerators, 1)
        device, _ = kernels.anneal_throughput(
            start, small.acc, small.cpu, small.size, small.supported, small.value_source, small.value_cost,
            small.reader_start, small.readers, starts, touched, small.num_accelerators, small.num_devices, small.memory,
            self.contiguous, small.node_class, small.node_backward, np.ascontiguousarray(small.edges[:, 0]),
            np.ascontiguousarray(small.edges[:, 1]), steps // (4 if self.contiguous else 1), hot * scale, 1e-5 * scale,
            self.seed * 1000 + number)
        if self._fits(small, device):
            self._offer(device[merged], "annealing")

    def _contiguous(self, small: PlaceInstance, device: np.ndarray) -> bool:
        return all(kernels.is_contiguous(d, device, small.node_class, small.node_backward,
                                         np.ascontiguousarray(small.edges[:, 0]),
                                         np.ascontiguousarray(small.edges[:, 1])) for d in range(small.num_devices))

    def _fits(self, small: PlaceInstance, device: np.ndarray) -> bool:
        used = np.bincount(device, small.size, small.num_devices)[:small.num_accelerators]
        return bool((used <= small.memory).all()) and not (
            ~small.supported & (device < small.num_accelerators)).any()

    def _prove(self) -> None:
        """The MIP over the contracted instance: improves, or proves that nothing better exists."""
        from mipipe.planner.milp import device_placement as milp
        from mipipe.planner.milp.highs import Termination

        assert self.best is not None
        while self.left > 1 and not self._proven:
            target = self.value * (1 - 1e-6)
            small, merged = merge_above(self.instance, transfer_budget(self.instance, self.value))
            self.contracted = small.num_classes
            start = np.zeros(small.num_classes, dtype=np.int64)
            start[merged] = self.best
            share = self.left if small.num_classes * small.num_devices < 900 else self.left / 3
            found, outcome = milp.solve(small, start, target, time_limit_s=share, seed=self.seed,
                                        contiguous=self.contiguous)
            if outcome.termination is Termination.INFEASIBLE:
                self.bound = max(self.bound, target)
                return
            if outcome.bound is not None:
                self.bound = max(self.bound, min(outcome.bound, self.value))
            if found is None or not self._fits(small, found):
                return
            before = self.value
            self._offer(found[merged], "MIP")
            if outcome.termination is Termination.OPTIMAL or self.value >= before:
                return

    def _improve_parts(self) -> None:
        """Fix-and-optimise: the busiest device with one or two others, chosen in turn, while time lasts."""
        from mipipe.planner.milp import device_placement as milp

        rng = np.random.default_rng(self.seed)
        while self.left > 0.5 and not self._proven and self.best is not None:
            loads = kernels.all_loads(self.best, self.instance.acc, self.instance.cpu, self.instance.value_source,
                                      self.instance.value_cost, self.instance.reader_start, self.instance.readers,
                                      self.instance.num_accelerators, self.instance.num_devices)
            busiest = int(loads.argmax())
            others = [d for d in range(self.instance.num_devices) if d != busiest]
            if not others:
                return
            chosen = rng.choice(others, min(len(others), int(rng.integers(1, 3))), replace=False)
            found, _ = milp.solve(self.instance, self.best, self.value * (1 - 1e-7), time_limit_s=min(self.left, 6.0),
                                  seed=self.seed, contiguous=self.contiguous, free={busiest, *chosen.tolist()})
            if found is not None and self._fits(self.instance, found):
                self._offer(found, "MIP over some devices")
