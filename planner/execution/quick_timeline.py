"""The simulated timeline of a large plan by arrays, where an order alone gives all times, as when it is measured.

Lowering and simulating takes 100 microseconds an action: half a minute for 64 ranks x 1,024 microbatches. The same
memory comes from the arrays, and the spans that someone looks at. A test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from mipipe.planner.actions import ActionKind, Stream
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.measure import exact, timed
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.action_arrays import COMPUTE_KINDS
from mipipe.planner.jobs.order_memory import held
from mipipe.planner.jobs.order_times import OrderTimes
from mipipe.planner.jobs.stages import view
from mipipe.planner.plan import Plan
from mipipe.planner.program import Transfer
from mipipe.planner.sizes import VERY_MANY
from mipipe.planner.timeline import ALL_KINDS, ALL_STREAMS, Columns, LazySpans, Span, Timeline


def timeline_of(plan: Plan, large: int = VERY_MANY) -> Timeline:
    """The simulated timeline of a plan, by arrays if it has at least ``large`` actions and they allow it."""
    count = sum(len(order.compute) for order in plan.schedule.ranks)
    found = by_arrays(plan) if count >= large else None
    return found if found is not None else simulate(plan, lower(plan))


def by_arrays(plan: Plan) -> Timeline | None:
    """The timeline where arrays can say it, else None."""
    stage_view = view(plan.problem, plan.placement)
    times = timed(stage_view, plan.schedule)
    if times is None or not exact(times):
        return None
    return Timeline("simulated", plan.problem.num_ranks, _spans(times), _memory(times),
                    stage_view.resident_bytes, plan.problem.unit_ns, {"plan": plan.name})


def _spans(times: OrderTimes) -> LazySpans:
    """All actions, then the transfers, sums and updates, by start, rank, stream and end."""
    actions, value = times.actions, times.actions.value
    moved = np.flatnonzero(times.moved)
    rank, stage, back = actions.nodes.rank, actions.nodes.stage, value["maker"][moved]
    few = _few(times)
    compute, collective, channel = (ALL_STREAMS.index(stream) for stream in (
        Stream.COMPUTE, Stream.COLLECTIVE, Stream.CHANNEL))
    code = np.array([ALL_KINDS.index(kind) for kind in COMPUTE_KINDS])
    columns = [np.concatenate([np.asarray(column, dtype=np.int64) for column in parts]) for parts in (
        (actions.rank, rank[back], [span.rank for span in few]),
        (np.where(actions.collective == 1, collective, compute), np.full(len(moved), channel),
         [ALL_STREAMS.index(span.stream) for span in few]),
        (code[actions.kind], np.full(len(moved), ALL_KINDS.index(ActionKind.SEND)),
         [ALL_KINDS.index(span.kind) for span in few]),
        (times.start, times.begin[moved], [span.start_ns for span in few]),
        (times.end, times.over[moved], [span.end_ns for span in few]),
        (actions.stage, stage[back], [span.stage for span in few]),
        (np.full(actions.size, -1), rank[value["reader"][moved]], np.full(len(few), -1)))]
    names = np.array([sorted(ALL_STREAMS).index(stream) for stream in ALL_STREAMS])
    order = np.lexsort((columns[4], names[columns[1]], columns[0], columns[3]))

    def make(places: Sequence[int]) -> Iterable[Span]:
        for number in order[places].tolist():
            if number < actions.size:
                yield _action(times, number)
            elif number < actions.size + len(moved):
                yield _transfer(times, int(moved[number - actions.size]))
            else:
                yield few[number - actions.size - len(moved)]

    return LazySpans(Columns(*(column[order] for column in columns)), make)


def _action(times: OrderTimes, number: int) -> Span:
    actions = times.actions
    action = actions.action(number)
    stream = Stream.COLLECTIVE if actions.collective[number] else Stream.COMPUTE
    return Span(int(actions.rank[number]), stream, action.kind, str(action), int(times.start[number]),
                int(times.end[number]), action.stage, action.microbatch)


def _transfer(times: OrderTimes, number: int) -> Span:
    """A value's way from rank to rank."""
    nodes, value = times.actions.nodes, times.actions.value
    made, read = int(value["maker"][number]), int(value["reader"][number])
    move = Transfer(int(nodes.stage[made]), int(nodes.stage[read]), int(nodes.microbatch[made]), int(nodes.rank[made]),
                    int(nodes.rank[read]), bool(value["backward"][number]), int(value["num_bytes"][number]))
    return Span(move.source_rank, Stream.CHANNEL, ActionKind.SEND, str(move), int(times.begin[number]),
                int(times.over[number]), move.source_stage, move.microbatch, peer=move.target_rank)


def _few(times: OrderTimes) -> list[Span]:
    """The sums of gradients on every member, and the updates that take time."""
    stages, updates = times.actions.view.placement.stages, times.actions.view.updates_ns()
    found = [Span(rank, Stream.COLLECTIVE, ActionKind.ALL_REDUCE, f"reduce {stage}", start, end, stage)
             for stage, start, end in times.reductions for rank in stages[stage].ranks]
    return found + [Span(rank, Stream.COMPUTE, ActionKind.OPTIMIZER_STEP, "update", int(end) - took, int(end))
                    for rank, (took, end) in enumerate(zip(updates, times.ends, strict=True)) if took]


def _memory(times: OrderTimes) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per rank the steps of its memory, resident bytes included; a moment's changes are one step."""
    owner, since, until, size = held(times)
    owner, moments, change = np.tile(owner, 2), np.concatenate([since, until]), np.concatenate([size, -size])
    order = np.argsort(owner, kind="stable")
    resident = times.actions.view.resident_bytes
    ends = np.searchsorted(owner[order], np.arange(len(resident) + 1))
    curves = []
    for rank, held_bytes in enumerate(resident):
        own = order[ends[rank]:ends[rank + 1]]
        when, place = np.unique(np.concatenate([[0], moments[own]]), return_inverse=True)
        sums = np.zeros(len(when), dtype=np.int64)
        np.add.at(sums, place, np.concatenate([[held_bytes], change[own]]))
        steps = (sums != 0) | (np.arange(len(when)) == 0)
        curves.append(tuple(zip(when[steps].tolist(), np.cumsum(sums)[steps].tolist(), strict=True)))
    return tuple(curves)
