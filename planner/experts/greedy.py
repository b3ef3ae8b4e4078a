"""The greedy replicate-and-pack rule that EPLB publishes, written anew: the baseline of expert placement.

Replicate: give one more replica to the expert with the largest load per replica, until the slots are used. Pack: take
items by falling load, each to the least loaded bin that has room (bins hold equally many items). With groups of
experts that divide over the nodes: pack groups to nodes, replicate within nodes, pack to the node's devices
(hierarchical policy); else one node and one group (global policy). Source: the README of deepseek-ai/EPLB.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mipipe.graphs.errors import InputError


def pack(weights: np.ndarray, num_bins: int) -> np.ndarray:
    """Bin of each item [item]: falling weight, least loaded bin with room; every bin gets as many items."""
    room = len(weights) // num_bins
    if room * num_bins != len(weights):
        raise InputError(f"experts: {len(weights)} items do not divide over {num_bins} bins")
    loads, counts = np.zeros(num_bins), np.zeros(num_bins, dtype=int)
    bins = np.empty(len(weights), dtype=int)
    for item in np.argsort(-weights, kind="stable"):
        target = int(np.argmin(np.where(counts < room, loads, np.inf)))
        bins[item] = target
        loads[target] += weights[item]
        counts[target] += 1
    return bins


def replicate(weights: np.ndarray, num_slots: int) -> np.ndarray:
    """Replicas of each expert [expert], at least one each, ``num_slots`` in all: the rule is optimal for max(w / c)."""
    counts = np.ones(len(weights), dtype=int)
    for _ in range(num_slots - len(weights)):
        counts[np.argmax(weights / counts)] += 1
    return counts


def greedy_layer(weights: np.ndarray, num_slots: int, num_devices: int, num_nodes: int = 1,
                 num_groups: int = 1) -> np.ndarray:
    """The rule's map for one layer, [device, slot]."""
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    experts_per_group = len(weights) // num_groups
    groups = pack(weights.reshape(num_groups, experts_per_group).sum(axis=1), num_nodes)
    rows: list[np.ndarray] = []
    for node in range(num_nodes):
        members = np.concatenate([np.arange(experts_per_group) + group * experts_per_group
                                  for group in np.flatnonzero(groups == node)])
        counts = replicate(weights[members], num_slots // num_nodes)
        items = np.repeat(members, counts)
        bins = pack(np.repeat(weights[members] / counts, counts), num_devices // num_nodes)
        rows.extend(items[bins == device] for device in range(num_devices // num_nodes))
    return np.stack(rows)


def rebalance_experts(weight: Sequence[Sequence[float]] | np.ndarray, num_replicas: int, num_groups: int,
                      num_nodes: int, num_gpus: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """EPLB's interface: the greedy rule's maps for all layers.

    Args:
        weight: load of each expert, [layers, experts].
        num_replicas: physical experts per layer in all, a multiple of ``num_gpus``.
        num_groups: groups of experts (tokens choose groups first).
        num_nodes: nodes with equally many devices.
        num_gpus: devices in all.

    Returns:
        ``physical_to_logical`` [layers, num_replicas], ``logical_to_physical`` [layers, experts, most replicas] padded
        with -1, ``count`` [layers, experts].

    Raises:
        InputError: sizes that do not divide.
    """
    table = np.asarray(weight, dtype=float)
    num_experts = table.shape[1]
    for name, whole, part in (("num_replicas", num_replicas, num_gpus), ("num_gpus", num_gpus, num_nodes),
                              ("experts", num_experts, num_groups)):
        if part < 1 or whole % part:
            raise InputError(f"rebalance_experts: {name} = {whole} is not a multiple of {part}")
    if num_replicas < num_experts:
        raise InputError(f"rebalance_experts: num_replicas = {num_replicas} is below the {num_experts} experts")
    maps = np.stack([greedy_layer(row, num_replicas, num_gpus, num_nodes, num_groups).ravel() for row in table])
    return maps, *inverse_maps(maps, num_experts)


def inverse_maps(physical: np.ndarray, num_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """``logical_to_physical`` (padded with -1) and ``count`` of a ``physical_to_logical`` table [layers, slots]."""
    counts = np.stack([np.bincount(row, minlength=num_experts) for row in physical])
    logical = np.full((len(physical), num_experts, int(counts.max())), -1)
    for layer, row in enumerate(physical):
        filled = np.zeros(num_experts, dtype=int)
        for slot, expert in enumerate(row):
            logical[layer, expert, filled[expert]] = slot
            filled[expert] += 1
    return logical, counts
