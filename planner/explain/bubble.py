"""Where a plan's time goes: the bubble of every rank as warm-up, imbalance, transfers, memory waits and recomputation.

A rank's bubble is the makespan less its busy compute time, as printed. Each part is what the bubble loses when one
cause is taken away; the causes go one after the other, so the parts add up to the bubble exactly:

1. *recomputation*: the same orders with forwards that run again taking no time. A rank that runs them in what would be
   bubble anyway has a negative part.
2. *transfers*: the same orders with values that arrive at once and reductions that take no time.
3. *memory waits*: every idle rank takes the first action of its order that is ready, whatever memory says. Where that
   is shorter and would not fit the memory, the difference is what ranks wait for memory; where it would fit, memory is
   not the cause, and the difference stays with the warm-up.
4. *imbalance*: the busiest rank's work less this rank's, without what runs again.
5. *warm-up*: what is left, the same for all ranks: what the busiest rank loses before work reaches it, until gradients
   come back, and after its last action. For 1F1B of equal stages, (P - 1) (F + B).
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.jobs.memory import capacity, effects, peaks, workspace
from mipipe.planner.jobs.stages import view
from mipipe.planner.jobs.times import ActionNodes, compile_actions, orders_of, run_orders
from mipipe.planner.plan import Plan


@dataclass(frozen=True, slots=True)
class BubbleParts:
    """One rank's bubble and its parts, in nanoseconds (module docstring)."""

    bubble_ns: int
    warm_up_ns: int
    imbalance_ns: int
    transfers_ns: int
    memory_ns: int
    recomputation_ns: int


def bubble_parts(plan: Plan) -> list[BubbleParts]:
    """The parts of every rank's bubble.

    Raises:
        PlanError: the order is incomplete or deadlocks.
    """
    stage_view = view(plan.problem, plan.placement)
    compiled = compile_actions(stage_view, plan.schedule.actions())
    orders = orders_of(compiled, plan.schedule)
    whole, busy = _makespan(compiled, orders), _busy(compiled)
    for node, action in enumerate(compiled.actions):
        if action.kind is ActionKind.RECOMPUTE:
            compiled.durations[node] = 0
    once, useful = _makespan(compiled, orders), _busy(compiled)
    compiled.releases[:] = [[(reader, -1, 0, edge, backward, 0) for reader, _, _, edge, backward, _ in released]
                            for released in compiled.releases]
    compiled.reductions[:] = [(stage, nodes, 0) for stage, nodes, _ in compiled.reductions]
    near = _makespan(compiled, orders)
    free = _without_memory(compiled, orders, near)
    most = max(useful)
    return [BubbleParts(whole - took, free - most, most - own, once - near, near - free, (whole - took) - (once - own))
            for took, own in zip(busy, useful, strict=True)]


def _makespan(compiled: ActionNodes, orders: list[list[int]]) -> int:
    found = run_orders(compiled, orders)
    assert found is not None, "compiled orders of a plan deadlock"
    return found.makespan_ns


def _busy(compiled: ActionNodes) -> list[int]:
    """Work of every rank's compute stream."""
    busy = [0] * compiled.view.problem.num_ranks
    for rank, stream, duration in zip(compiled.ranks, compiled.streams, compiled.durations, strict=True):
        if stream is Stream.COMPUTE:
            busy[rank] += duration
    return busy


def _without_memory(compiled: ActionNodes, orders: list[list[int]], known_ns: int) -> int:
    """The makespan without memory, orders being priorities; ``known_ns`` where that is no shorter, or fits memory."""
    starts = _dispatch(compiled, orders)
    makespan = max(start + duration for start, duration in zip(starts, compiled.durations, strict=True))
    return makespan if makespan < known_ns and not _fits(compiled, starts) else known_ns


def _dispatch(compiled: ActionNodes, orders: list[list[int]]) -> list[int]:
    """The start of every action where an idle stream takes the first action of its order that is ready.

    Arcs take no time here (module docstring, step 2).
    """
    line = {node: number for number, order in enumerate(orders) for node in order}
    place = {node: position for order in orders for position, node in enumerate(order)}
    waits, starts = compiled.num_waits.copy(), [0] * len(compiled.actions)
    ready: dict[int, list[tuple[int, int]]] = defaultdict(list)
    idle = set(range(len(orders)))
    for node, count in enumerate(waits):
        if not count:
            heapq.heappush(ready[line[node]], (place[node], node))
    running: list[tuple[int, int]] = []
    now = 0
    while True:
        for number in [number for number in idle if ready[number]]:
            _, node = heapq.heappop(ready[number])
            starts[node] = now
            heapq.heappush(running, (now + compiled.durations[node], node))
            idle.discard(number)
        if not running:
            return starts
        now = running[0][0]
        while running and running[0][0] == now:
            _, node = heapq.heappop(running)
            idle.add(line[node])
            for reader, *_ in compiled.releases[node]:
                waits[reader] -= 1
                if not waits[reader]:
                    heapq.heappush(ready[line[reader]], (place[reader], reader))


def _fits(compiled: ActionNodes, starts: list[int]) -> bool:
    """Whether saved tensors and workspace fit every rank's memory at these starts."""
    stage_view = compiled.view
    known = [effects(stage_view, stage) for stage in range(stage_view.num_stages)]
    taken, returned = [0] * len(starts), [0] * len(starts)
    for node, action in enumerate(compiled.actions):
        taken[node] = returned[node] = workspace(stage_view, action)
        for kind, stage, microbatch in action.parts():
            found = known[stage][kind]
            taken[node] += int(found.taken[microbatch])
            returned[node] += int(found.returned[microbatch])
    start = np.array(starts)
    most = peaks(np.array(compiled.ranks), start, start + np.array(compiled.durations), np.array(taken),
                 np.array(returned), stage_view.problem.num_ranks)
    return all(peak <= capacity(stage_view, rank) for rank, peak in enumerate(most))
