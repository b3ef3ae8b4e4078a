"""`plan_experts`: a map for every MoE layer, with its busiest times, bounds and what moving to it costs.

Each layer: greedy start, swaps and exchanges, co-activation, MIP polish while time lasts; layers are independent when
every device has the same slots in each. With a total of slots per device over all layers (memory couples them), the
slots of each layer come from an exact choice among what the search finds for each number of slots.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mipipe.graphs.errors import InfeasibleError, InputError
from mipipe.graphs.topology import Topology
from mipipe.planner import clock
from mipipe.planner.experts.balance.greedy import greedy_layer
from mipipe.planner.experts.balance.maps import ExpertLoads, ExpertMap, layer_bound, slots_for, unit_times
from mipipe.planner.experts.balance.swaps import Layer, balanced_start, gather_partners, improve_map, shared_tokens
from mipipe.planner.experts.migrate import changes, moved_experts, share_moves
from mipipe.planner.gap import gap_of


@dataclass(frozen=True, slots=True)
class ExpertOptions:
    """How to place. ``replicas`` redundant experts per layer; ``groups`` keeps groups of experts on one node each.

    ``horizon`` is the number of steps over which a move must pay off (None: moving is free); ``max_moves`` caps the
    experts received per layer, ``max_bytes`` what all layers together receive. ``balance_tolerance`` is what
    co-activation may cost in balance.
    """

    replicas: int = 0
    groups: int = 1
    time_limit_s: float = 60.0
    seed: int = 0
    horizon: float | None = None
    max_moves: int | None = None
    max_bytes: int | None = None
    balance_tolerance: float = 0.01
    polish: bool = True

    def __post_init__(self) -> None:
        if self.replicas < 0 or self.groups < 1 or self.time_limit_s <= 0:
            raise InputError(f"experts: replicas {self.replicas}, groups {self.groups}, time limit {self.time_limit_s}:"
                             " expected replicas >= 0, groups >= 1 and a positive time")
        if self.horizon is not None and self.horizon <= 0:
            raise InputError(f"experts: horizon {self.horizon}, expected a positive number of steps")
        if min(self.max_moves or 0, self.max_bytes or 0) < 0:
            raise InputError(f"experts: at most {self.max_moves} moves and {self.max_bytes} bytes: expected none below"
                             " 0")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer's figures: busiest times in units of the cost model, loads relative to the mean, bound and moves."""

    busiest: float
    greedy: float
    bound: float
    max_over_mean: float
    greedy_max_over_mean: float
    moved: int
    most_received: int
    shared_tokens: float

    @property
    def gap(self) -> float | None:
        """``busiest / bound - 1``."""
        return gap_of(self.busiest, self.bound)


@dataclass(frozen=True, slots=True)
class ExpertResult:
    """The map and what is known of it, layer by layer."""

    map: ExpertMap
    layers: tuple[LayerReport, ...]
    seconds: float


def plan_experts(loads: ExpertLoads, topology: Topology, options: ExpertOptions, *,
                 current: ExpertMap | None = None, slots: tuple[int, ...] | None = None) -> ExpertResult:
    """The best map found within the time limit.

    Args:
        loads: tokens per expert, and the cost of a token.
        topology: devices, hosts and links.
        options: replicas, groups, limits.
        current: the map in use; without ``options.horizon`` only used to relabel equal devices.
        slots: slots per device for each layer, instead of the equal number that ``options.replicas`` gives.

    Raises:
        InfeasibleError: slots that do not suffice or do not divide.
        InputError: a current map for another model or cluster.
    """
    began = time.monotonic()
    count = topology.num_devices
    per_layer = slots or (slots_for(loads.num_experts, options.replicas, count),) * loads.num_layers
    _check_current(loads, topology, current, per_layer)
    units = unit_times(loads, topology)
    hosts = {device.host: number for number, device in enumerate({d.host: d for d in topology.devices}.values())}
    nodes = np.array([hosts[device.host] for device in topology.devices])
    move_ns = _move_ns(loads, topology)
    layers = [_layer(loads, number, units, nodes) for number in range(loads.num_layers)]
    bounds = [layer_bound(layer.weights, units, k) for layer, k in zip(layers, per_layer, strict=True)]
    maps = [_search(layer, k, bound, options) for layer, k, bound in zip(layers, per_layer, bounds, strict=True)]
    if options.polish:
        bounds = _polish(layers, maps, bounds, options, began)
    if current is not None:
        maps = _changed(loads, layers, maps, current, options, move_ns)
    reports, rows = [], []
    for number, (layer, k, chosen, bound) in enumerate(zip(layers, per_layer, maps, bounds, strict=True)):
        before = None if current is None else current.devices(number)
        rows.append(tuple(chosen.ravel().tolist()))
        reports.append(_report(layer, chosen, before, bound, k, options.groups))
    seconds = time.monotonic() - began
    made = ExpertMap(loads.num_experts, count, tuple(rows), loads.model,
                     {"method": "swaps + MIP polish" if options.polish else "swaps", "seed": options.seed,
                      "seconds": round(seconds, 3), "replicas": options.replicas})
    return ExpertResult(made, tuple(reports), seconds)


def _changed(loads: ExpertLoads, layers: list[Layer], fresh: list[np.ndarray], current: ExpertMap,
             options: ExpertOptions, move_ns: float) -> list[np.ndarray]:
    """Each layer's map after the change that pays off, from the current one towards a fresh one, within the limits."""
    # Without a horizon moving costs nothing; any positive weight of the steps then gives the same choice.
    horizon, move_ns = (1.0, 0.0) if options.horizon is None else (options.horizon, move_ns)
    choices = [[change for change in changes(layer, current.devices(number), devices, horizon=horizon, move_ns=move_ns)
                if options.max_moves is None or change.moved <= options.max_moves]
               for number, (layer, devices) in enumerate(zip(layers, fresh, strict=True))]
    if options.max_bytes is None:
        return [min(layer, key=lambda change: change.cost).devices for layer in choices]
    if not loads.expert_bytes:
        raise InputError("loads: expert_bytes is missing, so moves cannot be bounded in bytes; give it, or bound the"
                         " number of moves")
    total = min(options.max_bytes // loads.expert_bytes, sum(max(item.moved for item in layer) for layer in choices))
    return [change.devices for change in share_moves(choices, total)]


def slots_in_memory(loads: ExpertLoads, memory_bytes: int) -> int:
    """Experts that fit into a device's memory for all layers together, with their optimizer state.

    Raises:
        InputError: the loads do not say how large an expert is.
    """
    if not loads.expert_bytes:
        raise InputError("loads: expert_bytes is missing, so experts cannot be counted into memory; give it, or"
                         " --replicas instead")
    return memory_bytes // loads.expert_bytes


FURTHER_SLOTS = 3
"""How many slots beyond an even share a layer may get: with more, the busiest device hardly gains."""


def share_slots(loads: ExpertLoads, topology: Topology, total_slots: int) -> tuple[int, ...]:
    """Slots per device for each layer, at most ``total_slots`` per device over all layers, with the least total time.

    Exact by dynamic programming, given what the search finds for every layer and number of slots.

    Raises:
        InfeasibleError: fewer slots than one replica of every expert needs.
    """
    count = topology.num_devices
    least = -(-loads.num_experts // count)
    if total_slots < least * loads.num_layers:
        raise InfeasibleError(f"experts: {total_slots} slots per device for {loads.num_layers} layers of"
                              f" {loads.num_experts} experts on {count} devices; the smallest that would do is"
                              f" {least * loads.num_layers}")
    units = unit_times(loads, topology)
    layers = [_layer(loads, number, units, np.zeros(count, dtype=int)) for number in range(loads.num_layers)]
    most = max(0, loads.num_experts - least)  # a device that holds every expert once needs no more
    spare = min(total_slots - least * loads.num_layers, most * loads.num_layers)
    most = min(spare, spare // loads.num_layers + FURTHER_SLOTS, most)

    def busiest(layer: Layer, k: int) -> float:
        return layer.makespan(improve_map(layer, balanced_start(layer, k), layer_bound(layer.weights, units, k),
                                          rounds=50))

    best, picks = np.zeros(spare + 1), []
    for layer in layers:
        table = np.full((most + 1, spare + 1), np.inf)
        for extra in range(most + 1):
            table[extra, extra:] = best[:spare + 1 - extra] + busiest(layer, least + extra)
        picks.append(table.argmin(axis=0))
        best = table.min(axis=0)
    slots = []
    for pick in reversed(picks):
        slots.append(least + int(pick[spare]))
        spare -= int(pick[spare])
    return tuple(slots[::-1])


def _layer(loads: ExpertLoads, number: int, units: np.ndarray, nodes: np.ndarray) -> Layer:
    together = None
    if loads.coactivation:
        together = np.zeros((loads.num_experts, loads.num_experts))
        for first, second, tokens in loads.coactivation[number]:
            together[first, second] += tokens
            together[second, first] += tokens
    return Layer(np.array(loads.loads[number], dtype=float), units, nodes, together)


def _search(layer: Layer, slots: int, bound: float, options: ExpertOptions) -> np.ndarray:
    num_nodes = len(set(layer.nodes.tolist()))
    if options.groups > 1:
        return greedy_layer(layer.weights, slots * len(layer.units), len(layer.units), num_nodes, options.groups)
    starts = [balanced_start(layer, slots)]
    if len(set(layer.units.tolist())) > 1:
        starts.append(starts[0][np.argsort(np.argsort(-layer.units, kind="stable"), kind="stable")])
    found = min((improve_map(layer, start, bound) for start in starts), key=layer.makespan)
    return gather_partners(layer, found, tolerance=options.balance_tolerance)


def _polish(layers: list[Layer], maps: list[np.ndarray], bounds: list[float], options: ExpertOptions,
            began: float) -> list[float]:
    """MIP polish of ``maps`` in place, layers with the largest gap first; the bounds, raised where proven."""
    from mipipe.planner.milp import expert_patterns, experts  # late: the heuristic alone needs no solver

    bounds = list(bounds)
    gaps = [layer.makespan(devices) - bound for layer, devices, bound in zip(layers, maps, bounds, strict=True)]
    worth = 1e-3  # below a tenth of a percent a MIP spends seconds on what no clock can see
    waiting = [number for number in np.argsort(gaps)[::-1].tolist() if gaps[number] > worth * bounds[number]]
    for done, number in enumerate(waiting):
        left = options.time_limit_s - (time.monotonic() - began)
        if left <= clock.LEAST_S or options.groups > 1 or layers[number].together is not None:
            break
        layer, devices = layers[number], maps[number]
        share = left / (len(waiting) - done)
        solved = expert_patterns.solve_layer(layer, devices, bounds[number], time_limit_s=share, seed=options.seed)
        if solved is not None:
            maps[number], bounds[number] = solved.devices, solved.bound
        else:
            maps[number] = experts.polish(layer, devices, bounds[number], time_limit_s=share, seed=options.seed)
    return bounds


def _report(layer: Layer, devices: np.ndarray, before: np.ndarray | None, bound: float, slots: int,
            groups: int) -> LayerReport:
    num_nodes = len(set(layer.nodes.tolist()))
    rule = greedy_layer(layer.weights, slots * len(layer.units), len(layer.units), num_nodes, groups)
    received = moved_experts(before, devices) if before is not None else np.zeros(1, dtype=int)

    def ratio(rows: np.ndarray) -> float:
        counts = np.bincount(rows.ravel(), minlength=len(layer.weights))
        tokens = (layer.weights / np.maximum(counts, 1))[rows].sum(axis=1)
        return float(tokens.max() / tokens.mean()) if tokens.any() else 1.0

    return LayerReport(layer.makespan(devices), layer.makespan(rule), bound, ratio(devices), ratio(rule),
                       int(received.sum()), int(received.max()), shared_tokens(layer, devices))


def _move_ns(loads: ExpertLoads, topology: Topology) -> float:
    """Time to receive one expert over the slowest kind of link; 0 where bytes or bandwidth are not given."""
    rates = [link.bytes_per_s for link in (topology.within_host, topology.between_hosts) if link.bytes_per_s]
    return loads.expert_bytes * 1e9 / min(rates) if rates else 0.0


def _check_current(loads: ExpertLoads, topology: Topology, current: ExpertMap | None, slots: tuple[int, ...]) -> None:
    if current is None:
        return
    shape = (current.num_experts, len(current.physical_to_logical), current.num_devices)
    expected = (loads.num_experts, loads.num_layers, topology.num_devices)
    if shape != expected:
        raise InputError(f"current map: {shape[0]} experts, {shape[1]} layers, {shape[2]} devices, but loads and"
                         f" cluster have {expected[0]}, {expected[1]} and {expected[2]}; it belongs to another model or"
                         " cluster")
    for layer, (row, k) in enumerate(zip(current.physical_to_logical, slots, strict=True)):
        if len(row) != k * topology.num_devices:
            raise InputError(f"current map, layer {layer}: {len(row)} slots, but the new map has"
                             f" {k * topology.num_devices}; plan with the same number of replicas")
