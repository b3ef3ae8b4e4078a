"""Max-load device placement as a MIP (the throughput objective of `mipipe.planner.devices.instances.instance`).

- ``x[c, d] = 1``: class c is on device d; ``sum_d x[c, d] = 1``; ``sum_c size[c] x[c, d] <= memory``;
- ``in[v, d] >= x[r, d] - x[s, d]`` for every reader r of value v with source s: accelerator d reads v from outside;
- ``out[v, d] >= x[s, d] - x[r, d]``: v leaves d;
- minimise T with ``sum_c acc[c] x[c, d] + sum_v cost[v] (in[v, d] + out[v, d]) <= T`` on accelerators and
  ``sum_c cpu[c] x[c, d] <= T`` on cores.

All transfers together are within the `transfer_budget` B of the target, and each is paid a whole number of times; so
for any cost c, ``sum_v floor(cost[v] / c) (in + out)[v] <= floor(B / c)`` (Chvatal-Gomory).

Equal devices are told apart by giving class k only to the first k + 1 of them. Contiguous: with
``after[n, d] >= x[a, d] - x[n, d]`` and ``after[n, d] >= after[a, d]`` along forward edges a -> n,
``after[n, d] + x[n, d] <= 1``. Where exactly one of the dear values of a `Region` is cut, ``z[v] = 1`` says which:
``sum_d in[v, d] + out[v, d] <= z[v]``, ``|x[s, d] - x[r, d]| <= z[v]``, ``sum_v z[v] = 1``, and no two accelerators
share it: ``x[s, d] + sum_{e != d} x[r, e] <= 1``; the end that must be on the core is there if ``z[v] = 1``.

With the value known as a cutoff and the classes contracted by `mipipe.planner.devices.instances.contract`, HiGHS proves
operator graphs of a hundred classes (``benchmarks/results/placement.txt``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mipipe.planner import clock
from mipipe.planner.devices.instances.contract import Region, transfer_budget
from mipipe.planner.devices.instances.instance import PlaceInstance
from mipipe.planner.milp import highs, pyo

MANY, DISTINCT = 50, 10
"""Rounding rows: for values of which the budget allows fewer than this; most rows."""

WITHOUT_HEURISTICS = {"mip_heuristic_effort": 0.0}
"""Annealing finds the assignments; HiGHS is here to prove."""


def solve_part(part: Region, target: float, *, time_limit_s: float, seed: int, contiguous: bool = False,
               stop: Callable[[], bool] | None = None) -> tuple[np.ndarray | None, highs.SolverOutcome]:
    """An assignment [class of the part] with a load below ``target`` if one was found, and the solver's outcome.

    Args:
        part: the instance, contracted or not, and what else holds.
        target: only better loads are of interest; INFEASIBLE then proves that the part has none.
        time_limit_s: wall-clock limit.
        seed: HiGHS's random seed.
        contiguous: forward nodes of each device must be contiguous.
        stop: asked now and then; true ends the solve.

    Raises:
        OutOfTimeError: the time that a caller set on `mipipe.planner.clock` was over while the model was built.
    """
    instance = part.instance
    model = pyo.ConcreteModel(name="device placement MIP")
    devices, classes = range(instance.num_devices), range(instance.num_classes)
    model.x = pyo.Var(classes, devices, domain=pyo.Binary)
    model.T = pyo.Var(bounds=(0, target))
    model.goal = pyo.Objective(expr=model.T)
    for c in np.flatnonzero(~instance.supported).tolist():
        for d in range(instance.num_accelerators):
            model.x[c, d].fix(0)
    _break_symmetry(instance, model, part.together)
    model.once = pyo.Constraint(classes, rule=lambda m, c: sum(m.x[c, d] for d in devices) == 1)
    _add_loads(instance, model)
    _whole_payments(instance, model, target)
    if part.dear:
        _cut_one(part, model)
    if contiguous:
        _add_contiguity(instance, model)
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, cutoff=target, stop=stop,
                          options=WITHOUT_HEURISTICS)
    if not outcome.has_solution:
        return None, outcome
    values = np.array([[0.0 if model.x[c, d].fixed else pyo.value(model.x[c, d]) for d in devices] for c in classes])
    return values.argmax(axis=1), outcome


def _break_symmetry(instance: PlaceInstance, model: pyo.ConcreteModel, together: bool | None) -> None:
    heaviest = np.argsort(-instance.acc, kind="stable")
    for place, c in enumerate(heaviest[:instance.num_accelerators]):
        for d in range(place + 1, instance.num_accelerators):
            model.x[int(c), d].fix(0)
    if together is not None and len(heaviest) > 1:
        model.beside = pyo.Constraint(expr=model.x[int(heaviest[1]), 0] == int(together))


def _add_loads(instance: PlaceInstance, model: pyo.ConcreteModel) -> None:
    accelerators = range(instance.num_accelerators)
    values = range(len(instance.value_source))
    classes = range(instance.num_classes)
    model.enter = pyo.Var(values, accelerators, bounds=(0, 1))
    model.leave = pyo.Var(values, accelerators, bounds=(0, 1))
    model.cuts = pyo.ConstraintList()
    for v in clock.asking(values, 16):
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
            model.busy.add(sum(float(instance.size[c] / instance.size.max()) * model.x[c, d] for c in classes)
                           <= float(instance.memory / instance.size.max()))
    for d in range(instance.num_accelerators, instance.num_devices):
        model.busy.add(sum(float(instance.cpu[c]) * model.x[c, d] for c in classes) <= model.T)


def _whole_payments(instance: PlaceInstance, model: pyo.ConcreteModel, target: float) -> None:
    values, accelerators = range(len(instance.value_source)), range(instance.num_accelerators)
    budget = transfer_budget(instance, target)
    costs = np.unique(instance.value_cost.round(9))
    costs = costs[(costs > 0) & (costs * MANY > budget) & (costs <= budget)]
    model.whole = pyo.ConstraintList()
    for unit in costs[::-1][:DISTINCT].tolist():
        often = np.floor(instance.value_cost / unit + 1e-9)
        model.whole.add(sum(float(often[v]) * (model.enter[v, d] + model.leave[v, d])
                            for v in values if often[v] for d in accelerators) <= float(np.floor(budget / unit + 1e-6)))


def _cut_one(part: Region, model: pyo.ConcreteModel) -> None:
    instance, dear = part.instance, part.dear
    accelerators = range(instance.num_accelerators)
    model.z = pyo.Var(dear, domain=pyo.Binary)
    model.one = pyo.ConstraintList()
    model.one.add(sum(model.z[v] for v in dear) == 1)
    for v, end in zip(dear, part.on_core, strict=True):
        if end is not None:
            model.one.add(model.x[end, instance.num_accelerators] >= model.z[v])
        model.one.add(sum(model.enter[v, d] + model.leave[v, d] for d in accelerators) <= model.z[v])
        source = int(instance.value_source[v])
        for reader in instance.readers[instance.reader_start[v]:instance.reader_start[v + 1]].tolist():
            for d in accelerators:
                model.one.add(model.x[source, d] - model.x[reader, d] <= model.z[v])
                model.one.add(model.x[reader, d] - model.x[source, d] <= model.z[v])
                model.one.add(model.x[source, d] + sum(model.x[reader, e] for e in accelerators if e != d) <= 1)


def _add_contiguity(instance: PlaceInstance, model: pyo.ConcreteModel) -> None:
    devices = range(instance.num_devices)
    nodes = [n for n in range(len(instance.node_class)) if not instance.node_backward[n]]
    model.after = pyo.Var(nodes, devices, bounds=(0, 1))
    model.convex = pyo.ConstraintList()
    classes = instance.node_class
    for d in clock.asking(devices, 1):
        for n in nodes:
            model.convex.add(model.after[n, d] + model.x[int(classes[n]), d] <= 1)
        for a, b in clock.asking(instance.edges.tolist(), 64):
            if instance.node_backward[a] or instance.node_backward[b]:
                continue
            model.convex.add(model.after[b, d] >= model.after[a, d])
            if classes[a] != classes[b]:
                model.convex.add(model.after[b, d] >= model.x[int(classes[a]), d] - model.x[int(classes[b]), d])
