"""Devices and the directed channels between them.

A `Topology` is what a cluster file describes: hosts with devices of a kind, and the links within and between hosts.
Every pair of devices has a channel in each direction. A transfer arrives ``latency + bytes / bandwidth`` after it
starts, but occupies its channel for ``bytes / bandwidth`` only: messages on their way follow each other, as on a wire,
and the published schedules' figures with transfer times assume the same. Left out: contention of several channels for
one network card or switch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator, or one worker process on a CPU. ``local_rank`` counts within ``host``."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    kind: str
    memory_bytes: int
    host: str = "host0"
    local_rank: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """What one transfer costs: ``latency_ns + bytes / bytes_per_s``. ``bytes_per_s=None``: latency alone."""

    __pydantic_config__: ClassVar = STRICT
    latency_ns: int = 0
    bytes_per_s: int | None = None

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
        for key in self.overrides:
            source, arrow, target = key.partition("->")
            ends = (source, target)
            if not arrow or not all(end.isdigit() and int(end) < len(self.devices) for end in ends):
                raise InputError(f"cluster: link {key!r}: expected 'a->b' with device indices below"
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
