"""Runs one rank's part of a merge plan, lowered to its program; see `mipipe.runtime.merge.engine`."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mipipe.planner.merging.lower import label, lower_rank
from mipipe.planner.merging.plan import MergePlan
from mipipe.planner.timeline import Span, Timeline
from mipipe.runtime.merge.align import match_experts
from mipipe.runtime.merge.calibrate import RankCalibration
from mipipe.runtime.merge.engine import Event, MergeEngine
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.methods.parts import PartsWriter
from mipipe.runtime.merge.pleas import ordered
from mipipe.runtime.merge.sources import Surroundings
from mipipe.runtime.merge.survey import Survey
from mipipe.runtime.weights.reader import Shelf
from mipipe.runtime.weights.writer import Writer, finished


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


def run_rank(plan: MergePlan, folder: Path, exchange: MergeRanks, device: torch.device,
             progress: Callable[[int], None] | None = None) -> tuple[RankReport, list[Event]]:
    """Merge the units this rank has, into the prepared ``folder``; units already in a journal are skipped.

    Returns what was done, and when each instruction of the rank's program ran.

    Args:
        progress: called with the bytes of every finished unit.
    """
    torch.set_num_threads(1)  # sums over threads would change the last bits with the thread count
    began, before = time.monotonic(), process_bytes()
    units, mine = plan.graph.units, plan.ranks[exchange.rank]
    with Shelf() as shelf:
        around = Surroundings(plan.graph, shelf, device,
                              {(item.model, unit.name): item for unit in units for item in unit.inputs})
        if plan.graph.align_experts:
            around = match_experts(around, units, exchange)
        if plan.graph.calibration is None:
            around = ordered(plan.graph, around, None)
        done = finished(folder)
        exchange.barrier()  # nobody appends to a journal before everybody has read them all
        writer = (PartsWriter(folder, exchange.rank) if plan.graph.stores_parts
                  else Writer(folder, plan.shards, exchange.rank))
        calibration = RankCalibration(plan, folder, around, exchange) if plan.graph.calibration is not None else None
        engine = MergeEngine(plan, around, Survey(units, exchange), writer, done, progress, calibration)
        try:
            engine.run(lower_rank(plan, exchange.rank))
        finally:
            writer.close()
    left = [units[index] for index in mine if units[index].name not in done]
    return RankReport(exchange.rank, len(left), len(mine) - len(left), time.monotonic() - began,
                      sum(unit.read_bytes for unit in left), sum(unit.write_bytes for unit in left),
                      max(0, peak_bytes() - before)), engine.events


def merge_timeline(plan: MergePlan, events: Sequence[Sequence[Event]]) -> Timeline:
    """The measured timeline of a merge on one host (ranks share its monotonic clock), from all ranks' events."""
    origin = min((start for rank in events for _, start, _ in rank), default=0)
    spans = []
    for rank, found in enumerate(events):
        program = lower_rank(plan, rank)
        for number, start, end in found:
            instruction = program[number]
            action = instruction.action
            place = (action.stage, action.microbatch) if action is not None else (-1, -1)
            spans.append(Span(rank, instruction.stream, instruction.kind, label(plan, instruction), start - origin,
                              end - origin, *place))
    spans.sort(key=lambda span: (span.start_ns, span.rank))
    return Timeline("measured", len(events), tuple(spans), notes={"merge": plan.graph.recipe.get("merge_method", "")})


def peak_bytes() -> int:
    """Largest resident memory of this process so far; where the system tells, without what its parent was."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_bytes() -> int:
    """Resident memory of this process now; its peak where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:
        return peak_bytes()
