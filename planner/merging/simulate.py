"""The timeline of a merge: its program executed on a clock, at the plan's rates, with every rank's memory over time.

A rank has two streams: reading (LOAD, one at a time, in order) and computing (everything else). MEASURE and COMBINE
wait for their LOAD; an ALL_REDUCE starts when all ranks have reached it and takes no time, because statistics are
small. Memory is what was read and not yet freed, what was merged and not yet saved, and what computing takes.
"""

from __future__ import annotations

import dataclasses

from mipipe.graphs.errors import ProgramError
from mipipe.graphs.merging.graph import columns_of
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.merging.calibration import RunCosts
from mipipe.planner.merging.costs import (
    OVERHEAD_BYTES,
    held_bytes,
    shared_rates,
    spectral_seconds,
    step_overhead,
    stream_seconds,
    work_bytes,
    written_bytes,
)
from mipipe.planner.merging.lower import label
from mipipe.planner.merging.plan import MergePlan
from mipipe.planner.merging.steps import MergeStep, unit_steps
from mipipe.planner.program import Instruction, Program
from mipipe.planner.timeline import Span, Timeline


def simulate_merge(plan: MergePlan, program: Program) -> Timeline:
    """The simulated timeline of a merge, at the rates of ranks that share processors and disk.

    Raises:
        ProgramError: something is computed on before it is loaded, or freed or saved before it is there, or is left
            over at the end, or the ranks disagree on how many statistics they share.
    """
    plan = dataclasses.replace(plan, rates=shared_rates(plan.rates, len(program.ranks)))
    ranks = [_Rank(plan, number) for number in range(len(program.ranks))]
    places = [0] * len(ranks)
    while True:
        for rank, instructions in zip(ranks, program.ranks, strict=True):
            while places[rank.number] < len(instructions):
                instruction = instructions[places[rank.number]]
                if instruction.kind is ActionKind.ALL_REDUCE:
                    break
                rank.run(instruction)
                places[rank.number] += 1
        waiting = [rank for rank in ranks if places[rank.number] < len(program.ranks[rank.number])]
        if not waiting:
            break
        if len(waiting) < len(ranks):
            raise ProgramError(f"rank {waiting[0].number}: waits at an ALL_REDUCE that not all ranks reach")
        now = max(rank.busy_ns for rank in ranks)
        for rank in ranks:
            rank.busy_ns = now
            places[rank.number] += 1
    for rank in ranks:
        rank.check_empty()
    spans = sorted((span for rank in ranks for span in rank.spans), key=lambda span: (span.start_ns, span.rank))
    return Timeline("simulated", len(ranks), tuple(spans), tuple(rank.curve() for rank in ranks),
                    (OVERHEAD_BYTES,) * len(ranks), 1, {"merge": plan.graph.recipe.get("merge_method", "")})


def step_ns(plan: MergePlan, unit: int, step: MergeStep, kind: ActionKind) -> int:
    """How long an instruction on a step takes at the plan's rates."""
    graph, rates = plan.graph, plan.rates
    item = graph.units[unit]
    own = step_overhead(item, kind, rates)
    if kind is ActionKind.LOAD:
        return round((own + held_bytes(item, step, graph) / rates.read) * 1e9)
    if kind is ActionKind.SAVE:
        return round((own + written_bytes(item, step) / rates.write) * 1e9)
    width = 8 if graph.compute_dtype == "float64" else 4
    share = (step.stop - step.start) * columns_of(item, item.shape) / max(1, item.num_entries)
    seconds = own + stream_seconds(item, item.num_entries, rates, width) * share
    if step.round is None:
        seconds += spectral_seconds(item, rates) * share
    if not held_bytes(item, step, graph):  # read tile by tile while computing
        seconds += item.read_bytes * share / rates.read
    return round(seconds * 1e9)


class _Rank:
    """One rank's clock, and what it holds."""

    def __init__(self, plan: MergePlan, number: int) -> None:
        self.plan, self.number = plan, number
        self.busy_ns = self.reading_ns = 0
        self.loaded: dict[tuple[int, int], int] = {}
        self.merged: set[tuple[int, int]] = set()
        self.spans: list[Span] = []
        self.changes: dict[int, int] = {0: OVERHEAD_BYTES}
        self._steps: dict[int, list[MergeStep]] = {}
        self._costs: RunCosts | None = None
        self._width = 8 if plan.graph.compute_dtype == "float64" else 4

    def run(self, instruction: Instruction) -> None:
        """Execute one instruction that needs no other rank."""
        action = instruction.action
        assert action is not None
        if instruction.kind is ActionKind.CALIBRATE:
            self._calibrate(instruction, action)
            return
        key = (action.stage, action.microbatch)
        unit, step = self.plan.graph.units[action.stage], self._step(action)
        if instruction.kind is ActionKind.FREE:
            if key not in self.loaded:
                raise self._wrong(action, "frees what was not loaded")
            self._hold(self.busy_ns, -held_bytes(unit, step, self.plan.graph))
            del self.loaded[key]
            return
        if instruction.kind is ActionKind.LOAD:
            start = max(self.busy_ns, self.reading_ns)
            self._hold(start, held_bytes(unit, step, self.plan.graph))
            self.reading_ns = self.loaded[key] = self._span(instruction, action, step, start)
            return
        copied = unit.method == "copy"
        if instruction.kind is ActionKind.SAVE:
            if key not in (self.loaded if copied else self.merged):
                raise self._wrong(action, "saves what was not merged")
            start = max(self.busy_ns, self.loaded.get(key, 0))
            self.busy_ns = self._span(instruction, action, step, start)
            if not copied:
                self._hold(self.busy_ns, -written_bytes(unit, step))
                self.merged.discard(key)
            return
        if key not in self.loaded and held_bytes(unit, step, self.plan.graph):
            raise self._wrong(action, "computes on what was not loaded")
        start = max(self.busy_ns, self.loaded.get(key, 0))
        self._hold(start, work_bytes(unit, self._width) + written_bytes(unit, step))
        self.busy_ns = self._span(instruction, action, step, start)
        self._hold(self.busy_ns, -work_bytes(unit, self._width))
        if instruction.kind is ActionKind.COMBINE:
            self.merged.add(key)

    def _calibrate(self, instruction: Instruction, action: Action) -> None:
        """Run a step of a calibration stream."""
        calibration = self.plan.graph.calibration
        assert calibration is not None
        costs = RunCosts(self.plan.graph, self.plan.rates) if self._costs is None else self._costs
        self._costs, stream, start = costs, calibration.streams[action.stage], self.busy_ns
        memory = costs.step_memory(stream, action.microbatch)
        self._hold(start, memory)
        self.busy_ns = start + round(costs.step_seconds(stream, action.microbatch) * 1e9)
        self.spans.append(Span(self.number, instruction.stream, instruction.kind, label(self.plan, instruction), start,
                               self.busy_ns, action.stage, action.microbatch))
        self._hold(self.busy_ns, -memory)

    def check_empty(self) -> None:
        """Raise if something was loaded or merged and never dropped."""
        for key, what in ((next(iter(self.loaded), None), "is never freed"),
                          (next(iter(self.merged), None), "is never saved")):
            if key is not None:
                raise ProgramError(f"rank {self.number}: step {key[1]} of {self.plan.graph.units[key[0]].name} {what}")

    def curve(self) -> tuple[tuple[int, int], ...]:
        """Memory as steps ``(ns, bytes)``."""
        level, steps = 0, list[tuple[int, int]]()
        for moment in sorted(self.changes):
            level += self.changes[moment]
            steps.append((moment, level))
        return tuple(steps)

    def _step(self, action: Action) -> MergeStep:
        if action.stage not in self._steps:
            self._steps = {action.stage: unit_steps(self.plan.graph.units[action.stage], self.plan.graph,
                                                    self.plan.portion_entries), **self._steps}
        return self._steps[action.stage][action.microbatch]

    def _span(self, instruction: Instruction, action: Action, step: MergeStep, start: int) -> int:
        end = start + step_ns(self.plan, action.stage, step, instruction.kind)
        self.spans.append(Span(self.number, instruction.stream, instruction.kind,
                               label(self.plan, instruction), start, end, action.stage, action.microbatch))
        return end

    def _hold(self, moment: int, size: int) -> None:
        self.changes[moment] = self.changes.get(moment, 0) + size

    def _wrong(self, action: Action, what: str) -> ProgramError:
        return ProgramError(f"rank {self.number}, {action.kind} of {self.plan.graph.units[action.stage].name}, step"
                            f" {action.microbatch}: {what}")
