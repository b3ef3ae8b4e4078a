"""The greedy replicate-and-pack rule that EPLB publishes, written anew: the baseline of expert placement.

Replicate: give one more replica to the expert with the largest load per replica, until the slots are used. Pack: take
items by falling load, each to the least loaded bin that has room (bins hold equally many items). With groups of
experts that divide over the nodes: pack groups to nodes, replicate within nodes, pack to the node's devices
(hierarchical policy); else one node and one group (global policy). Source: the README of deepseek-ai/EPLB.
"""

from __future__ import annotations

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
