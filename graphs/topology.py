"""Devices and the directed channels between them.

A `Topology` is what a cluster file describes: hosts with devices of a kind, and the links within and between hosts.
Every pair of devices has a channel in each direction. A transfer arrives ``latency + bytes / bandwidth`` after it
starts, but occupies its channel for ``bytes / bandwidth`` only: messages on their way follow each other, as on a wire,
and the published schedules' figures with transfer times assume the same. Left out: contention of several channels for
one network card or switch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT
from mipipe.graphs.units import shown

MOST_DEVICES = 16_384
"""Devices of a cluster: more is a slip of the pen, and would be planned for days."""

UNLIMITED_BYTES = 2**60
"""A device with this much memory or more has no limit."""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one worker process on a CPU. ``local_rank`` counts within ``host``.

    ``nominal_bytes``: the memory it is sold with, where ``memory_bytes`` is only what of that tensors can fill
    (`mipipe.planner.device_memory`).
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    kind: str
    memory_bytes: int
    host: str = "host0"
    local_rank: int = 0
    nominal_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.memory_bytes < 0 or self.local_rank < 0:
            raise InputError(f"device {shown(self.name)}: found memory_bytes {shown(self.memory_bytes)} and local_rank"
                             f" {shown(self.local_rank)}, expected none below 0")


@dataclass(frozen=True, slots=True)
class Link:
    """What one transfer costs: ``latency_ns + bytes / bytes_per_s``. ``bytes_per_s=None``: latency alone."""

    __pydantic_config__: ClassVar = STRICT
    latency_ns: int = 0
    bytes_per_s: int | None = None

    def __post_init__(self) -> None:
        if self.latency_ns < 0:
            raise InputError(f"link: found latency_ns {shown(self.latency_ns)}, expected none below 0")
        if self.bytes_per_s is not None and self.bytes_per_s < 1:
            raise InputError(f"link: found bytes_per_s {shown(self.bytes_per_s)}, expected a rate above 0")

    def transfer_ns(self, num_bytes: int) -> int:
        """Duration of one transfer, rounded up to a nanosecond."""
        if self.bytes_per_s is None:
            return self.latency_ns
        return self.latency_ns + -(-num_bytes * 10**9 // self.bytes_per_s)

    def occupied_ns(self, num_bytes: int) -> int:
        """How long one transfer keeps the channel from the next one: its duration without the latency."""
        return self.transfer_ns(num_bytes) - self.latency_ns


@dataclass(frozen=True, slots=True)
class Topology:
    """Devices in rank order, the link within a host, the link between hosts, and measured exceptions.

    ``overrides[(a, b)]`` is keyed ``"a->b"`` by device index in files.
    """

    __pydantic_config__: ClassVar = STRICT
    devices: tuple[Device, ...]
    within_host: Link
    between_hosts: Link
    overrides: dict[str, Link] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.devices:
            raise InputError("cluster: no devices; expected at least one host with devices")
        if len(self.devices) > MOST_DEVICES:
            raise InputError(f"cluster: {len(self.devices)} devices; expected at most {MOST_DEVICES}")
        names = [device.name for device in self.devices]
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise InputError(f"cluster: two devices are named {shown(twice)}; every device has a name of its own")
        for key in self.overrides:
            ends = re.fullmatch(r"(0|[1-9][0-9]{0,8})->(0|[1-9][0-9]{0,8})", key)
            if ends is None or max(map(int, ends.groups())) >= len(self.devices) or ends[1] == ends[2]:
                raise InputError(f"cluster: link {shown(key)}: expected 'a->b' with two device indices below"
                                 f" {len(self.devices)}")

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    def link(self, source: int, target: int) -> Link:
        """The channel from device ``source`` to device ``target``."""
        override = self.overrides.get(f"{source}->{target}")
        if override is not None:
            return override
        same = self.devices[source].host == self.devices[target].host
        return self.within_host if same else self.between_hosts

    def transfer_ns(self, source: int, target: int, num_bytes: int) -> int:
        """Duration of one transfer; 0 within a device."""
        return 0 if source == target else self.link(source, target).transfer_ns(num_bytes)

    def occupied_ns(self, source: int, target: int, num_bytes: int) -> int:
        """How long one transfer occupies its channel; 0 within a device."""
        return 0 if source == target else self.link(source, target).occupied_ns(num_bytes)

    def all_reduce_ns(self, devices: tuple[int, ...], num_bytes: int) -> int:
        """Ring all-reduce: 2(n-1) steps of 1/n of the bytes over the slowest link (Patarasuk and Yuan, 2009)."""
        size = len(devices)
        if size < 2 or num_bytes == 0:
            return 0
        share = -(-num_bytes // size)
        ring = zip(devices, devices[1:] + devices[:1], strict=True)
        return 2 * (size - 1) * max(self.transfer_ns(a, b, share) for a, b in ring)

    def without(self, lost: Iterable[int]) -> Topology:
        """The topology of the devices that are left, links kept.

        Raises:
            InputError: none is left.
        """
        gone = set(lost)
        kept = [index for index in range(len(self.devices)) if index not in gone]
        place = {str(old): new for new, old in enumerate(kept)}
        ends = {key: key.partition("->")[::2] for key in self.overrides}
        overrides = {f"{place[a]}->{place[b]}": self.overrides[key] for key, (a, b) in ends.items()
                     if a in place and b in place}
        return Topology(tuple(self.devices[index] for index in kept), self.within_host, self.between_hosts, overrides)

    @classmethod
    def uniform(cls, num_devices: int, *, latency_ns: int = 0, bytes_per_s: int | None = None, kind: str = "device",
                memory_bytes: int = 2**62) -> Topology:
        """Equal devices on one host with equal links: the setting of the published closed forms."""
        devices = tuple(Device(f"device{i}", kind, memory_bytes, local_rank=i) for i in range(num_devices))
        link = Link(latency_ns, bytes_per_s)
        return cls(devices, link, link)
