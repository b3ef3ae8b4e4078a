"""What collectives take on a cluster whose links have levels: within a host, between hosts, between racks.

Rings and trees as NCCL has them, whichever is faster (Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", 2005; NCCL's double binary trees, 2018). A ring over n members moves ``(n-1)/n`` of
the bytes once (gather, scatter) or twice (all-reduce) at the rate of its slowest hop; where k members of a unit (a
host) are neighbours in the ring, k rings share the unit's k adapters, so the rate between units is k adapters', at most
the rate within. Latencies: a hop of the slowest level for each of the ring's steps, or a tree's depth at every level.
An all-to-all sends each peer its part: the slowest level decides, and every peer costs a message. A row that several
members of a unit get crosses to it once (DeepEP's dispatch; rows are taken as spread at random). Left out: contention
of other axes for the same adapters, and reductions in the switch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from mipipe.graphs.errors import InputError
from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.serialize import STRICT, Count
from mipipe.graphs.topology import Link, Topology

MESSAGE_NS = 1_000
"""What each further peer of an all-to-all costs: a message is posted in about a microsecond."""


@dataclass(frozen=True, slots=True)
class Level:
    """Units of ``size`` devices whose members reach each other over ``link``, as seen from one device."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    size: Count
    link: Link


@dataclass(frozen=True, slots=True)
class Fabric:
    """The levels of a cluster, the innermost first; the last holds all devices. Links as usable, not as sold."""

    __pydantic_config__: ClassVar = STRICT
    levels: tuple[Level, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise InputError("a fabric without levels; expected at least that of all devices")

    def link(self, stride: int) -> Level:
        """The level at which devices ``stride`` apart in the mesh's order meet."""
        return next((level for level in self.levels if stride < level.size), self.levels[-1])

    def counts(self, members: int, stride: int) -> list[tuple[Level, int]]:
        """Per level that a group spans how many of its members (or units of them) meet there; each at least 2."""
        found, inside = [], 1
        for level in self.levels:
            here = members if level is self.levels[-1] else max(1, min(members, level.size // stride))
            if here > inside:
                found.append((level, -(-here // inside)))
                inside = here
        return found


def collective_ns(fabric: Fabric, kind: CollectiveKind, num_bytes: int, members: int, stride: int = 1, *,
                  fanout: float = 1.0) -> int:
    """Nanoseconds of one collective.

    Args:
        fabric: the cluster's levels.
        kind: what is done.
        num_bytes: of the whole tensor, as `mipipe.graphs.modes.Collective` counts it.
        members: devices that take part.
        stride: how far apart they are in the order of devices.
        fanout: of an all-to-all, how many of a member's rows are the same (a token for each of its experts).
    """
    if members < 2 or not num_bytes:
        return 0
    spans = fabric.counts(members, stride)
    if kind is CollectiveKind.ALL_TO_ALL:
        return round(_all_to_all(spans, num_bytes, members, fanout))
    rate, inside = math.inf, 1
    for level, count in spans:
        if level.link.bytes_per_s is not None:
            rate = min(rate, inside * level.link.bytes_per_s)
        inside *= count
    hop = max(level.link.latency_ns for level, _ in spans)
    times = 2 if kind is CollectiveKind.ALL_REDUCE else 1
    wire = times * num_bytes / rate * 1e9
    ring = times * (members - 1) * hop + wire * (members - 1) / members
    if kind is not CollectiveKind.ALL_REDUCE:
        return round(ring)
    depth = sum(math.ceil(math.log2(count)) * level.link.latency_ns for level, count in spans)
    return round(min(ring, 2 * depth + wire))


def _all_to_all(spans: list[tuple[Level, int]], num_bytes: int, members: int, fanout: float) -> float:
    slowest, inside, latency = 0.0, 1, 0
    for level, count in spans:
        peers = inside * (count - 1)
        rate, units = level.link.bytes_per_s, members / inside
        once = units * (1 - (1 - 1 / units) ** fanout) / fanout if inside > 1 else 1.0
        slowest = max(slowest, 0.0 if rate is None else once * num_bytes * peers / members / rate * 1e9)
        latency, inside = max(latency, level.link.latency_ns), inside * count
    return slowest + latency + (members - 1) * MESSAGE_NS


def fabric_of(topology: Topology) -> Fabric:
    """The levels of a cluster file: its hosts (of the smallest number of devices), then all.

    Exceptions for single pairs of devices are left out: a team's collectives are as fast as the usual link.
    """
    sizes: dict[str, int] = {}
    for device in topology.devices:
        sizes[device.host] = sizes.get(device.host, 0) + 1
    count, least = topology.num_devices, min(sizes.values())
    inside = Level("host", least, topology.within_host)
    if len(sizes) == 1:
        return Fabric((inside,))
    outside = Level("network", count, topology.between_hosts)
    return Fabric((inside, outside) if least > 1 else (outside,))
