"""Contracting a placement instance: which classes must share a device, and the smaller instance that follows.

With a target T for the largest load, ``K * T`` less the compute the accelerators must do is all that transfers may cost
in sum. A value cut between two accelerators costs twice its cost, cut towards a CPU core once; so a value above that
budget is never cut, and its source and readers are one. On operator graphs this merges most classes, which is what
makes the MIP provable.

Between two cores values are free, so with several cores only ends that no core can run in time T are made one.

A *dear* value costs more than half of the budget. It can be cut only by paying once, so between one accelerator and
a core, and two dear values cannot be cut together. With at most one core, every assignment within the target is
therefore in one of two parts (`parts`): no dear value is cut, where all of them are contracted; or exactly one is, and
the others contracted say which of its ends, if any, a core can run in time. Each is cut once more by whether the second
heaviest class is beside the heaviest. The relaxation of a MIP over the whole sees nothing of this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mipipe.planner.devices.instances.instance import PlaceInstance


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the search space: a contracted instance, the new class of every old one, and what else holds in it.

    Exactly one of the values ``dear`` is cut (empty: says nothing), and then its class in ``on_core``, if it has one
    there, is on the core. ``together``: whether the class that takes accelerators second longest is on accelerator 0,
    where the longest is unless on a core (None: says nothing).
    """

    instance: PlaceInstance
    merged: np.ndarray
    dear: tuple[int, ...] = ()
    on_core: tuple[int | None, ...] = ()
    together: bool | None = None


def parts(instance: PlaceInstance, target: float) -> list[Region]:
    """Parts that hold all assignments with loads of at most ``target``, most work first; see the module docstring."""
    budget = transfer_budget(instance, target)
    small, merged = merge_above(instance, budget, target)
    dear = np.flatnonzero(small.value_cost > budget / 2).tolist()
    if not dear or small.num_classes < 3 or instance.num_cpus > 1:
        return [Region(small, merged)]
    smaller, again = merge_above(small, budget / 2, target)
    ends = [(v, end) for v in dear for end in _core_ends(small, v, budget / 2, target)]
    cut, on_core = tuple(v for v, _ in ends), tuple(end for _, end in ends)
    found = [Region(smaller, again[merged], together=together) for together in (False, True)]
    return found + [Region(small, merged, cut, on_core, together) for together in (False, True) if cut]


def _core_ends(small: PlaceInstance, v: int, threshold: float, target: float) -> list[int | None]:
    """What the core must hold if value v is the only one above the threshold that is cut.

    Empty where no end fits the core, so that v is not cut at all; else one class, or None where it may be either end.
    """
    costs = small.value_cost.copy()
    costs[v] = 0.0
    one, merged = merge_above(replace(small, value_cost=costs), threshold, target)
    source = int(small.value_source[v])
    readers = [int(r) for r in small.readers[small.reader_start[v]:small.reader_start[v + 1]]
               if merged[r] != merged[source]]
    may_read = [r for r in readers if one.cpu[merged[r]] <= target]
    if not small.num_cpus or not readers:
        return []
    if one.cpu[merged[source]] <= target:
        return [None] if may_read else [source]
    return [None] if len(may_read) > 1 else list(may_read)


def merge_above(instance: PlaceInstance, threshold: float,
                target: float | None = None) -> tuple[PlaceInstance, np.ndarray]:
    """The instance with all values above ``threshold`` uncut, and the new class of every old one [class].

    With ``target``, ends that two cores could run within it stay apart, as values between cores are free.
    """
    parent = np.arange(instance.num_classes)

    def find(c: int) -> int:
        while parent[c] != c:
            parent[c] = parent[parent[c]]
            c = int(parent[c])
        return c

    free = instance.cpu <= target if target is not None and instance.num_cpus > 1 else np.zeros(len(parent), bool)
    for v in np.flatnonzero(instance.value_cost > threshold):
        source = int(instance.value_source[v])
        for reader in instance.readers[instance.reader_start[v]:instance.reader_start[v + 1]]:
            if not (free[source] and free[reader]):
                parent[find(int(reader))] = find(source)
    roots = np.array([find(c) for c in range(instance.num_classes)])
    _, merged = np.unique(roots, return_inverse=True)
    return merge_classes(instance, merged), merged


def merge_classes(instance: PlaceInstance, merged: np.ndarray) -> PlaceInstance:
    """The instance in which the classes of equal number ``merged[class]`` (from 0, without holes) are one."""
    count = int(merged.max()) + 1
    values: dict[tuple[int, tuple[int, ...]], float] = {}
    for v, source in enumerate(merged[instance.value_source]):
        reading = merged[instance.readers[instance.reader_start[v]:instance.reader_start[v + 1]]]
        readers = tuple(sorted(set(reading.tolist()) - {int(source)}))
        if readers:
            values[int(source), readers] = values.get((int(source), readers), 0.0) + float(instance.value_cost[v])
    supported = np.ones(count, dtype=bool)
    np.logical_and.at(supported, merged, instance.supported)
    return replace(
        instance, node_class=merged[instance.node_class], acc=np.bincount(merged, instance.acc, count),
        cpu=np.bincount(merged, instance.cpu, count), size=np.bincount(merged, instance.size, count),
        supported=supported, value_source=np.array([source for source, _ in values], dtype=np.int64),
        value_cost=np.array(list(values.values())),
        reader_start=np.cumsum([0, *(len(readers) for _, readers in values)]).astype(np.int64),
        readers=np.array([reader for _, readers in values for reader in readers], dtype=np.int64))


def transfer_budget(instance: PlaceInstance, target: float) -> float:
    """Upper limit of what all transfers cost together in any assignment with loads of at most ``target``.

    ``K * T`` minus the accelerators' compute, of which the cores take as much as fits their time (fractionally, of
    classes that fit a core at all).
    """
    taken, room = 0.0, instance.num_cpus * target
    allowed = np.flatnonzero(instance.cpu <= target) if instance.num_cpus else np.empty(0, dtype=np.int64)
    ratio = np.where(instance.cpu > 0, instance.acc / np.maximum(instance.cpu, 1e-300), np.inf)
    for c in allowed[np.argsort(-ratio[allowed])]:
        share = 1.0 if instance.cpu[c] <= room else room / instance.cpu[c]
        taken += share * instance.acc[c]
        room -= share * instance.cpu[c]
        if share < 1.0:
            break
    return instance.num_accelerators * target - (float(instance.acc.sum()) - taken)


def average_bound(instance: PlaceInstance) -> float:
    """A lower bound: all compute spread perfectly and no transfers, and where the longest class is run fastest.

    The largest T whose `transfer_budget` is negative, to 60 bisections.
    """
    least = np.where(instance.supported & (instance.num_accelerators > 0), instance.acc, np.inf)
    if instance.num_cpus:
        least = np.minimum(least, instance.cpu)
    low, high = float(least.max()), float(instance.acc.sum() + instance.cpu.sum())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if transfer_budget(instance, middle) >= 0 else (middle, high)
    return low
