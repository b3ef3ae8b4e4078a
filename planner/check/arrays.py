"""The checker's rules by arrays, for large plans: a hundredth of the time per action.

`holds` is a second writing of what `mipipe.planner.check.plan` calls, rule by rule. It says yes only where every rule
was found kept; where anything is amiss it says no, and the checker itself finds the rule and its place. It shares no
code with search, lowering or simulation either. 64 ranks x 1,024 microbatches (200,000 actions): a second, where the
checker takes 24.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from mipipe.graphs.errors import PlanError
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.check.array_times import ArrayTimes, run_clock
from mipipe.planner.check.facts import Demands, check_placement, scaled, workspace_bytes
from mipipe.planner.check.memory import check_resident
from mipipe.planner.plan import Plan
from mipipe.planner.problem import Group

PARTS = (ActionKind.F, ActionKind.RECOMPUTE, ActionKind.I, ActionKind.W)
"""The kinds of elementary parts; part number ``(kind * stages + stage) * microbatches + microbatch``."""
_F, _R, _I, _W = range(4)


def holds(plan: Plan) -> bool:
    """Whether the plan keeps every rule, stated figures included."""
    try:
        check_placement(plan)
        facts = Demands(plan)
        check_resident(facts)
    except PlanError:
        return False
    read = _actions(facts)
    if read is None:
        return False
    clock = run_clock(facts, read.rank, read.lane, read.duration, read.doer, _flows(facts), _followings(facts))
    if clock is None:
        return False
    bounds = [bound for bound in (plan.bound_ns, plan.placement_bound_ns) if bound is not None]
    return (plan.makespan_ns in (None, clock.makespan_ns) and all(bound <= clock.makespan_ns for bound in bounds)
            and bounds == sorted(bounds) and _memory_suffices(facts, read, clock))


@dataclass(frozen=True, slots=True)
class Read:
    """The actions by rank, stream and position. ``doer`` is the action of every part, -1 where there is none.
    ``stages``: that of an action's gradients or F run again, and that of its F; -1 for none."""

    rank: np.ndarray
    lane: np.ndarray
    duration: np.ndarray
    stages: np.ndarray
    doer: np.ndarray


def _actions(facts: Demands) -> Read | None:
    """The actions; None unless each part there should be is there once, on its rank and stream, and nothing else."""
    problem, routes = facts.plan.problem, np.array(facts.plan.placement.routes, dtype=np.int64)
    count, stages = problem.num_microbatches, len(facts.phases)
    lanes = [order for rank in facts.plan.schedule.ranks for order in (rank.compute, rank.collective)]
    lane = np.repeat(np.arange(len(lanes)), [len(order) for order in lanes])
    table = _parts([action for order in lanes for action in order])
    if len(lanes) != 2 * problem.num_ranks or table is None:
        return None
    of, kind, stage, m = table.T
    if len(table) and (stage.min() < 0 or stage.max() >= stages or m.min() < 0 or m.max() >= count):
        return None
    wanted = np.zeros((len(PARTS), stages, count), dtype=np.int64)
    for at, kinds in enumerate(facts.phases):
        wanted[[PARTS.index(name) for name in kinds], at] = 1
    part = (kind * stages + stage) * count + m
    beside = np.array([stream is Stream.COLLECTIVE for stream in facts.streams])
    if (np.bincount(part, minlength=wanted.size) != wanted.reshape(-1)).any() \
            or (2 * routes[stage, m] + beside[stage] != lane[of]).any():
        return None
    doer = np.full(wanted.size, -1, dtype=np.int64)
    doer[part] = of
    ahead, behind = (_summed(_durations(facts)[part], of, chosen, len(lane)) for chosen in (kind == _F, kind != _F))
    works = np.full((2, len(lane)), -1, dtype=np.int64)
    works[0, of[kind != _F]], works[1, of[kind == _F]] = stage[kind != _F], stage[kind == _F]
    duration, paired = ahead + behind, np.flatnonzero((works >= 0).all(axis=0))
    if not beside.any() and len(paired):
        different, which = np.unique(np.stack([ahead[paired], behind[paired]]), axis=1, return_inverse=True)
        duration[paired] = np.array([problem.overlap.duration_ns(f, b) for f, b in different.T.tolist()])[which.ravel()]
    return Read(lane // 2, lane % 2, duration, works, doer)


def _parts(actions: Sequence[Action]) -> np.ndarray | None:
    """(number of the action, kind, stage, microbatch) of all parts, in rows; None where an action is none of a plan's.
    """
    rows: list[tuple[int, int, int, int]] = []
    for number, action in enumerate(actions):
        kind, stage, m = action.kind, action.stage, action.microbatch
        if (kind is ActionKind.OVERLAP_F_B) != (action.partner is not None) or action.partner == (stage, m):
            return None  # others that need their own forward wait for themselves
        if kind is ActionKind.F:
            rows.append((number, _F, stage, m))
        elif kind is ActionKind.I:
            rows.append((number, _I, stage, m))
        elif kind is ActionKind.W:
            rows.append((number, _W, stage, m))
        elif kind is ActionKind.RECOMPUTE:
            rows.append((number, _R, stage, m))
        elif kind is ActionKind.B:
            rows += [(number, _I, stage, m), (number, _W, stage, m)]
        elif action.partner is not None:
            rows += [(number, _F, stage, m), (number, _I, *action.partner), (number, _W, *action.partner)]
        else:
            return None
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _summed(values: np.ndarray, owner: np.ndarray, chosen: np.ndarray, size: int) -> np.ndarray:
    total = np.zeros(size, dtype=np.int64)
    np.add.at(total, owner[chosen], values[chosen])
    return total


def _durations(facts: Demands) -> np.ndarray:
    """Of every part, on the rank that its microbatch is routed to; 0 where there is no such part."""
    problem, routes = facts.plan.problem, facts.plan.placement.routes
    found = np.zeros((len(PARTS), len(facts.phases), problem.num_microbatches), dtype=np.int64)
    for stage, kinds in enumerate(facts.phases):
        loaded = any(group.loads for group in facts.groups(stage))
        device = [problem.topology.devices[rank].kind for rank in routes[stage]]
        example = {name: m for m, name in enumerate(device)}
        for kind in kinds:
            each = {name: facts.part_ns((kind, stage, m)) for name, m in example.items()}
            found[PARTS.index(kind), stage] = (
                [facts.part_ns((kind, stage, m)) for m in range(len(device))] if loaded else
                [each[name] for name in device])
    return found.reshape(-1)


def _followings(facts: Demands) -> np.ndarray:
    """(part, part that follows it within its stage), in two rows, for all microbatches."""
    count, stages = facts.plan.problem.num_microbatches, len(facts.phases)
    pairs = [[(PARTS.index(kind) * stages + stage) * count for kind in two]
             for stage, kinds in enumerate(facts.phases) for two in pairwise(kinds)]
    return (np.array(pairs, dtype=np.int64).reshape(-1, 2, 1) + np.arange(count)).swapaxes(0, 1).reshape(2, -1)


def _flows(facts: Demands) -> np.ndarray:
    """(maker, reader, bytes) of everything that passes between two stages, in three rows; by microbatch, then by pair
    of stages, forward first."""
    problem, stages, count = facts.plan.problem, len(facts.phases), facts.plan.problem.num_microbatches
    between: dict[tuple[int, int], list[int]] = {}
    for number, edge in enumerate(problem.edges):
        for target in {facts.stage_of[group] for group in edge.targets} - {facts.stage_of[edge.source]}:
            between.setdefault((facts.stage_of[edge.source], target), []).append(number)
    rows = []
    for (source, target), numbers in sorted(between.items()):
        edges = [problem.edges[number] for number in numbers]
        rows.append((_F * stages + source, _F * stages + target,
                     sum(_each(edge.num_bytes, problem.groups[edge.source], count) for edge in edges)))
        reader = facts.gradient_kind(source)
        returned = [edge for edge in edges if edge.grad_bytes is not None and any(
            facts.stage_of[group] == target and _has_i(problem.groups[group]) for group in edge.targets)]
        if returned and reader is not None:
            rows.append((_I * stages + target, PARTS.index(reader) * stages + source,
                         sum(_each(edge.grad_bytes or 0, problem.groups[edge.source], count) for edge in returned)))
    each = np.arange(count)
    columns = [np.stack([np.asarray(row[at]) * count + each for row in rows], axis=1) if rows
               else np.zeros((count, 0), dtype=np.int64) for at in (0, 1)]
    sizes = np.stack([row[2] for row in rows], axis=1) if rows else columns[0]
    return np.stack([*(column.reshape(-1) for column in columns), sizes.reshape(-1)])


def _each(amount: int, group: Group, count: int) -> np.ndarray:
    """An amount of a group for every microbatch."""
    if not group.loads:
        return np.full(count, amount, dtype=np.int64)
    return np.array([scaled(amount, group, m) for m in range(count)], dtype=np.int64)


def _has_i(group: Group) -> bool:
    return any(times.i_ns is not None for times in group.times.values())


Held = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Columns: rank, from, to, bytes."""


def _memory_suffices(facts: Demands, read: Read, clock: ArrayTimes) -> bool:
    """Whether every rank keeps its limits at every moment; what ends at a moment is gone before what begins comes."""
    problem = facts.plan.problem
    held = [*_saved(facts, read, clock), (read.rank, clock.start, clock.end, _workspace(facts, read)), *clock.in_flight]
    rank, since, until, size = (np.concatenate([item[at] for item in held]) for at in range(4))
    some = (size > 0) & (until > since)
    rank, moment = np.tile(rank[some], 2), np.concatenate([since[some], until[some]])
    change = np.concatenate([size[some], -size[some]])
    order = np.lexsort((change, moment, rank))
    level = np.cumsum(change[order])  # all is returned in the end, so every rank begins at 0
    limit = problem.limits.activation_bytes
    room = np.array([min(device.memory_bytes - facts.resident_bytes(r), limit if limit is not None else 1 << 62)
                     for r, device in enumerate(problem.topology.devices)], dtype=np.int64)
    return bool((level <= room[rank[order]]).all())


def _workspace(facts: Demands, read: Read) -> np.ndarray:
    """What every action needs while it runs, forward and backward; the larger of both where it is one stage's."""
    count = len(facts.phases)
    tables = [np.array([max(workspace_bytes(group, ahead) for group in facts.groups(stage)) for stage in range(count)]
                       + [0], dtype=np.int64) for ahead in (False, True)]
    works, again = read.stages, _runs_again(facts, read)
    back = np.where(again, tables[1][works[0]], tables[0][works[0]])
    front = tables[1][works[1]]
    return np.where(works[0] == works[1], np.maximum(back, front), back + front)


def _runs_again(facts: Demands, read: Read) -> np.ndarray:
    """Whether an action runs F again."""
    found = np.zeros(len(read.rank), dtype=bool)
    doers = read.doer.reshape(len(PARTS), -1)[_R]
    found[doers[doers >= 0]] = True
    return found


def _saved(facts: Demands, read: Read, clock: ArrayTimes) -> Iterator[Held]:
    """Saved tensors, group by group."""
    problem, stages, count = facts.plan.problem, len(facts.phases), facts.plan.problem.num_microbatches
    routes = np.array(facts.plan.placement.routes, dtype=np.int64)
    for stage, kinds in enumerate(facts.phases):
        doers = {kind: read.doer[(PARTS.index(kind) * stages + stage) * count:][:count] for kind in kinds}
        last_i = next(kind for kind in (ActionKind.I, ActionKind.W, ActionKind.F) if kind in kinds)
        last_w = next(kind for kind in (ActionKind.W, ActionKind.I, ActionKind.F) if kind in kinds)
        begin = clock.start[doers.get(ActionKind.RECOMPUTE, doers[ActionKind.F])]
        end_i, end_w = clock.end[doers[last_i]], clock.end[doers[last_w]]
        for number, group in zip(facts.plan.placement.stages[stage].groups, facts.groups(stage), strict=True):
            if ActionKind.RECOMPUTE in kinds:
                yield (routes[stage], clock.start[doers[ActionKind.F]], begin,
                       _each(group.recompute_bytes or 0, group, count))
            yield routes[stage], begin, end_i, _each(group.saved_fi_bytes, group, count)
            yield routes[stage], begin, end_w, _each(group.saved_fw_bytes, group, count)
            if ActionKind.I in kinds and ActionKind.W in kinds:
                sizes = [group.saved_iw_bytes]
                if not _has_i(group) and all(found.w_ns is not None for found in group.times.values()):
                    sizes += [edge.grad_bytes or 0 for edge in problem.edges if edge.source == number
                              and any(_has_i(problem.groups[other]) for other in edge.targets)]
                for size in sizes:
                    yield routes[stage], clock.start[doers[ActionKind.I]], end_w, _each(size, group, count)
