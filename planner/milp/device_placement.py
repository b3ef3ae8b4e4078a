"""Max-load device placement as a MIP (the throughput objective of `mipipe.planner.place_instance`).

- ``x[c, d] = 1``: class c is on device d; ``sum_d x[c, d] = 1``; ``sum_c size[c] x[c, d] <= memory``;
- ``in[v, d] >= x[r, d] - x[s, d]`` for every reader r of value v with source s: accelerator d reads v from outside;
- ``out[v, d] >= x[s, d] - x[r, d]``: v leaves d;
- minimise T with ``sum_c acc[c] x[c, d] + sum_v cost[v] (in[v, d] + out[v, d]) <= T`` on accelerators and
  ``sum_c cpu[c] x[c, d] <= T`` on cores.

Equal devices are told apart by giving class k only to the first k + 1 of them. Contiguous: with
``after[n, d] >= x[a, d] - x[n, d]`` and ``after[n, d] >= after[a, d]`` along forward edges a -> n,
``after[n, d] + x[n, d] <= 1``. With the start's value as a cutoff and the classes contracted by `place_contract`, HiGHS
proves operator graphs of 128 to 227 classes in seconds; `free` restricts a solve to the classes of some devices
(fix-and-optimise) where the whole is too large.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyomo.environ as pyo

from mipipe.planner.milp import highs
from mipipe.planner.place_instance import PlaceInstance


def solve(instance: PlaceInstance, start: np.ndarray, target: float, *, time_limit_s: float, seed: int,
          contiguous: bool = False,
          free: Collection[int] | None = None) -> tuple[np.ndarray | None, highs.SolverOutcome]:
    """An assignment [class] with a load below ``target`` if one was found, and the solver's outcome.

    Args:
        instance: contracted or not.
        start: a feasible assignment; with ``free``, classes on other devices stay where it puts them.
        target: only better loads are of interest; INFEASIBLE then proves that none exists.
        time_limit_s: wall-clock limit.
        seed: HiGHS's random seed.
        contiguous: forward nodes of each device must be contiguous.
        free: devices whose classes may move among each other; all if None.
    """
    model = pyo.ConcreteModel()
    devices = range(instance.num_devices)
    classes = range(instance.num_classes)
    model.x = pyo.Var(classes, devices, domain=pyo.Binary)
    model.T = pyo.Var(bounds=(0, target))
    model.goal = pyo.Objective(expr=model.T)
    movable = set(devices) if free is None else set(free)
    for c in classes:
        for d in devices:
            if start[c] in movable:
                if d not in movable or (d < instance.num_accelerators and not instance.supported[c]):
                    model.x[c, d].fix(0)
            else:
                model.x[c, d].fix(int(start[c] == d))
    if free is None:
        _break_symmetry(instance, model)
    model.once = pyo.Constraint(classes, rule=lambda m, c: (
        sum(m.x[c, d] for d in devices) == 1 if start[c] in movable else pyo.Constraint.Skip))
    accelerators = [d for d in range(instance.num_accelerators) if d in movable]
    _add_loads(instance, model, accelerators, [d for d in movable if d >= instance.num_accelerators])
    if contiguous:
        _add_contiguity(instance, model, movable)
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, threads=2, cutoff=target)
    if not outcome.has_solution:
        return None, outcome
    values = np.array([[pyo.value(model.x[c, d]) for d in devices] for c in classes])
    return values.argmax(axis=1), outcome


def _break_symmetry(instance: PlaceInstance, model: pyo.ConcreteModel) -> None:
    heaviest = np.argsort(-instance.acc, kind="stable")
    for place, c in enumerate(heaviest[:instance.num_accelerators]):
        for d in range(place + 1, instance.num_accelerators):
            model.x[int(c), d].fix(0)


def _add_loads(instance: PlaceInstance, model: pyo.ConcreteModel, accelerators: list[int], cores: list[int]) -> None:
    values = range(len(instance.value_source))
    classes = range(instance.num_classes)
    model.enter = pyo.Var(values, accelerators, bounds=(0, 1))
    model.leave = pyo.Var(values, accelerators, bounds=(0, 1))
    model.cuts = pyo.ConstraintList()
    for v in values:
        source = int(instance.value_source[v])
        for reader in instance.readers[instance.reader_start[v]:instance.reader_start[v + 1]].tolist():
            for d in accelerators:
                model.cuts.add(model.enter[v, d] >= model.x[reader, d] - model.x[source, d])
                model.cuts.add(model.leave[v, d] >= model.x[source, d] - model.x[reader, d])
    model.busy = pyo.ConstraintList()
    for d in accelerators:
        model.busy.add(sum(float(instance.acc[c]) * model.x[c, d] for c in classes)
                       + sum(float(instance.value_cost[v]) * (model.enter[v, d] + model.leave[v, d]) for v in values)
                       <= model.T)
        if instance.size.sum() > instance.memory:
            model.busy.add(sum(float(instance.size[c] / instance.memory) * model.x[c, d] for c in classes) <= 1)
    for d in cores:
        model.busy.add(sum(float(instance.cpu[c]) * model.x[c, d] for c in classes) <= model.T)


def _add_contiguity(instance: PlaceInstance, model: pyo.ConcreteModel, devices: Collection[int]) -> None:
    nodes = [n for n in range(len(instance.node_class)) if not instance.node_backward[n]]
    model.after = pyo.Var(nodes, sorted(devices), bounds=(0, 1))
    model.convex = pyo.ConstraintList()
    classes = instance.node_class
    for d in sorted(devices):
        for n in nodes:
            model.convex.add(model.after[n, d] + model.x[int(classes[n]), d] <= 1)
        for a, b in instance.edges.tolist():
            if instance.node_backward[a] or instance.node_backward[b]:
                continue
            model.convex.add(model.after[b, d] >= model.after[a, d])
            if classes[a] != classes[b]:
                model.convex.add(model.after[b, d] >= model.x[int(classes[a]), d] - model.x[int(classes[b]), d])
