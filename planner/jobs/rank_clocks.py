"""An instance on a clock for each rank, as it is searched where no barrier parts the steps.

A rank's clock begins at its *offset*, the shortest way from a rank where the graph begins, over all arcs between ranks
(duration and lag): nothing starts before what it reads on these clocks either, and the makespan is the longest span of
a rank.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import replace

import numpy as np

from mipipe.planner.jobs.arcs import longest
from mipipe.planner.jobs.arrays import Instance


def on_rank_clocks(instance: Instance) -> Instance:
    """The instance on a clock for each rank, which begins at the rank's offset."""
    offset = offsets(instance)
    source = np.repeat(np.arange(instance.size), np.diff(instance.succ_ptr))
    target = np.repeat(np.arange(instance.size), np.diff(instance.pred_ptr))
    here, there = offset[instance.rank[source]], offset[instance.rank[instance.succ]]
    lag = instance.lag + here - there
    pred_lag = instance.pred_lag + offset[instance.rank[instance.pred]] - offset[instance.rank[target]]
    graph = (instance.pred_ptr, instance.pred, pred_lag, instance.succ_ptr, instance.succ, lag)
    return replace(instance, lag=lag, pred_lag=pred_lag, head=longest(*graph, instance.dur) - instance.dur,
                   tail=longest(*graph[3:], *graph[:3], instance.dur))


def offsets(instance: Instance) -> np.ndarray:
    """The offset of every rank: the shortest way of durations and lags from a rank that needs no other to begin."""
    ranks = instance.view.problem.num_ranks
    source = np.repeat(np.arange(instance.size), np.diff(instance.succ_ptr))
    ways: dict[tuple[int, int], int] = {}
    for a, b, way in zip(instance.rank[source].tolist(), instance.rank[instance.succ].tolist(),
                         (instance.dur[source] + instance.lag).tolist(), strict=True):
        if a != b:
            ways[a, b] = min(way, ways.get((a, b), way))
    after: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (a, b), way in ways.items():
        after[a].append((b, way))
    found = np.full(ranks, -1, dtype=np.int64)
    heap = [(0, rank) for rank in sorted(set(instance.rank[np.diff(instance.pred_ptr) == 0].tolist()))]
    while heap:
        way, rank = heapq.heappop(heap)
        if found[rank] < 0:
            found[rank] = way
            for other, more in after[rank]:
                heapq.heappush(heap, (way + more, other))
    return np.maximum(found, 0)
