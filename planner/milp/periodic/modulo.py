"""A periodic pattern by greedy modulo scheduling: the MIP's start, and its stand-in where the MIP finds none in time.

Operations are placed one by one, forwards in the order of the data, then input gradients, then weight gradients, each
at the earliest moment that its predecessors allow and at which its machine is free in every period (the modulo
reservation table of Rau 1994, without backtracking). Early placement also keeps activations short-lived; memory is
checked at the end.
"""

from __future__ import annotations

from collections import defaultdict

from mipipe.planner.actions import ActionKind
from mipipe.planner.milp.periodic.pattern import OperationKey, PeriodicPattern

ORDER = {ActionKind.F: 0, ActionKind.RECOMPUTE: 1, ActionKind.I: 1, ActionKind.B: 1, ActionKind.W: 2}


def greedy(pattern: PeriodicPattern, period_ns: int) -> dict[OperationKey, float] | None:
    """Start of every operation; None if some operation finds no gap or the memory does not suffice."""
    before: dict[OperationKey, list[tuple[OperationKey, int]]] = defaultdict(list)
    for a, b, lag in pattern.arcs:
        before[pattern.alias[b]].append((pattern.alias[a], lag))
    shared: dict[OperationKey, list[int]] = defaultdict(list)
    for key, machine in pattern.machine.items():
        shared[pattern.alias[key]].append(machine)
    busy: dict[int, list[tuple[int, int]]] = defaultdict(list)
    start: dict[OperationKey, int] = {}
    for key in _ordered(pattern):
        earliest = max((start[a] + pattern.duration[a] + lag for a, lag in before[key]), default=0)
        moment = _gap([busy[machine] for machine in shared[key]], earliest, pattern.duration[key], period_ns)
        if moment is None:
            return None
        start[key] = moment
        for machine in set(shared[key]):
            busy[machine].append((moment % period_ns, pattern.duration[key]))
    times = {key: float(start[pattern.alias[key]]) for key in pattern.keys}
    return times if _fits(pattern, times, period_ns) else None


def _ordered(pattern: PeriodicPattern) -> list[OperationKey]:
    """One operation of every alias: by phase, within a phase along the data."""
    depth = dict.fromkeys(pattern.keys, 0)
    for _ in pattern.keys:
        moved = False
        for a, b, _ in pattern.arcs:
            if depth[b] < depth[a] + 1:
                depth[b], moved = depth[a] + 1, True
        if not moved:
            break
    own = [key for key in pattern.keys if pattern.alias[key] == key]
    return sorted(own, key=lambda key: (ORDER[key[1]], depth[key], key))


def _gap(tables: list[list[tuple[int, int]]], earliest: int, length: int, period: int) -> int | None:
    """The first moment from ``earliest`` at which all tables are free for ``length`` in every period."""
    moment = earliest
    for _ in range(2 * sum(map(len, tables)) + 1):
        wait = max((_blocked(begin, size, moment % period, length, period)
                    for table in tables for begin, size in table), default=0)
        if wait == 0:
            return moment
        moment += wait
        if moment >= earliest + period:
            return None
    return None


def _blocked(begin: int, size: int, moment: int, length: int, period: int) -> int:
    """How long an interval of ``length`` at ``moment`` waits for one of ``size`` at ``begin``; 0 if they are apart."""
    if not size or not length:
        return 0
    since = (moment - begin) % period  # time since the other began
    if since < size:
        return size - since
    return (begin + size - moment) % period if since + length > period else 0


def _fits(pattern: PeriodicPattern, times: dict[OperationKey, float], period: int) -> bool:
    """Whether what is held when an operation starts fits its rank, in steady state."""
    for key, machine in pattern.machine.items():
        rank = machine // 2
        held = float(pattern.workspace[key])
        for other, where in pattern.machine.items():
            if where // 2 == rank and (pattern.alloc[other] or pattern.free[other]):
                started = (times[key] - times[other]) // period + 1
                ended = (times[key] - times[other] - pattern.duration[other]) // period + 1
                held += pattern.alloc[other] * started - pattern.free[other] * ended
        if held > pattern.capacity[rank]:
            return False
    return True
