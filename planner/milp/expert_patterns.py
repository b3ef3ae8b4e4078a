"""Expert placement by patterns: what one device may hold, and how many devices hold it, for one layer.

An item (e, c) is a replica of expert e where e has c of them: it weighs ``w[e] / c`` tokens. A pattern p is a multiset
of k items, as many as a device has slots. Devices with the same time per token u are of one kind t. Whether a busiest
time T can be had:

- ``x[t, p]`` devices of kind t hold pattern p, only patterns with ``u[t] * weight(p) <= T``;
- ``sum_p x[t, p]``: the devices of kind t;
- ``z[e, c]``: e has c replicas; ``sum_c z[e, c] = 1``;
- ``sum_{t, p} count(p, (e, c)) * x[t, p] = c z[e, c]``: every replica is in a pattern.

All tokens are served, so a device carries at least what the others cannot within T: that leaves few patterns. The
smallest T is found by bisection over the weights that patterns can have, each step one MIP; the last one that is
infeasible is the proof. Device numbers never appear, so equal devices are no symmetry (cutting stock's model: Gilmore
and Gomory, A linear programming approach to the cutting-stock problem, 1961).
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import numpy as np

from mipipe.planner import clock
from mipipe.planner.experts.balance.swaps import Layer
from mipipe.planner.milp import highs, pyo

PATTERNS = 40_000
"""Patterns of all kinds up to which a layer is solved this way: beyond, one MIP takes more than seconds."""

SAME = 1e-9
"""Relative difference below which two busiest times are one: sums of the same loads in another order."""

TIGHT = {"mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}
"""HiGHS's usual tolerances are as large as differences between patterns that count here."""

Pattern = tuple[int, ...]
"""Numbers of items, heaviest first."""


@dataclass(frozen=True, slots=True)
class Items:
    """The items of a layer, heaviest first: expert, replicas and weight of each."""

    experts: np.ndarray
    counts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class PatternResult:
    """A map [device, slot] with its busiest time, and the largest bound proven (0 without one)."""

    devices: np.ndarray
    makespan: float
    bound: float


def solve_layer(layer: Layer, start: np.ndarray, bound: float, *, time_limit_s: float,
                seed: int) -> PatternResult | None:
    """The best map of one layer, the start if nothing is better; its bound meets it where the bisection ended. None
    where there are too many patterns.

    Args:
        layer: the tokens of its experts and the time per token of its devices.
        start: a map [device, slot] from which the bisection comes down.
        bound: a busiest time below which no map is known to be.
        time_limit_s, seed: of all MIPs together; see `highs.solve`.
    """
    ends = time.monotonic() + time_limit_s
    best, slots = start, start.shape[1]
    most = min(start.size - len(layer.weights) + 1, start.size)
    items = _items(layer.weights, most)
    patterns = _patterns(layer, items, slots, layer.makespan(start))
    if patterns is None:
        return None
    times = np.unique(np.concatenate([unit * _weights(items, of_kind) for unit, of_kind in patterns.items()]))
    while True:
        waiting = times[(times >= bound * (1 - SAME)) & (times < layer.makespan(best) * (1 - SAME))]
        if not len(waiting):
            return PatternResult(best, layer.makespan(best), layer.makespan(best))
        left = ends - time.monotonic()
        if left <= clock.LEAST_S:
            return PatternResult(best, layer.makespan(best), bound)
        limit = float(waiting[len(waiting) // 2])
        found, ended = _within(layer, items, slots, limit, left, seed)
        if found is not None:
            best = found
        elif ended:  # no busiest time up to the limit, so none below the next that patterns can have
            later = times[times > limit * (1 + SAME)]
            bound = min(float(later[0]) if len(later) else layer.makespan(best), layer.makespan(best))
        else:
            return PatternResult(best, layer.makespan(best), bound)


def _items(loads: np.ndarray, most: int) -> Items:
    experts, counts = np.divmod(np.arange(len(loads) * most), most)
    weights = loads[experts] / (counts + 1)
    order = np.argsort(-weights, kind="stable")
    return Items(experts[order], counts[order] + 1, weights[order])


def _weights(items: Items, patterns: list[Pattern]) -> np.ndarray:
    if not patterns:
        return np.zeros(0)
    return np.asarray(items.weights[np.array(patterns)].sum(axis=1))


def _patterns(layer: Layer, items: Items, slots: int, limit: float) -> dict[float, list[Pattern]] | None:
    """The patterns of each kind of device (by its time per token) within a busiest time; None if they are too many."""
    speed = float((1 / layer.units).sum())
    found: dict[float, list[Pattern]] = {}
    for unit in np.unique(layer.units).tolist():
        most = limit / unit * (1 + SAME)
        least = (layer.weights.sum() - limit * (speed - 1 / unit)) * (1 - SAME)
        made = _of_weight(items, slots, least, most, PATTERNS - sum(map(len, found.values())))
        if made is None:
            return None
        found[unit] = made
    return found


def _of_weight(items: Items, slots: int, least: float, most: float, number: int) -> list[Pattern] | None:
    """All patterns of a weight between two; None if there are more than ``number``."""
    weights = items.weights.tolist()
    together = items.experts.tolist(), items.counts.tolist()
    found: list[Pattern] = []

    def extend(chosen: Pattern, total: float) -> bool:
        left = slots - len(chosen)
        if not left:
            found.append(chosen)
            return len(found) <= number
        lightest = weights[-1]
        for item in range(chosen[-1] if chosen else 0, len(weights)):
            if total + left * weights[item] < least:
                return True
            if total + weights[item] + (left - 1) * lightest > most or _clashes(together, chosen, item):
                continue
            if not extend((*chosen, item), total + weights[item]):
                return False
        return True

    return found if extend((), 0.0) else None


def _clashes(together: tuple[list[int], list[int]], chosen: Pattern, item: int) -> bool:
    """Whether a pattern cannot hold an item: its expert with another count, or more often than it has replicas."""
    experts, counts = together
    same = [other for other in chosen if experts[other] == experts[item]]
    return bool(same) and (same[0] != item or len(same) >= counts[item])


def _within(layer: Layer, items: Items, slots: int, limit: float, time_limit_s: float,
            seed: int) -> tuple[np.ndarray | None, bool]:
    """A map with a busiest time of at most ``limit``, None if there is none or time is up; whether the MIP ended."""
    patterns = _patterns(layer, items, slots, limit)
    assert patterns is not None  # fewer than for the start
    kinds = np.unique(layer.units).tolist()
    model = pyo.ConcreteModel(name="expert patterns")
    model.x = pyo.Var([(t, p) for t, unit in enumerate(kinds) for p in range(len(patterns[unit]))],
                      domain=pyo.NonNegativeIntegers)
    model.z = pyo.Var(range(len(items.weights)), domain=pyo.Binary)
    model.goal = pyo.Objective(expr=0.0)
    placed: list[list[pyo.Expression]] = [[] for _ in items.weights]
    for t, unit in enumerate(kinds):
        for p, pattern in enumerate(patterns[unit]):
            for item, amount in Counter(pattern).items():
                placed[item].append(amount * model.x[t, p])
    model.rows = pyo.ConstraintList()
    for t, unit in enumerate(kinds):
        if not patterns[unit]:
            return None, True
        model.rows.add(sum(model.x[t, p] for p in range(len(patterns[unit]))) == int((layer.units == unit).sum()))
    for e in range(len(layer.weights)):
        model.rows.add(sum(model.z[item] for item in np.flatnonzero(items.experts == e).tolist()) == 1)
    for item, amounts in enumerate(placed):
        model.rows.add(sum(amounts) == int(items.counts[item]) * model.z[item])
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, options=TIGHT)
    if not outcome.has_solution:
        return None, outcome.termination is highs.SolverStatus.INFEASIBLE
    devices = np.zeros((len(layer.units), slots), dtype=int)
    for t, unit in enumerate(kinds):
        held = [pattern for p, pattern in enumerate(patterns[unit]) for _ in range(round(model.x[t, p].value))]
        devices[layer.units == unit] = items.experts[np.array(held)]
    return devices, True
