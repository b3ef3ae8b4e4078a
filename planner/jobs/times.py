"""From an order to its times: the earliest start of every action, in one pass over events.

This is what the search loops call, so it works on integers and lists. `mipipe.planner.execution.simulate` runs the
lowered program instead and must agree with it.

A transfer is ready when its producer ends; each directed channel serves transfers in the order they become ready (ties:
the order of the actions), which is what lowering writes into the program. Latency does not occupy the channel.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.jobs.dependencies import dependencies, kinds_of
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.plan import Schedule


@dataclass(slots=True)
class ActionNodes:
    """The actions of a schedule as numbered nodes with integer dependencies; independent of their order.

    ``releases[n]`` lists what ends with node n: (waiting node, channel or -1 within a rank, duration, edge, backward,
    how long the channel is occupied).
    """

    view: StageView
    actions: list[Action]
    ranks: list[int]
    streams: list[Stream]
    durations: list[int]
    releases: list[list[tuple[int, int, int, int, bool, int]]]
    num_waits: list[int]
    index: dict[Action, int]
    reductions: list[tuple[int, list[int], int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TransferSpan:
    """One simulated transfer."""

    producer: int
    consumer: int
    edge: int
    backward: bool
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Start of every node, all transfers in channel order, the reductions as (stage, start, end), the makespan."""

    starts: list[int]
    transfers: list[TransferSpan]
    reductions: list[tuple[int, int, int]]
    makespan_ns: int


def compile_actions(view: StageView, actions: Sequence[Action]) -> ActionNodes:
    """Number the actions and resolve who waits for whom.

    Raises:
        PlanError: an elementary action is missing or there twice.
    """
    done_by: dict[tuple[ActionKind, int, int], int] = {}
    for node, action in enumerate(clock.asking(actions)):
        for part in action.parts():
            if part in done_by:
                raise PlanError(f"action {Action(part[1], part[0], part[2])}: scheduled twice")
            done_by[part] = node
    num_microbatches = view.problem.num_microbatches
    topology = view.problem.topology
    count = len(actions)
    releases: list[list[tuple[int, int, int, int, bool, int]]] = [[] for _ in range(count)]
    waits = [0] * count

    def node_of(kind: ActionKind, stage: int, microbatch: int) -> int:
        try:
            return done_by[kind, stage, microbatch]
        except KeyError:
            raise PlanError(f"action {Action(stage, kind, microbatch)}: missing from the schedule") from None

    def link(producer: int, consumer: int, edge: int, backward: bool, source: int, target: int, size: int) -> None:
        if producer == consumer:
            if not backward and actions[producer].partner is not None:
                raise PlanError(f"action {actions[producer]}: its backward needs its own forward to have ended")
            return
        channel = -1 if source == target else source * topology.num_devices + target
        duration = topology.transfer_ns(source, target, size)
        releases[producer].append((consumer, channel, duration, edge, backward,
                                   topology.occupied_ns(source, target, size)))
        waits[consumer] += 1

    nodes = {(stage, kind): [node_of(kind, stage, microbatch) for microbatch in range(num_microbatches)]
             for stage in clock.asking(range(view.num_stages), 16) for kind in kinds_of(view, stage)}
    routes = view.placement.routes
    reads = [(nodes[one.maker], nodes[one.reader], one.edge, one.backward, routes[one.maker[0]], routes[one.reader[0]],
              one.num_bytes or (0,) * num_microbatches) for one in dependencies(view)]
    for m in clock.asking(range(num_microbatches), 16):
        for makers, readers, edge, backward, source, target, size in reads:
            link(makers[m], readers[m], edge, backward, source[m], target[m], size[m])
    if len(done_by) > num_microbatches * len(nodes):
        extra = len(done_by) - num_microbatches * len(nodes)
        raise PlanError(f"schedule: {extra} actions that the problem does not have (a phase its stage lacks, or a"
                        " microbatch beyond the last)")
    ranks = [view.rank(action.stage, action.microbatch) for action in actions]
    streams = [view.streams[action.stage] for action in actions]
    durations = [view.duration_ns(action.kind, action.stage, action.microbatch, action.partner)
                 for action in clock.asking(actions)]
    reductions = []
    for index, placed in enumerate(view.placement.stages):
        if len(placed.ranks) > 1 and view.w_ns[index] is not None:
            last = [done_by[ActionKind.W, index, m] for m in range(num_microbatches)]
            reductions.append((index, last, view.reduce_ns(index)))
    return ActionNodes(view, list(actions), ranks, streams, durations, releases, waits,
                       {action: node for node, action in enumerate(actions)}, reductions)


def orders_of(compiled: ActionNodes, schedule: Schedule) -> list[list[int]]:
    """The schedule as node numbers: one list per rank and stream in use."""
    orders = []
    for rank in schedule.ranks:
        for order in (rank.compute, rank.collective):
            if order:
                orders.append([compiled.index[action] for action in order])
    return orders


def run_orders(compiled: ActionNodes, orders: Sequence[Sequence[int]]) -> Evaluation | None:
    """Times of all actions under the given orders; None if the orders deadlock."""
    count = len(compiled.actions)
    durations, releases = compiled.durations, compiled.releases
    waits = compiled.num_waits.copy()
    following = [-1] * count
    for order in orders:
        for first, second in itertools.pairwise(order):
            following[first] = second
            waits[second] += 1
    ready = [0] * count
    starts = ready.copy()
    heap = [(ready[node] + durations[node], node) for node in range(count) if waits[node] == 0]
    heapq.heapify(heap)
    free: dict[int, int] = {}
    transfers: list[TransferSpan] = []
    finished = 0
    makespan = 0
    while heap:
        end, node = heapq.heappop(heap)
        finished += 1
        if not finished % clock.STEPS:
            clock.ask()
        if end > makespan:
            makespan = end
        for consumer, channel, duration, edge, backward, occupied in releases[node]:
            arrival = end
            if channel >= 0:
                begin = free.get(channel, 0)
                if begin < end:
                    begin = end
                free[channel] = begin + occupied
                arrival = begin + duration
                transfers.append(TransferSpan(node, consumer, edge, backward, begin, arrival))
            if ready[consumer] < arrival:
                ready[consumer] = arrival
            waits[consumer] -= 1
            if not waits[consumer]:
                starts[consumer] = ready[consumer]
                heapq.heappush(heap, (ready[consumer] + durations[consumer], consumer))
        consumer = following[node]
        if consumer >= 0:
            if ready[consumer] < end:
                ready[consumer] = end
            waits[consumer] -= 1
            if not waits[consumer]:
                starts[consumer] = ready[consumer]
                heapq.heappush(heap, (ready[consumer] + durations[consumer], consumer))
    if finished < count:
        return None
    reductions, makespan = _reduce(compiled, orders, starts, makespan)
    return Evaluation(starts, transfers, reductions, makespan)


def _reduce(compiled: ActionNodes, orders: Sequence[Sequence[int]], starts: list[int],
            makespan: int) -> tuple[list[tuple[int, int, int]], int]:
    """Append the gradient reductions on the collective streams, in the order in which they become ready; updates."""
    updates = compiled.view.updates_ns()
    if not compiled.reductions and not any(updates):
        return [], makespan
    busy, ends = [0] * len(updates), [0] * len(updates)
    for order in orders:
        if order:
            node = order[-1]
            rank, end = compiled.ranks[node], starts[node] + compiled.durations[node]
            ends[rank] = max(ends[rank], end)
            if compiled.streams[node] is Stream.COLLECTIVE:
                busy[rank] = end
    waiting = sorted((max(starts[node] + compiled.durations[node] for node in nodes), stage, duration)
                     for stage, nodes, duration in compiled.reductions)
    result = []
    for ready, stage, duration in waiting:
        members = compiled.view.placement.stages[stage].ranks
        start = max(ready, *(busy[rank] for rank in members))
        for rank in members:
            busy[rank] = start + duration
        result.append((stage, start, start + duration))
    ends = [max(pair) for pair in zip(ends, busy, strict=True)]
    return result, max(makespan, *(end + update for end, update in zip(ends, updates, strict=True)))


def evaluate(view: StageView, schedule: Schedule) -> tuple[ActionNodes, Evaluation]:
    """Times of a schedule.

    Raises:
        PlanError: an action is missing, twice, on a wrong rank, or the order deadlocks.
    """
    compiled = compile_actions(view, schedule.actions())
    for number, rank in enumerate(schedule.ranks):
        for action in (*rank.compute, *rank.collective):
            if view.rank(action.stage, action.microbatch) != number:
                raise PlanError(f"rank {number}: schedules {action}, but microbatch {action.microbatch} of stage"
                                f" {action.stage} is routed to rank {view.rank(action.stage, action.microbatch)}")
    evaluation = run_orders(compiled, orders_of(compiled, schedule))
    if evaluation is None:
        raise PlanError("schedule: the order deadlocks; see `mipipe check`")
    return compiled, evaluation
