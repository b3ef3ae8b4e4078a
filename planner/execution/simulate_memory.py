"""Memory of every rank over time, from when things happened: the rules of `mipipe.planner.problem`, exactly.

Every holding is an interval ``[from, to)`` on one rank; what ends at a moment is gone before what begins there comes.
An action that does several things (B, OVERLAP_F_B) holds all of it from its start to its end.
"""

from __future__ import annotations

from mipipe.planner.actions import ActionKind
from mipipe.planner.execution.execute import Execution, execute
from mipipe.planner.jobs.dependencies import dependencies, gradient_kind
from mipipe.planner.jobs.memory import holdings, workspace
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.program import Program

Curve = tuple[tuple[int, int], ...]
Holding = tuple[int, int, int, int]
"""(rank, from, to, bytes)."""


def memory_curves(stage_view: StageView, program: Program, run: Execution) -> tuple[Curve, ...]:
    """Per rank the steps ``(ns, bytes)`` of its memory, resident bytes included; the first step is at 0."""
    spans = {part: (start, end) for _, action, start, end in run.actions for part in action.parts()}
    holdings = [*_saved(stage_view, spans), *_workspace(stage_view, run), *_within_ranks(stage_view, spans),
                *_transferred(stage_view, program, run, spans)]
    changes: list[dict[int, int]] = [{0: size} for size in stage_view.resident_bytes]
    for rank, start, end, size in holdings:
        if size and end > start:
            change = changes[rank]
            change[start] = change.get(start, 0) + size
            change[end] = change.get(end, 0) - size
    return tuple(map(_levels, changes))


def rank_peaks(stage_view: StageView, program: Program) -> list[int]:
    """Per rank the largest memory beyond resident bytes while the program runs."""
    curves = memory_curves(stage_view, program, execute(stage_view, program))
    return [max(size for _, size in curve) - stage_view.resident_bytes[rank] for rank, curve in enumerate(curves)]


def sends_fit(stage_view: StageView, program: Program, rank: int) -> bool:
    """Whether a rank has room for all that it sends in a step beside its peak, so that nothing needs to wait for a send
    before the step is over."""
    sent = sum(move.num_bytes for move in program.transfers if move.source_rank == rank)
    used = stage_view.resident_bytes[rank] + rank_peaks(stage_view, program)[rank]
    return used + sent <= stage_view.problem.topology.devices[rank].memory_bytes


def _levels(changes: dict[int, int]) -> Curve:
    level, steps = 0, list[tuple[int, int]]()
    for time_ns in sorted(changes):
        if changes[time_ns] or not steps:
            level += changes[time_ns]
            steps.append((time_ns, level))
    return tuple(steps)


Spans = dict[tuple[ActionKind, int, int], tuple[int, int]]


def _saved(stage_view: StageView, spans: Spans) -> list[Holding]:
    """Tensors saved for the gradients, per stage and microbatch."""
    found = []
    for stage, route in enumerate(stage_view.placement.routes):
        for held in holdings(stage_view, stage):
            for microbatch, (rank, size) in enumerate(zip(route, held.num_bytes, strict=True)):
                start, _ = spans[held.since, stage, microbatch]
                found.append((rank, start, spans[held.until, stage, microbatch][not held.replaced], size))
    return found


def _workspace(stage_view: StageView, run: Execution) -> list[Holding]:
    """Workspace of every running action."""
    return [(rank, start, end, workspace(stage_view, action)) for rank, action, start, end in run.actions]


def _within_ranks(stage_view: StageView, spans: Spans) -> list[Holding]:
    """Values and gradients between two stages of one rank, from their producer's end to their consumer's start."""
    found = []
    for one in dependencies(stage_view):
        (source, maker), (target, reader) = one.maker, one.reader
        for microbatch, size in enumerate(one.num_bytes):
            rank = stage_view.rank(source, microbatch)
            if rank == stage_view.rank(target, microbatch):
                _, made = spans[maker, source, microbatch]
                read, _ = spans[reader, target, microbatch]
                found.append((rank, made, read, size))
    return found


def _transferred(stage_view: StageView, program: Program, run: Execution, spans: Spans) -> list[Holding]:
    """Both ends of every transfer: the sender's until it is over, the receiver's from its posting until it is read."""
    found = []
    for number, move in enumerate(program.transfers):
        made_by = ActionKind.I if move.backward else ActionKind.F
        read_by = gradient_kind(stage_view, move.target_stage) if move.backward else ActionKind.F
        assert read_by is not None
        _, made = spans[made_by, move.source_stage, move.microbatch]
        read, _ = spans[read_by, move.target_stage, move.microbatch]
        found.append((move.source_rank, made, run.moved[number][1], move.num_bytes))
        found.append((move.target_rank, run.posted[number], read, move.num_bytes))
    return found
