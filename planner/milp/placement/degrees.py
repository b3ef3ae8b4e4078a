"""How many layers of which kind every stage of a chain of teams holds, and which of them run again: a MIP over counts.

Equal layers are counted, not placed one by one. A model is a sequence of *runs* of equal pieces (embedding, dense
layers, MoE layers, head); n[r, s, m] pieces of run r are in stage s in mode m (what is recomputed):

    minimise T
    T >= in_p + M load_p + out_p + update_p                    rank p: forwards before its first stage, its work, the
                                                                 backwards of the stages before, each with a transfer
    T >= in_p + turn_p + M load_p - (w - 1) f_p + out_p + update_p         1F1B: w = min(M, P - p) forwards come before
                                                                 the first gradient, turn_p after the first of them
    T >= M load_p + update_p + (P - 1) (f_s + b_s)             v > 1 chunks: interleaved 1F1B starts in steps of a stage
    |pieces of stage s - pieces / stages| <= 1 and a bit       and they are nearly even, but for the first and the last
    sum_{s, m} n[r, s, m] = N_r                                every piece somewhere
    sum_{s' <= s, m} n[r, s', m] >= N_r done[r, s]             runs in their order: run r + 1 reaches stage s only if
    sum_{s' <= s, m} n[r + 1, s', m] <= N_{r + 1} done[r, s]     run r is through by then
    sum resident + alive_s kept + work_p <= memory             what warm-up holds: alive_s microbatches of stage s
    work_p >= workspace[r, m] n[r, s, m] where N_r = 1         (longer runs' largest workspace is held ready everywhere)
    sum_{r, m} n[r, s, m] >= 1                                 no stage is empty

Stage s is on rank s mod P (one chunk per rank: a chain; more: interleaved). The objective models 1F1B and interleaved
1F1B on these stages; it bounds no other order, and the simulator says what a plan takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mipipe.planner.milp import highs, pyo


@dataclass(frozen=True, slots=True)
class ModeCost:
    """One piece of a run in one mode: seconds of forward and backward of a microbatch, of its update, and bytes."""

    forward: float
    backward: float
    update: float
    resident: int
    kept: int
    workspace: int


@dataclass(frozen=True, slots=True)
class StageCounts:
    """An answer: ``counts[s][r][m]`` pieces, the objective and the bound in seconds; ``bound`` None: not proven."""

    counts: tuple[tuple[tuple[int, ...], ...], ...]
    seconds: float
    bound: float | None


@dataclass(frozen=True, slots=True)
class ChainTask:
    """What is decided: ``runs[r]`` = (pieces, cost in every mode), on ``ranks`` with ``chunks`` stages each.

    ``transfer``: seconds of one hop between stages; ``action``: overhead of a forward or backward; ``memory`` in bytes.
    """

    runs: tuple[tuple[int, tuple[ModeCost, ...]], ...]
    ranks: int
    chunks: int
    microbatches: int
    transfer: float
    action: float
    memory: int

    @property
    def stages(self) -> int:
        return self.ranks * self.chunks

    def alive(self, stage: int) -> int:
        """Microbatches of a stage that 1F1B holds when its warm-up ends; interleaved, rounds of one per rank go through
        the first chunk, the next, and so on, and the last chunk's backwards begin ``2 (P - p - 1)`` steps after it."""
        chunk, rank = divmod(stage, self.ranks)
        if self.chunks == 1:
            return min(self.microbatches, self.ranks - rank)
        late = 2 * (self.ranks - rank - 1) + 1
        held = min(self.ranks, late) if chunk == self.chunks - 1 else self.ranks
        return min(self.microbatches, held + (max(0, late - self.ranks) if chunk == 0 else 0))


def stage_counts(task: ChainTask, *, time_limit_s: float, seed: int = 0, cutoff: float | None = None,
                 gap: float = 5e-3) -> StageCounts | None:
    """The best counts; None where none fit the memory, beat the cutoff, or were found in time. Ctrl-C raises
    `KeyboardInterrupt`."""
    model = _build(task)
    scale = work_of(task)
    outcome = highs.solve(model, time_limit_s=time_limit_s, seed=seed, gap=gap,
                          cutoff=None if cutoff is None else cutoff / scale)
    if outcome.termination is highs.SolverStatus.INTERRUPTED:
        raise KeyboardInterrupt
    if not outcome.has_solution or outcome.objective is None:
        return None
    counts = tuple(tuple(tuple(round(pyo.value(model.n[r, s, m])) for m in range(len(costs)))
                         for r, (_, costs) in enumerate(task.runs)) for s in range(task.stages))
    return StageCounts(counts, outcome.objective * scale, None if outcome.bound is None else outcome.bound * scale)


def _build(task: ChainTask) -> pyo.ConcreteModel:
    """The model, in units of one microbatch's work (seconds) and of the memory (bytes)."""
    model, stages, ranks = pyo.ConcreteModel(), range(task.stages), range(task.ranks)
    scale = work_of(task)
    keys = [(r, s, m) for r, (_, costs) in enumerate(task.runs) for s in stages for m in range(len(costs))]
    model.n = pyo.Var(keys, domain=pyo.NonNegativeIntegers, bounds=lambda _, r, s, m: (0, task.runs[r][0]))
    model.rows = pyo.ConstraintList()
    in_order(model, [count for count, _ in task.runs], [len(costs) for _, costs in task.runs], task.stages,
             even=task.chunks > 1)
    model.forward, model.backward, model.head = (pyo.Var(stages), pyo.Var(stages), pyo.Var(range(task.ranks + 1)))
    model.time, model.step = pyo.Var(domain=pyo.NonNegativeReals), pyo.Var(domain=pyo.NonNegativeReals)
    usual = max((cost.workspace for count, costs in task.runs if count > 1 for cost in costs), default=0)
    model.work = pyo.Var(ranks, bounds=(usual / task.memory, None))

    def total(stage: int, name: str) -> pyo.Expression:
        return sum(getattr(cost, name) * model.n[r, stage, m] for r, (_, costs) in enumerate(task.runs)
                   for m, cost in enumerate(costs))

    for s in stages:
        model.rows.add(model.forward[s] == (total(s, "forward") + task.action) / scale)
        model.rows.add(model.backward[s] == (total(s, "backward") + task.action) / scale)
        model.rows.add(model.step >= model.forward[s] + model.backward[s])
    model.rows.add(model.head[0] == 0)
    count, last = task.microbatches, task.ranks
    for p in ranks:
        own = [stage for stage in stages if stage % task.ranks == p]
        update = sum(total(stage, "update") for stage in own) / scale
        load = count * sum(model.forward[stage] + model.backward[stage] for stage in own)
        model.rows.add(model.head[p + 1] == model.head[p] + model.forward[p] + model.backward[p]
                       + 2 * task.transfer / scale)
        if task.chunks > 1:
            model.rows.add(model.time >= load + update + (task.ranks - 1) * model.step)
        else:
            warm = min(count, task.ranks - p)
            turn = model.head[last] - model.head[p + 1]
            model.rows.add(model.time >= model.head[p] + load + update)
            model.rows.add(model.time >= model.head[p] + turn + load + update - (warm - 1) * model.forward[p])
        kept = sum((task.alive(stage) * total(stage, "kept") + total(stage, "resident")) / task.memory for stage in own)
        model.rows.add(kept + model.work[p] <= 1)
    for r, s, m in keys:
        share = task.runs[r][1][m].workspace / task.memory
        if share and task.runs[r][0] == 1:
            model.rows.add(model.work[s % task.ranks] >= share * model.n[r, s, m])
    model.goal = pyo.Objective(expr=model.time, sense=pyo.minimize)
    return model


def work_of(task: ChainTask) -> float:
    """Seconds of one microbatch in the first mode: the unit of the model's times."""
    return max(1e-9, sum(count * (costs[0].forward + costs[0].backward) for count, costs in task.runs))


def in_order(model: pyo.ConcreteModel, sizes: Sequence[int], modes: Sequence[int], count: int, *, even: bool) -> None:
    """All pieces of runs of these ``sizes`` in ``count`` stages, runs in their order, no stage empty; ``even``: stages
    are nearly so. The pieces are ``model.n[r, s, m]``, m below ``modes[r]``."""
    stages = range(count)
    pairs = [(r, s) for r in range(len(sizes)) for s in stages]
    model.done, model.reached = pyo.Var(pairs, domain=pyo.Binary), pyo.Var(pairs, domain=pyo.NonNegativeReals)
    for r, s in pairs:
        before = model.reached[r, s - 1] if s else 0
        model.rows.add(model.reached[r, s] == before + sum(model.n[r, s, m] for m in range(modes[r])))
        model.rows.add(model.reached[r, s] >= sizes[r] * model.done[r, s])
        if r:
            model.rows.add(model.reached[r, s] <= sizes[r] * model.done[r - 1, s])
        if s == count - 1:
            model.rows.add(model.reached[r, s] == sizes[r])
    each, more = divmod(sum(sizes), count)
    for s in stages:
        inner = even and 0 < s < count - 1
        here = sum(model.n[r, s, m] for r in range(len(sizes)) for m in range(modes[r]))
        model.rows.add(pyo.inequality(max(1, each - 1) if inner else 1, here, each + 1 + bool(more) if even else None))
