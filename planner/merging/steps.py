"""How a unit of a merge is walked: some rows of one of its pieces at a time, each read once.

Statistics over several tensors come first, round by round; then every unit is merged, its own statistics before it.
Tensors whose rows are gathered (a joined vocabulary, experts to be matched) are read where they are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mipipe.graphs.merging.checkpoints.files import DTYPE_BITS
from mipipe.graphs.merging.checkpoints.tensor_classes import TableRows
from mipipe.graphs.merging.graph import Input, MergeGraph, MergeUnit, columns_of, pieces_of
from mipipe.graphs.merging.method_table.method_spec import Scope
from mipipe.graphs.merging.passes import is_whole, is_wide, num_rounds, scope_of
from mipipe.planner.actions import ActionKind

TILE_ENTRIES = 2**18
"""Entries of a tile: 1 MiB in float32, so a few of them fit a core's second-level cache."""


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


def _portions(index: int, piece: TableRows, rows: int, number: int | None, wide: bool = False) -> list[MergeStep]:
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
    if unit.widened:  # its rows are not those of the inputs
        return [(item, 0, item.tensor.num_bytes) for item in unit.inputs]
    found = []
    for item in unit.inputs:
        width = columns_of(unit, item.tensor.shape) * DTYPE_BITS[item.tensor.dtype] // 8
        found.append((item, step.start * width, step.stop * width))
    return found
