"""From a merge plan to its `Program`: what every rank reads, measures, merges and writes, portion by portion.

A unit (one tensor of the output) is walked in `MergeStep`s: some rows of one of its pieces, read once. Statistics over
several tensors come first, round by round, each round ended by an ALL_REDUCE of all ranks; then every unit is merged,
its own statistics before it. ::

    LOAD s, LOAD s+1, COMBINE s, FREE s, SAVE s, LOAD s+2, COMBINE s+1, ...          (with one step read ahead)

A stage of the program is a unit's index, a microbatch a step's number within its unit. Tensors whose rows are gathered
(a joined vocabulary, experts to be matched) are read where they are needed, inside MEASURE and COMBINE, and have no
LOAD. How large portions are and how many are read ahead is the plan's choice, made for speed and memory; results do
not depend on it, because tiles do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mipipe.graphs.merging.checkpoint_files import DTYPE_BITS
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeUnit, columns_of, pieces_of
from mipipe.graphs.merging.passes import Scope, is_whole, is_wide, num_rounds, scope_of
from mipipe.graphs.merging.tensor_classes import Piece
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.program import Instruction, Program

if TYPE_CHECKING:
    from mipipe.planner.merging.plan import MergePlan

TILE_ENTRIES = 2**18
"""Entries of a tile; the same as `mipipe.runtime.merge.methods.method.TILE_ELEMENTS` (a test compares them)."""


@dataclass(frozen=True, slots=True)
class MergeStep:
    """Rows ``[start, stop)`` of a unit's table, inside one piece, read once.

    For a ``round`` of statistics, or (None) to be merged. ``wide``: the statistics are shared with other tensors.
    ``last``: the piece's last step of this round or merge. Of a copied tensor the rows are bytes.
    """

    piece: int
    start: int
    stop: int
    round: int | None = None
    wide: bool = False
    last: bool = False

    @property
    def kind(self) -> ActionKind:
        """What is done with the rows."""
        return ActionKind.COMBINE if self.round is None else ActionKind.MEASURE


def unit_steps(unit: MergeUnit, graph: MergeGraph, portion_entries: int) -> list[MergeStep]:
    """A unit's steps in order, those of shared statistics first."""
    if unit.method == "copy":
        size = unit.inputs[0].tensor.num_bytes
        step = portion_entries * 2
        return [MergeStep(0, start, min(start + step, size), last=start + step >= size)
                for start in range(0, size, step)]
    pieces = pieces_of(unit, graph.source_config)
    columns = columns_of(unit, unit.shape)
    tile_rows = max(1, TILE_ENTRIES // max(1, columns))
    portion_rows = tile_rows * max(1, portion_entries // max(1, tile_rows * columns))
    rounds, wide = num_rounds(unit), is_wide(unit)
    steps = []
    for number in range(rounds) if wide else ():
        for index, piece in enumerate(pieces):
            steps += _portions(index, piece, portion_rows, number, wide=True)
    for index, piece in enumerate(pieces):
        for number in range(rounds) if scope_of(unit) is Scope.PIECE else ():
            steps += _portions(index, piece, portion_rows, number)
        steps += _portions(index, piece, piece.stop - piece.start if is_whole(unit) else portion_rows, None)
    return steps


def _portions(index: int, piece: Piece, rows: int, number: int | None, wide: bool = False) -> list[MergeStep]:
    return [MergeStep(index, start, min(start + rows, piece.stop), number, wide, start + rows >= piece.stop)
            for start in range(piece.start, piece.stop, max(1, rows))]


def is_gathered(unit: MergeUnit, graph: MergeGraph) -> bool:
    """Whether a unit's rows come from scattered places, so that they are read tile by tile where they are needed."""
    return unit.vocabulary or (graph.align_experts and bool(unit.experts) and unit.method != "copy")


def reads(unit: MergeUnit, step: MergeStep, graph: MergeGraph) -> list[tuple[Input, int, int]]:
    """The bytes ``[start, stop)`` of every input's tensor that a step's LOAD reads; none where rows are gathered."""
    if unit.method == "copy":
        return [(unit.inputs[0], step.start, step.stop)]
    if is_gathered(unit, graph):
        return []
    found = []
    for item in unit.inputs:
        width = columns_of(unit, item.tensor.shape) * DTYPE_BITS[item.tensor.dtype] // 8
        found.append((item, step.start * width, step.stop * width))
    return found


def label(plan: MergePlan, instruction: Instruction) -> str:
    """An instruction in words: ``COMBINE model.norm.weight, step 0``."""
    action = instruction.action
    if action is None:
        return f"{instruction.kind} of round {instruction.stage}"
    return f"{instruction.kind} {plan.graph.units[action.stage].name}, step {action.microbatch}"


def lower_merge(plan: MergePlan) -> Program:
    """The program of a merge."""
    return Program(tuple(lower_rank(plan, rank) for rank in range(len(plan.ranks))), ())


def lower_rank(plan: MergePlan, rank: int) -> tuple[Instruction, ...]:
    """One rank's instructions."""
    graph = plan.graph
    steps = {index: unit_steps(graph.units[index], graph, plan.portion_entries) for index in plan.ranks[rank]}
    instructions: list[Instruction] = []
    everyone = tuple(range(len(plan.ranks)))
    for number in range(max((num_rounds(unit) for unit in graph.units if is_wide(unit)), default=0)):
        chosen = [(index, place) for index in plan.ranks[rank] for place, step in enumerate(steps[index])
                  if step.wide and step.round == number]
        instructions += _walk(plan, chosen, steps)
        instructions.append(Instruction(ActionKind.ALL_REDUCE, Stream.COLLECTIVE, stage=number, peers=everyone))
    instructions += _walk(plan, [(index, place) for index in plan.ranks[rank]
                                 for place, step in enumerate(steps[index]) if not step.wide], steps)
    return tuple(instructions)


def _walk(plan: MergePlan, chosen: Sequence[tuple[int, int]],
          steps: dict[int, list[MergeStep]]) -> list[Instruction]:
    """Steps one after another, each read ``plan.ahead`` steps before it is needed."""
    instructions: list[Instruction] = []

    def add(kind: ActionKind, place: int, stream: Stream = Stream.COMPUTE) -> None:
        index, step = chosen[place]
        instructions.append(Instruction(kind, stream, Action(index, kind, step)))

    loaded = [not is_gathered(plan.graph.units[index], plan.graph) for index, _ in chosen]
    for place, (index, number) in enumerate(chosen):
        for other in range(place if place == 0 else place + plan.ahead, min(place + plan.ahead + 1, len(chosen))):
            if loaded[other]:
                add(ActionKind.LOAD, other, Stream.CHANNEL)
        step = steps[index][number]
        copied = plan.graph.units[index].method == "copy"
        if not copied:
            add(step.kind, place)
            if loaded[place]:
                add(ActionKind.FREE, place)
        if step.round is None:
            add(ActionKind.SAVE, place)
        if copied:
            add(ActionKind.FREE, place)
    return instructions
