"""Measured timelines: each rank's events, on one clock, as a `Timeline`.

Processes on one machine share the monotonic clock, so their offsets are exactly zero; between machines the offset to
rank 0 is estimated from the fastest of several round trips (Cristian, 1989; error at most half of that round trip).

What a span of a transfer means: from the moment the sender handed it over to the moment the receiver noticed it, which
is when its consumer asked for it. A transfer that arrived earlier looks longer than it was; calibration uses only those
that were waited for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.timeline import AxisSpan, Span, Timeline
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks import processes

ROUND_TRIPS = 20
"""Enough for one of them to be undisturbed."""


def measured_timeline(engine: Engine) -> Timeline | None:
    """The timeline of the engine's last step on plan rank 0 of the first copy, of the first member of every team; None
    elsewhere. All ranks must call."""
    offset = clock_offset_ns()
    rank, program = engine.mesh.rank, engine.compiled.program
    compute = []
    for index, start, end in engine.record.events:
        action = program.ranks[rank][index].action
        place = (action.stage, action.microbatch) if action else (-1, -1)
        compute.append((index, *place, start + offset, end + offset))
    moved = [(index, side, moment + offset) for index, side, moment in engine.record.transfer_times]
    memory = [(moment + offset, size) for moment, size in engine.record.memory]
    talk = [(axis, what, start + offset, end + offset) for axis, what, start, end in engine.record.talk]
    mesh = engine.mesh
    mine = (rank, mesh.copy == 0 and mesh.member == 0, compute, moved, memory, talk)
    everyone = processes.gather(mine)
    if not mesh.first:
        return None
    return _assemble(engine, sorted((item for item in everyone if item[1]), key=lambda item: item[0]))


def _assemble(engine: Engine, everyone: Sequence[Any]) -> Timeline:
    program = engine.compiled.program
    origin = min((start for _, _, compute, *_ in everyone for *_, start, _ in compute), default=0)
    spans = []
    sent: dict[int, int] = {}
    arrived: dict[int, int] = {}
    axes: list[AxisSpan] = []
    for rank, _, compute, moved, _, talk in everyone:
        axes += [AxisSpan(rank, axis, what, max(0, start - origin), max(0, end - origin))
                 for axis, what, start, end in talk]
        for index, stage, microbatch, start, end in compute:
            instruction = program.ranks[rank][index]
            label = str(instruction.action) if instruction.action else str(instruction.kind)
            spans.append(Span(rank, instruction.stream, instruction.kind, label, start - origin, end - origin, stage,
                              microbatch))
        for index, side, moment in moved:
            (arrived if side else sent)[index] = moment - origin
    for index, transfer in enumerate(program.transfers):
        if index in sent and index in arrived:
            start, end = sent[index], max(sent[index], arrived[index])
            spans.append(Span(transfer.source_rank, Stream.CHANNEL, ActionKind.SEND, str(transfer), start, end,
                              transfer.source_stage, transfer.microbatch, transfer.target_rank))
    spans.sort(key=lambda span: (span.start_ns, span.rank))
    memory = tuple(tuple((moment - origin, size) for moment, size in sizes) for *_, sizes, _ in everyone)
    return Timeline("measured", len(everyone), tuple(spans), memory if any(memory) else (),
                    unit_ns=engine.plan.problem.unit_ns,
                    notes={"plan": engine.plan.name, "threads": torch.get_num_threads(), "step": engine.steps_done,
                           "device": engine.mesh.device.type, "clock": engine.record.clock}, axes=tuple(axes))


def clock_offset_ns() -> int:
    """What to add to this process's clock to get rank 0's. Collective."""
    boots = processes.gather(_boot_id())
    offset = 0
    for other in range(1, len(boots)):
        if boots[other] != boots[0] or not boots[0]:
            offset = _ping(other) if processes.rank() in (0, other) else offset
    return offset if processes.rank() else 0


def _boot_id() -> str:
    """Names the running kernel: processes with the same one read the same monotonic clock."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _ping(other: int) -> int:
    """Rank 0 and ``other``: the offset, known to ``other``."""
    stamp = torch.zeros(1, dtype=torch.int64)
    best = (2**62, 0)
    for _ in range(ROUND_TRIPS):
        if dist.get_rank() == 0:
            dist.recv(stamp, other)
            stamp[0] = time.perf_counter_ns()
            dist.send(stamp, other)
        else:
            start = time.perf_counter_ns()
            dist.send(stamp, 0)
            dist.recv(stamp, 0)
            end = time.perf_counter_ns()
            best = min(best, (end - start, int(stamp) - (start + end) // 2))
    return best[1]
