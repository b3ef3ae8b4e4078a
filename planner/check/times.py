"""When everything happens under a plan's order: the checker's own clock, and its account of deadlocks.

A transfer is ready when its producer ends; a channel serves transfers in the order in which they become ready, the
next as soon as the bytes of the one before are through (latency passes for several at once).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from mipipe.graphs.errors import PlanError
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.check.facts import Demands, Part, part_text

Place = tuple[int, int, int]
"""(rank, 0 for compute and 1 for collective, position)."""

_GRID_COLUMNS, _GRID_ROWS = 7, 16
"""Actions and ranks of the grid that shows where a plan waits for ever: what a terminal holds."""


@dataclass(frozen=True, slots=True)
class CheckedTimes:
    """Spans of the elementary parts (a fused action's parts all have its span), of the flows that are transfers, and
    of the reductions by stage and of the updates by rank; ``posted[flow]`` is when its receive is posted."""

    parts: dict[Part, tuple[int, int]]
    moved: dict[int, tuple[int, int]]
    posted: dict[int, int]
    reduced: dict[int, tuple[int, int]]
    updated: dict[int, tuple[int, int]]

    @property
    def makespan_ns(self) -> int:
        ends = [end for spans in (self.parts, self.moved, self.reduced, self.updated) for _, end in spans.values()]
        return max(ends, default=0)


def lanes_of(facts: Demands) -> dict[tuple[int, int], tuple[Action, ...]]:
    """The plan's orders by (rank, 0 for compute and 1 for collective)."""
    return {(rank, lane): actions for rank, order in enumerate(facts.plan.schedule.ranks)
            for lane, actions in enumerate((order.compute, order.collective))}


def order_times(facts: Demands) -> CheckedTimes:
    """The times of a complete schedule.

    Raises:
        PlanError: the order deadlocks; the message shows who waits for whom and the orders around the stuck actions.
    """
    lanes = lanes_of(facts)
    doer = {part: (rank, lane, position) for (rank, lane), actions in lanes.items()
            for position, action in enumerate(actions) for part in action.parts()}
    waits, locally, flows_of = _dependencies(facts, doer)
    ready: dict[Place, int] = {}
    starts: dict[Place, int] = {}
    ends: dict[Place, int] = {}
    moved: dict[int, tuple[int, int]] = {}
    channel_free: dict[tuple[int, int], int] = {}
    heap: list[tuple[int, Place]] = []

    def arrive(place: Place, time_ns: int) -> None:
        ready[place] = max(ready.get(place, 0), time_ns)
        waits[place] -= 1
        if waits[place] == 0:
            start(place)

    def start(place: Place) -> None:
        rank, lane, position = place
        starts[place] = ready.get(place, 0)
        heapq.heappush(heap, (starts[place] + facts.action_ns(lanes[rank, lane][position]), place))

    for place in [place for place, count in waits.items() if count == 0]:
        start(place)
    topology = facts.plan.problem.topology
    while heap:
        end, place = heapq.heappop(heap)
        ends[place] = end
        for number in flows_of.get(place, ()):
            flow = facts.flows[number]
            reader = doer[flow.consumer]
            if reader[0] == place[0]:
                arrive(reader, end)
                continue
            channel = (place[0], reader[0])
            begin = max(end, channel_free.get(channel, 0))
            moved[number] = (begin, begin + topology.transfer_ns(*channel, flow.num_bytes))
            channel_free[channel] = moved[number][1] - topology.link(*channel).latency_ns
            arrive(reader, moved[number][1])
        for later in locally.get(place, ()):
            arrive(later, end)
    if len(ends) < len(waits):
        raise PlanError(_deadlock(facts, lanes, doer, ends))
    parts = {part: (starts[place], ends[place]) for part, place in doer.items()}
    reduced = _reductions(facts, lanes, parts)
    return CheckedTimes(parts, moved, _postings(facts, lanes, parts, moved), reduced, updates(facts, parts, reduced))


def _dependencies(facts: Demands, doer: dict[Part, Place]) -> tuple[dict[Place, int], dict[Place, list[Place]],
                                                                 dict[Place, list[int]]]:
    """Per action: how much it waits for; which actions wait for its end; which flows it makes."""
    waits = dict.fromkeys(doer.values(), 0)
    locally: dict[Place, list[Place]] = {}
    flows_of: dict[Place, list[int]] = {}
    for place in list(waits):
        following = (place[0], place[1], place[2] + 1)
        if following in waits:
            locally.setdefault(place, []).append(following)
            waits[following] += 1
    for part, place in doer.items():
        before = facts.needs_before(part)
        if before is not None and doer[before] != place:
            locally.setdefault(doer[before], []).append(place)
            waits[place] += 1
    for number, flow in enumerate(facts.flows):
        if doer[flow.producer] != doer[flow.consumer]:
            flows_of.setdefault(doer[flow.producer], []).append(number)
            waits[doer[flow.consumer]] += 1
    return waits, locally, flows_of


def _postings(facts: Demands, lanes: dict[tuple[int, int], tuple[Action, ...]], parts: dict[Part, tuple[int, int]],
              moved: dict[int, tuple[int, int]]) -> dict[int, int]:
    """When receives are posted: at the end of the reader's last compute action that ended by the transfer's start."""
    arriving: dict[int, list[tuple[int, int]]] = {}
    for number, (begin, _) in moved.items():
        _, stage, microbatch = facts.flows[number].consumer
        arriving.setdefault(facts.rank(stage, microbatch), []).append((begin, number))
    posted = {}
    for rank, entries in arriving.items():
        times = [parts[action.parts()[0]][1] for action in lanes[rank, 0]]
        count = 0
        for begin, number in sorted(entries):
            while count < len(times) and times[count] <= begin:
                count += 1
            posted[number] = times[count - 1] if count else 0
    return posted


def _reductions(facts: Demands, lanes: dict[tuple[int, int], tuple[Action, ...]],
                parts: dict[Part, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Reductions run after all collectives of their ranks, in the order in which they become ready."""
    free = {rank: parts[actions[-1].parts()[0]][1] if actions else 0 for (rank, lane), actions in lanes.items() if lane}
    count = facts.plan.problem.num_microbatches
    waiting = sorted((max(parts[ActionKind.W, stage, m][1] for m in range(count)), stage)
                     for stage in facts.reduced_stages())
    found = {}
    for ready, stage in waiting:
        members = facts.plan.placement.stages[stage].ranks
        begin = max([ready, *(free[rank] for rank in members)])
        found[stage] = (begin, begin + facts.reduce_ns(stage))
        free.update(dict.fromkeys(members, found[stage][1]))
    return found


def updates(facts: Demands, parts: dict[Part, tuple[int, int]],
            reduced: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Each rank's update, after all its parts and reductions; ranks whose update takes no time have none."""
    ends = [0] * facts.plan.problem.num_ranks
    for (_, stage, microbatch), (_, end) in parts.items():
        rank = facts.rank(stage, microbatch)
        ends[rank] = max(ends[rank], end)
    for stage, (_, end) in reduced.items():
        for rank in facts.plan.placement.stages[stage].ranks:
            ends[rank] = max(ends[rank], end)
    return {rank: (end, end + facts.update_ns(rank)) for rank, end in enumerate(ends) if facts.update_ns(rank)}


def _deadlock(facts: Demands, lanes: dict[tuple[int, int], tuple[Action, ...]], doer: dict[Part, Place],
              ends: dict[Place, int]) -> str:
    """Who waits for whom, round to where it began, and the grid of orders."""
    heads = {key: next((k for k in range(len(actions)) if (*key, k) not in ends), len(actions))
             for key, actions in lanes.items()}
    arriving: dict[Part, list[Part]] = {}
    for flow in facts.flows:
        arriving.setdefault(flow.consumer, []).append(flow.producer)

    def blocker(key: tuple[int, int]) -> Part:
        action = lanes[key][heads[key]]
        for part in action.parts():
            before = facts.needs_before(part)
            for needed in ([] if before is None else [before]) + arriving.get(part, []):
                if doer[needed] not in ends and (doer[needed] != (*key, heads[key])):
                    return needed
        raise AssertionError("the head of a stuck order waits for nothing")

    key = next(key for key in lanes if heads[key] < len(lanes[key]))
    visited: list[tuple[int, int]] = []
    while key not in visited:
        visited.append(key)
        key = doer[blocker(key)][:2]
    cycle = visited[visited.index(key):]
    steps = [f"rank {key[0]}, action {heads[key]} ({lanes[key][heads[key]]}) waits for {part_text(blocker(key))}"
             f" on rank {doer[blocker(key)][0]}" for key in cycle]
    rows = [[str(action) for action in lanes[key]] for key in cycle]
    return "schedule: the order deadlocks: " + "; ".join(steps) + "\n" + grid(
        [f"rank {key[0]}" + (" collective" if key[1] else "") for key in cycle], rows, [heads[key] for key in cycle])


def grid(labels: Sequence[str], rows: Sequence[Sequence[str]], stuck: Sequence[int]) -> str:
    """The rank x order grid around the stuck positions, each marked with an arrow."""
    shown = []
    for row, head in zip(rows, stuck, strict=True):
        first = max(0, min(head - _GRID_COLUMNS // 2, len(row) - _GRID_COLUMNS))
        cells = [("→" if k == head else " ") + row[k] for k in range(first, min(len(row), first + _GRID_COLUMNS))]
        shown.append([f"[{first}]", *cells])
    shown = shown[:_GRID_ROWS]
    widths = [max(len(row[k]) if k < len(row) else 0 for row in shown) for k in range(_GRID_COLUMNS + 1)]
    label_width = max(map(len, labels))
    lines = [f"  {label:<{label_width}}  " + " ".join(f"{cell:<{width}}" for cell, width in
                                                      zip(row, widths, strict=False)).rstrip()
             for label, row in zip(labels, shown, strict=False)]
    more = [f"  ... and {len(rows) - _GRID_ROWS} more ranks"] if len(rows) > _GRID_ROWS else []
    return "\n".join([*lines, *more])
