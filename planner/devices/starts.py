"""Assignments to start from, and what is asked of any: whether it fits, and its largest load. No kernels needed."""

from __future__ import annotations

import networkx as nx
import numpy as np

from mipipe.planner.devices.instances.instance import PlaceInstance


def max_load(instance: PlaceInstance, device: np.ndarray) -> float:
    """The largest load of an assignment [class]: every device pays a value that some but not all who touch it hold."""
    values = np.arange(len(instance.value_source))
    times = np.where(device < instance.num_accelerators, instance.acc, instance.cpu)
    loads = np.bincount(device, times, instance.num_devices)
    touching = np.concatenate((np.repeat(values, np.diff(instance.reader_start)), values))
    there = np.concatenate((device[instance.readers], device[instance.value_source]))
    value, place = np.divmod(np.unique(touching * instance.num_devices + there), instance.num_devices)
    paid = (np.bincount(value, minlength=len(values))[value] > 1) & (place < instance.num_accelerators)
    return float((loads + np.bincount(place[paid], instance.value_cost[value[paid]], instance.num_devices)).max())


def fits(instance: PlaceInstance, device: np.ndarray) -> bool:
    """Whether an assignment [class] keeps to memory and to where classes can run."""
    used = np.bincount(device, instance.size, instance.num_devices)[:instance.num_accelerators]
    return bool((used <= instance.memory).all()) and not (
        ~instance.supported & (device < instance.num_accelerators)).any()


def pack_first(instance: PlaceInstance) -> np.ndarray | None:
    """A start that fits memory: classes in topological order, each accelerator filled before the next; the rest on CPU.

    None where nothing fits.
    """
    device = np.zeros(instance.num_classes, dtype=np.int64)
    used = np.zeros(instance.num_accelerators)
    current = 0
    share = instance.size.sum() / max(instance.num_accelerators, 1) * 1.02
    for c in range(instance.num_classes):
        room = [d for d in range(instance.num_accelerators)
                if instance.supported[c] and used[d] + instance.size[c] <= instance.memory]
        if current + 1 < instance.num_accelerators and used[current] >= share > 0:
            current += 1
        if current in room:
            choice = current
        elif room:
            choice = room[0]
        elif instance.num_cpus:
            choice = instance.num_accelerators
        else:
            return None
        device[c] = choice
        if choice < instance.num_accelerators:
            used[choice] += instance.size[c]
    return device


def fill_in_order(instance: PlaceInstance) -> np.ndarray | None:
    """A contiguous start: accelerators filled one after another with an equal share of the time, as paths go.

    Classes on a cycle of forward edges stay together, so no path returns. None where memory or support forbid it.
    """
    forward = ~instance.node_backward[instance.edges].any(axis=1)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(instance.num_classes))
    graph.add_edges_from(instance.node_class[instance.edges[forward]].tolist())
    whole = nx.condensation(graph)
    if not instance.num_accelerators or not instance.supported.all():
        return None
    device = np.zeros(instance.num_classes, dtype=np.int64)
    share = instance.acc.sum() / instance.num_accelerators
    current, taken, used = 0, 0.0, 0.0
    for component in nx.lexicographical_topological_sort(whole, key=lambda c: min(whole.nodes[c]["members"])):
        members = sorted(whole.nodes[component]["members"])
        taking, size = instance.acc[members].sum(), instance.size[members].sum()
        last = current + 1 == instance.num_accelerators
        if taken and not last and (taken + taking / 2 > share or used + size > instance.memory):
            current, taken, used = current + 1, 0.0, 0.0
        taken, used = taken + taking, used + size
        if used > instance.memory:
            return None
        device[members] = current
    return device


def contracted(device: np.ndarray, merged: np.ndarray) -> np.ndarray:
    """An assignment of the contracted classes that follows ``device`` where that is possible."""
    small = np.zeros(int(merged.max()) + 1, dtype=np.int64)
    small[merged] = device
    return small
