"""Executes one rank's part of a merge's program: a loop over instructions with one handler for each kind.

Which rows are read when was decided by the plan; see `mipipe.planner.merging.lower`. Reading ahead is the work of a
second thread, which does nothing but read; everything that rounds is done by this one, so it does not show in the
result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mipipe.graphs.errors import RunError
from mipipe.graphs.merging.graph import MergeUnit
from mipipe.graphs.merging.passes import is_whole
from mipipe.planner.actions import ActionKind
from mipipe.planner.merging.lower import CALIBRATED, label
from mipipe.planner.merging.plan import MergePlan
from mipipe.planner.merging.steps import MergeStep, reads, unit_steps
from mipipe.planner.program import Instruction
from mipipe.runtime.merge.finite import refuse_nonfinite, refuse_overflow
from mipipe.runtime.merge.methods.method import Method, Round, Tile
from mipipe.runtime.merge.methods.registry import BY_METHOD
from mipipe.runtime.merge.sources import Surroundings, UnitPiece, unit_pieces
from mipipe.runtime.merge.survey import Survey, unit_values
from mipipe.runtime.weights.reader import TORCH_DTYPES, Range

Merged = Tensor | dict[str, Tensor]
"""A merged tile in the output's dtype, or the parts of a piece by name."""
Event = tuple[int, int, int]
"""Number of the instruction, start and end in nanoseconds."""


class Sink(Protocol):
    """Where results go: `mipipe.runtime.weights.writer.Writer` or `mipipe.runtime.merge.methods.parts.PartsWriter`."""

    def write(self, name: str, offset: int, data: Any) -> int:
        """Write what belongs at an offset of a tensor; returns how many bytes."""

    def finish(self, name: str) -> None:
        """Note that a tensor is complete."""


class ModelRunner(Protocol):
    """What runs models: `mipipe.runtime.merge.calibrate.RankCalibration`."""

    def run(self, stream: int, step: int) -> None:
        """Run a step of a stream."""

    def finish(self, around: Surroundings) -> Surroundings:
        """Wait for all ranks, and add what they found to what tiles are read with."""


@dataclass(slots=True)
class UnitProgress:
    """Where a unit is: its steps and pieces, its method with its values, its statistics, how much is written."""

    unit: MergeUnit
    steps: list[MergeStep]
    pieces: list[UnitPiece]
    method: Method | None
    values: dict[str, Any]
    stats: Any = None
    total: Tensor | None = None
    parts: list[Tensor] = field(default_factory=list)
    written: int = 0


class MergeEngine:
    """One rank of a merge. ``done`` are tensors that an earlier run finished; they are measured, but not merged again.

    ``advance`` is called with the bytes of every finished tensor. After `run`, ``events`` has what happened when.
    """

    def __init__(self, plan: MergePlan, around: Surroundings, survey: Survey, writer: Sink, done: Set[str],
                 advance: Callable[[int], None] | None = None, calibration: ModelRunner | None = None) -> None:
        self.plan, self.around, self.survey, self.writer = plan, around, survey, writer
        self.calibration = calibration
        self.done, self.advance = done, advance
        self.events: list[Event] = []
        self._units: dict[int, UnitProgress] = {}
        self._loads: dict[tuple[int, int], tuple[list[Range], Future[tuple[list[Tensor], Event]]]] = {}
        self._merged: dict[tuple[int, int], list[Merged]] = {}
        self._position = 0
        self._reader: ThreadPoolExecutor | None = None
        self._handlers: Mapping[ActionKind, Callable[[Instruction], None]] = {
            ActionKind.LOAD: self._load, ActionKind.MEASURE: self._measure, ActionKind.COMBINE: self._combine,
            ActionKind.SAVE: self._save, ActionKind.FREE: self._free, ActionKind.ALL_REDUCE: self._join,
            ActionKind.CALIBRATE: self._calibrate}

    def run(self, program: Sequence[Instruction]) -> None:
        """Execute the instructions in order.

        Raises:
            RunError: a file ends early or cannot be written, or values are not finite.
        """
        with ThreadPoolExecutor(1, "mipipe-reader") as self._reader, torch.no_grad():
            for self._position, instruction in enumerate(program):
                try:
                    if not self._is_done(instruction):
                        self._handlers[instruction.kind](instruction)
                except Exception as error:
                    error.add_note(f"instruction {self._position} of {len(program)}: {label(self.plan, instruction)}")
                    raise

    def _is_done(self, instruction: Instruction) -> bool:
        """Whether an earlier run did what the instruction is for."""
        action = instruction.action
        if action is None or action.kind is ActionKind.CALIBRATE:
            return False
        if self.plan.graph.units[action.stage].name not in self.done:
            return False
        at = self._progress(action.stage)
        if at.steps[action.microbatch].wide:
            return False
        if instruction.kind is ActionKind.SAVE and action.microbatch == len(at.steps) - 1:
            self._finish(action.stage)
        return True

    def _progress(self, index: int) -> UnitProgress:
        if index not in self._units:
            unit = self.plan.graph.units[index]
            copied = unit.method == "copy"
            self._units[index] = UnitProgress(
                unit, unit_steps(unit, self.plan.graph, self.plan.portion_entries),
                [] if copied else unit_pieces(unit, self.around),
                None if copied else BY_METHOD[unit.method].handling(unit.tensor_class),
                {} if copied else unit_values(unit))
        return self._units[index]

    def _at(self, instruction: Instruction) -> tuple[tuple[int, int], UnitProgress, MergeStep]:
        action = instruction.action
        assert action is not None
        at = self._progress(action.stage)
        return (action.stage, action.microbatch), at, at.steps[action.microbatch]

    # Handlers --------------------------------------------------------------------------------------------------------

    def _load(self, instruction: Instruction) -> None:
        key, at, step = self._at(instruction)
        ranges = [(item.folder, item.tensor, start, stop)
                  for item, start, stop in reads(at.unit, step, self.plan.graph)]
        shelf, position = self.around.shelf, self._position
        shelf.open(ranges)

        def fetch() -> tuple[list[Tensor], Event]:
            start = time.perf_counter_ns()
            buffers = shelf.fetch(ranges)
            return buffers, (position, start, time.perf_counter_ns())

        assert self._reader is not None
        if self.plan.ahead:
            self._loads[key] = (ranges, self._reader.submit(fetch))
            return
        ready: Future[tuple[list[Tensor], Event]] = Future()
        ready.set_result(fetch())
        self._loads[key] = (ranges, ready)

    def _wait(self, key: tuple[int, int]) -> list[Tensor]:
        """Wait for a LOAD, if the step has one, and hand its bytes to the shelf."""
        if key not in self._loads:
            return []
        ranges, future = self._loads[key]
        buffers, event = future.result()
        self.events.append(event)
        self.around.shelf.hold(ranges, buffers)
        return buffers

    def _measure(self, instruction: Instruction) -> None:
        key, at, step = self._at(instruction)
        self._wait(key)
        start = time.perf_counter_ns()
        round_, stats = self._round(at, step)
        for tile in self._tiles(at, step, whole=False):
            part = round_.measure(tile, stats, **at.values)
            at.total = part if at.total is None else at.total + part
        if step.last:
            assert at.total is not None
            total, at.total = at.total, None
            if not step.wide:
                at.stats = round_.finish(total, stats, **at.values)
            else:
                at.parts.append(total)
                if step.piece == len(at.pieces) - 1:
                    self.survey.add(key[0], at.unit, torch.stack(at.parts).sum(0))
                    at.parts = []
        self.events.append((self._position, start, time.perf_counter_ns()))

    def _round(self, at: UnitProgress, step: MergeStep) -> tuple[Round, Any]:
        assert step.round is not None and at.method is not None
        if step.wide:
            return self.survey.step(at.unit, step.round), self.survey.stats(at.unit)
        return at.method.rounds(**at.values)[step.round], at.stats

    def _combine(self, instruction: Instruction) -> None:
        key, at, step = self._at(instruction)
        self._wait(key)
        start = time.perf_counter_ns()
        assert at.method is not None
        wide = self.survey.stats(at.unit)
        dtype = TORCH_DTYPES[at.unit.dtype]
        turned = at.unit.transposed and is_whole(at.unit) and at.method.spec.oriented
        found: list[Merged] = []
        for tile in self._tiles(at, step, whole=is_whole(at.unit)):
            merged = at.method.apply(tile, at.stats if wide is None else wide, **at.values)
            if isinstance(merged, dict):  # parts to be stored
                found.append(merged)
                continue
            like = tile.models[0] if tile.models else tile.origin
            if merged.shape != like.shape:
                raise RunError(f"{at.unit.name}: {at.unit.method} makes {list(merged.shape)} of tiles of shape"
                               f" {list(like.shape)}; a method keeps the shape")
            if not bool(torch.isfinite(merged.sum())) and not bool(torch.isfinite(merged).all()):
                refuse_nonfinite(at.unit, at.pieces[step.piece])
            refuse_overflow(at.unit.name, merged, dtype)
            found.append((merged.T if turned else merged).to(dtype).cpu())
        self._merged[key] = found
        if step.last:
            at.stats = None
        self.events.append((self._position, start, time.perf_counter_ns()))

    def _tiles(self, at: UnitProgress, step: MergeStep, whole: bool) -> Iterator[Tile]:
        piece = at.pieces[step.piece]
        origin = piece.piece.start
        return piece.tiles(whole, step.start - origin, step.stop - origin)

    def _save(self, instruction: Instruction) -> None:
        key, at, _ = self._at(instruction)
        tensors: Sequence[Merged] = self._wait(key) if at.method is None else self._merged.pop(key)
        start = time.perf_counter_ns()
        for tensor in tensors:
            at.written += self.writer.write(at.unit.name, at.written, tensor)
        self.events.append((self._position, start, time.perf_counter_ns()))
        if key[1] == len(at.steps) - 1:
            self.writer.finish(at.unit.name)
            self._finish(key[0])

    def _finish(self, index: int) -> None:
        unit = self._units.pop(index).unit
        if self.advance is not None:
            self.advance(unit.write_bytes)

    def _free(self, instruction: Instruction) -> None:
        assert instruction.action is not None
        ranges, _ = self._loads.pop((instruction.action.stage, instruction.action.microbatch))
        self.around.shelf.drop(ranges)

    def _calibrate(self, instruction: Instruction) -> None:
        assert instruction.action is not None and self.calibration is not None
        start = time.perf_counter_ns()
        self.calibration.run(instruction.action.stage, instruction.action.microbatch)
        self.events.append((self._position, start, time.perf_counter_ns()))

    def _join(self, instruction: Instruction) -> None:
        assert instruction.stage is not None
        start = time.perf_counter_ns()
        if instruction.stage == CALIBRATED:
            assert self.calibration is not None
            self.around = self.calibration.finish(self.around)
        else:
            self.survey.finish_round(instruction.stage)
        self.events.append((self._position, start, time.perf_counter_ns()))
