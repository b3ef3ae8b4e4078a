"""A contiguous start by dynamic programming: the best cut of one linear order into intervals, one per device.

Along a topological order every device gets an interval, so no forward path leaves a device and returns. For the order
given the result is exact; over all contiguous assignments it is an upper bound only, for another order, or devices that
take turns, may do better. So several orders are tried, and nothing here is a lower bound.

A value is paid by a device exactly if some but not all of the classes that touch it (source and readers) are there,
which for intervals ``[i, j)`` is a sum of rectangles in (i, j): all costs of all intervals come from one table of
differences, O(n^2) in all. Then ``best[k, m, j] = min over i of max(best[k - 1, m, i], acc[i, j])``, or
``max(best[k, m - 1, i], cpu[i, j])`` with one core more: the best largest load of the first j positions on k
accelerators and m cores (the recurrence of Tarnawski et al., NeurIPS 2020, on the downsets of one order).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import networkx as nx
import numpy as np

from mipipe.planner.devices.instances.instance import PlaceInstance

WORK = 2e8
"""Table entries computed for one order at most, some tenths of a second: longer orders are cut into equal pieces."""


def best_intervals(instance: PlaceInstance, left: Callable[[], float]) -> Iterator[np.ndarray]:
    """Contiguous assignments that fit [class], the best of every order tried, while ``left()`` seconds are above 0."""
    for places in topological_orders(instance):
        if left() <= 0:
            return
        found = cut_order(instance, _pieces(instance, places), left)
        if found is not None:
            yield found


def topological_orders(instance: PlaceInstance) -> Iterator[np.ndarray]:
    """Positions [class] in orders that all forward edges follow; classes on a cycle share one.

    Classes without forward nodes are held by no edge; they stand by their backward edges reversed, beside what they
    serve. Three orders: by the classes' numbers, by depth, and depth first.
    """
    backward = instance.node_backward[instance.edges]
    ends = instance.node_class[instance.edges]
    moves = np.ones(instance.num_classes, dtype=bool)
    moves[instance.node_class[~instance.node_backward]] = False
    graph = nx.DiGraph()
    graph.add_nodes_from(range(instance.num_classes))
    graph.add_edges_from(ends[~backward.any(axis=1)].tolist())
    graph.add_edges_from(ends[backward.all(axis=1) & moves[ends].any(axis=1)][:, ::-1].tolist())
    whole = nx.condensation(graph)
    members = whole.graph["mapping"]
    first = {part: min(whole.nodes[part]["members"]) for part in whole}
    depth: dict[int, int] = {}
    for part in nx.topological_sort(whole):
        depth[part] = max((depth[before] + 1 for before in whole.predecessors(part)), default=0)
    sorts = (list(nx.lexicographical_topological_sort(whole, key=first.__getitem__)),
             sorted(whole, key=lambda part: (depth[part], first[part])),
             list(nx.dfs_postorder_nodes(whole))[::-1])
    for order in sorts:
        place = {part: number for number, part in enumerate(order)}
        yield np.array([place[members[c]] for c in range(instance.num_classes)], dtype=np.int64)


def _pieces(instance: PlaceInstance, places: np.ndarray) -> np.ndarray:
    """The positions, neighbours made one where there are more than `WORK` allows."""
    count = int(places.max()) + 1
    steps = (min(instance.num_accelerators, count) + 1) * (min(instance.num_cpus, count) + 1)
    most = max(1, int((WORK / steps) ** 0.5))
    return places if count <= most else places * most // count


def cut_order(instance: PlaceInstance, places: np.ndarray, left: Callable[[], float]) -> np.ndarray | None:
    """The assignment [class] with the least largest load among those that give every device an interval of positions.

    Args:
        instance: the classes.
        places: the position of every class, numbered from 0 without holes.
        left: seconds left; without any, devices not looked at yet stay empty.

    Returns:
        None where no such assignment fits.
    """
    acc, cpu = interval_loads(instance, places)
    count = len(acc) - 1
    accelerators, cores = min(instance.num_accelerators, count), min(instance.num_cpus, count)
    best = np.full((accelerators + 1, cores + 1, count + 1), np.inf)
    came = np.zeros((accelerators + 1, cores + 1, count + 1), dtype=np.int64)
    on_core = np.zeros((accelerators + 1, cores + 1, count + 1), dtype=bool)
    best[0, 0, 0] = 0.0
    columns = np.arange(count + 1)
    for k, m in np.ndindex(accelerators + 1, cores + 1):
        if left() <= 0:
            break
        for core, before, table in ((False, best[k - 1, m] if k else None, acc),
                                    (True, best[k, m - 1] if m else None, cpu)):
            if before is None:
                continue
            loads = np.maximum(before[:, None], table)
            source = loads.argmin(axis=0)
            value = loads[source, columns]
            better = value < best[k, m]
            best[k, m, better], came[k, m, better] = value[better], source[better]
            on_core[k, m, better] = core
    k, m = np.unravel_index(best[:, :, count].argmin(), best.shape[:2])
    if not np.isfinite(best[k, m, count]):
        return None
    device, end = np.zeros(count, dtype=np.int64), count
    while k or m:
        begin, core = int(came[k, m, end]), bool(on_core[k, m, end])
        device[begin:end] = instance.num_accelerators + m - 1 if core else k - 1
        k, m, end = k - (not core), m - core, begin
    return device[places]


def interval_loads(instance: PlaceInstance, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Load of an accelerator and of a core that hold the positions ``[i, j)``: two tables [i, j].

    Infinite where j < i, where they do not fit memory and, on accelerators, where one of them is not supported.
    """
    count = int(places.max()) + 1
    sums = [np.concatenate(([0.0], np.cumsum(np.bincount(places, weights, count))))
            for weights in (instance.acc, instance.cpu, instance.size, ~instance.supported)]
    time, core_time, size, unsupported = (total[None, :] - total[:, None] for total in sums)
    change = np.zeros((count + 2, count + 2))

    def add(first: int, last: int, begin: int, end: int, cost: float) -> None:
        """``cost`` to all intervals with ``first <= i <= last`` and ``begin <= j <= end``."""
        change[first, begin] += cost
        change[first, end + 1] -= cost
        change[last + 1, begin] -= cost
        change[last + 1, end + 1] += cost

    for v, cost in enumerate(instance.value_cost.tolist()):
        touched = {int(places[instance.value_source[v]]),
                   *places[instance.readers[instance.reader_start[v]:instance.reader_start[v + 1]]].tolist()}
        stops = [-1, *sorted(touched), count]
        if len(touched) > 1:
            add(0, count, 0, count, cost)
            add(0, stops[1], stops[-2] + 1, count, -cost)
            for before, after in pairwise(stops):
                add(before + 1, count, 0, after, -cost)
    transfers = change.cumsum(axis=0).cumsum(axis=1)[:count + 1, :count + 1]
    wrong = np.tril(np.ones((count + 1, count + 1), dtype=bool), -1)
    acc = time + np.maximum(transfers, 0.0)
    acc[wrong | (size > instance.memory * (1 + 1e-12)) | (unsupported > 0)] = np.inf
    core_time[wrong] = np.inf
    return acc, core_time
