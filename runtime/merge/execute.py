"""Runs one rank's part of a merge plan: load, delta, combine, save, unit after unit."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mipipe.graphs.errors import RunError
from mipipe.graphs.merge_graph import MergeUnit
from mipipe.planner.merge_plan import MergePlan
from mipipe.runtime.merge.align import match_experts
from mipipe.runtime.merge.exchange import Exchange
from mipipe.runtime.merge.method import merge_piece
from mipipe.runtime.merge.output import Writer, finished
from mipipe.runtime.merge.registry import BY_METHOD
from mipipe.runtime.merge.shelf import Shelf
from mipipe.runtime.merge.sources import Surroundings, UnitPiece, unit_pieces
from mipipe.runtime.merge.survey import scope_key, survey, unit_values

COPY_BYTES = 2**24
"""Copied tensors pass through a buffer of this size."""


@dataclass(frozen=True, slots=True)
class RankReport:
    """What a rank did: units merged (and found done), seconds, bytes, and its peak memory above the start."""

    rank: int
    units: int
    resumed: int
    seconds: float
    read_bytes: int
    write_bytes: int
    peak_bytes: int


def run_rank(plan: MergePlan, folder: Path, exchange: Exchange, device: torch.device,
             progress: Callable[[int], None] | None = None) -> RankReport:
    """Merge the units this rank has, into the prepared ``folder``; units already in a journal are skipped.

    Args:
        progress: called with the bytes of every finished unit.
    """
    torch.set_num_threads(1)  # sums over threads would change the last bits with the thread count
    began, before = time.monotonic(), resident_bytes()
    units, mine = plan.graph.units, plan.ranks[exchange.rank]
    with Shelf() as shelf, torch.no_grad():
        around = Surroundings(plan.graph, shelf, device,
                              {(item.model, unit.name): item for unit in units for item in unit.inputs})
        if plan.graph.align_experts:
            around = match_experts(around, units, exchange)
        stats = survey(units, mine, around, exchange)
        done = finished(folder)
        exchange.barrier()  # nobody appends to a journal before everybody has read them all
        writer = Writer(folder, plan.shards, exchange.rank)
        try:
            for index in mine:
                unit = units[index]
                if unit.name not in done:
                    merge_unit(unit, around, stats, writer)
                if progress is not None:
                    progress(unit.write_bytes)
        finally:
            writer.close()
    left = [units[index] for index in mine if units[index].name not in done]
    return RankReport(exchange.rank, len(left), len(mine) - len(left), time.monotonic() - began,
                      sum(unit.read_bytes for unit in left), sum(unit.write_bytes for unit in left),
                      max(0, peak_bytes() - before))


def merge_unit(unit: MergeUnit, around: Surroundings, stats: Mapping[Any, Any], writer: Writer) -> None:
    """Merge one tensor and write it tile by tile.

    Raises:
        RunError: the result has values that are not numbers although the inputs have none.
    """
    if unit.method == "copy":
        copy_unit(unit, around, writer)
        return
    method, values = BY_METHOD[unit.method].handling(unit.tensor_class), unit_values(unit)
    wide = stats.get(key) if (key := scope_key(unit)) is not None else None
    offset = 0
    for piece in unit_pieces(unit, around):
        for merged in merge_piece(method, piece, values, wide):
            if not bool(torch.isfinite(merged.sum())) and not bool(torch.isfinite(merged).all()):
                _explain(unit, piece)
            turned = unit.transposed and method.spec.whole and method.spec.oriented
            offset += writer.write(unit.name, offset, merged.T if turned else merged)
    writer.finish(unit.name)


def _explain(unit: MergeUnit, piece: UnitPiece) -> None:
    """Raise for a tensor that came out with NaN or infinite values, naming the input at fault if there is one."""
    for tile in piece.tiles(whole=False):
        tensors = ([] if tile.base is None else [tile.base]) + list(tile.models)
        for item, tensor in zip(unit.inputs, tensors, strict=True):
            if not bool(torch.isfinite(tensor).all()):
                raise RunError(f"{item.folder}: tensor {item.tensor.name} holds values that are not finite numbers")
    raise RunError(f"{unit.name}: {unit.method} gives values that are not finite numbers; check its parameters")


def copy_unit(unit: MergeUnit, around: Surroundings, writer: Writer) -> None:
    """Copy a tensor's bytes as they are."""
    item = unit.inputs[0]
    for start in range(0, item.tensor.num_bytes, COPY_BYTES):
        stop = min(start + COPY_BYTES, item.tensor.num_bytes)
        writer.write(unit.name, start, around.shelf.read_bytes(item.folder, item.tensor, start, stop))
    writer.finish(unit.name)


def peak_bytes() -> int:
    """Largest resident memory of this process so far; where the system tells, without what its parent was."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return peak_bytes()
