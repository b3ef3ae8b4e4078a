"""What every rank holds from when to when, from a schedule's times as arrays: `mipipe.planner.jobs.memory`'s rules.

Exact where every action takes time: what takes none may be put anywhere at its moment by lowering.
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.action_arrays import COMPUTE_KINDS, ActionArrays
from mipipe.planner.jobs.memory import carries_bytes, holdings, peaks
from mipipe.planner.jobs.order_times import OrderTimes

FORWARD_KINDS = [COMPUTE_KINDS.index(kind) for kind in (ActionKind.F, ActionKind.RECOMPUTE)]

Interval = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Columns of intervals of memory: rank, from, to, bytes."""


def held(times: OrderTimes) -> Interval:
    """What every rank holds from when to when, by the rules of `mipipe.planner.problem`, resident bytes left out.

    Exact where every action takes time: what takes none may be put anywhere at its moment by lowering.
    """
    actions = times.actions
    view, nodes, count = actions.view, actions.nodes, actions.view.problem.num_microbatches
    start, end = times.part_times()
    found: list[Interval] = []
    for stage, route in enumerate(view.placement.routes):
        rank = np.array(route, dtype=np.int64)
        for one in holdings(view, stage):
            since, until = (nodes.first[stage, kind] + np.arange(count) for kind in (one.since, one.until))
            found.append((rank, start[since], (start if one.replaced else end)[until],
                          np.array(one.num_bytes, dtype=np.int64)))
    found.append((actions.rank, times.start, times.end, _workspace(actions)))
    if carries_bytes(view):
        found += _in_flight(times, start, end)
    rank, since, until, size = (np.concatenate([item[at] for item in found]) for at in range(4))
    kept = (size > 0) & (until > since)
    return rank[kept], since[kept], until[kept], size[kept]


def _workspace(actions: ActionArrays) -> np.ndarray:
    """Of every action, as `mipipe.planner.jobs.memory.workspace`."""
    ahead, behind = (np.array(column, dtype=np.int64) for column in (
        actions.view.forward_workspace, actions.view.workspace))
    other, stage = actions.partner[:, 0], actions.stage
    alone = np.where(np.isin(actions.kind, FORWARD_KINDS), ahead[stage], behind[stage])
    pair = np.where(other == stage, np.maximum(ahead, behind)[stage], ahead[stage] + behind[other])
    return np.where(other >= 0, pair, alone)


def _in_flight(times: OrderTimes, start: np.ndarray, end: np.ndarray) -> list[Interval]:
    """Values between two stages: within a rank until they are read; on the way, at both ends."""
    value, moved = times.actions.value, times.moved
    maker, reader, size, rank = value["maker"], value["reader"], value["num_bytes"], times.actions.nodes.rank
    here = rank[reader]
    return [(rank[maker], end[maker], np.where(moved, times.over, start[reader]), size),
            (here[moved], postings(times)[moved], start[reader][moved], size[moved])]


def postings(times: OrderTimes) -> np.ndarray:
    """When the receive of every value that moves is posted: at the end of its reader's last compute action that ended
    by the transfer's begin; 0 before the first."""
    actions, value = times.actions, times.actions.value
    found, target = np.zeros(len(times.begin), dtype=np.int64), actions.nodes.rank[value["reader"]]
    computing = actions.collective == 0
    for rank in np.unique(target[times.moved]).tolist():
        ends = np.concatenate([[0], times.end[computing & (actions.rank == rank)]])
        own = times.moved & (target == rank)
        found[own] = ends[np.searchsorted(ends[1:], times.begin[own], side="right")]
    return found


def peaks_of(times: OrderTimes) -> list[int]:
    """Per rank the most bytes beyond resident ones."""
    rank, since, until, size = held(times)
    return peaks(rank, since, until, size, size, times.actions.view.problem.num_ranks)
