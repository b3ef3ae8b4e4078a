"""What binds a plan: the device with the least idle time, the channel that is busiest, the memory that is full.

Every line is a fact about the plan as simulated, not an opinion: what the bound rests on, where time is lost, and what
would have to change for a shorter step.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

from mipipe.graphs.units import format_bytes, format_ns
from mipipe.planner.actions import Stream
from mipipe.planner.jobs.arrays import capacity
from mipipe.planner.jobs.times import Compiled, Evaluation, evaluate
from mipipe.planner.ladder.candidate import Candidate
from mipipe.planner.placements.branches import encoders


def explain(found: Candidate) -> tuple[str, ...]:
    """Lines that say what binds the candidate's best schedule."""
    assert found.best is not None
    compiled, evaluation = evaluate(found.view, found.best.schedule)
    told = partial(told_time, unit_ns=found.view.problem.unit_ns)
    makespan = evaluation.makespan_ns
    lines = [_placement(found)]
    lines.append(f"bound at this placement: {told(found.bound.ns)} ({found.bound.what}); the plan takes"
                 f" {told(makespan)}, {makespan / found.bound.ns - 1:.1%} above it")
    busy: dict[int, int] = defaultdict(int)
    first: dict[int, int] = {}
    last: dict[int, int] = defaultdict(int)
    for node, rank in enumerate(compiled.ranks):
        if compiled.streams[node] is Stream.COMPUTE:
            busy[rank] += compiled.durations[node]
            first[rank] = min(first.get(rank, makespan), evaluation.starts[node])
            last[rank] = max(last[rank], evaluation.starts[node] + compiled.durations[node])
    rank = max(busy, key=lambda r: (busy[r], -first[r]))
    inside = last[rank] - first[rank] - busy[rank]
    lines.append(f"device: rank {rank} has the most work, {told(busy[rank])}; it starts at {told(first[rank])},"
                 f" ends {told(makespan - last[rank])} before the step and idles {told(inside)} in between")
    lines += _channel(compiled, evaluation)
    lines += _memory(found)
    return tuple(lines)


def told_time(time_ns: float, unit_ns: int) -> str:
    """A time in the problem's unit, or with a unit of its own where times were measured or estimated."""
    return f"{time_ns / unit_ns:g}" if unit_ns != 1 else format_ns(time_ns)


def _placement(found: Candidate) -> str:
    stages = found.placement.stages
    copies = max(len(stage.ranks) for stage in stages)
    ranks = {rank for stage in stages for rank in stage.ranks}
    per_rank = max(sum(rank in stage.ranks for stage in stages) for rank in ranks)
    line = (f"placement {found.placement.name}: {len(stages)} stages on {len(ranks)} ranks, up to {per_rank} stages"
            f" on a rank, up to {copies} replicas of a stage")
    again = sum(stage.recompute for stage in stages)
    if again:
        line += f"; {again} stages run their forward again"
    chosen = set(encoders(found.view.problem))
    if chosen:
        own, other = ({rank for stage in stages if bool(chosen.intersection(stage.groups)) is wanted
                       for rank in stage.ranks} for wanted in (True, False))
        shared = "apart from" if own.isdisjoint(other) else "beside"
        line += f"; encoders on ranks {', '.join(map(str, sorted(own)))}, {shared} the rest"
    return line


def _channel(compiled: Compiled, evaluation: Evaluation) -> list[str]:
    told = partial(told_time, unit_ns=compiled.view.problem.unit_ns)
    topology = compiled.view.problem.topology
    moved: dict[tuple[int, int], int] = defaultdict(int)
    for transfer in evaluation.transfers:
        action = compiled.actions[transfer.producer]
        source, target = compiled.view.rank(action.stage, action.microbatch), compiled.ranks[transfer.consumer]
        moved[source, target] += transfer.end_ns - transfer.start_ns - topology.link(source, target).latency_ns
    if not moved:
        return []
    if not any(moved.values()):
        return ["channel: transfers take latency alone and occupy no channel"]
    (source, target), load = max(moved.items(), key=lambda item: item[1])
    return [f"channel: rank {source} to rank {target} is the busiest, {told(load)} of"
            f" {told(evaluation.makespan_ns)}"]


def _memory(found: Candidate) -> list[str]:
    """How full the fullest rank's activation memory gets, by the order alone (values in flight not counted)."""
    instance = found.instance
    assert found.best is not None
    peak: dict[int, float] = {}
    for rank, order in enumerate(found.best.schedule.ranks):
        used = top = 0
        for action in order.compute:
            nodes = [n for kind, stage, m in action.parts() if (n := instance.number.get((stage, kind, m))) is not None]
            if not nodes:
                break  # a halved instance knows half of the ranks
            used += sum(int(instance.alloc[n]) for n in nodes)
            top = max(top, used + max(int(instance.work[n]) for n in nodes))
            used -= sum(int(instance.free[n]) for n in nodes)
        room = capacity(found.view, rank)
        if top:
            peak[rank] = top / max(1, room)
    if not peak:
        return []
    rank = max(peak, key=lambda r: peak[r])
    room = capacity(found.view, rank)
    full = "which binds: more memory may shorten the step" if peak[rank] > 0.97 else "which does not bind"
    return [f"memory: rank {rank} uses {peak[rank]:.0%} of its {format_bytes(room)} for activations, {full}"]
