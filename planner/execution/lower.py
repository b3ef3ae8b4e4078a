"""From a plan to its program: every transfer, wait and reduction written out, as pure passes over simulated times.

The plan's order is simulated once (`mipipe.planner.jobs.times`); every instruction is then put where the simulated
clock says it belongs, so a topological order over all ranks exists and no rank waits for something that another one has
not been told to do yet:

- a rank's compute and collective actions are merged by start, dependencies first;
- SEND directly follows the action that makes its values (unless its channel first carries a later action's);
- RECV follows the last compute action that has ended when the transfer starts, so its buffer exists no longer than it
  must, and never comes after the action that reads it;
- FREE precedes the first compute action that starts after the transfer has ended: waiting for it then delays nothing;
- ALL_REDUCE of a stage precedes the first compute action that starts after all its replicas are ready;
- between two actions: first sends, then receives, then what waits, so that waiting never keeps a peer from its data.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from mipipe.graphs.serialize import digest
from mipipe.planner import clock
from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import ActionNodes, Evaluation, TransferSpan, evaluate, orders_of
from mipipe.planner.plan import Plan
from mipipe.planner.program import Instruction, Program, Transfer


def lower(plan: Plan) -> Program:
    """The program of a plan.

    Raises:
        PlanError: the plan's schedule is incomplete, on wrong ranks, or deadlocks.
    """
    compiled, evaluation = evaluate(view(plan.problem, plan.placement), plan.schedule)
    lists = _merge_streams(compiled, evaluation, orders_of(compiled, plan.schedule))
    lanes = [_Lane(nodes, compiled, evaluation) for nodes in lists]
    gaps = [_Gaps(len(nodes) + 1) for nodes in lists]
    transfers = tuple(_transfer(compiled, move) for move in evaluation.transfers)
    place_sends(evaluation, transfers, lanes, gaps)
    place_receives(evaluation, transfers, lanes, gaps)
    place_frees(evaluation, transfers, lanes, gaps)
    place_reductions(compiled, evaluation, lanes, gaps)
    ranks = tuple(_write_out(compiled, nodes, gap) for nodes, gap in zip(lists, gaps, strict=True))
    return Program(ranks, transfers, plan_digest=digest(plan))


def place_sends(evaluation: Evaluation, transfers: Sequence[Transfer], lanes: Sequence[_Lane],
                gaps: Sequence[_Gaps]) -> None:
    """Each SEND after its producer, and after the SENDs that its channel carries before."""
    last: dict[tuple[int, int], int] = {}
    for number, (move, transfer) in enumerate(zip(evaluation.transfers, transfers, strict=True)):
        channel = transfer.source_rank, transfer.target_rank
        gap = max(lanes[transfer.source_rank].position[move.producer] + 1, last.get(channel, 0))
        last[channel] = gap
        gaps[transfer.source_rank].sends[gap].append(
            Instruction(ActionKind.SEND, Stream.CHANNEL, transfer=number))


def place_receives(evaluation: Evaluation, transfers: Sequence[Transfer], lanes: Sequence[_Lane],
                   gaps: Sequence[_Gaps]) -> None:
    """Each RECV after the last compute action that ended by the transfer's start, in its channel's order."""
    first: dict[tuple[int, int], int] = {}
    for number in reversed(range(len(transfers))):
        move, transfer = evaluation.transfers[number], transfers[number]
        channel = transfer.source_rank, transfer.target_rank
        lane = lanes[transfer.target_rank]
        # The minima matter only where something takes no time at all.
        gap = min(lane.gap_after_ended(move.start_ns), lane.position[move.consumer],
                  first.get(channel, len(lane.nodes)))
        first[channel] = gap
        gaps[transfer.target_rank].receives[gap].insert(
            0, Instruction(ActionKind.RECV, Stream.CHANNEL, transfer=number))


def place_frees(evaluation: Evaluation, transfers: Sequence[Transfer], lanes: Sequence[_Lane],
                gaps: Sequence[_Gaps]) -> None:
    """Each FREE before the first compute action that starts after the transfer's end."""
    for number, (move, transfer) in enumerate(zip(evaluation.transfers, transfers, strict=True)):
        gap = lanes[transfer.source_rank].gap_before_later(move.end_ns)
        gaps[transfer.source_rank].waits[gap].append(
            (move.end_ns, Instruction(ActionKind.FREE, Stream.CHANNEL, transfer=number)))


def place_reductions(compiled: ActionNodes, evaluation: Evaluation, lanes: Sequence[_Lane],
                     gaps: Sequence[_Gaps]) -> None:
    """Each ALL_REDUCE on all members before the first compute action that starts after it; one order for all ranks."""
    for stage, start_ns, _ in evaluation.reductions:
        members = compiled.view.placement.stages[stage].ranks
        instruction = Instruction(ActionKind.ALL_REDUCE, Stream.COLLECTIVE, stage=stage, peers=members)
        for rank in members:
            gaps[rank].waits[lanes[rank].gap_before_later(start_ns)].append((start_ns, instruction))


class _Lane:
    """One rank's actions in program order, with the times of those on the compute stream.

    A gap is a place between actions: gap g comes before the g-th action of the rank's list.
    """

    def __init__(self, nodes: Sequence[int], compiled: ActionNodes, evaluation: Evaluation) -> None:
        self.nodes = nodes
        self.position = {node: index for index, node in enumerate(nodes)}
        compute = [node for node in nodes if compiled.streams[node] is Stream.COMPUTE]
        self.places = [self.position[node] for node in compute]
        self.starts = [evaluation.starts[node] for node in compute]
        self.ends = [evaluation.starts[node] + compiled.durations[node] for node in compute]

    def gap_after_ended(self, time_ns: int) -> int:
        """The gap after the last compute action with an end by ``time_ns``."""
        ended = bisect_right(self.ends, time_ns)
        return self.places[ended - 1] + 1 if ended else 0

    def gap_before_later(self, time_ns: int) -> int:
        """The gap before the first compute action with a start after ``time_ns``."""
        started = bisect_right(self.starts, time_ns)
        return self.places[started] if started < len(self.places) else len(self.nodes)


class _Gaps:
    """What goes into the gaps of one rank's list. ``waits`` carry the time at which they are over."""

    def __init__(self, count: int) -> None:
        self.sends: list[list[Instruction]] = [[] for _ in range(count)]
        self.receives: list[list[Instruction]] = [[] for _ in range(count)]
        self.waits: list[list[tuple[int, Instruction]]] = [[] for _ in range(count)]


def _merge_streams(compiled: ActionNodes, evaluation: Evaluation, orders: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per rank the nodes of both streams by start; where starts are equal, what others wait for comes first."""
    count = len(compiled.actions)
    waits = compiled.num_waits.copy()
    following = [-1] * count
    for order in orders:
        for first, second in pairwise(order):
            following[first] = second
            waits[second] += 1
    heap = [(evaluation.starts[node], node) for node in range(count) if not waits[node]]
    heapq.heapify(heap)
    lists: list[list[int]] = [[] for _ in range(compiled.view.problem.num_ranks)]
    while heap:
        _, node = heapq.heappop(heap)
        if not node % clock.STEPS:
            clock.ask()
        lists[compiled.ranks[node]].append(node)
        released = [release[0] for release in compiled.releases[node]]
        for other in (*released, following[node]):
            if other >= 0:
                waits[other] -= 1
                if not waits[other]:
                    heapq.heappush(heap, (evaluation.starts[other], other))
    return lists


def _transfer(compiled: ActionNodes, move: TransferSpan) -> Transfer:
    edge = compiled.view.edges[move.edge]
    source, target = (edge.target, edge.source) if move.backward else (edge.source, edge.target)
    sizes = edge.grad_bytes if move.backward else edge.num_bytes
    assert sizes is not None
    reader = compiled.actions[move.consumer]
    microbatch = reader.partner[1] if move.backward and reader.partner is not None else reader.microbatch
    return Transfer(source, target, microbatch, compiled.ranks[move.producer], compiled.ranks[move.consumer],
                    move.backward, sizes[microbatch], edge.grad_values if move.backward else edge.values)


def _write_out(compiled: ActionNodes, nodes: Sequence[int], gaps: _Gaps) -> tuple[Instruction, ...]:
    result: list[Instruction] = []
    for index in range(len(nodes) + 1):
        if index:
            node = nodes[index - 1]
            action = compiled.actions[node]
            result.append(Instruction(action.kind, compiled.streams[node], action=action))
        result += gaps.sends[index]
        result += gaps.receives[index]
        result += [instruction for _, instruction in sorted(gaps.waits[index], key=lambda wait: wait[0])]
    return (*result, Instruction(ActionKind.OPTIMIZER_STEP, Stream.COMPUTE))
