"""Plans and timelines in other tools' formats: torch's schedule CSV, Chrome's and Perfetto's trace JSON.

torch.distributed.pipelining knows a chain of stages, each on one rank, with a backward for every forward; what cannot
be said in its grammar is refused. One row per rank, one action per cell: ``0F0``, ``2I0``, ``2W0``, ``2B0``,
``(0F3;1B2)OVERLAP_F_B``. A stage without I or without W has its one gradient phase written as B, torch's full backward.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from typing import Any

from mipipe.graphs.errors import InputError, PlanError
from mipipe.graphs.topology import MOST_DEVICES
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.plan import Plan, RankOrder, Schedule
from mipipe.planner.timeline import Span, Timeline

REMEDY = "; `mipipe plan --exportable` (or --placement v) makes plans that can be"
"""What to do about a plan that torch's grammar cannot say, where another plan of the same model may be one."""

_GRADIENTS = (ActionKind.I, ActionKind.W)
_TRANSFER = re.compile(r"(\d+)([⇒⇐])(\d+):(\d+)")


def torch_csv(plan: Plan) -> str:
    """The plan's order as CSV for torch's schedule runtime (format ``compute_only``).

    Raises:
        PlanError: the plan has what torch's grammar cannot say: a stage on several ranks, a branch, a second stream,
            recomputation, a stage without gradients.
    """
    stages = view(plan.problem, plan.placement)
    _check_chain(stages)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for order in plan.schedule.ranks:
        writer.writerow([str(_as_torch(stages, action)) for action in order.compute])
    return text.getvalue()


def read_torch_csv(text: str, where: str = "CSV") -> tuple[tuple[Action, ...], ...]:
    """The order of every rank in a CSV of torch's compute actions; empty cells are skipped.

    Raises:
        InputError: a cell is no compute action.
    """
    orders = []
    for rank, row in enumerate(csv.reader(io.StringIO(text))):
        order = []
        for place, cell in enumerate(row):
            if not cell.strip():
                continue
            try:
                order.append(Action.parse(cell.strip()))
            except PlanError as error:
                raise InputError(f"{where}: rank {rank}, cell {place}: {error}") from None
        orders.append(tuple(order))
    return tuple(orders)


def with_torch_order(plan: Plan, text: str, where: str = "CSV") -> Plan:
    """The plan with the order of a CSV, its figures dropped; the inverse of `torch_csv`.

    Raises:
        InputError: a cell is no compute action, or there are rows for another number of ranks.
    """
    stages = view(plan.problem, plan.placement)
    orders = read_torch_csv(text, where)
    if len(orders) != plan.problem.num_ranks:
        raise InputError(f"{where}: has {len(orders)} rows, but the plan has {plan.problem.num_ranks} ranks")
    ranks = tuple(RankOrder(tuple(_from_torch(stages, action) for action in order)) for order in orders)
    return Plan(plan.name, plan.problem, plan.placement, Schedule(ranks), provenance={"method": f"order of {where}"})


def _check_chain(stages: StageView) -> None:
    last = stages.num_stages - 1
    for number, stage in enumerate(stages.placement.stages):
        if len(stage.ranks) > 1:
            raise PlanError(f"stage {number}: is on ranks {', '.join(map(str, stage.ranks))}; torch's schedule CSV has"
                            f" one rank for each stage, so this plan cannot be exported to it{REMEDY}")
        if stages.streams[number] is not Stream.COMPUTE:
            raise PlanError(f"stage {number}: runs on the collective stream; torch's schedule CSV has one stream")
        if stage.recompute:
            raise PlanError(f"stage {number}: recomputes; torch's schedule CSV has no action for it{REMEDY}")
        if stages.i_ns[number] is None and stages.w_ns[number] is None:
            raise PlanError(f"stage {number}: has no gradients; torch's schedule runtime wants a backward for every"
                            " forward, so this plan cannot be exported to it")
        targets = {stages.edges[edge].target for edge in stages.outgoing[number]}
        if targets != ({number + 1} if number < last else set()):
            found = f"stages {', '.join(map(str, sorted(targets)))}" if targets else "no stage"
            raise PlanError(f"stage {number}: feeds {found}, expected {'no other' if number == last else number + 1};"
                            f" torch's schedule CSV knows only chains, so this plan cannot be exported to it{REMEDY}")


def _as_torch(stages: StageView, action: Action) -> Action:
    lone = stages.i_ns[action.stage] is None or stages.w_ns[action.stage] is None
    return Action(action.stage, ActionKind.B, action.microbatch) if lone and action.kind in _GRADIENTS else action


def _from_torch(stages: StageView, action: Action) -> Action:
    if action.kind is not ActionKind.B or action.stage >= stages.num_stages:
        return action
    kinds = [kind for kind, times in zip(_GRADIENTS, (stages.i_ns, stages.w_ns), strict=True)
             if times[action.stage] is not None]
    return Action(action.stage, kinds[0], action.microbatch) if len(kinds) == 1 else action


def perfetto_text(*timelines: Timeline) -> str:
    """Timelines as one trace for Perfetto or chrome://tracing: process = rank, thread = stream or channel.

    Arrows (flows) lead from a transfer to the action that reads it, counters show memory. The first timeline's process
    ids are its ranks; those of the next start at 16,384, the most that a cluster has, and so on.
    """
    events = [event for number, timeline in enumerate(timelines) for event in _events(timeline, number, len(timelines))]
    trace = {"traceEvents": events, "displayTimeUnit": "ms"}
    return json.dumps(trace, separators=(",", ":"), ensure_ascii=False) + "\n"


def _events(timeline: Timeline, number: int, count: int) -> Iterator[dict[str, Any]]:
    base = number * MOST_DEVICES
    for rank in range(timeline.num_ranks):
        name = f"rank {rank}" + (f", {timeline.origin}" if count > 1 else "")
        yield {"ph": "M", "name": "process_name", "pid": base + rank, "args": {"name": name}}
        place = rank * count + number  # a rank's timelines stand under one another
        yield {"ph": "M", "name": "process_sort_index", "pid": base + rank, "args": {"sort_index": place}}
    threads = _threads(timeline)
    for rank, thread, label in sorted({(span.rank, *threads[span]) for span in timeline.spans}):
        yield {"ph": "M", "name": "thread_name", "pid": base + rank, "tid": thread, "args": {"name": label}}
    for span in timeline.spans:
        details = {"stage": span.stage, "microbatch": span.microbatch, "peer": span.peer}
        yield {"ph": "X", "name": span.label, "cat": span.kind.value, "pid": base + span.rank, "tid": threads[span][0],
               "ts": span.start_ns / 1000, "dur": (span.end_ns - span.start_ns) / 1000,
               "args": {key: value for key, value in details.items() if value is not None and value != -1}}
    for arrow, (span, reader) in enumerate(_arrows(timeline)):
        common = {"name": "transfer", "cat": "transfer", "id": base * 1000 + arrow}
        yield {"ph": "s", "pid": base + span.rank, "tid": threads[span][0], "ts": span.start_ns / 1000, **common}
        yield {"ph": "f", "bp": "e", "pid": base + reader.rank, "tid": threads[reader][0],
               "ts": reader.start_ns / 1000, **common}
    for rank, curve in enumerate(timeline.memory):
        for time_ns, size in curve:
            yield {"ph": "C", "name": "memory", "pid": base + rank, "ts": time_ns / 1000, "args": {"bytes": size}}


def _threads(timeline: Timeline) -> dict[Span, tuple[int, str]]:
    """The thread id and name of each span: compute, collective, then for each peer what goes out and what comes in.

    Transfers under way at once (latency occupies no channel) take further threads, for a viewer can only nest slices.
    """
    lanes: dict[Span, tuple[int, int, str]] = {}
    ends: dict[tuple[int, str, int], list[int]] = {}
    for span in sorted(timeline.spans, key=lambda span: span.start_ns):
        name, place = span.stream.value, int(span.stream is Stream.COLLECTIVE)
        if span.stream is Stream.CHANNEL:
            inward = span.kind is ActionKind.RECV
            name, place = f"{'from' if inward else 'to'} rank {span.peer}", 2 + 2 * (span.peer or 0) + inward
        busy = ends.setdefault((span.rank, name, place), [])
        lane = next((number for number, end in enumerate(busy) if end <= span.start_ns), len(busy))
        busy[lane:lane + 1] = [span.end_ns]
        lanes[span] = place, lane, name if lane == 0 else f"{name} ({lane + 1})"
    most = max(map(len, ends.values()), default=0)
    return {span: (place * most + lane, name) for span, (place, lane, name) in lanes.items()}


def _arrows(timeline: Timeline) -> Iterator[tuple[Span, Span]]:
    """Each sent transfer with the action that reads it."""
    readers: dict[tuple[bool, int, int], Span] = {}
    for span in timeline.spans:
        if span.stream is Stream.CHANNEL or span.kind is ActionKind.ALL_REDUCE:
            continue
        try:
            parts = Action.parse(span.label).parts()
        except PlanError:
            continue  # a measured timeline may hold more than actions, such as the optimizer's step
        for kind, stage, microbatch in parts:
            if kind is not ActionKind.RECOMPUTE:
                key = (kind is not ActionKind.F, stage, microbatch)
                readers[key] = min(readers.get(key, span), span, key=lambda item: item.start_ns)
    for span in timeline.spans:
        match = _TRANSFER.fullmatch(span.label) if span.kind is ActionKind.SEND else None
        if match is not None:
            reader = readers.get((match[2] == "⇐", int(match[3]), int(match[4])))
            if reader is not None:
                yield span, reader
