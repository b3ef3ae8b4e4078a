"""The latency problem of `mipipe.planner.place_instance`: one sample, subgraphs on accelerators, the rest on the CPU.

Annealing over labels (accelerator and subgraph, or CPU) from several starts: one accelerator after another filled with
a contiguous run of classes, or everything on the CPU. The bound is the longest path with every node on its faster kind
and all transfers free; it is far from tight where transfers dominate, and says so by its gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from mipipe.graphs.errors import InfeasibleError
from mipipe.planner import place_kernels as kernels
from mipipe.planner.place import PlaceResult
from mipipe.planner.place_instance import PlaceInstance

SUBGRAPHS_PER_ACCELERATOR = 4
"""More subgraphs never helped on the benchmark and slow every evaluation."""


def place_latency(instance: PlaceInstance, time_limit_s: float, seed: int,
                  report: Callable[[float, str], None]) -> PlaceResult:
    """The best labels found within the time limit.

    Raises:
        InfeasibleError: no core, so what does not fit one accelerator has nowhere to go.
    """
    began = time.monotonic()
    if not instance.num_cpus:
        raise InfeasibleError(f"{instance.name}: the latency problem needs maxCPUs of at least 1 (cores are unlimited"
                              " there, but some nodes may have to run on one)")
    graph = _Arrays(instance)
    best, value, number = np.full(instance.num_classes, -1, dtype=np.int64), np.inf, 0
    steps = 300_000
    while time.monotonic() - began < time_limit_s or number == 0:
        start = best if number % 4 == 3 else _runs(instance, number)
        label, found = graph.anneal(start, steps, (0.03, 0.01)[number // 2 % 2], seed * 1000 + number)
        if found < value * (1 - 1e-12):
            best, value = label, found
            report(value, "annealing")
        number += 1
        spent = time.monotonic() - began
        steps = int(max(20_000, min(2_000_000, steps * min(4.0, 0.12 * time_limit_s / (spent / number + 1e-9)))))
        left = time_limit_s - spent
        steps = int(min(steps, max(10_000, steps * left / max(spent / number, 1e-9))))
    per_acc = SUBGRAPHS_PER_ACCELERATOR
    names = {str(node): "cpu0" if best[c] < 0 else f"acc{best[c] // per_acc}/{best[c] % per_acc}"
             for node, c in zip(instance.node_ids, instance.node_class, strict=True)}
    return PlaceResult(value, graph.bound(), time.monotonic() - began, names, "annealing", instance.num_classes,
                       instance.num_classes)


def _runs(instance: PlaceInstance, number: int) -> np.ndarray:
    """A start: class order cut into one run per accelerator that fits its memory; every other start all on the CPU."""
    label = np.full(instance.num_classes, -1, dtype=np.int64)
    if number % 2:
        return label
    used, device = 0.0, 0
    for c in range(instance.num_classes):
        if used + instance.size[c] > instance.memory:
            used, device = 0.0, device + 1
        if device >= instance.num_accelerators:
            break
        if instance.supported[c]:
            label[c] = device * SUBGRAPHS_PER_ACCELERATOR
            used += instance.size[c]
    return label


class _Arrays:
    """The instance's graph in the arrays the kernels take."""

    def __init__(self, instance: PlaceInstance) -> None:
        self.instance = instance
        count = len(instance.node_class)
        self.source = np.ascontiguousarray(instance.edges[:, 0])
        self.target = np.ascontiguousarray(instance.edges[:, 1])
        order = np.argsort(self.target, kind="stable")
        self.preds = self.source[order]
        self.pred_start = np.concatenate([[0], np.cumsum(np.bincount(self.target, minlength=count))]).astype(np.int64)
        near: list[set[int]] = [set() for _ in range(instance.num_classes)]
        for a, b in zip(instance.node_class[self.source].tolist(), instance.node_class[self.target].tolist(),
                        strict=True):
            if a != b:
                near[a].add(b)
                near[b].add(a)
        self.near_start = np.cumsum([0, *map(len, near)]).astype(np.int64)
        self.near = np.array([c for row in near for c in sorted(row)], dtype=np.int64)

    def anneal(self, start: np.ndarray, steps: int, hot: float, seed: int) -> tuple[np.ndarray, float]:
        """The best labels from one annealing run, and their latency."""
        instance = self.instance
        scale = float(instance.cpu.sum())
        start = start if np.isfinite(self.latency(start)) else np.full(instance.num_classes, -1, dtype=np.int64)
        return kernels.anneal_latency(
            start, instance.num_accelerators, SUBGRAPHS_PER_ACCELERATOR, instance.size, instance.supported,
            instance.memory, self.near_start, self.near, instance.node_class, instance.node_acc, instance.node_cpu,
            instance.node_cost, self.source, self.target, self.pred_start, self.preds, steps, hot * scale, 1e-6 * scale,
            seed)

    def latency(self, label: np.ndarray) -> float:
        """Last finish under labels; infinity for a cycle."""
        instance = self.instance
        return float(kernels.latency_of(
            label, instance.num_accelerators * SUBGRAPHS_PER_ACCELERATOR, SUBGRAPHS_PER_ACCELERATOR,
            instance.node_class, instance.node_acc, instance.node_cpu, instance.node_cost, self.source, self.target,
            self.pred_start, self.preds))

    def bound(self) -> float:
        """The longest path with every node on its faster kind and free transfers."""
        fastest = np.minimum(self.instance.node_acc, self.instance.node_cpu)
        finish = fastest.copy()
        for a, b in self.instance.edges.tolist():  # sorted by topological source
            finish[b] = max(finish[b], finish[a] + fastest[b])
        return float(finish.max())
