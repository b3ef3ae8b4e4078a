"""Improve an expert map by swaps and replica exchanges, under balance, co-activation and migration.

From a start (the greedy rule's map, or the map in use) two moves lower the busiest device's time: *swap* two slots of
the busiest and another device, and *exchange* a replica: an expert on the busiest device gets one more, another gives
one up. Both are tried in whole arrays. The moves end near the bound; the MIP polish closes
part of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mipipe.planner.experts.balance.greedy import pack, replicate
from mipipe.planner.experts.balance.maps import device_times


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer's data: tokens per expert, time per token of each device, and optional co-activation [expert, expert].

    ``nodes[device]`` numbers the host of each device.
    """

    weights: np.ndarray
    units: np.ndarray
    nodes: np.ndarray
    together: np.ndarray | None = None

    def times(self, devices: np.ndarray) -> np.ndarray:
        return device_times(self.weights, devices, self.units)

    def makespan(self, devices: np.ndarray) -> float:
        return float(self.times(devices).max())


def balanced_start(layer: Layer, slots_per_device: int) -> np.ndarray:
    """The global greedy map [device, slot], faster devices served in proportion."""
    num_slots = slots_per_device * len(layer.units)
    counts = replicate(layer.weights, num_slots)
    items = np.repeat(np.arange(len(layer.weights)), counts)
    bins = pack(np.repeat(layer.weights / counts, counts), len(layer.units))
    return np.stack([items[bins == device] for device in range(len(layer.units))])


def improve_map(layer: Layer, devices: np.ndarray, bound: float, *, rounds: int = 400) -> np.ndarray:
    """The map after swaps and exchanges until neither helps, the bound is met, or ``rounds`` moves were made."""
    best = devices.copy()
    for _ in range(rounds):
        times = layer.times(best)
        if times.max() <= bound * (1 + 1e-6):
            break
        changed = best_move(layer, best, times)
        if changed is None:
            break
        best = changed
    return best


def best_move(layer: Layer, devices: np.ndarray, times: np.ndarray) -> np.ndarray | None:
    """The map after the best swap, or where none helps the best exchange; None where neither does."""
    changed = best_swap(layer, devices, times)
    return best_exchange(layer, devices, times) if changed is None else changed


def best_swap(layer: Layer, devices: np.ndarray, times: np.ndarray) -> np.ndarray | None:
    """The map after the best swap with the busiest device; None if none lowers the larger of the two times."""
    counts = np.bincount(devices.ravel(), minlength=len(layer.weights))
    share = (layer.weights / np.maximum(counts, 1))[devices]
    busiest = int(times.argmax())
    moved = share[busiest][:, None, None] - share[None]
    after = np.maximum(times[busiest] - moved * layer.units[busiest], times[None, :, None] + moved
                       * layer.units[None, :, None])
    after[:, busiest, :] = np.inf
    slot, other, other_slot = np.unravel_index(int(after.argmin()), after.shape)
    if after[slot, other, other_slot] >= times[busiest] * (1 - 1e-9):
        return None
    result = devices.copy()
    result[busiest, slot], result[other, other_slot] = devices[other, other_slot], devices[busiest, slot]
    return result


def best_exchange(layer: Layer, devices: np.ndarray, times: np.ndarray, *, donors: int = 8) -> np.ndarray | None:
    """The map after the best replica exchange; None if none lowers the busiest time.

    Receivers are the experts of the busiest device; donors the experts that bear losing a replica best.
    """
    counts = np.bincount(devices.ravel(), minlength=len(layer.weights))
    spare = np.flatnonzero(counts > 1)
    if not len(spare):
        return None
    spare = spare[np.argsort(layer.weights[spare] / (counts[spare] - 1))][:donors]
    busiest = int(times.argmax())
    best, best_time = None, times[busiest] * (1 - 1e-9)
    for receiver in np.unique(devices[busiest]):
        for donor in spare[spare != receiver]:
            for place in np.argwhere(devices == donor):
                trial = devices.copy()
                trial[tuple(place)] = receiver
                time = layer.makespan(trial)
                if time < best_time:
                    best, best_time = trial, time
    return best


def gather_partners(layer: Layer, devices: np.ndarray, *, tolerance: float, rounds: int = 200) -> np.ndarray:
    """The map after swaps that bring co-activated experts onto one node, the busiest time kept within ``tolerance``.

    A token whose experts share a node crosses to that node once; for pairs the tokens saved are the co-activation
    counts within nodes (replicated experts count by their share, triples are not seen).
    """
    if layer.together is None or len(set(layer.nodes.tolist())) < 2:
        return devices
    limit = layer.makespan(devices) * (1 + tolerance)
    best = devices.copy()
    for _ in range(rounds):
        changed = _best_gathering(layer, best, limit)
        if changed is None:
            break
        best = changed
    return best


def _best_gathering(layer: Layer, devices: np.ndarray, limit: float) -> np.ndarray | None:
    assert layer.together is not None
    counts = np.bincount(devices.ravel(), minlength=len(layer.weights))
    together = layer.together / np.outer(counts, counts).clip(1)
    flat = devices.ravel()
    owner = np.repeat(np.arange(len(devices)), devices.shape[1])
    node = layer.nodes[owner]
    places = range(int(layer.nodes.max()) + 1)
    affinity = np.stack([together[:, flat[node == place]].sum(axis=1) for place in places], axis=1)
    pull = affinity[flat][:, node] - affinity[flat, node][:, None]
    gain = pull + pull.T - 2 * together[np.ix_(flat, flat)]
    share = (layer.weights / np.maximum(counts, 1))[flat]
    moved = share[:, None] - share[None]
    times = layer.times(devices)
    gain[(times[owner][:, None] - moved * layer.units[owner][:, None] > limit)
         | (times[owner][None] + moved * layer.units[owner][None] > limit) | (node[:, None] == node[None])] = -np.inf
    first, second = np.unravel_index(int(gain.argmax()), gain.shape)
    if gain[first, second] <= 1e-9:
        return None
    result = flat.copy()
    result[first], result[second] = flat[second], flat[first]
    return result.reshape(devices.shape)


def shared_tokens(layer: Layer, devices: np.ndarray) -> float:
    """Tokens per step whose pair of experts shares a node (0 without co-activation counts)."""
    if layer.together is None:
        return 0.0
    counts = np.bincount(devices.ravel(), minlength=len(layer.weights))
    present = np.zeros((int(layer.nodes.max()) + 1, len(layer.weights)))
    np.add.at(present, (np.repeat(layer.nodes, devices.shape[1]), devices.ravel()), 1)
    present = present / np.maximum(counts, 1)
    return float(sum(row @ np.triu(layer.together, 1) @ row for row in present))
