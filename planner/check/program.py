"""Whether a program does what its plan says and nothing can wait for ever, proven before a process starts.

Orders, transfers, buffers and reductions are compared with what the plan demands; `mipipe.planner.check.waits` proves
that no instruction waits for ever and gives the times from which memory is checked; `mipipe.planner.check.contact`
proves the same where the first use of a communicator keeps the host.
"""

from __future__ import annotations

from collections import defaultdict

from mipipe.graphs.errors import PlanError, ProgramError
from mipipe.graphs.serialize import digest
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.check.contact import Openings, check_contact
from mipipe.planner.check.facts import Demands, Flow, check_placement, part_text
from mipipe.planner.check.memory import check_activations
from mipipe.planner.check.plan import check_actions
from mipipe.planner.check.waits import Places, program_times, text_of, wait_order
from mipipe.planner.execution.opening import openings
from mipipe.planner.plan import Plan
from mipipe.planner.program import Program, Transfer

_MOVES = (ActionKind.SEND, ActionKind.RECV, ActionKind.FREE)


def check_program(plan: Plan, program: Program) -> None:
    """Check a program against its plan: orders, transfers, buffers, reductions, deadlock, memory.

    Raises:
        PlanError: the plan itself is unsound.
        ProgramError: the first violated rule, with its place.
    """
    check_placement(plan)
    facts = Demands(plan)
    check_actions(facts)
    if program.plan_digest and program.plan_digest != digest(plan):
        raise ProgramError(f"program: was lowered from plan {program.plan_digest}, but this plan is {digest(plan)};"
                           " lower it again")
    if len(program.ranks) != plan.problem.num_ranks:
        raise ProgramError(f"program: is for {len(program.ranks)} ranks, but the plan has {plan.problem.num_ranks}")
    _check_orders(facts, program)
    flows = _check_transfers(facts, program)
    places = _find_moves(program, flows)
    _check_neighbours(program, flows, places)
    _check_channels(program, places)
    _check_reductions(facts, program)
    order = wait_order(facts, program, places)
    check_contact(facts, program, places, openings(program))
    times = program_times(facts, program, [number for number, _ in flows], order)
    try:
        check_activations(facts, times)
    except PlanError as error:
        raise ProgramError(str(error)) from None
    if plan.makespan_ns is not None and times.makespan_ns != plan.makespan_ns:
        raise ProgramError(f"program: takes {times.makespan_ns} ns, but its plan {plan.makespan_ns} ns; lower it again")


def check_first_contact(plan: Plan, program: Program, opened: Openings = ()) -> None:
    """Check a sound program for deadlock at first contact, after ranks have opened ``opened`` (by default nothing).

    Raises:
        ProgramError: ranks would wait for each other for ever.
    """
    facts = Demands(plan)
    check_contact(facts, program, _find_moves(program, _check_transfers(facts, program)), opened)


def _check_orders(facts: Demands, program: Program) -> None:
    """The compute actions of each stream are the plan's, in its order; the last instruction is the optimizer's step."""
    for rank, (instructions, order) in enumerate(zip(program.ranks, facts.plan.schedule.ranks, strict=True)):
        for stream, planned in ((Stream.COMPUTE, order.compute), (Stream.COLLECTIVE, order.collective)):
            found = [item.action for item in instructions if item.action is not None and item.stream is stream]
            for position in range(max(len(found), len(planned))):
                have = found[position] if position < len(found) else "nothing"
                want = planned[position] if position < len(planned) else "nothing"
                if have != want:
                    raise ProgramError(f"rank {rank}, action {position} of the {stream} stream: found {have}, but the"
                                       f" plan says {want}")
        for index, item in enumerate(instructions):
            if (item.kind is ActionKind.OPTIMIZER_STEP) != (index == len(instructions) - 1):
                raise ProgramError(f"rank {rank}, instruction {index} ({text_of(program, item)}): a rank ends with"
                                   " OPTIMIZER_STEP, once")
            kinds = _MOVES if item.transfer is not None else (
                (ActionKind.ALL_REDUCE,) if item.stage is not None else (ActionKind.OPTIMIZER_STEP,))
            if item.kind not in kinds and (item.action is None or item.kind is not item.action.kind):
                raise ProgramError(f"rank {rank}, instruction {index}: a {item.kind} without what it works on")
            if item.transfer is not None and not 0 <= item.transfer < len(program.transfers):
                raise ProgramError(f"rank {rank}, instruction {index}: names transfer {item.transfer}, but there are"
                                   f" {len(program.transfers)}")
        if not instructions:
            raise ProgramError(f"rank {rank}: has no instructions; a rank ends with OPTIMIZER_STEP, once")


def _check_transfers(facts: Demands, program: Program) -> list[tuple[int, Flow]]:
    """The program's transfers are the plan's flows between ranks, each once; returns their flows by transfer."""
    needed = {(flow.source, flow.target, flow.microbatch): (number, flow) for number, flow in enumerate(facts.flows)
              if facts.rank(*flow.producer[1:]) != facts.rank(*flow.consumer[1:])}
    found: dict[tuple[int, int, int], int] = {}
    matched = []
    for number, move in enumerate(program.transfers):
        key = (move.source_stage, move.target_stage, move.microbatch)
        if key not in needed:
            raise ProgramError(f"transfer {number} ({move}): the plan has no such value between ranks")
        if key in found:
            raise ProgramError(f"transfer {number} ({move}): is the same as transfer {found[key]}")
        found[key] = number
        flow = needed[key][1]
        wanted = Transfer(flow.source, flow.target, flow.microbatch, facts.rank(*flow.producer[1:]),
                          facts.rank(*flow.consumer[1:]), flow.backward, flow.num_bytes, flow.values)
        for name in ("source_rank", "target_rank", "backward", "num_bytes", "values"):
            if getattr(move, name) != getattr(wanted, name):
                raise ProgramError(f"transfer {number} ({move}): has {name} {getattr(move, name)!r}, but the plan says"
                                   f" {getattr(wanted, name)!r}")
        matched.append(needed[key])
    missing = [flow for key, (_, flow) in needed.items() if key not in found]
    if missing:
        raise ProgramError(f"stage {missing[0].source}, microbatch {missing[0].microbatch}: its values for stage"
                           f" {missing[0].target} ({missing[0]}) are in no transfer")
    return matched


def _find_moves(program: Program, flows: list[tuple[int, Flow]]) -> Places:
    """Each transfer is sent and freed once by its source and received once by its target."""
    places = Places()
    for rank, instructions in enumerate(program.ranks):
        for index, item in enumerate(instructions):
            if item.action is not None:
                places.parts.update(dict.fromkeys(item.action.parts(), (rank, index)))
            if item.transfer is None:
                continue
            move = program.transfers[item.transfer]
            where = f"rank {rank}, instruction {index} ({text_of(program, item)})"
            owner = move.target_rank if item.kind is ActionKind.RECV else move.source_rank
            if rank != owner:
                raise ProgramError(f"{where}: belongs to rank {owner}")
            if (item.kind, item.transfer) in places.moves:
                first = places.moves[item.kind, item.transfer][1]
                raise ProgramError(f"{where}: comes a second time, first at instruction {first}")
            places.moves[item.kind, item.transfer] = (rank, index)
    for number, move in enumerate(program.transfers):
        for kind in _MOVES:
            if (kind, number) not in places.moves:
                flow = flows[number][1]
                rank = move.target_rank if kind is ActionKind.RECV else move.source_rank
                if kind is ActionKind.FREE:
                    raise ProgramError(f"rank {rank}: never frees {move}, which it sends")
                if kind is ActionKind.RECV:
                    raise ProgramError(f"rank {rank}, {part_text(flow.consumer)}: reads {move}, which rank"
                                       f" {move.source_rank} sends but it never receives")
                raise ProgramError(f"rank {move.target_rank}, {part_text(flow.consumer)}: receives {move} from rank"
                                   f" {rank}, which never sends it")
    return places


def _check_neighbours(program: Program, flows: list[tuple[int, Flow]], places: Places) -> None:
    """On each rank: producer before SEND before FREE, RECV before its reader."""
    for number, move in enumerate(program.transfers):
        flow = flows[number][1]
        send, receive, free = (places.moves[kind, number] for kind in _MOVES)
        made, read = places.parts[flow.producer], places.parts[flow.consumer]
        for first, second, text in (
                (made, send, f"sends {move} before {part_text(flow.producer)} has made it"),
                (send, free, f"frees {move} before it sends it"),
                (receive, read, f"receives {move} only after {part_text(flow.consumer)}, which reads it")):
            if first[1] > second[1]:
                raise ProgramError(f"rank {first[0]}, instruction {second[1]}: {text}, at instruction {first[1]}")


def _check_channels(program: Program, places: Places) -> None:
    """The k-th SEND of a channel meets the k-th RECV."""
    ends: dict[tuple[int, int], tuple[list[tuple[int, int]], list[tuple[int, int]]]] = defaultdict(lambda: ([], []))
    for number, move in enumerate(program.transfers):
        sends, receives = ends[move.source_rank, move.target_rank]
        sends.append((places.moves[ActionKind.SEND, number][1], number))
        receives.append((places.moves[ActionKind.RECV, number][1], number))
    for (source, target), (sends, receives) in sorted(ends.items()):
        for place, ((at, sent), (then, received)) in enumerate(zip(sorted(sends), sorted(receives), strict=True)):
            if sent != received:
                raise ProgramError(f"channel {source}->{target}, transfer {place}: rank {source} sends"
                                   f" {program.transfers[sent]} (instruction {at}), but rank {target} receives"
                                   f" {program.transfers[received]} (instruction {then}); both ends must use one order")


def _check_reductions(facts: Demands, program: Program) -> None:
    """Each replicated stage is reduced once on every member after its last W there, in one order on all ranks."""
    wanted = set(facts.reduced_stages())
    orders: list[list[int]] = []
    for rank, instructions in enumerate(program.ranks):
        order: list[int] = []
        for index, item in enumerate(instructions):
            if item.action is not None:
                late = [stage for kind, stage, _ in item.action.parts() if kind is ActionKind.W and stage in order]
                if late:
                    raise ProgramError(f"rank {rank}, instruction {index} ({item.action}): comes after the reduction of"
                                       f" stage {late[0]}'s gradients")
            if item.kind is not ActionKind.ALL_REDUCE or item.stage is None:
                continue
            where = f"rank {rank}, instruction {index} (ALL_REDUCE {item.stage})"
            if item.stage not in wanted or rank not in facts.plan.placement.stages[item.stage].ranks:
                raise ProgramError(f"{where}: the stage has no replicas to reduce with here")
            if sorted(item.peers) != sorted(facts.plan.placement.stages[item.stage].ranks):
                raise ProgramError(f"{where}: has members {item.peers}, but the stage is on ranks"
                                   f" {facts.plan.placement.stages[item.stage].ranks}")
            if item.stage in order:
                raise ProgramError(f"{where}: comes a second time")
            order.append(item.stage)
        orders.append(order)
    for stage in sorted(wanted):
        for rank in facts.plan.placement.stages[stage].ranks:
            if stage not in orders[rank]:
                raise ProgramError(f"rank {rank}: never reduces the gradients of stage {stage}, which it shares with"
                                   f" ranks {facts.plan.placement.stages[stage].ranks}")
