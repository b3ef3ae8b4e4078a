"""Expert placement where a layer is too large for `mipipe.planner.milp.expert_patterns`: a few devices at a time.

All slots of a few devices are packed anew, the counts of replicas fixed, the rest kept. For these devices d, experts e
with ``a[e]`` replicas among them that weigh ``s[e]`` tokens each, ``u[d]`` time per token and k slots:

- ``x[e, d]``: replicas of e on d; ``sum_d x[e, d] = a[e]``, ``sum_e x[e, d] = k``;
- minimise T with ``u[d] * sum_e s[e] * x[e, d] <= T``.
"""

from __future__ import annotations

import time

import numpy as np

from mipipe.planner import clock
from mipipe.planner.experts.balance.swaps import Layer
from mipipe.planner.milp import highs, pyo


def polish(layer: Layer, devices: np.ndarray, bound: float, *, time_limit_s: float, seed: int,
           width: int = 4) -> np.ndarray:
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
    return best


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
    outcome = highs.solve(model, time_limit_s=min(max(time_limit_s, clock.LEAST_S), 0.5), seed=seed, gap=1e-4)
    if not outcome.has_solution:
        return None
    result = devices.copy()
    for place, device in enumerate(members):
        result[device] = [int(expert) for e, expert in enumerate(experts)
                          for _ in range(round(pyo.value(model.x[e, place])))]
    return result
