"""That no instruction of a program waits for ever, proven before a process starts; and when everything then happens.

The proof: a rank works through its list in order; SEND and RECV announce and go on; a transfer takes place once both
its ends are announced and the transfer before it on its channel is over (the k-th SEND meets the k-th RECV); an action
waits for the transfers it reads, FREE for its own, ALL_REDUCE for all members. If the graph of these waits over all
ranks has no cycle, every instruction is reached, whatever the durations are.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mipipe.graphs.errors import ProgramError
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.check.facts import Demands, Part
from mipipe.planner.check.times import CheckedTimes, grid, updates
from mipipe.planner.program import Instruction, Program

Event = tuple[int, int] | int
"""An instruction as (rank, index); a transfer as its number."""


@dataclass(slots=True)
class Places:
    """Where things are, as (rank, index): each transfer's SEND, RECV and FREE, and the doer of every part."""

    moves: dict[tuple[ActionKind, int], tuple[int, int]] = field(default_factory=dict)
    parts: dict[Part, tuple[int, int]] = field(default_factory=dict)


def text_of(program: Program, instruction: Instruction) -> str:
    if instruction.action is not None:
        return str(instruction.action)
    if instruction.transfer is not None:
        return f"{instruction.kind} {program.transfers[instruction.transfer]}"
    return f"{instruction.kind} {instruction.stage}" if instruction.stage is not None else str(instruction.kind)


def wait_order(facts: Demands, program: Program, places: Places) -> list[Event]:
    """All instructions and transfers in an order in which none waits for a later one.

    Raises:
        ProgramError: there is none, with the rank x order grid around the instructions that wait for each other.
    """
    needs = waits_of(facts, program, places)
    order = in_order(needs)
    if len(order) < len(needs):
        raise ProgramError(deadlock_text(program, needs, set(order)))
    return order


def in_order(needs: dict[Event, list[Event]]) -> list[Event]:
    """The events, each after all that it waits for, as far as there is such an order: those that wait in a circle, or
    for one of those, are missing."""
    followers: dict[Event, list[Event]] = defaultdict(list)
    missing = {node: len(before) for node, before in needs.items()}
    for node, before in needs.items():
        for other in before:
            followers[other].append(node)
    ready: deque[Event] = deque(node for node, count in missing.items() if not count)
    order: list[Event] = []
    while ready:
        node = ready.popleft()
        order.append(node)
        for other in followers[node]:
            missing[other] -= 1
            if not missing[other]:
                ready.append(other)
    return order


def waits_of(facts: Demands, program: Program, places: Places) -> dict[Event, list[Event]]:
    """What each instruction and transfer waits for."""
    needs: dict[Event, list[Event]] = {}
    channels: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for rank, instructions in enumerate(program.ranks):
        for index, item in enumerate(instructions):
            needs[rank, index] = [(rank, index - 1)] if index else []
            if item.kind is ActionKind.FREE and item.transfer is not None:
                needs[rank, index].append(item.transfer)
            if item.kind is ActionKind.SEND and item.transfer is not None:
                channels[rank, program.transfers[item.transfer].target_rank].append((index, item.transfer))
    for queue in channels.values():
        for place, (_, number) in enumerate(queue):
            needs[number] = [places.moves[ActionKind.SEND, number], places.moves[ActionKind.RECV, number]]
            needs[number] += [queue[place - 1][1]] if place else []
    numbers = {(move.source_stage, move.target_stage, move.microbatch): number
               for number, move in enumerate(program.transfers)}
    for flow in facts.flows:
        carrier = numbers.get((flow.source, flow.target, flow.microbatch))
        maker, reader = places.parts[flow.producer], places.parts[flow.consumer]
        if carrier is not None or maker != reader:
            needs[reader].append(maker if carrier is None else carrier)
    for part, reader in places.parts.items():
        before = facts.needs_before(part)
        if before is not None and places.parts[before] != reader:
            needs[reader].append(places.parts[before])
    reached: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for rank, instructions in enumerate(program.ranks):
        for index, item in enumerate(instructions):
            if item.kind is ActionKind.ALL_REDUCE and item.stage is not None:
                reached[item.stage].append((rank, index))
    for members in reached.values():
        for rank, index in members:  # an all-reduce is over once all members have come to it
            needs[rank, index] += [(other, at - 1) for other, at in members if other != rank and at]
    return needs


def deadlock_text(program: Program, needs: dict[Event, list[Event]], done: set[Event],
                  openings: Sequence[Sequence[object]] = ()) -> str:
    """A cycle of waits in words, and the orders of its ranks around where they are stuck.

    ``openings``: what each rank does before its program, at the indices -n to -1.
    """
    before = [list(map(str, items)) for items in openings] or [[] for _ in program.ranks]
    node: Event = next(node for node in needs if node not in done)
    visited: list[Event] = []
    while node not in visited:
        visited.append(node)
        node = next(other for other in needs[node] if other not in done)
    cycle = visited[visited.index(node):]

    def name(node: Event) -> str:
        if isinstance(node, int):
            return f"transfer {program.transfers[node]}"
        if node[1] < 0:
            return f"opening the {before[node[0]][node[1]]} by rank {node[0]}"
        return f"{text_of(program, program.ranks[node[0]][node[1]])} of rank {node[0]}"

    ranks = sorted({node[0] for node in cycle if not isinstance(node, int)})
    rows = [before[rank] + [text_of(program, item) for item in program.ranks[rank]] for rank in ranks]
    stuck = [next(k for k in range(len(row)) if (rank, k - len(before[rank])) not in done)
             for rank, row in zip(ranks, rows, strict=True)]
    steps = " waits for ".join(name(node) for node in [*cycle[:6], *([cycle[0]] if len(cycle) <= 6 else [])])
    more = f" ... ({len(cycle)} in all)" if len(cycle) > 6 else ""
    return f"program: deadlock: {steps}{more}\n" + grid([f"rank {rank}" for rank in ranks], rows, stuck)


def program_times(facts: Demands, program: Program, flows: Sequence[int], order: list[Event]) -> CheckedTimes:
    """When everything happens if every instruction runs as soon as its list and its data allow.

    ``flows`` gives each transfer's number in ``facts.flows``, ``order`` comes from `wait_order`.
    """
    topology = facts.plan.problem.topology
    times = CheckedTimes({}, {}, {}, {}, {})
    free: dict[tuple[int, Stream], int] = defaultdict(int)
    held: dict[int, int] = defaultdict(int)
    channel_free: dict[tuple[int, int], int] = defaultdict(int)
    arrived: dict[Part, int] = defaultdict(int)
    local: dict[Part, list[Part]] = defaultdict(list)
    sent: dict[int, int] = {}
    carried = set(flows)
    for number, flow in enumerate(facts.flows):
        if number not in carried:
            local[flow.consumer].append(flow.producer)
    reaching: dict[int, int] = defaultdict(int)
    for node in order:
        if isinstance(node, int):
            number, move = flows[node], program.transfers[node]
            flow, channel = facts.flows[number], (move.source_rank, move.target_rank)
            begin = max(times.parts[flow.producer][1], sent[node], times.posted[number], channel_free[channel])
            times.moved[number] = (begin, begin + topology.transfer_ns(*channel, move.num_bytes))
            channel_free[channel] = times.moved[number][1] - topology.link(*channel).latency_ns
            arrived[flow.consumer] = max(arrived[flow.consumer], times.moved[number][1])
            continue
        rank, item = node[0], program.ranks[node[0]][node[1]]
        if item.kind is ActionKind.SEND and item.transfer is not None:
            sent[item.transfer] = held[rank]
        elif item.kind is ActionKind.RECV and item.transfer is not None:
            times.posted[flows[item.transfer]] = max(free[rank, Stream.COMPUTE], held[rank])
        elif item.kind is ActionKind.FREE and item.transfer is not None:
            held[rank] = max(held[rank], times.moved[flows[item.transfer]][1])
        elif item.action is not None:
            begin = max(free[rank, item.stream], held[rank])
            own = item.action.parts()
            for part in own:
                before = facts.needs_before(part)
                sources = [source for source in [*local[part], *([before] if before else [])] if source not in own]
                begin = max([begin, arrived[part], *(times.parts[source][1] for source in sources)])
            free[rank, item.stream] = begin + facts.action_ns(item.action)
            times.parts.update(dict.fromkeys(own, (begin, free[rank, item.stream])))
        elif item.kind is ActionKind.ALL_REDUCE and item.stage is not None:
            reaching[item.stage] += 1
            if reaching[item.stage] == len(item.peers):
                _reduce(facts, times, free, held, item.stage)
    times.updated.update(updates(facts, times.parts, times.reduced))
    return times


def _reduce(facts: Demands, times: CheckedTimes, free: dict[tuple[int, Stream], int], held: dict[int, int],
            stage: int) -> None:
    """The reduction of a stage, once the last member has come to it."""
    members = facts.plan.placement.stages[stage].ranks
    last = max(times.parts[ActionKind.W, stage, m][1] for m in range(facts.plan.problem.num_microbatches))
    begin = max([last, *(max(free[rank, Stream.COLLECTIVE], held[rank]) for rank in members)])
    times.reduced[stage] = (begin, begin + facts.reduce_ns(stage))
    for rank in members:
        free[rank, Stream.COLLECTIVE] = times.reduced[stage][1]
