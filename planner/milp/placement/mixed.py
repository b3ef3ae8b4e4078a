"""How many layers of which kind every stage of a known schedule holds, and in which mode, for the least busiest rank.

The schedule says how many microbatches every rank holds of each of its stages at every moment, whatever the stages
are (`mipipe.planner.teams.holding`). Equal layers are counted, as in `mipipe.planner.milp.placement.degrees`;
n[r, s, m] pieces of run r are in stage s in mode m (what is recomputed):

    minimise T + small mean_p load_p
    load_p = sum_{s on p} (M / replicas_s - (1 - share) pairs_s) (f_s + b_s) + update_p           work, pairs as pairs
    T >= start_p + load_p + end_p + sum_{s < back_p} path_s
    start_p >= sum_{s < front_p} f_s                                        the first forward comes
    start_p >= sum_s f_s + sum_{s > turn_p} path_s - ahead_p                and the first gradient; what is done before
    end_p >= sum_{s > last_p} f_s + sum_{s >= back_p} path_s - behind_p     the last gradient, after the last forward
    sum_{s on p} resident_s + fi fi_s + fw fw_s + iw iw_s + work_p <= memory_p       at every moment (fi, fw, iw)
    work_p >= back_s, ahead_s, of pairs ahead_s + back_t                    s, t on p
    back_s >= workspace[r, m] used[r, s, m]                                 (the least of longer runs: everywhere)
    ahead_s >= forward_workspace[r, m] used[r, s, m]                        (likewise)
    n[r, s, m] <= pieces used[r, s, m]
    runs in their order, no stage empty                                     as there

The first and the last microbatch go through all stages as fast as they can, what a rank does meanwhile is as the
schedule says, and nothing else waits: the simulator says what the stages take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from mipipe.planner.gap import BOUND_SLACK
from mipipe.planner.milp import highs, pyo
from mipipe.planner.milp.placement.degrees import StageCounts, in_order

Held = tuple[tuple[int, int, int, int], ...]
"""What a rank holds at a moment: (stage, microbatches from F to I, from F to W, from I to W) of its stages."""


@dataclass(frozen=True, slots=True)
class MixCost:
    """One piece of a run in one mode: seconds of a microbatch's forward, its backward and the part of that which others
    wait for, and of the update; bytes that stay, of a microbatch from F to I, F to W and I to W, and while its backward
    and its forward run."""

    forward: float
    backward: float
    path: float
    update: float
    resident: int
    fi: int
    fw: int
    iw: int
    workspace: int
    forward_workspace: int


@dataclass(frozen=True, slots=True)
class RankOrders:
    """What a schedule has a rank do, whatever the stages are: ``held`` at every moment; ``forwards`` and ``backwards``
    of its stages in all, as (stage, alone, in pairs); ``ahead`` of the first backward and ``behind`` the last forward,
    as (stage, how many); the stages of the first and last of both."""

    held: tuple[Held, ...]
    forwards: tuple[tuple[int, int, int], ...]
    backwards: tuple[tuple[int, int, int], ...]
    ahead: tuple[tuple[int, int], ...]
    behind: tuple[tuple[int, int], ...]
    front: int
    turn: int
    last: int
    back: int


@dataclass(frozen=True, slots=True)
class MixTask:
    """What is decided: ``runs[r]`` = (pieces, cost in every mode) in ``stages`` of ranks that run ``orders``, within
    ``memory[p]`` bytes; ``share``: of the time of both that an overlapped pair takes."""

    runs: tuple[tuple[int, tuple[MixCost, ...]], ...]
    stages: int
    orders: tuple[RankOrders, ...]
    memory: tuple[int, ...]
    share: float

    @property
    def chunks(self) -> int:
        """Stages of a rank."""
        return -(-self.stages // len(self.orders))


def mixed_counts(task: MixTask, *, time_limit_s: float, seed: int = 0, cutoff: float | None = None,
                 gap: float = 5e-3) -> StageCounts | None:
    """The best counts, and the busiest rank's seconds; None where none fit, beat the cutoff, or were found in time.
    Ctrl-C raises `KeyboardInterrupt`."""
    model, scale = _build(task), _work_of(task)
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, gap=gap,
                          cutoff=None if cutoff is None else cutoff / scale)
    if outcome.termination is highs.SolverStatus.INTERRUPTED:
        raise KeyboardInterrupt
    if not outcome.has_solution:
        return None
    counts = tuple(tuple(tuple(round(pyo.value(model.n[r, s, m])) for m in range(len(costs)))
                         for r, (_, costs) in enumerate(task.runs)) for s in range(task.stages))
    return StageCounts(counts, pyo.value(model.time) * scale,
                       None if outcome.bound is None else outcome.bound * scale / (1 + BOUND_SLACK))


def _work_of(task: MixTask) -> float:
    """Seconds of a rank in the first mode: the unit of the model's times."""
    microbatches = sum(alone + pairs for _, alone, pairs in task.orders[0].forwards) / task.chunks
    return max(1e-9, microbatches * sum(count * (costs[0].forward + costs[0].backward) for count, costs in task.runs)
               / len(task.orders))


def _build(task: MixTask) -> pyo.ConcreteModel:
    """The model, in units of a rank's mean work (seconds) and of the largest memory (bytes)."""
    model, scale, unit = pyo.ConcreteModel(), _work_of(task), max(1, *task.memory)
    stages, ranks = range(task.stages), range(len(task.orders))
    keys = [(r, s, m) for r, (_, costs) in enumerate(task.runs) for s in stages for m in range(len(costs))]
    model.n = pyo.Var(keys, domain=pyo.NonNegativeIntegers, bounds=lambda _, r, s, m: (
        0, 0 if _worse(task.runs[r][1], m) else task.runs[r][0]))
    model.rows = pyo.ConstraintList()
    in_order(model, [count for count, _ in task.runs], [len(costs) for _, costs in task.runs], task.stages,
             even=task.chunks > 1)
    model.time, model.busy = pyo.Var(domain=pyo.NonNegativeReals), pyo.Var(ranks)
    _workspaces(model, task, unit)
    _times(model, task, scale)
    for p in ranks:
        for moment in task.orders[p].held:
            model.rows.add(model.work[p] + sum(
                _total(model, task, stage, {"resident": 1 / unit, "fi": fi / unit, "fw": fw / unit, "iw": iw / unit})
                for stage, fi, fw, iw in moment) <= task.memory[p] / unit)
    model.goal = pyo.Objective(expr=model.time + BOUND_SLACK * sum(model.busy[p] for p in ranks) / len(ranks),
                               sense=pyo.minimize)
    return model


def _total(model: pyo.ConcreteModel, task: MixTask, stage: int, weights: Mapping[str, float]) -> pyo.Expression:
    """The weighted costs of a stage's pieces."""
    return sum(sum(weight * getattr(cost, name) for name, weight in weights.items()) * model.n[r, stage, m]
               for r, (_, costs) in enumerate(task.runs) for m, cost in enumerate(costs))


def _times(model: pyo.ConcreteModel, task: MixTask, scale: float) -> None:
    """When every rank ends at the earliest, as far as the first and the last microbatch say."""
    stages, ranks = range(task.stages), range(len(task.orders))
    model.f, model.b, model.path = pyo.Var(stages), pyo.Var(stages), pyo.Var(stages)
    model.start, model.end = pyo.Var(ranks, domain=pyo.NonNegativeReals), pyo.Var(ranks, domain=pyo.NonNegativeReals)
    for s in stages:
        for own, name in ((model.f, "forward"), (model.b, "backward"), (model.path, "path")):
            model.rows.add(own[s] == _total(model, task, s, {name: 1 / scale}))
    for p, order in enumerate(task.orders):
        model.rows.add(model.busy[p] == sum(
            (alone + task.share * pairs) * seconds[s] for seconds, counts in (
                (model.f, order.forwards), (model.b, order.backwards)) for s, alone, pairs in counts)
            + sum(_total(model, task, s, {"update": 1 / scale}) for s, _, _ in order.forwards))
        model.rows.add(model.start[p] >= sum(model.f[s] for s in stages[:order.front]))
        model.rows.add(model.start[p] >= sum(model.f[s] for s in stages)
                       + sum(model.path[s] for s in stages[order.turn + 1:])
                       - sum(count * model.f[s] for s, count in order.ahead))
        model.rows.add(model.end[p] >= sum(model.f[s] for s in stages[order.last + 1:])
                       + sum(model.path[s] for s in stages[order.back:])
                       - sum(count * model.b[s] for s, count in order.behind))
        model.rows.add(model.time >= model.start[p] + model.busy[p] + model.end[p]
                       + sum(model.path[s] for s in stages[:order.back]))


def _worse(costs: Sequence[MixCost], mode: int) -> bool:
    """Whether an earlier mode takes no more of anything."""
    def all_of(cost: MixCost) -> tuple[float, ...]:
        return (cost.forward, cost.backward, cost.path, cost.update, cost.resident, cost.fi + cost.fw, cost.fw,
                cost.iw + cost.fw, cost.workspace, cost.forward_workspace)

    own = all_of(costs[mode])
    return any(all(mine <= its for mine, its in zip(all_of(cost), own, strict=True)) for cost in costs[:mode])


def _workspaces(model: pyo.ConcreteModel, task: MixTask, unit: float) -> None:
    """What runs needs beside what is kept: of the least mode of longer runs everywhere, of others where they are."""
    stages, ranks, spaces = range(task.stages), range(len(task.orders)), ("workspace", "forward_workspace")
    usual = {name: max((min(getattr(cost, name) for cost in costs) for count, costs in task.runs if count > 1),
                       default=0) for name in spaces}
    model.back = pyo.Var(stages, bounds=(usual["workspace"] / unit, None))
    model.ahead = pyo.Var(stages, bounds=(usual["forward_workspace"] / unit, None))
    model.work = pyo.Var(ranks, domain=pyo.NonNegativeReals)
    apart = [(r, s, m) for r, (_, costs) in enumerate(task.runs) for s in stages for m, cost in enumerate(costs)
             if any(getattr(cost, name) > usual[name] for name in spaces) and not _worse(costs, m)]
    model.used = pyo.Var(apart, domain=pyo.Binary)
    for r, s, m in apart:
        count, costs = task.runs[r]
        model.rows.add(model.n[r, s, m] <= count * model.used[r, s, m])
        for own, name in ((model.back, "workspace"), (model.ahead, "forward_workspace")):
            if getattr(costs[m], name) > usual[name]:
                model.rows.add(own[s] >= getattr(costs[m], name) / unit * model.used[r, s, m])
    for p in ranks:
        here = [stage for stage, _, _ in task.orders[p].forwards]
        for stage in here:
            model.rows.add(model.work[p] >= model.back[stage])
            model.rows.add(model.work[p] >= model.ahead[stage])
        for one, other in permutations(here, 2) if any(pairs for _, _, pairs in task.orders[p].forwards) else ():
            model.rows.add(model.work[p] >= model.ahead[one] + model.back[other])
