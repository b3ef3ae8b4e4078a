"""A placement's actions as a job shop: jobs on machines, arcs that always hold, and what each job does to memory.

Bounds (`mipipe.planner.bounds.at_placement`) and formulations (`mipipe.planner.milp`) read this; times are integer
nanoseconds. Left out: values in flight (their bytes only matter at the edge of a memory limit; whoever adopts an order
checks it).

Three kinds of arcs hold in some optimal schedule:

- data: F along the graph, I against it, W after I, with the transfer in between as lag;
- FIFO: microbatches with the same routes and loads are interchangeable. Sorting the starts of every (stage, kind)
  within such a class and handing them out in microbatch order keeps every difference ``start_j - start_i >= c`` (the
  k-th smallest of a dominates the k-th smallest of b where a_m >= b_m for all m), the machine's intervals and the
  number of activations alive;
- memory: where n activations of one (stage, class) fill a rank, F number k + n starts after W number k ended.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.jobs.dependencies import kinds_of
from mipipe.planner.jobs.memory import capacities, effects, holdings, peaks, workspace
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.jobs.times import ActionNodes, compile_actions
from mipipe.planner.plan import RankOrder, Schedule


@dataclass(frozen=True, slots=True)
class Jobs:
    """Jobs 0..n-1, one per action.

    ``machine[j]`` is ``2 * rank + stream``. ``arcs`` holds (first, second, lag): second starts at least ``lag`` after
    first's end. ``alloc[j]`` bytes are taken at j's start, ``free[j]`` returned at its end, ``workspace[j]`` held in
    between; ``capacity[rank]`` is what the rank has for all of these. ``extra`` is empty but in a relaxation of
    overlapped pairs (`mipipe.planner.bounds.pairs`).
    """

    compiled: ActionNodes
    durations: list[int]
    machine: list[int]
    arcs: list[tuple[int, int, int]]
    alloc: list[int]
    free: list[int]
    workspace: list[int]
    capacity: list[int]
    extra: list[int] = field(default_factory=list)

    @property
    def view(self) -> StageView:
        return self.compiled.view

    @property
    def count(self) -> int:
        return len(self.durations)

    def by_machine(self) -> dict[int, list[int]]:
        """The jobs of every machine in use."""
        found: dict[int, list[int]] = defaultdict(list)
        for job, machine in enumerate(self.machine):
            found[machine].append(job)
        return dict(found)


def elementary_actions(view: StageView, *, split_backward: bool = True) -> list[Action]:
    """All actions of a placement: F, I and W (or B where there are both), RECOMPUTE where the stage asks for it."""
    actions = []
    for stage in range(view.num_stages):
        kinds = kinds_of(view, stage)
        if not split_backward and kinds[-2:] == (ActionKind.I, ActionKind.W):
            kinds = (*kinds[:-2], ActionKind.B)
        actions += [Action(stage, kind, m) for kind in kinds
                    for m in clock.asking(range(view.problem.num_microbatches))]
    return actions


def job_shop(view: StageView, actions: Iterable[Action] | None = None, *, fifo: bool = True) -> Jobs:
    """The job shop of the given actions (default: all elementary ones).

    FIFO and memory arcs are added unless ``fifo`` is False or some action is an OVERLAP_F_B.

    Raises:
        PlanError: resident bytes do not fit, or an action does not even fit alone.
    """
    compiled = compile_actions(view, elementary_actions(view) if actions is None else list(actions))
    arcs = [(producer, consumer, duration if channel >= 0 else 0)
            for producer, releases in enumerate(compiled.releases)
            for consumer, channel, duration, *_ in releases]
    alloc, free = _memory(view, compiled.actions)
    machine = [2 * rank + (stream is Stream.COLLECTIVE)
               for rank, stream in zip(compiled.ranks, compiled.streams, strict=True)]
    jobs = Jobs(compiled, compiled.durations, machine, arcs, alloc, free,
                [workspace(view, action) for action in compiled.actions], capacities(view))
    _check_fits(jobs)
    if fifo and all(action.partner is None for action in compiled.actions):
        found = lines(jobs)
        arcs += [(first, second, 0) for line in found.values() for first, second in pairwise(line)]
        arcs += _memory_arcs(jobs, found)
    return jobs


def _check_fits(jobs: Jobs) -> None:
    held = [holdings(jobs.view, stage) for stage in range(jobs.view.num_stages)]
    for job, action in enumerate(clock.asking(jobs.compiled.actions)):
        need, rank = jobs.alloc[job] + jobs.workspace[job], jobs.machine[job] // 2
        if action.kind is ActionKind.RECOMPUTE:  # takes what F has not kept
            need += sum(found.num_bytes[action.microbatch] for found in held[action.stage] if found.replaced)
        if need > jobs.capacity[rank]:
            raise PlanError(f"rank {rank}: {action} needs {need} bytes, but the rank has {jobs.capacity[rank]} for"
                            " activations; give it more memory or cut the stage")


def _memory(view: StageView, actions: Iterable[Action]) -> tuple[list[int], list[int]]:
    """Bytes each action takes at its start and returns at its end: those of its parts."""
    known = {(stage, kind): list(zip(found.taken.tolist(), found.returned.tolist(), strict=True))
             for stage in range(view.num_stages) for kind, found in effects(view, stage).items()}
    alloc, free = [], []
    for action in clock.asking(actions):
        own = known.get((action.stage, action.kind))
        taken, returned = own[action.microbatch] if own is not None else map(sum, zip(
            *(known[stage, kind][m] for kind, stage, m in action.parts()), strict=True))
        alloc.append(taken)
        free.append(returned)
    return alloc, free


def classes(view: StageView) -> list[int]:
    """Per microbatch the smallest microbatch with the same routes and loads: the two are interchangeable."""
    first: dict[tuple[object, ...], int] = {}
    result = []
    for m in range(view.problem.num_microbatches):
        key = (tuple(route[m] for route in view.placement.routes),
               tuple(group.loads[m] for group in view.problem.groups if group.loads))
        result.append(first.setdefault(key, m))
    return result


def lines(jobs: Jobs) -> dict[tuple[int, ActionKind, int], list[int]]:
    """Jobs of the same (stage, kind, class) in microbatch order."""
    class_of = classes(jobs.view)
    found: dict[tuple[int, ActionKind, int], list[int]] = defaultdict(list)
    actions = jobs.compiled.actions
    for job in sorted(range(jobs.count), key=lambda job: actions[job].microbatch):
        action = actions[job]
        found[action.stage, action.kind, class_of[action.microbatch]].append(job)
    return dict(found)


def _memory_arcs(jobs: Jobs, lines: dict[tuple[int, ActionKind, int], list[int]]) -> list[tuple[int, int, int]]:
    """F number k + n of a line starts after the job that frees activation k, where n activations fill the rank."""
    view, arcs = jobs.view, []
    for (stage, kind, name), forwards in lines.items():
        if kind is not ActionKind.F or view.placement.stages[stage].recompute:
            continue
        m = jobs.compiled.actions[forwards[0]].microbatch
        last = next((lines[stage, kind, name] for kind in (ActionKind.W, ActionKind.B, ActionKind.I)
                     if (stage, kind, name) in lines), None)
        until = {part[0] for part in jobs.compiled.actions[last[0]].parts()} if last is not None else set()
        size = sum(held.num_bytes[m] for held in holdings(view, stage)
                   if held.since is ActionKind.F and held.until in until)
        if last is None or size == 0:
            continue
        room = (jobs.capacity[jobs.machine[forwards[0]] // 2] - view.forward_workspace[stage]) // size
        arcs += [(last[k], forwards[k + room], 0) for k in range(len(forwards) - room)]
    return arcs


def relabel(view: StageView, schedule: Schedule) -> Schedule:
    """The same schedule with microbatches of one class renamed into FIFO order; never slower (module docstring).

    Schedules with OVERLAP_F_B, or with B beside I and W of the same stage, are returned as they are.
    """
    class_of = classes(view)
    actions = schedule.actions()
    kinds: dict[int, set[ActionKind]] = defaultdict(set)
    for action in actions:
        kinds[action.stage].add(action.kind)
    if any(action.partner is not None for action in actions) or any(
            ActionKind.B in found and found & {ActionKind.I, ActionKind.W} for found in kinds.values()):
        return schedule
    members: dict[int, list[int]] = defaultdict(list)
    for m, name in enumerate(class_of):
        members[name].append(m)
    used: dict[tuple[int, ActionKind, int], int] = defaultdict(int)

    def renamed(order: Sequence[Action]) -> tuple[Action, ...]:
        result = []
        for action in order:
            key = (action.stage, action.kind, class_of[action.microbatch])
            result.append(Action(action.stage, action.kind, members[key[2]][used[key]]))
            used[key] += 1
        return tuple(result)

    return Schedule(tuple(RankOrder(renamed(rank.compute), renamed(rank.collective)) for rank in schedule.ranks))


def peak_memory(jobs: Jobs, starts: Sequence[int]) -> list[int]:
    """Per rank the most bytes held at once by jobs that start at ``starts``."""
    start, durations, alloc, free, work, machine = (np.array(column, dtype=np.int64) for column in (
        starts, jobs.compiled.durations, jobs.alloc, jobs.free, jobs.workspace, jobs.machine))
    return peaks(machine // 2, start, start + durations, alloc + work, free + work, len(jobs.capacity))
