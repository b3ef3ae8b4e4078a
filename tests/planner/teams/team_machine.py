"""A machine for the small models of this folder's tests."""

from __future__ import annotations

from mipipe.graphs.cluster import DeviceKind
from mipipe.graphs.costs.collectives import Fabric, Level
from mipipe.graphs.efficiency import Achieved
from mipipe.graphs.topology import Link
from mipipe.planner.teams.prices.machine import Machine


def machine(memory: int = 10**9, host: int = 8, inside: int = 10**10, outside: int = 10**9, **achieved) -> Machine:
    """Devices with a tenth of an H100's rates, so that the small model is not all launches, so many on a host, with
    links of so many bytes a second inside it and between."""
    shares = Achieved(**{"product": 0.5, "half": 64.0, "memory": 0.8, "action_ns": 1000, **achieved})
    kind = DeviceKind("small", {"bfloat16": 10**13, "float32": 10**12, "float8": 2 * 10**13}, 10**11, memory, 500,
                      "made up", achieved=shares)
    levels = Level("host", host, Link(1000, inside)), Level("network", 64, Link(5000, outside))
    return Machine(kind, Fabric(levels), memory)
