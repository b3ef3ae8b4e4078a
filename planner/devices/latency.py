"""The latency problem of `mipipe.planner.devices.instance`: one sample, subgraphs on accelerators, the rest on the CPU.

Annealing over labels (accelerator and subgraph, or CPU) in runs of growing length, from one accelerator after another
filled with a contiguous run of classes, from everything on the CPU, or from the best labels known. The bound is the
longest path with every node on its faster kind and all transfers free; it is far from tight where transfers dominate,
and says so by its gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np

from mipipe.graphs.errors import InfeasibleError
from mipipe.planner.devices import latency_kernels as kernels
from mipipe.planner.devices.instance import PlaceInstance
from mipipe.planner.devices.result import TOLERANCE, PlaceResult
from mipipe.planner.devices.workers import Job, run_jobs

FIRST_STEPS = 100_000
RUNS_PER_LENGTH = 6
"""Moves of the first annealing runs, and runs until their number is doubled."""


def place_latency(instance: PlaceInstance, time_limit_s: float, seed: int, threads: int,
                  report: Callable[[float, str], None]) -> PlaceResult:
    """The best labels found within the time limit.

    Raises:
        InfeasibleError: no core, so what does not fit one accelerator has nowhere to go.
    """
    began = time.monotonic()
    if not instance.num_cpus:
        raise InfeasibleError(f"{instance.name}: the latency problem needs maxCPUs of at least 1 (cores are unlimited"
                              " there, but some nodes may have to run on one)")
    graph = kernels.graph_of(instance)
    scale, bound = float(instance.cpu.sum()), longest_path(instance)
    best = np.full(instance.num_classes, -1, dtype=np.int64)
    value = kernels.latency_of(graph, best)
    report(value, "all on the CPU")

    def annealing(start: np.ndarray, steps: int, hot: float, number: int) -> Job:
        def job(stop: np.ndarray) -> Callable[[], None]:
            label, found = kernels.anneal_latency(graph, start, steps, hot * scale, 1e-5 * scale, seed * 1000 + number,
                                                  stop)

            def take() -> None:
                nonlocal best, value
                if found < value * (1 - 1e-12):
                    best, value = label, found
                    report(value, "annealing")
            return take
        return job

    def jobs() -> Iterator[Job]:
        filled = _filled(instance)
        starts = (filled, np.full(instance.num_classes, -1, dtype=np.int64))
        for number in count():
            start = best if number % 4 == 3 else starts[number % 2]
            steps = FIRST_STEPS * 2 ** min(number // RUNS_PER_LENGTH, 8)
            yield annealing(start if np.isfinite(kernels.latency_of(graph, start)) else starts[1], steps,
                            0.003 if number % 4 == 3 else (0.03, 0.01)[number // 2 % 2], number)

    try:
        run_jobs(jobs(), threads=threads, seconds=time_limit_s - (time.monotonic() - began),
                 enough=lambda: value <= bound * (1 + TOLERANCE))
    except KeyboardInterrupt:
        pass  # the best labels so far are the answer
    per_acc = kernels.SUBGRAPHS_PER_ACCELERATOR
    names = {str(node): "cpu0" if best[c] < 0 else f"acc{best[c] // per_acc}/{best[c] % per_acc}"
             for node, c in zip(instance.node_ids, instance.node_class, strict=True)}
    return PlaceResult(value, bound, time.monotonic() - began, names, "annealing", instance.num_classes,
                       instance.num_classes)


def longest_path(instance: PlaceInstance) -> float:
    """The longest path with every node on its faster kind and free transfers: no latency is below it."""
    fastest = np.minimum(instance.node_acc, instance.node_cpu)
    finish = fastest.copy()
    for a, b in instance.edges.tolist():  # sorted by topological source
        finish[b] = max(finish[b], finish[a] + fastest[b])
    return float(finish.max())


def _filled(instance: PlaceInstance) -> np.ndarray:
    """A start: class order cut into one run per accelerator that fits its memory; what is left over on the CPU."""
    label = np.full(instance.num_classes, -1, dtype=np.int64)
    used, device = 0.0, 0
    for c in range(instance.num_classes):
        if used + instance.size[c] > instance.memory:
            used, device = 0.0, device + 1
        if device >= instance.num_accelerators:
            break
        if instance.supported[c] and instance.size[c] <= instance.memory:
            label[c] = device * kernels.SUBGRAPHS_PER_ACCELERATOR
            used += instance.size[c]
    return label
