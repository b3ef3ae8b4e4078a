"""`place`: a workload on accelerators and CPU cores, with its objective, a bound and the gap.

The largest load of any device is minimised (throughput); `mipipe.planner.devices.throughput` has the search.
"""

from __future__ import annotations

import numpy as np

from mipipe.graphs.errors import InfeasibleError
from mipipe.planner.devices.instances.instance import PlaceInstance
from mipipe.planner.devices.result import PlaceProgress, PlaceResult
from mipipe.planner.devices.throughput import place_throughput


def place(instance: PlaceInstance, *, contiguous: bool = False, time_limit_s: float = 60.0, seed: int = 0,
          threads: int = 2, on_progress: PlaceProgress | None = None) -> PlaceResult:
    """The best assignment found within the time limit.

    Raises:
        InfeasibleError: memory or devices do not suffice; the smallest memory that would do is named.
        TimeUpError: no assignment that fits was found in time.
    """
    check_feasible(instance)
    report = on_progress or (lambda value, method: None)
    return place_throughput(instance, contiguous, time_limit_s, seed, threads, report)


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
