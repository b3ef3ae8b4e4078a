"""Expert placement as a MIP: replicas of every expert, and the device of every replica, for one layer.

Exact model (sets: experts e, replica counts c, devices d; ``w[e]`` tokens, ``u[d]`` time per token, k slots):

- ``y[e, c, d]``: e has c replicas, that many of them on d (two on one device waste a slot, and may have to);
  ``z[e, c] = 1``: e has c replicas;
- ``sum_c z[e, c] = 1``, ``sum_d y[e, c, d] = c z[e, c]``, ``sum_{e, c} y[e, c, d] = k``;
- minimise T with ``u[d] * sum_{e, c} w[e] / c * y[e, c, d] <= T``.

Equal devices are ordered by load to break their symmetry. HiGHS proves 8 to 12 experts on 4 to 8 devices in seconds;
hundreds of experts only as `polish`: all slots of a few devices are packed anew, counts fixed, the rest kept.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pyomo.environ as pyo

from mipipe.planner.experts.swaps import Layer
from mipipe.planner.milp import highs

TIGHT = {"mip_feasibility_tolerance": 1e-9, "primal_feasibility_tolerance": 1e-9}
"""Without these HiGHS 1.14 calls an optimum proven that is not: for loads 42, 25, 37, 43 on three devices, 54.5 where
51.33 exists."""


@dataclass(frozen=True, slots=True)
class LayerResult:
    """A map [device, slot] with its busiest time, and the bound the solver proved (None for `polish`)."""

    devices: np.ndarray
    makespan: float
    bound: float | None
    outcome: highs.SolverOutcome | None


def solve_layer(layer: Layer, start: np.ndarray, *, time_limit_s: float, seed: int,
                max_replicas: int = 4) -> LayerResult:
    """The best map of one layer with at most ``max_replicas`` replicas per expert; the start if nothing is better.

    The bound holds when ``max_replicas`` allows as many replicas as there are spare slots plus one.
    """
    num_devices, slots = start.shape
    num_experts = len(layer.weights)
    scale = layer.makespan(start)
    most = min(max_replicas, num_devices * slots - num_experts + 1)
    model = pyo.ConcreteModel(name="expert MIP")
    model.z = pyo.Var(range(num_experts), range(1, most + 1), domain=pyo.Binary)
    model.y = pyo.Var(range(num_experts), range(1, most + 1), range(num_devices), domain=pyo.NonNegativeIntegers)
    model.T = pyo.Var(bounds=(0, 1))
    model.goal = pyo.Objective(expr=model.T)
    counts = range(1, most + 1)
    model.one_count = pyo.Constraint(range(num_experts), rule=lambda m, e: sum(m.z[e, c] for c in counts) == 1)
    model.spread = pyo.Constraint(range(num_experts), counts, rule=lambda m, e, c: sum(
        m.y[e, c, d] for d in range(num_devices)) == c * m.z[e, c])
    model.slots = pyo.Constraint(range(num_devices), rule=lambda m, d: sum(
        m.y[e, c, d] for e in range(num_experts) for c in counts) == slots)
    model.busy = pyo.ConstraintList()
    times = [sum(float(layer.weights[e] / c * layer.units[d] / scale) * model.y[e, c, d]
                 for e in range(num_experts) for c in counts) for d in range(num_devices)]
    for d, expression in enumerate(times):
        model.busy.add(expression <= model.T)
        if d and layer.units[d] == layer.units[d - 1]:
            model.busy.add(expression <= times[d - 1])
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, options=TIGHT)
    bound = outcome.bound * scale if outcome.bound is not None else None
    if not outcome.has_solution:
        return LayerResult(start, scale, bound, outcome)
    rows = [[e for e in range(num_experts) for c in counts for _ in range(round(pyo.value(model.y[e, c, d])))]
            for d in range(num_devices)]
    devices = np.array(rows)
    if layer.makespan(devices) >= scale:
        devices = start
    return LayerResult(devices, layer.makespan(devices), bound, outcome)


def polish(layer: Layer, devices: np.ndarray, bound: float, *, time_limit_s: float, seed: int,
           width: int = 4) -> LayerResult:
    """The map after packing the busiest device anew with ``width - 1`` others, again and again, counts kept.

    The others are the least busy ones and, after a failure, random ones. Stops at the bound, after three failures in
    a row, or when time is up; never worse than its argument.
    """
    ends = time.monotonic() + time_limit_s
    rng = np.random.default_rng(seed)
    best, failures = devices, 0
    while failures < 3 and time.monotonic() < ends:
        times = layer.times(best)
        if times.max() <= bound * (1 + 1e-6):
            break
        busiest = int(times.argmax())
        others = np.argsort(times, kind="stable")[:width - 1] if failures == 0 else rng.choice(
            np.delete(np.arange(len(times)), busiest), min(width - 1, len(times) - 1), replace=False)
        members = np.array([busiest, *[device for device in others if device != busiest]])
        trial = _repack(layer, best, members, ends - time.monotonic(), seed)
        if trial is not None and layer.times(trial)[members].max() < times[busiest] * (1 - 1e-9):
            best, failures = trial, 0
        else:
            failures += 1
    return LayerResult(best, layer.makespan(best), None, None)


def _repack(layer: Layer, devices: np.ndarray, members: np.ndarray, time_limit_s: float,
            seed: int) -> np.ndarray | None:
    """The slots of ``members`` assigned anew with the smallest busiest time; None without a better assignment."""
    counts = np.bincount(devices.ravel(), minlength=len(layer.weights))
    experts, amounts = np.unique(devices[members], return_counts=True)
    share = layer.weights[experts] / counts[experts]
    scale = layer.times(devices)[members].max()
    model = pyo.ConcreteModel(name="expert device MIP")
    model.x = pyo.Var(range(len(experts)), range(len(members)), domain=pyo.NonNegativeIntegers)
    model.T = pyo.Var(bounds=(0, 1))
    model.goal = pyo.Objective(expr=model.T)
    model.amount = pyo.Constraint(range(len(experts)), rule=lambda m, e: sum(
        m.x[e, d] for d in range(len(members))) == int(amounts[e]))
    model.slots = pyo.Constraint(range(len(members)), rule=lambda m, d: sum(
        m.x[e, d] for e in range(len(experts))) == devices.shape[1])
    model.busy = pyo.Constraint(range(len(members)), rule=lambda m, d: sum(
        float(share[e] * layer.units[members[d]] / scale) * m.x[e, d] for e in range(len(experts))) <= m.T)
    outcome = highs.solve(model, time_limit_s=min(max(time_limit_s, 0.05), 0.5), seed=seed, gap=1e-4)
    if not outcome.has_solution:
        return None
    result = devices.copy()
    for place, device in enumerate(members):
        result[device] = [int(expert) for e, expert in enumerate(experts)
                          for _ in range(round(pyo.value(model.x[e, place])))]
    return result
