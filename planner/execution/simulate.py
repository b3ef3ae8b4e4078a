"""From a program to its timeline: its instructions on a clock, and the memory that follows."""

from __future__ import annotations

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.execution.execute import execute
from mipipe.planner.execution.simulate_memory import memory_curves
from mipipe.planner.jobs.stages import view
from mipipe.planner.plan import Plan
from mipipe.planner.program import Program
from mipipe.planner.timeline import Span, Timeline


def simulate(plan: Plan, program: Program) -> Timeline:
    """The timeline of a program, with each rank's memory over time by the rules of `mipipe.planner.problem`.

    Raises:
        ProgramError: an action reads what its rank neither made nor received, the ends of a channel disagree, or the
            ranks wait for each other for ever.
    """
    stage_view = view(plan.problem, plan.placement)
    run = execute(stage_view, program)
    spans = [Span(rank, stage_view.streams[action.stage], action.kind, str(action), start, end, action.stage,
                  action.microbatch) for rank, action, start, end in run.actions]
    for number, (start, end) in run.moved.items():
        move = program.transfers[number]
        spans.append(Span(move.source_rank, Stream.CHANNEL, ActionKind.SEND, str(move), start, end, move.source_stage,
                          move.microbatch, peer=move.target_rank))
    for stage, (start, end) in run.reduced.items():
        spans += [Span(rank, Stream.COLLECTIVE, ActionKind.ALL_REDUCE, f"reduce {stage}", start, end, stage)
                  for rank in plan.placement.stages[stage].ranks]
    spans += [Span(rank, Stream.COMPUTE, ActionKind.OPTIMIZER_STEP, "update", start, end)
              for rank, (start, end) in run.updated.items()]
    spans.sort(key=lambda span: (span.start_ns, span.rank, span.stream, span.end_ns))
    return Timeline("simulated", plan.problem.num_ranks, tuple(spans), memory_curves(stage_view, program, run),
                    stage_view.resident_bytes, plan.problem.unit_ns, {"plan": plan.name})
