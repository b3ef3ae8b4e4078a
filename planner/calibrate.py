"""From a measured run back to costs: what every stage really took, and how far the simulation was off.

A stage runs as one action, so a run measures stages, not groups: each group of a stage is scaled by the stage's factor
(the median over microbatches of measured / planned), per phase and device kind. Phases and kinds that did not run keep
their entries, and the table says which is which. What a rank does between two actions (send, post receives, launch) is
time it does not compute in: its median over the places where nothing is waited for is added to every action. Transfers
are reported, not fitted: only those a rank waited for are counted, since an early arrival is noticed late
(`mipipe.runtime.train.trace`).
"""

from __future__ import annotations

import bisect
import dataclasses
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from mipipe.graphs.costs.table import CostTable, GroupCost
from mipipe.graphs.errors import ProblemError, TimelineError
from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.serialize import STRICT
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.measure import makespan_of
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.plan import Plan
from mipipe.planner.problem import PlanningProblem
from mipipe.planner.problems.from_graph import times_of
from mipipe.planner.timeline import Span, Timeline

PhaseKey = tuple[int, Phase, str]
"""Stage, phase, device kind."""

_PHASES = {ActionKind.F: Phase.F, ActionKind.I: Phase.I, ActionKind.W: Phase.W}


@dataclass(frozen=True, slots=True)
class DriftRow:
    """One stage's phase on one device kind, or all waited-for transfers of one channel, planned and measured (medians).

    ``spread`` is the relative half-width of the middle half of measured / planned.
    """

    __pydantic_config__: ClassVar = STRICT
    what: str
    device_kind: str
    samples: int
    planned_ns: int
    measured_ns: int
    ratio: float
    spread: float


@dataclass(frozen=True, slots=True)
class Drift:
    """How far the simulation was off: the whole step before and after calibration, and row by row.

    ``recalibrated_ns`` is the plan simulated again with the new costs; what then remains between it and
    ``measured_ns`` is not a matter of stage durations (waiting for transfers, the optimizer). ``launch_ns`` is what a
    rank takes between two actions; the new costs have it in every action.
    """

    __pydantic_config__: ClassVar = STRICT
    measured_ns: int
    simulated_ns: int
    recalibrated_ns: int
    launch_ns: int
    rows: tuple[DriftRow, ...]

    @property
    def ratio(self) -> float:
        """Measured over simulated makespan."""
        return self.measured_ns / max(self.simulated_ns, 1)

    @property
    def ratio_after(self) -> float:
        """Measured over recalibrated makespan."""
        return self.measured_ns / max(self.recalibrated_ns, 1)


def calibrate(plan: Plan, measured: Timeline, costs: CostTable) -> tuple[CostTable, Drift]:
    """The cost table corrected by a measured step of the plan, and how far the simulation was off.

    Raises:
        TimelineError: simulated, of another number of ranks, or without this plan's actions.
        ProblemError: the cost table is of another graph.
    """
    if measured.origin != "measured":
        raise TimelineError("calibrate: found a simulated timeline, expected a measured one (from `mipipe train`)")
    if not measured.in_device_time:
        raise TimelineError(f"calibrate: the timeline of a run on {measured.notes.get('device')} was taken by the"
                            " host's clock, which says when work was launched, not when it ran; take the one that"
                            " `mipipe train` writes of its last step (engine.measuring = True before it, in a library)")
    if measured.num_ranks != plan.problem.num_ranks:
        raise TimelineError(f"calibrate: the timeline has {measured.num_ranks} ranks, but plan {plan.name} has"
                            f" {plan.problem.num_ranks}; give the timeline of a run of this plan")
    if costs.graph_digest != plan.problem.graph_digest:
        raise ProblemError(f"calibrate: the cost table is of graph {costs.graph_digest or '(none)'}, but the plan of"
                           f" graph {plan.problem.graph_digest or '(none)'}; give the table the plan was made with")
    stages = view(plan.problem, plan.placement)
    samples = _stage_samples(plan, stages, measured)
    table = _scaled(plan, costs, _factors(samples))
    launch = _launch_ns(dataclasses.replace(plan, problem=with_costs(plan.problem, table)), measured)
    if launch:
        table = _scaled(plan, costs, _factors(_stage_samples(plan, stages, measured, launch)))
    rows = [_row(f"stage {stage} {phase}", kind, pairs) for (stage, phase, kind), pairs in sorted(samples.items())]
    rows += [_row(f"transfers {source}->{target}", "", pairs)
             for (source, target), pairs in sorted(_transfer_samples(plan, measured).items())]
    before = makespan_of(stages, plan.schedule)
    problem = with_costs(plan.problem, table)
    after = makespan_of(view(problem, plan.placement), plan.schedule)
    return table, Drift(_step_ns(measured), before, after, launch, tuple(rows))


def with_costs(problem: PlanningProblem, costs: CostTable) -> PlanningProblem:
    """The problem with its durations taken from another cost table; phases stay as they are.

    Raises:
        ProblemError: the table lacks a group, or has it with other phases.
    """
    kinds = {device.kind for device in problem.topology.devices}
    groups = []
    for group in problem.groups:
        times = dict(group.times)
        for kind in kinds:
            known = times[kind]
            phases = [phase for phase, spent in ((Phase.F, known.f_ns), (Phase.I, known.i_ns), (Phase.W, known.w_ns))
                      if spent is not None]
            times[kind] = times_of(group.name, phases, kind, costs.find(group.name, kind))
        groups.append(dataclasses.replace(group, times=times))
    return problem.replace(groups=tuple(groups))


def _factors(samples: dict[PhaseKey, list[tuple[int, int]]]) -> dict[PhaseKey, float]:
    return {key: statistics.median(real / max(planned, 1) for planned, real in pairs)
            for key, pairs in samples.items()}


def _launch_ns(plan: Plan, measured: Timeline) -> int:
    """The median time between two actions of a rank that follow one another without a gap in the simulation.

    ``plan`` has the measured durations, so that its simulation knows where ranks wait for one another.
    """
    found = {(span.rank, span.label): span for span in measured.spans}
    lanes: list[list[Span]] = [[] for _ in range(plan.problem.num_ranks)]
    for span in simulate(plan, lower(plan)).spans:
        if span.stream is Stream.COMPUTE and (span.rank, span.label) in found:
            lanes[span.rank].append(span)
    gaps = [found[second.rank, second.label].start_ns - found[first.rank, first.label].end_ns
            for lane in lanes for first, second in pairwise(sorted(lane, key=lambda span: span.start_ns))
            if first.end_ns == second.start_ns]
    return max(0, round(statistics.median(gaps))) if gaps else 0


def _stage_samples(plan: Plan, stages: StageView, measured: Timeline,
                   launch_ns: int = 0) -> dict[PhaseKey, list[tuple[int, int]]]:
    """(planned, measured) nanoseconds of every stage's phase on every kind it ran on; each action and ``launch_ns``.

    B and OVERLAP_F_B are shared out over their parts in proportion to the planned durations.
    """
    devices = plan.problem.topology.devices
    found: dict[PhaseKey, list[tuple[int, int]]] = {}
    for span in measured.spans:
        if span.stream is Stream.CHANNEL or span.kind in (ActionKind.ALL_REDUCE, ActionKind.OPTIMIZER_STEP):
            continue
        action = Action.parse(span.label)
        _check(plan, span, action)
        parts = [(stage, _PHASES.get(kind, Phase.F), stages.duration_ns(kind, stage, microbatch))
                 for kind, stage, microbatch in action.parts()
                 if kind in (ActionKind.F, ActionKind.RECOMPUTE) or _exists(stages, kind, stage)]
        planned = stages.duration_ns(action.kind, action.stage, action.microbatch, action.partner)
        factor = (span.end_ns - span.start_ns + launch_ns) / max(planned, 1)
        for stage, phase, own in parts:
            found.setdefault((stage, phase, devices[span.rank].kind), []).append((own, round(own * factor)))
    if not found:
        raise TimelineError(f"calibrate: the timeline has no action of plan {plan.name}")
    return found


def _exists(stages: StageView, kind: ActionKind, stage: int) -> bool:
    return (stages.i_ns if kind is ActionKind.I else stages.w_ns)[stage] is not None


def _check(plan: Plan, span: Span, action: Action) -> None:
    """Raise `TimelineError` unless the plan routes the action to the span's rank."""
    for _, stage, microbatch in action.parts():
        routes = plan.placement.routes
        known = stage < len(routes) and microbatch < plan.problem.num_microbatches
        if not known or routes[stage][microbatch] != span.rank:
            raise TimelineError(f"calibrate: rank {span.rank} ran {span.label}, which plan {plan.name} does not give"
                                " it; give the plan of this run")


def _transfer_samples(plan: Plan, measured: Timeline) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """(planned, measured) nanoseconds of the transfers that their receiver waited for, by channel."""
    sizes = {str(transfer): transfer.num_bytes for transfer in lower(plan).transfers}
    compute: list[list[Span]] = [[] for _ in range(measured.num_ranks)]
    for span in measured.spans:
        if span.stream is Stream.COMPUTE and span.kind is not ActionKind.OPTIMIZER_STEP:
            compute[span.rank].append(span)
    starts = []
    for spans in compute:
        spans.sort(key=lambda span: span.start_ns)
        starts.append([span.start_ns for span in spans])
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for span in measured.spans:
        if span.stream is not Stream.CHANNEL or span.peer is None or span.label not in sizes:
            continue
        following = bisect.bisect_left(starts[span.peer], span.end_ns)
        busy_until = max((before.end_ns for before in compute[span.peer][:following][-1:]), default=0)
        if busy_until < span.end_ns and following < len(starts[span.peer]):
            planned = plan.problem.topology.transfer_ns(span.rank, span.peer, sizes[span.label])
            found.setdefault((span.rank, span.peer), []).append((planned, span.end_ns - span.start_ns))
    return found


def _scaled(plan: Plan, costs: CostTable, factors: dict[PhaseKey, float]) -> CostTable:
    """The table with every group that ran scaled by its stage's factors."""
    stage_of = {plan.problem.groups[group].name: number for number, stage in enumerate(plan.placement.stages)
                for group in stage.groups}
    return dataclasses.replace(costs, entries=tuple(_entries(costs, stage_of, factors)),
                               notes=costs.notes | {"calibrated": f"from a run of plan {plan.name}"})


def _entries(costs: CostTable, stage_of: dict[str, int], factors: dict[PhaseKey, float]) -> Iterator[GroupCost]:
    for entry in costs.entries:
        stage = stage_of.get(entry.group, -1)
        scales = {phase: factors.get((stage, phase, entry.device_kind)) for phase in entry.times_ns}
        if all(scale is None for scale in scales.values()):
            yield entry
            continue
        times = {phase: round(time * (scales[phase] or 1.0)) for phase, time in entry.times_ns.items()}
        yield dataclasses.replace(entry, times_ns=times, origin="calibrated")


def _row(what: str, kind: str, pairs: list[tuple[int, int]]) -> DriftRow:
    ratios = sorted(real / max(planned, 1) for planned, real in pairs)
    ratio = statistics.median(ratios)
    spread = 0.0
    if len(ratios) >= 4:
        low, _, high = statistics.quantiles(ratios, n=4)
        spread = (high - low) / 2 / ratio if ratio else 0.0
    return DriftRow(what, kind, len(pairs), round(statistics.median(planned for planned, _ in pairs)),
                    round(statistics.median(real for _, real in pairs)), round(ratio, 4), round(spread, 4))


def _step_ns(measured: Timeline) -> int:
    """The measured makespan without the optimizer, which the simulation leaves out."""
    return max((span.end_ns for span in measured.spans if span.kind is not ActionKind.OPTIMIZER_STEP), default=0)
