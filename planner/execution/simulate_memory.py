"""Memory of every rank over time, from when things happened: the rules of `mipipe.planner.problem`, exactly.

Every holding is an interval ``[from, to)`` on one rank; what ends at a moment is gone before what begins there comes.
An action that does several things (B, OVERLAP_F_B) holds all of it from its start to its end. Where a phase does not
exist, what would be freed at its end is freed with the gradient phase that does exist, or else with F. A stage that
recomputes keeps ``recompute_bytes`` from the start of F to the start of RECOMPUTE, and its saved tensors from there.
"""

from __future__ import annotations

from mipipe.planner.actions import ActionKind
from mipipe.planner.execution.execute import Execution
from mipipe.planner.jobs.dependencies import dependencies, gradient_kind
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
    for stage, placed in enumerate(stage_view.placement.stages):
        has_i, has_w = stage_view.i_ns[stage] is not None, stage_view.w_ns[stage] is not None
        for microbatch, rank in enumerate(stage_view.placement.routes[stage]):
            start, forward_end = spans[ActionKind.F, stage, microbatch]
            if placed.recompute and (has_i or has_w):
                again, _ = spans[ActionKind.RECOMPUTE, stage, microbatch]
                found.append((rank, start, again, stage_view.kept[stage][microbatch]))
                start = again
            ends = [spans[kind, stage, microbatch][1] if exists else None
                    for kind, exists in ((ActionKind.I, has_i), (ActionKind.W, has_w))]
            end_i, end_w = (next(end for end in choice if end is not None)
                            for choice in ((*ends, forward_end), (*ends[::-1], forward_end)))
            found.append((rank, start, end_i, stage_view.saved_fi[stage][microbatch]))
            found.append((rank, start, end_w, stage_view.saved_fw[stage][microbatch]))
            if has_i and has_w:
                start_i = spans[ActionKind.I, stage, microbatch][0]
                found.append((rank, start_i, end_w, stage_view.saved_iw[stage][microbatch]))
    return found


def _workspace(stage_view: StageView, run: Execution) -> list[Holding]:
    """Workspace of every running action; an overlapped pair needs both stages'."""
    return [(rank, start, end, sum(stage_view.workspace[stage] for stage in {part[1] for part in action.parts()}))
            for rank, action, start, end in run.actions]


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
