"""Expert loads in, expert maps out: the data of expert placement, and what one placement costs.

The cost model of a MoE layer under expert parallelism: every device holds ``slots`` physical experts; an expert with
``c`` replicas sends ``load / c`` tokens to each (EPLB's even split); tokens start evenly spread over all devices. A
device with ``L`` incoming tokens is busy for ``L * unit_ns[d]``, where ``unit_ns`` is the expert's compute time per
token plus the time to receive and return one token over the links into that device. A layer takes as long as its
busiest device, and layers follow one another. Left out: contention inside switches, and the latency of the collective.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from mipipe.graphs.errors import InfeasibleError, InputError, shown
from mipipe.graphs.serialize import MOST_SUMMED, STRICT, Amount, Count
from mipipe.graphs.topology import Topology


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """Tokens per step routed to each expert: ``loads[layer][expert]``. Written by the runtime, or by hand.

    ``token_ns`` is an expert's compute time per token on each device kind; ``token_bytes`` what one token's hidden
    state takes on the wire; ``expert_bytes`` what moving one expert costs (weights and optimizer state). With all
    three at their defaults only the balance of tokens counts. ``coactivation[layer]`` lists (expert, expert, tokens
    that chose both).
    """

    FORMAT: ClassVar = "mipipe.expert_loads"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    loads: tuple[tuple[float, ...], ...]
    model: str = ""
    token_ns: dict[str, float] = field(default_factory=dict)
    token_bytes: Amount = 0
    expert_bytes: Amount = 0
    coactivation: tuple[tuple[tuple[int, int, float], ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.loads or not self.loads[0]:
            raise InputError("loads: empty; expected one list of tokens per expert for each layer")
        num_experts = len(self.loads[0])
        for layer, row in enumerate(self.loads):
            if len(row) != num_experts:
                raise InputError(f"loads[{layer}]: {len(row)} experts, but layer 0 has {num_experts}")
            for expert, load in enumerate(row):
                if not 0 <= load <= MOST_SUMMED:
                    raise InputError(f"loads[{layer}][{expert}]: found {load}, expected a number of tokens, 0 or more")
        for kind, time in self.token_ns.items():
            if not 0 <= time <= MOST_SUMMED:
                raise InputError(f"loads: token_ns of {shown(kind)}: found {time}, expected nanoseconds, 0 or more")
        if self.coactivation and len(self.coactivation) != len(self.loads):
            raise InputError(f"coactivation: {len(self.coactivation)} layers, but loads have {len(self.loads)}")
        for layer, pairs in enumerate(self.coactivation):
            for first, second, count in pairs:
                if not (0 <= first < num_experts and 0 <= second < num_experts) or not 0 <= count <= MOST_SUMMED:
                    raise InputError(f"coactivation[{layer}]: found ({first}, {second}, {count}), expected two experts"
                                     f" below {num_experts} and a count of 0 or more")

    @property
    def num_layers(self) -> int:
        return len(self.loads)

    @property
    def num_experts(self) -> int:
        return len(self.loads[0])


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Which expert sits in each physical slot. Device d owns slots ``[d * k, (d + 1) * k)`` of a layer.

    The three tables are EPLB's: ``physical_to_logical[layer][slot]`` is an expert; ``logical_to_physical()[layer]
    [expert]`` its slots, padded with -1; ``counts()[layer][expert]`` its number of replicas.
    """

    FORMAT: ClassVar = "mipipe.expert_map"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    num_experts: Count
    num_devices: Count
    physical_to_logical: tuple[tuple[Amount, ...], ...]
    model: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.physical_to_logical:
            raise InputError("map: has no layers; expected the experts of one or more")
        for layer, slots in enumerate(self.physical_to_logical):
            if len(slots) < self.num_experts:
                raise InputError(f"map, layer {layer}: {len(slots)} slots hold fewer than the"
                                 f" {self.num_experts} experts")
            if len(slots) % self.num_devices:
                raise InputError(f"map, layer {layer}: {len(slots)} slots do not divide evenly over {self.num_devices}"
                                 " devices")
            missing = set(range(self.num_experts)) - set(slots)
            if missing:
                raise InputError(f"map, layer {layer}: expert {min(missing)} is in no slot; every expert needs at least"
                                 " one replica")
            if set(slots) - set(range(self.num_experts)):
                raise InputError(f"map, layer {layer}: names expert {max(slots)}, but there are {self.num_experts}")

    def counts(self) -> list[list[int]]:
        """Replicas of each expert: ``[layers][experts]``."""
        return [np.bincount(slots, minlength=self.num_experts).tolist() for slots in self.physical_to_logical]

    def logical_to_physical(self) -> list[list[list[int]]]:
        """Slots of each expert, padded with -1 to the largest number of replicas: ``[layers][experts][replicas]``."""
        width = max(max(row) for row in self.counts())
        tables = []
        for slots in self.physical_to_logical:
            table: list[list[int]] = [[] for _ in range(self.num_experts)]
            for slot, expert in enumerate(slots):
                table[expert].append(slot)
            tables.append([places + [-1] * (width - len(places)) for places in table])
        return tables

    def devices(self, layer: int) -> np.ndarray:
        """The experts of one layer as an array [device, slot]."""
        return np.array(self.physical_to_logical[layer]).reshape(self.num_devices, -1)


def unit_times(loads: ExpertLoads, topology: Topology) -> np.ndarray:
    """Busy time of each device per incoming token, ns [device]; all 1 where nothing takes time (no ``token_ns``, and no
    bytes or no links with a bandwidth), so that only the balance of tokens counts.

    A token comes from every device equally often and returns to it: ``token_ns + 2 * bytes * mean(1 / bandwidth)``.
    """
    count = topology.num_devices
    if not loads.token_ns and not loads.token_bytes:
        return np.ones(count)
    kinds = {device.kind for device in topology.devices}
    if loads.token_ns and kinds - set(loads.token_ns):
        missing = min(kinds - set(loads.token_ns))
        raise InputError(f"loads: token_ns has no entry for device kind {missing!r}, which the cluster has")
    units = np.zeros(count)
    for target, device in enumerate(topology.devices):
        wire = 0.0
        for source in range(count):
            rate = topology.link(source, target).bytes_per_s
            if source != target and rate is not None:
                wire += 2 * loads.token_bytes * 1e9 / rate / count
        units[target] = loads.token_ns.get(device.kind, 0.0) + wire
    if not units.any():
        return np.ones(count)
    if not units.all():
        idle = topology.devices[int(np.argmin(units))].name
        raise InputError(f"loads: a token takes no time on device {idle}, but does on others; give token_ns for its"
                         " kind")
    return units


def device_times(weights: np.ndarray, devices: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Busy time of every device in one layer [device]; ``weights[expert]`` tokens, ``devices[device, slot]``."""
    counts = np.bincount(devices.ravel(), minlength=len(weights))
    return (weights / np.maximum(counts, 1))[devices].sum(axis=1) * units


def layer_bound(weights: np.ndarray, units: np.ndarray, slots_per_device: int) -> float:
    """A lower bound on the busiest device's time over all maps with this many slots.

    The largest of: all work spread perfectly; the smallest time T whose replicas fit (`_replicas_fit`); and, without
    spare slots, the pigeonhole sums (some device has j + 1 of the j * devices + 1 heaviest experts, and fills its other
    slots with the lightest).
    """
    spread = weights.sum() / (1.0 / units).sum()
    fastest = units.min()
    num_slots = slots_per_device * len(units)
    low, high = spread, max(spread, weights.sum() * fastest)
    for _ in range(50):
        middle = (low + high) / 2
        fits = middle > 0 and _replicas_fit(weights * fastest, middle, slots_per_device, num_slots)
        low, high = (low, middle) if fits else (middle, high)
    bound = max(spread, low)
    if num_slots == len(weights):
        ordered = np.sort(weights)
        for j in range(slots_per_device):
            if j * len(units) < len(ordered):
                heavy = ordered[len(ordered) - 1 - j * len(units)]
                bound = max(bound, ((j + 1) * heavy + ordered[:slots_per_device - j - 1].sum()) * fastest)
    return float(bound)


def _replicas_fit(times: np.ndarray, limit: float, slots: int, num_slots: int) -> bool:
    """Whether a busiest time of ``limit`` survives a count of replicas (False proves that it cannot be had).

    Every share is at most ``limit``. All slots are filled, so a share above ``room = limit - (slots - 1) * smallest``
    needs a partner below the smallest expert, a *tiny* one. ``t`` spare slots spent on cutting experts to tiny shares
    make at most ``2 t`` of them, each of which admits at most ``slots - 1`` shares above room; they also cut those
    experts themselves, which is worth at most ``own * t`` cuts. All other shares must be cut down to room, one spare
    slot a cut (relaxed: the best savings per share, fractional). Exhaustive search agrees in the tests.
    """
    spare = num_slots - len(times)
    few = np.maximum(1, np.ceil(times / limit - 1e-9))
    if few.sum() > num_slots:
        return False
    room = limit - (slots - 1) * float(times.min())
    if slots < 2 or room < times.min() or times.min() <= 0:
        return True
    many = np.maximum(1, np.ceil(times / room - 1e-9))
    heavy = np.flatnonzero(times / few > room * (1 + 1e-9))
    order = heavy[np.argsort(-((many - few)[heavy] / few[heavy]))]
    shares = np.concatenate([[0.0], np.cumsum(few[order])])
    saved = np.concatenate([[0.0], np.cumsum((many - few)[order])])
    tiny = np.arange(spare + 1)
    needed = np.where(np.isin(np.arange(len(times)), heavy), many, few).sum() - len(times)
    over = times > room
    own = ((many - 1)[over] / np.maximum(1, np.ceil(times[over] / times.min()) - 1)).max() if over.any() else 0.0
    left = needed - np.interp(2 * tiny * min(slots - 1, int(limit / room)), shares, saved) - min(own, 1.0) * tiny
    return bool((left <= spare - tiny + 1e-9).any())


def slots_for(num_experts: int, replicas: int, num_devices: int) -> int:
    """Slots per device for ``replicas`` redundant experts.

    Raises:
        InfeasibleError: fewer slots than experts, or slots that do not divide over the devices.
    """
    total = num_experts + replicas
    if replicas < 0 or total < num_devices:
        least = max(0, num_devices - num_experts)
        raise InfeasibleError(f"experts: {num_experts} experts and {replicas} replicas leave devices of {num_devices}"
                              f" empty; the smallest number of replicas that does is {least}")
    if total % num_devices:
        fit = -(-total // num_devices) * num_devices - num_experts
        raise InfeasibleError(f"experts: {num_experts} + {replicas} slots do not divide over {num_devices} devices; the"
                              f" next number of replicas that does is {fit}")
    return total // num_devices
