"""Kernels that are compiled before they are called, in a process of their own, so that a time limit can hold.

numba compiles on the first call, which takes ten seconds and more and cannot be stopped; later processes find the
result in a cache beside the source (`mipipe.planner.kernel`). A search that finds no cache lets a second process fill
it, meanwhile does what needs no kernel, and ends that process if its own time is over first.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from mipipe.planner.devices import kernels
from mipipe.planner.devices.instances.instance import WorkloadNode, contract_classes
from mipipe.planner.kernel import is_compiled


@contextmanager
def compiling() -> Iterator[Callable[[], bool]]:
    """Whether the kernels can be called without a wait, to be asked again and again; leaves no process behind."""
    if is_compiled(kernels.anneal_throughput):
        yield lambda: True
        return
    child = subprocess.Popen([sys.executable, "-c", f"from {__name__} import compile_kernels; compile_kernels()"],
                             stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield lambda: child.poll() is not None
    finally:
        child.kill()
        child.wait()


def compile_kernels() -> None:
    """Call every kernel that the search calls, on three classes."""
    nodes = [WorkloadNode(n, 1.0, 2.0, 1.0, n) for n in range(3)]
    workload = kernels.workload_of(contract_classes("chain", (2, 1, 9.0), nodes, [(0, [1], 0.1), (1, [2], 0.1)]))
    start = np.zeros(3, dtype=np.int64)
    kernels.is_contiguous(workload, 0, start)
    kernels.anneal_throughput(workload, start, False, 10, 1.0, 0.1, 0.5, 0.5, 1, 4, 0, np.zeros(1, dtype=np.bool_))
