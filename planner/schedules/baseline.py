"""`Baseline`: a published schedule applied to a problem.

Accountings: ``split=False`` keeps a schedule's own blocks (B, OVERLAP_F_B; on a problem with collectives everything on
one stream), ``split=True`` is the same order with every block split into F, I and W, where a model has several streams
each action on its own. Where an overlapped pair is split over two streams, its operators are interleaved by list
scheduling: gradients first, weight gradients last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.execution.measure import makespan_of
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.plan import Placement, Plan, RankOrder, Schedule, Stage
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.schedules.closed_forms import ClosedForm
from mipipe.planner.schedules.cut import CutRule, cut_stages, merge_streams
from mipipe.planner.schedules.pattern import EvenTimes, StagePattern

OrderAccounting = Literal["indivisible", "split"]
MakePattern = Callable[[int, int, EvenTimes | None], StagePattern]


@dataclass(frozen=True, slots=True)
class Baseline:
    """A schedule by its paper's name. ``accountings`` are those in which its row differs."""

    name: str
    make: MakePattern
    accountings: tuple[OrderAccounting, ...]
    closed_form: ClosedForm | None
    source: str

    def plan(self, problem: PlanningProblem, *, split: bool = True, cut: CutRule = "even") -> Plan:
        """The schedule's plan for a problem, with its makespan; memory limits are not looked at.

        Raises:
            ProblemError: the schedule does not exist for this size, or the model has too few layers for it.
        """
        problem = problem if split else merge_streams(problem)
        pattern = _pattern(self.make, problem.num_ranks, problem.num_microbatches, _times(problem))
        placement, parts = _placed(problem, pattern, cut_stages(problem, pattern.stage_ranks, cut, self.name))
        stages = view(problem, placement)
        schedule = Schedule(tuple(_rank_order(stages, order, parts, split) for order in pattern.orders))
        return Plan(self.name, problem, placement, schedule, makespan_of(stages, schedule), provenance={
            "method": self.name, "source": self.source, "accounting": "split" if split else "indivisible", "cut": cut})

    def published(self, problem: PlanningProblem) -> float | None:
        """The bubble of the paper's closed form in the problem's unit, from an even stage; None where there is none."""
        if self.closed_form is None:
            return None
        kind = problem.topology.devices[0].kind
        f, i, w = (Fraction(sum(getattr(group.times[kind], name) or 0 for group in problem.groups),
                            problem.num_ranks * problem.unit_ns) for name in ("f_ns", "i_ns", "w_ns"))
        pair = (f + i + w) * Fraction(problem.overlap.numerator, problem.overlap.denominator)
        found = self.closed_form(f, i, w, pair, problem.num_ranks, problem.num_microbatches)
        return None if found is None else float(found)


@lru_cache(maxsize=1)
def _pattern(make: MakePattern, ranks: int, microbatches: int, times: EvenTimes) -> StagePattern:
    """The pattern; the last one is kept, because every accounting and cut asks for it again."""
    return make(ranks, microbatches, times)


def _times(problem: PlanningProblem) -> EvenTimes:
    """An even stage's durations on the first device and a typical transfer, for the automatic schedules."""
    devices, edges = problem.topology.devices, problem.edges
    f, i, w = (sum(getattr(group.times[devices[0].kind], name) or 0 for group in problem.groups) // problem.num_ranks
               for name in ("f_ns", "i_ns", "w_ns"))
    size = sorted(edge.num_bytes for edge in edges)[len(edges) // 2] if edges else 0
    return EvenTimes(f, i, w, problem.topology.transfer_ns(0, 1, size) if len(devices) > 1 else 0)


def _placed(problem: PlanningProblem, pattern: StagePattern,
            cuts: Sequence[Sequence[int]]) -> tuple[Placement, list[list[int]]]:
    """The placement, and for each of the pattern's stages the plan's stages: one for each run of one stream."""
    stages: list[Stage] = []
    routes: list[tuple[int, ...]] = []
    parts: list[list[int]] = []
    for groups, ranks, route in zip(cuts, pattern.stage_ranks, pattern.routes, strict=True):
        runs: list[list[int]] = []
        for group in groups:
            if runs and problem.groups[runs[-1][-1]].stream is problem.groups[group].stream:
                runs[-1].append(group)
            else:
                runs.append([group])
        parts.append(list(range(len(stages), len(stages) + len(runs))))
        stages += [Stage(tuple(run), tuple(sorted(set(ranks)))) for run in runs]
        routes += [route] * len(runs)
    return Placement(tuple(stages), tuple(routes), pattern.placement), parts


def _rank_order(stages: StageView, order: Sequence[Action], parts: Sequence[Sequence[int]], split: bool) -> RankOrder:
    """A rank's order of the pattern's actions as an order of the plan's, on its two streams."""
    lanes: dict[Stream, list[Action]] = {Stream.COMPUTE: [], Stream.COLLECTIVE: []}
    for action in order:
        for small in _expand(stages, action, parts, split):
            lanes[stages.streams[small.stage]].append(small)
    return RankOrder(tuple(lanes[Stream.COMPUTE]), tuple(lanes[Stream.COLLECTIVE]))


def _expand(stages: StageView, action: Action, parts: Sequence[Sequence[int]], split: bool) -> list[Action]:
    """The plan's actions for one of the pattern's; phases that a stage does not have are left out."""
    if action.partner is not None:
        ahead = _ahead(parts[action.stage], action.microbatch)
        gradients = _gradients(stages, parts[action.partner[0]], action.partner[1])
        if not split and len(ahead) == 1 and len(gradients) == 2:
            return [Action(ahead[0].stage, ActionKind.OVERLAP_F_B, action.microbatch,
                           (gradients[0].stage, action.partner[1]))]
        single = {stages.streams[small.stage] for small in (*ahead, *gradients)} == {Stream.COMPUTE}
        return [*ahead, *gradients] if single else _interleaved(stages, ahead, gradients)
    stage = action.stage
    if parts[stage] == [stage] and (action.kind is ActionKind.F or (
            action.kind is ActionKind.B and not split and None not in (stages.i_ns[stage], stages.w_ns[stage]))):
        return [action]
    if action.kind is ActionKind.F:
        return _ahead(parts[action.stage], action.microbatch)
    gradients = _gradients(stages, parts[action.stage], action.microbatch)
    if action.kind is ActionKind.B:
        if not split and len(gradients) == 2:
            return [Action(gradients[0].stage, ActionKind.B, action.microbatch)]
        return gradients
    return [small for small in gradients if small.kind is action.kind]


def _ahead(stages: Sequence[int], microbatch: int) -> list[Action]:
    return [Action(stage, ActionKind.F, microbatch) for stage in stages]


def _gradients(stages: StageView, parts: Sequence[int], microbatch: int) -> list[Action]:
    """All I, last part first, then all W: gradients go on their way before anything else."""
    return [Action(part, kind, microbatch) for kind, times in ((ActionKind.I, stages.i_ns), (ActionKind.W, stages.w_ns))
            for part in reversed(parts) if times[part] is not None]


def _interleaved(stages: StageView, ahead: list[Action], gradients: list[Action]) -> list[Action]:
    """Operators of an overlapped pair in the order in which they start if run alone, the earliest possible first."""
    chains = [ahead, [small for small in gradients if small.kind is ActionKind.I]]
    weights = [small for small in gradients if small.kind is ActionKind.W]
    ready, free = [0, 0], {Stream.COMPUTE: 0, Stream.COLLECTIVE: 0}
    available = {small: 0 for small in weights if stages.i_ns[small.stage] is None}
    order: list[Action] = []
    while any(chains) or available:
        options = [(max(ready[n], free[stages.streams[chain[0].stage]]), 1 - n, chain[0])
                   for n, chain in enumerate(chains) if chain]
        options += [(max(time, free[stages.streams[small.stage]]), 2, small) for small, time in available.items()]
        start, rank, chosen = min(options, key=lambda option: option[:2])
        end = start + stages.duration_ns(chosen.kind, chosen.stage, chosen.microbatch)
        free[stages.streams[chosen.stage]] = end
        order.append(chosen)
        if rank == 2:
            del available[chosen]
            continue
        ready[1 - rank] = end
        chains[1 - rank] = chains[1 - rank][1:]
        if chosen.kind is ActionKind.I:
            available |= {small: end for small in weights if small.stage == chosen.stage}
    return order
