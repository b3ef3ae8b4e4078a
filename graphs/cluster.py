"""Cluster files: YAML in which people write hosts, links and device kinds -> `Topology` and `DeviceKind`s.

There is no default hardware: a file names the kind of every host; a few kinds ship as data (``hardware.yaml``, each
with its source), others are declared in the file itself, from figures or from another kind: ``h200x8: {base: h200,
count: 8, efficiency: 0.55}`` is a node of eight H200 that works on one group with tensor or expert parallelism, at 55 %
of the eight peaks. Left out: the network's shape beyond the two link classes and named exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict

from mipipe.graphs.efficiency import Achieved
from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT, check_header, from_data, load_data
from mipipe.graphs.topology import MOST_DEVICES, Device, Link, Topology
from mipipe.graphs.units import MOST, Written, parse_bytes, parse_flops, parse_ns, parse_rate, shown

FORMAT = "mipipe.cluster"
VERSION = 1

_HARDWARE = Path(__file__).with_name("hardware.yaml")
_ACHIEVED = Path(__file__).with_name("achieved.yaml")
"""Shares of the peaks that were fitted (written by benchmarks/fit_costs.py); others are those of hardware.yaml."""


@dataclass(frozen=True, slots=True)
class DeviceKind:
    """What a roofline needs to know of a device. ``flops`` is operations per second by dtype; empty: only profiled.

    Peaks are as usable: ``count`` and ``efficiency`` of the cluster file are multiplied in. ``count`` says how many
    chips one device of this kind stands for. ``achieved``: how far kernels stay below the peaks on teams; with an
    ``efficiency`` or ``count`` of the file's, these alone are to say so. ``host_link`` and ``network``: the usual links
    of such devices within a host and between hosts, as sold (None: not known).
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    flops: dict[str, int]
    bytes_per_s: int | None
    memory_bytes: int | None
    launch_ns: int
    source: str
    count: int = 1
    efficiency: float = 1.0
    achieved: Achieved = Achieved()
    host_link: Link | None = None
    network: Link | None = None

    @property
    def has_peaks(self) -> bool:
        """Whether a roofline can be computed."""
        return bool(self.flops) and self.bytes_per_s is not None

    def peak(self, dtype: str) -> int:
        """Operations per second in ``dtype`` (torch's name).

        Raises:
            InputError: this kind has no rate for it.
        """
        key = "float8" if dtype.startswith("float8") else dtype
        if key not in self.flops:
            known = ", ".join(self.flops) or "none: it is always profiled"
            raise InputError(f"device kind {self.name}: no peak for {dtype} (it has {known}); add one under"
                             " device_kinds in the cluster file, or profile")
        return self.flops[key]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster file's content: devices and links, and the kinds of its devices by name."""

    topology: Topology
    kinds: dict[str, DeviceKind]


_WRITTEN = ConfigDict(extra="forbid")
"""What people write: a number that is none is named as the quantity it should be."""


@dataclass(frozen=True, slots=True)
class _LinkText:
    __pydantic_config__: ClassVar = _WRITTEN
    latency: Written
    bandwidth: Written


@dataclass(frozen=True, slots=True)
class _KindText:
    __pydantic_config__: ClassVar = _WRITTEN
    base: str | None = None
    count: int = 1
    efficiency: float = 1.0
    flops: dict[str, Written] | None = None
    memory: Written | None = None
    bandwidth: Written | None = None
    launch_overhead: Written | None = None
    source: str | None = None
    achieved: Achieved | None = None
    host_link: _LinkText | None = None
    network: _LinkText | None = None


@dataclass(frozen=True, slots=True)
class _HostText:
    __pydantic_config__: ClassVar = _WRITTEN
    name: str
    devices: int
    kind: str
    memory: Written | None = None


@dataclass(frozen=True, slots=True)
class _LinksText:
    __pydantic_config__: ClassVar = _WRITTEN
    within_host: _LinkText | None = None
    between_hosts: _LinkText | None = None
    overrides: dict[str, _LinkText] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _ClusterText:
    __pydantic_config__: ClassVar = _WRITTEN
    hosts: list[_HostText]
    links: _LinksText = _LinksText()
    device_kinds: dict[str, _KindText] = field(default_factory=dict)


def load_cluster(path: str | Path) -> Cluster:
    """The cluster described by a YAML file.

    Raises:
        InputError: unreadable, another format, unknown keys, a kind nobody declared, a size or link that is missing.
    """
    return read_cluster(load_data(path), str(path))


def read_cluster(data: Mapping[str, Any], where: str) -> Cluster:
    """The cluster described by a cluster file's data; ``where`` opens error messages."""
    check_header(dict(data), FORMAT, VERSION, where)
    text = from_data({key: item for key, item in data.items() if key not in ("format", "version")}, _ClusterText, where)
    known = shipped_kinds()
    for name, kind in text.device_kinds.items():
        known[name] = _kind(name, kind, known, f"{where}: device_kinds.{name}")
    devices: list[Device] = []
    kinds: dict[str, DeviceKind] = {}
    for number, host in enumerate(text.hosts):
        place = f"{where}: hosts[{number}]"
        if host.kind not in known:
            raise InputError(f"{place}.kind: unknown device kind {shown(host.kind)}; known are"
                             f" {', '.join(sorted(known))}, or declare it under device_kinds")
        if host.devices < 1:
            raise InputError(f"{place}.devices: found {shown(host.devices)}, expected at least 1")
        if host.devices > MOST_DEVICES - len(devices):
            raise InputError(f"{place}.devices: found {shown(host.devices)}, expected at most {MOST_DEVICES} on all"
                             " hosts together")
        if any(host.name == other.name for other in text.hosts[:number]):
            raise InputError(f"{place}.name: two hosts are named {shown(host.name)}")
        kinds[host.kind] = known[host.kind]
        memory = known[host.kind].memory_bytes
        if host.memory is not None:
            memory = parse_bytes(host.memory, f"{place}.memory")
        if memory == 0:
            raise InputError(f"{place}.memory: found {shown(host.memory)}, expected more than 0")
        if memory is None:
            raise InputError(f"{place}: device kind {host.kind} has no memory size of its own; add memory: (per device,"
                             " such as 4GB)")
        devices += [Device(f"{host.name}/{rank}", host.kind, memory, host.name, rank) for rank in range(host.devices)]
    return Cluster(_topology(devices, text, where), kinds)


def uniform_cluster(kind: str | DeviceKind, devices: int, per_host: int = 8,
                    memory_bytes: int | None = None) -> Cluster:
    """A cluster of equal hosts of a kind (a name: of a shipped one), with the kind's usual links at the share of them
    that is achieved.

    Raises:
        InputError: an unknown kind, one whose links or memory are not known, a number of devices that hosts do not
            make up.
    """
    if isinstance(kind, str):
        kinds = shipped_kinds()
        if kind not in kinds:
            raise InputError(f"--kind {shown(kind)}: unknown device kind; known are {', '.join(sorted(kinds))}")
        kind = kinds[kind]
    memory = kind.memory_bytes if memory_bytes is None else memory_bytes
    if kind.host_link is None or kind.network is None or memory is None:
        raise InputError(f"--kind {kind.name}: its links and memory are not known; describe it in a cluster file"
                         " (--cluster)")
    if not 1 <= devices <= MOST_DEVICES or per_host < 1 or (devices > per_host and devices % per_host):
        raise InputError(f"--devices {shown(devices)}, --per-host {shown(per_host)}: expected 1 to {MOST_DEVICES}"
                         " devices, a multiple of those on a host")
    placed = tuple(Device(f"host{index // per_host}/{index % per_host}", kind.name, memory, f"host{index // per_host}",
                          index % per_host) for index in range(devices))
    inside, outside = (Link(link.latency_ns, round((link.bytes_per_s or 0) * kind.achieved.link))
                       for link in (kind.host_link, kind.network))
    return Cluster(Topology(placed, inside, outside), {kind.name: kind})


def shipped_kinds(fitted: bool = True) -> dict[str, DeviceKind]:
    """The device kinds of ``hardware.yaml`` by name, with what was fitted for them (or as assumed)."""
    found: dict[str, DeviceKind] = {}
    achieved = load_data(_ACHIEVED) if fitted else {}
    for name, entry in load_data(_HARDWARE).items():
        where = f"{_HARDWARE.name}: {name}"
        kind = _kind(name, from_data(entry, _KindText, where), found, where)
        if name in achieved:
            kind = replace(kind, achieved=from_data(achieved[name], Achieved, f"{_ACHIEVED.name}: {name}"))
        found[name] = kind
    return found


def _kind(name: str, text: _KindText, known: Mapping[str, DeviceKind], where: str) -> DeviceKind:
    """A declared kind: its own figures, or those of its base, times count and efficiency."""
    if text.base is not None and text.base not in known:
        raise InputError(f"{where}.base: unknown device kind {shown(text.base)}; known are {', '.join(sorted(known))}")
    if not 1 <= text.count <= MOST_DEVICES:
        raise InputError(f"{where}.count: found {shown(text.count)}, expected 1 to {MOST_DEVICES}")
    if not 0 < text.efficiency <= 1:
        raise InputError(f"{where}.efficiency: found {text.efficiency}, expected a share of the peak in (0, 1]")
    base = known[text.base] if text.base is not None else None
    if base is None and text.flops is None:
        raise InputError(f"{where}: expected base: (a known kind) or flops: (by dtype, such as bfloat16: 989TFLOPS)")
    flops = {} if base is None else dict(base.flops)
    flops |= {dtype: parse_flops(rate, f"{where}.flops.{dtype}") for dtype, rate in (text.flops or {}).items()}
    bandwidth = base.bytes_per_s if base else None
    if text.bandwidth is not None:
        bandwidth = parse_rate(text.bandwidth, f"{where}.bandwidth")
    if flops and bandwidth is None:
        raise InputError(f"{where}: has flops but no bandwidth; add bandwidth: (of the memory, such as 3.35TB/s)")
    memory = base.memory_bytes if base else None
    if text.memory is not None:
        memory = parse_bytes(text.memory, f"{where}.memory")
    launch = base.launch_ns if base else 0
    if text.launch_overhead is not None:
        launch = parse_ns(text.launch_overhead, f"{where}.launch_overhead")
    elif flops and base is None:
        raise InputError(f"{where}: has flops but no launch_overhead; add one (5us for eager GPU work, 0us for none)")
    if not all(flops.values()) or bandwidth == 0:
        raise InputError(f"{where}: a rate of 0; expected rates above 0")
    scale = text.count * text.efficiency
    rates = [*flops.values(), *(() if bandwidth is None else (bandwidth,))]
    if rates and (min(rates) * scale < 1 or max(rates) * scale >= MOST or (memory or 0) * text.count >= MOST):
        raise InputError(f"{where}: count {text.count} and efficiency {text.efficiency:g} make a rate below 1 a second,"
                         " or a rate or size too large; expected what a device can have")
    links = [_link(link, f"{where}.{name}") if link is not None else None if base is None else getattr(base, name)
             for name, link in (("host_link", text.host_link), ("network", text.network))]
    usual = base.achieved if base is not None and scale == 1 else Achieved()
    source = text.source or (f"{text.count} x {text.base} at {text.efficiency:g} of {base.source}" if base else "given")
    return DeviceKind(name, {dtype: round(rate * scale) for dtype, rate in flops.items()},
                      None if bandwidth is None else round(bandwidth * scale),
                      None if memory is None else memory * text.count, launch, source, text.count, text.efficiency,
                      text.achieved or usual, *links)


def _topology(devices: list[Device], text: _ClusterText, where: str) -> Topology:
    """Devices and links; a link class that no pair of devices uses may be absent."""
    links = text.links
    within, between = links.within_host, links.between_hosts
    if within is None and any(host.devices > 1 for host in text.hosts):
        raise InputError(f"{where}: links.within_host: missing, but a host has several devices; add latency: and"
                         " bandwidth:")
    if between is None and len(text.hosts) > 1:
        raise InputError(f"{where}: links.between_hosts: missing, but there are {len(text.hosts)} hosts; add latency:"
                         " and bandwidth:")
    overrides = {key: _link(link, f"{where}: links.overrides.{key}") for key, link in links.overrides.items()}
    inside = _link(within, f"{where}: links.within_host") if within else Link()
    outside = _link(between, f"{where}: links.between_hosts") if between else Link()
    try:
        return Topology(tuple(devices), inside, outside, overrides)
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix('cluster: ')}") from None


def _link(text: _LinkText, where: str) -> Link:
    rate = parse_rate(text.bandwidth, f"{where}.bandwidth")
    if rate == 0:
        raise InputError(f"{where}.bandwidth: found {shown(text.bandwidth)}, expected a rate above 0")
    return Link(parse_ns(text.latency, f"{where}.latency"), rate)
