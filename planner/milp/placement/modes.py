"""Which stages of a placement run F again: modes as a MIP, time against memory.

z[s] = 1: stage s keeps only its inputs after F and runs F again before its gradients.

    minimise C + 1e-3 sum_s again_s z[s]
    C >= load_d + sum_{s on d} again_s z[s]                                              compute of device d in a step
    C capacity_d >= pressure sum_{s on d} (area_s - (area_s - kept_area_s) z[s])         bytes x time (Little's law)
    sum_{s on d} (saved_s - (saved_s - kept_s) z[s]) + work_d <= capacity_d              one microbatch at a time fits

Areas come from the earliest times of one microbatch at this placement; ``pressure`` says how much longer activations
stay in a real schedule (see `mipipe.planner.milp.placement.shares.LASTING`). The search decides between the answers for
several pressures. One binary per stage: solved in milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.jobs.arrays import Instance, build
from mipipe.planner.jobs.dependencies import KINDS
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.highs import SolverOutcome
from mipipe.planner.plan import Placement
from mipipe.planner.problem import PlanningProblem

PRESSURES = (1.0, 1.5, 2.5)
"""Tried in turn: the least that memory demands, what schedules without idle time take, and 1F1B's unhurried order."""


@dataclass(frozen=True, slots=True)
class Modes:
    """A placement with the stages chosen that run F again, and the solve it came from."""

    placement: Placement
    outcome: SolverOutcome


def choose(problem: PlanningProblem, placement: Placement, *, pressure: float, time_limit_s: float,
           seed: int) -> Modes | None:
    """The placement with the best modes under a pressure; None if no stage may recompute, or nothing fits.

    Raises:
        PlanError: the placement does not fit the problem.
    """
    stage_view = view(problem, placement)
    may = [s for s in range(stage_view.num_stages) if _may(stage_view, s)]
    if not may:
        return None
    model = _build(stage_view, build(stage_view), may, pressure)
    if model is None:
        return None
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, gap=1e-4)
    if not outcome.has_solution:
        return None
    chosen = {s for s in may if model.z[s].value > 0.5}
    stages = tuple(replace(stage, recompute=s in chosen) for s, stage in enumerate(placement.stages))
    name = placement.name + ("+recompute" if chosen else "")
    return Modes(replace(placement, stages=stages, name=name), outcome)


def _may(stage_view: StageView, s: int) -> bool:
    """Whether F of a stage may run again, and whether that would give memory back."""
    groups = [stage_view.problem.groups[g] for g in stage_view.placement.stages[s].groups]
    saved = sum(stage_view.saved_fi[s]) + sum(stage_view.saved_fw[s])
    return (all(group.recompute_bytes is not None for group in groups) and stage_view.streams[s] is Stream.COMPUTE
            and sum(stage_view.kept[s]) < saved)


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of every stage (rows) on every rank (columns), over a step: compute, F alone, bytes x time in both modes; of one
    microbatch: bytes saved and kept."""

    load: np.ndarray
    again: np.ndarray
    area: np.ndarray
    kept_area: np.ndarray
    saved: np.ndarray
    kept: np.ndarray


def _sums(stage_view: StageView, instance: Instance) -> _Sums:
    """The figures of the model, from the earliest times of the instance (a placement without recomputation)."""
    at = zip(instance.depth.tolist(), instance.kind.tolist(), instance.own_microbatch.tolist(), strict=True)
    head = dict(zip(at, instance.head.tolist(), strict=True))
    shape = stage_view.num_stages, stage_view.problem.num_ranks
    load, again, area, kept_area, saved, kept = (np.zeros(shape) for _ in range(6))
    for s in range(stage_view.num_stages):
        i_ns, w_ns = stage_view.i_ns[s], stage_view.w_ns[s]
        compute = stage_view.streams[s] is Stream.COMPUTE
        for m in range(stage_view.problem.num_microbatches):
            here = s, stage_view.rank(s, m)
            until_i = i_ns[m] if i_ns is not None else 0
            until_w = until_i + (w_ns[m] if w_ns is not None else 0)
            load[here] += compute * (stage_view.f_ns[s][m] + until_w)
            again[here] += stage_view.f_ns[s][m]
            if i_ns is None and w_ns is None:
                continue
            fi, fw, left = stage_view.saved_fi[s][m], stage_view.saved_fw[s][m], stage_view.kept[s][m]
            waits = head[s, KINDS.index(ActionKind.I if i_ns is not None else ActionKind.W), m] - head[s, 0, m]
            after = fi * until_i + fw * until_w
            area[here] += (fi + fw) * waits + after
            kept_area[here] += left * waits + after
            saved[here], kept[here] = max(saved[here], fi + fw), max(kept[here], left)
    return _Sums(load, again, area, kept_area, saved, kept)


def _build(stage_view: StageView, instance: Instance, may: list[int],
           pressure: float) -> pyo.ConcreteModel | None:
    """The model of the module docstring; times in thousandths of the largest load. None: a device lacks room, and no
    stage on it may give some back."""
    sums = _sums(stage_view, instance)
    load = sums.load.sum(axis=0)
    scale = max(1.0, load.max() / 1000)
    model = pyo.ConcreteModel(name="mode MIP")
    model.z = pyo.Var(may, domain=pyo.Binary)
    model.makespan = pyo.Var(bounds=(0, None))
    model.rows = pyo.ConstraintList()
    for d in range(stage_view.problem.num_ranks):
        room = max(1.0, float(instance.cap[d]))
        here = [s for s, stage in enumerate(stage_view.placement.stages) if d in stage.ranks]
        chosen = [s for s in may if s in here]
        model.rows.add(model.makespan >= load[d] / scale + sum(sums.again[s, d] / scale * model.z[s] for s in chosen))
        rate = pressure / room / scale
        given = sum(rate * (sums.area[s, d] - sums.kept_area[s, d]) * model.z[s] for s in chosen)
        model.rows.add(model.makespan >= rate * sums.area[:, d].sum() - given)
        work = max((max(stage_view.forward_workspace[s], stage_view.workspace[s] + max(stage_view.saved_iw[s]))
                    for s in here), default=0)
        lack = (sums.saved[:, d].sum() + work) / room - 1
        if lack > 0 and not chosen:
            return None
        if lack > 0:
            saving = sum((sums.saved[s, d] - sums.kept[s, d]) / room * model.z[s] for s in chosen)
            model.rows.add(saving + 0 * model.makespan >= lack)  # a row also where nothing may recompute
    least = sum(float(sums.again[s].sum()) / scale * model.z[s] for s in may)
    model.goal = pyo.Objective(expr=model.makespan + 1e-3 * least)
    return model
