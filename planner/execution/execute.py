"""Every rank's instructions executed on a clock instead of a device.

What is simulated is the program, not the plan, so a mistake of lowering shows. Each rank walks its list. Compute and
collective actions start when their stream is free and their inputs have arrived; SEND and RECV only announce; the k-th
transfer of a channel runs once its values are made, its receive is posted and the bytes before it are through; FREE
holds the rank until its transfer is over; an ALL_REDUCE starts when all members have reached it.

OPTIMIZER_STEP takes what its rank's groups say, after all that went before it on the rank. Left out: the time of
launching instructions, and contention between streams and channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from mipipe.graphs.errors import ProgramError
from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.jobs.dependencies import StageKind, inputs
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.program import Instruction, Program

Part = tuple[ActionKind, int, int]


@dataclass(slots=True)
class Execution:
    """What happened when: actions as (rank, action, start, end); per transfer its (start, end) and when its receive
    was posted; per stage its reduction's (start, end); per rank its update's, where that takes time; and the end of
    every elementary part."""

    actions: list[tuple[int, Action, int, int]] = field(default_factory=list)
    moved: dict[int, tuple[int, int]] = field(default_factory=dict)
    posted: dict[int, int] = field(default_factory=dict)
    reduced: dict[int, tuple[int, int]] = field(default_factory=dict)
    updated: dict[int, tuple[int, int]] = field(default_factory=dict)
    ends: dict[Part, int] = field(default_factory=dict)


@dataclass(slots=True)
class _Rank:
    """Where a rank is: next instruction, when each stream is free, when the last FREE was over, what arrives."""

    next: int = 0
    free: dict[Stream, int] = field(default_factory=lambda: {Stream.COMPUTE: 0, Stream.COLLECTIVE: 0})
    held_ns: int = 0
    pending_reduction: int | None = None
    arrivals: dict[tuple[int, int, int, bool], int] = field(default_factory=dict)


@dataclass(slots=True)
class _Channel:
    """Announced sends with the time their values are ready, announced receives, and how many have met."""

    sends: list[tuple[int, int]] = field(default_factory=list)
    receives: list[int] = field(default_factory=list)
    met: int = 0
    free_ns: int = 0


def execute(stage_view: StageView, program: Program) -> Execution:
    """Run all ranks to their ends.

    Raises:
        ProgramError: as `simulate`.
    """
    run, reads, updates = Execution(), inputs(stage_view), stage_view.updates_ns()
    ranks = [_Rank() for _ in program.ranks]
    channels: dict[tuple[int, int], _Channel] = {}
    waiting: dict[int, list[tuple[int, int]]] = {}
    pending = deque(range(len(ranks)))
    while pending:
        clock.ask()
        number = pending.popleft()
        rank, instructions = ranks[number], program.ranks[number]
        while rank.next < len(instructions):
            instruction = instructions[rank.next]
            if instruction.kind in (ActionKind.SEND, ActionKind.RECV):
                pending += _announce(stage_view, program, run, rank, channels, instruction)
            elif instruction.kind is ActionKind.FREE:
                assert instruction.transfer is not None
                if instruction.transfer not in run.moved:
                    break
                rank.held_ns = max(rank.held_ns, run.moved[instruction.transfer][1])
            elif instruction.kind is ActionKind.ALL_REDUCE:
                if rank.pending_reduction is not None:
                    break
                pending += _join_reduction(stage_view, run, ranks, waiting, number, instruction)
            elif instruction.kind is ActionKind.OPTIMIZER_STEP:
                if rank.pending_reduction is not None:
                    break
                if updates[number]:
                    start = max(rank.free.values())
                    run.updated[number] = (start, start + updates[number])
            elif not _act(stage_view, reads, run, rank, number, instruction):
                break
            rank.next += 1
    for number, rank in enumerate(ranks):
        if rank.next < len(program.ranks[number]):
            raise ProgramError(f"rank {number}, instruction {rank.next}"
                               f" ({describe(program, program.ranks[number][rank.next])}): waits for ever; the ranks'"
                               " orders deadlock, see `mipipe check`")
    return run


def describe(program: Program, instruction: Instruction) -> str:
    """An instruction in a few characters: ``2F0``, ``SEND 2⇒3:0``, ``ALL_REDUCE 2``."""
    if instruction.action is not None:
        return str(instruction.action)
    if instruction.transfer is not None:
        return f"{instruction.kind} {program.transfers[instruction.transfer]}"
    return f"{instruction.kind} {instruction.stage}" if instruction.stage is not None else str(instruction.kind)


def _act(stage_view: StageView, reads: Mapping[StageKind, list[StageKind]], run: Execution, rank: _Rank, number: int,
         instruction: Instruction) -> bool:
    """Start an action if all its inputs are there; False if a transfer is still to come."""
    action = instruction.action
    assert action is not None
    if instruction.stream is Stream.COLLECTIVE and rank.pending_reduction is not None:
        return False
    ready = max(rank.held_ns, rank.free[instruction.stream])
    own = set(action.parts())
    for part in own:
        microbatch = part[2]
        for stage, kind in reads.get((part[1], part[0]), ()):
            source = kind, stage, microbatch
            if stage == part[1] or stage_view.rank(stage, microbatch) == number:
                if source in own:
                    if kind is ActionKind.F:
                        raise ProgramError(f"rank {number}, {action}: its backward needs its own forward to have ended")
                    continue
                if source not in run.ends:
                    raise ProgramError(f"rank {number}, {action}: comes before {Action(stage, kind, microbatch)}, which"
                                       " it needs")
                ready = max(ready, run.ends[source])
                continue
            key = (stage, part[1], microbatch, kind is not ActionKind.F)
            if key not in rank.arrivals:
                raise ProgramError(f"rank {number}, {action}: reads the values of"
                                   f" {Action(stage, kind, microbatch)}, for which it has posted no receive")
            if rank.arrivals[key] not in run.moved:
                return False
            ready = max(ready, run.moved[rank.arrivals[key]][1])
    end = ready + stage_view.duration_ns(action.kind, action.stage, action.microbatch, action.partner)
    rank.free[instruction.stream] = end
    run.actions.append((number, action, ready, end))
    for part in own:
        run.ends[part] = end
    return True


def _announce(stage_view: StageView, program: Program, run: Execution, rank: _Rank,
              channels: dict[tuple[int, int], _Channel], instruction: Instruction) -> list[int]:
    """Put a SEND or RECV into its channel's queue and let what meets run; returns the ranks that may go on."""
    number = instruction.transfer
    assert number is not None
    move = program.transfers[number]
    channel = channels.setdefault((move.source_rank, move.target_rank), _Channel())
    if instruction.kind is ActionKind.SEND:
        part = (ActionKind.I if move.backward else ActionKind.F, move.source_stage, move.microbatch)
        if part not in run.ends:
            raise ProgramError(f"rank {move.source_rank}: sends {move} before it has made its values")
        channel.sends.append((number, max(run.ends[part], rank.held_ns)))
    else:
        run.posted[number] = max(rank.free[Stream.COMPUTE], rank.held_ns)
        rank.arrivals[move.source_stage, move.target_stage, move.microbatch, move.backward] = number
        channel.receives.append(number)
    return [move.source_rank, move.target_rank] if _meet(stage_view, program, run, channel) else []


def _meet(stage_view: StageView, program: Program, run: Execution, channel: _Channel) -> bool:
    """Run the transfers of a channel whose two ends have both been announced; whether there were any."""
    first = channel.met
    while channel.met < min(len(channel.sends), len(channel.receives)):
        number, made_ns = channel.sends[channel.met]
        other = channel.receives[channel.met]
        move = program.transfers[number]
        if other != number:
            raise ProgramError(f"channel {move.source_rank}->{move.target_rank}: its transfer {channel.met} is sent as"
                               f" {move} but received as {program.transfers[other]}")
        start = max(made_ns, run.posted[number], channel.free_ns)
        duration = stage_view.problem.topology.transfer_ns(move.source_rank, move.target_rank, move.num_bytes)
        channel.free_ns = start + stage_view.problem.topology.occupied_ns(move.source_rank, move.target_rank,
                                                                          move.num_bytes)
        run.moved[number] = (start, start + duration)
        channel.met += 1
    return channel.met > first


def _join_reduction(stage_view: StageView, run: Execution, ranks: list[_Rank],
                    waiting: dict[int, list[tuple[int, int]]], number: int, instruction: Instruction) -> list[int]:
    """Note that a rank has reached an ALL_REDUCE; the last member starts it. Returns the ranks that may go on."""
    stage = instruction.stage
    assert stage is not None
    rank = ranks[number]
    ready = max(rank.held_ns, rank.free[Stream.COLLECTIVE])
    for microbatch, user in enumerate(stage_view.placement.routes[stage]):
        if user == number:
            part = (ActionKind.W, stage, microbatch)
            if part not in run.ends:
                raise ProgramError(f"rank {number}: reduces the gradients of stage {stage} before"
                                   f" {Action(stage, ActionKind.W, microbatch)} has made its part")
            ready = max(ready, run.ends[part])
    waiting.setdefault(stage, []).append((number, ready))
    rank.pending_reduction = stage
    if len(waiting[stage]) < len(instruction.peers):
        return []
    start = max(ready for _, ready in waiting[stage])
    run.reduced[stage] = (start, start + stage_view.reduce_ns(stage))
    for member in instruction.peers:
        ranks[member].free[Stream.COLLECTIVE] = run.reduced[stage][1]
        ranks[member].pending_reduction = None
    return list(instruction.peers)
