"""Lower bounds on the makespan that need no solver: at one placement, and over all placements of a problem.

At a placement (`placement_bound`) the actions are a job shop with heads and tails: longest paths to the start of every
job and from it to the end of the step, along data, FIFO and memory arcs (`mipipe.planner.jobs.job_shop`). The best of

- **path**: the longest path alone;
- **device**: Jackson's preemptive schedule of each machine's jobs (Jackson 1955; Carlier 1982), which is at least
  ``head + load + tail`` for every subset of jobs;
- **filling**: until gradients come back a rank runs only the forwards its memory holds, whatever stages they are of;
- **turnover**: its last forward starts after all others and after the gradients that make room for it;
- **channel**: the same for the transfers of each directed channel;
- **memory**: activations occupy ``bytes x time``; a rank offers ``capacity`` bytes between its first F and its end;
- **pairs**: where a forward and a backward that overlap take less than their sum, all these hold for their shares, and
  how many pairs there can be bounds the rest (`mipipe.planner.bounds.pairs`).

Over all placements: `problem_bound`, from `mipipe.planner.bounds.over_placements`.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Sequence

from mipipe.graphs.errors import PlanError
from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.bounds.over_placements import Bound, problem_bound
from mipipe.planner.bounds.pairs import pairing_bound, relaxed
from mipipe.planner.jobs.job_shop import Jobs, classes, job_shop
from mipipe.planner.jobs.longest import heads_of, tails_of
from mipipe.planner.jobs.memory import holdings
from mipipe.planner.jobs.stages import StageView

__all__ = ["Bound", "bounding_shop", "heads_and_tails", "placement_bound", "preemptive_bound", "problem_bound",
           "reduce_tails"]


def placement_bound(view: StageView, jobs: Jobs | None = None) -> Bound:
    """The best combinatorial bound on the makespan at a placement.

    ``jobs``: its job shop, relaxed where pairs gain (`bounding_shop`, the default).

    Raises:
        PlanError: the memory arcs form a cycle: some activations never fit together (the message names the rank).
    """
    jobs = bounding_shop(view) if jobs is None else jobs
    heads, tails = heads_and_tails(jobs)
    reduce_tails(jobs, tails)
    best = [Bound(max(head + tail for head, tail in zip(heads, tails, strict=True)), "critical path")]
    by_machine = jobs.by_machine()
    for machine, members in by_machine.items():
        clock.ask()
        value = preemptive_bound([(heads[j], jobs.durations[j], tails[j] - jobs.durations[j]) for j in members])
        stream = "collective stream of rank" if machine % 2 else "rank"
        best.append(Bound(value, f"{stream} {machine // 2}: earliest start + load + what must follow"))
        best.append(Bound(pairing_bound(jobs, members, heads, tails),
                          f"rank {machine // 2}: forwards before its first gradient are in no overlapped pair"))
        on_rank = [*members, *by_machine.get(machine ^ 1, ())]
        best.append(_filling_bound(jobs, machine, on_rank, heads, tails))
    best.append(_channel_bound(jobs, heads, tails))
    best.append(_memory_bound(jobs, heads, tails))
    return max(best, key=lambda bound: bound.ns)


def bounding_shop(view: StageView, actions: Iterable[Action] | None = None) -> Jobs:
    """The job shop that every schedule of a placement's actions is one of, with overlapped pairs or without.

    Raises:
        PlanError: as `job_shop`.
    """
    return relaxed(job_shop(view, actions))


def heads_and_tails(jobs: Jobs) -> tuple[list[int], list[int]]:
    """Longest path to the start of every job, and from its start to the end of the step.

    Raises:
        PlanError: the arcs form a cycle, so some activations never fit together.
    """
    found = heads_of(jobs.durations, jobs.arcs)
    if len(found.order) < jobs.count:
        stuck = min(set(range(jobs.count)) - set(found.order))
        raise PlanError(f"rank {jobs.machine[stuck] // 2}: {jobs.compiled.actions[stuck]} can never start within"
                        f" {jobs.capacity[jobs.machine[stuck] // 2]} bytes for activations; give the rank more memory"
                        " or fewer groups")
    return found.heads, tails_of(found, jobs.durations, jobs.extra)


def reduce_tails(jobs: Jobs, tails: list[int]) -> None:
    """Raise the tails, in place, by what ends a step: a reduction follows the weight gradients of replicated stages,
    a rank's update all its jobs."""
    for _, members, duration in jobs.compiled.reductions:
        for job in members:
            tails[job] = max(tails[job], jobs.durations[job] + duration)
    updates = jobs.view.updates_ns()
    if any(updates):
        for job, machine in enumerate(jobs.machine):
            tails[job] = max(tails[job], jobs.durations[job] + updates[machine // 2])


def preemptive_bound(items: Sequence[tuple[int, int, int]]) -> int:
    """Jackson's preemptive schedule of jobs (head, duration, tail) on one machine: its makespan with tails."""
    waiting: list[tuple[int, int]] = []
    coming = sorted(items)
    now = best = 0
    number = 0
    while number < len(coming) or waiting:
        if not waiting:
            now = max(now, coming[number][0])
        while number < len(coming) and coming[number][0] <= now:
            heapq.heappush(waiting, (-coming[number][2], coming[number][1]))
            number += 1
        tail, left = heapq.heappop(waiting)
        until = coming[number][0] if number < len(coming) else now + left
        step = min(left, until - now)
        now += step
        if step < left:
            heapq.heappush(waiting, (tail, left - step))
        else:
            best = max(best, now - tail)
    return best


MOMENTS = 24
"""Moments tried by `_filling_bound`: the first gradients decide; any subset is valid."""


def _filling_bound(jobs: Jobs, machine: int, on_rank: list[int], heads: list[int], tails: list[int]) -> Bound:
    """``t + load - work that can be done before t``, at the moments t when gradients reach the machine.

    Before t it runs jobs whose head is below t; of those that take memory, no more than fit into the rank's capacity
    and what jobs of the rank could have returned by t (a fractional knapsack by duration per byte). Turnover is the
    same for the work before its last forward instead of all its load, with that forward's tail.
    """
    members = [j for j in on_rank if jobs.machine[j] == machine]
    returned = [(heads[j] + jobs.durations[j], jobs.free[j]) for j in on_rank if jobs.free[j]]
    returned += [(heads[j], -jobs.alloc[j]) for j in on_rank if jobs.alloc[j] < 0]  # F run again that saves less
    returned.sort()
    takers = sorted((j for j in members if jobs.alloc[j] > 0),
                    key=lambda j: (-jobs.durations[j] / jobs.alloc[j], heads[j]))
    others = sorted((heads[j], jobs.durations[j]) for j in members if jobs.alloc[j] <= 0)
    load = sum(jobs.durations[j] for j in members)
    after = min(tails[j] - jobs.durations[j] for j in members)
    needed = _before_last_taker(jobs, machine, on_rank, takers)
    last = min((tails[j] for j in takers), default=0)
    best, done, position, room, back = 0, 0, 0, jobs.capacity[machine // 2], 0
    turnover = 0
    for moment in sorted({head for head, _ in others})[:MOMENTS]:
        while position < len(others) and others[position][0] < moment:
            done += others[position][1]
            position += 1
        while back < len(returned) and returned[back][0] <= moment:
            room += returned[back][1]
            back += 1
        left, forwards = room, 0
        for job in takers:
            if heads[job] < moment:
                if jobs.alloc[job] >= left:
                    forwards += -(-jobs.durations[job] * left // jobs.alloc[job])
                    break
                left -= jobs.alloc[job]
                forwards += jobs.durations[job]
        best = max(best, moment + load - done - forwards + after)
        if needed > done + forwards:  # else the last forward may start before this moment
            turnover = max(turnover, moment + needed - done - forwards + last)
    if turnover > best:
        return Bound(turnover, f"rank {machine // 2}: gradients must make room for its last forward, whose own way back"
                     " remains")
    return Bound(best, f"rank {machine // 2}: its memory is full of activations before gradients come back")


def _before_last_taker(jobs: Jobs, machine: int, on_rank: list[int], takers: list[int]) -> int:
    """Work a machine has done when the last of its ``takers`` (jobs that take memory) starts, at least.

    All the others, and what returned the bytes that they and the last one take beyond the capacity: the jobs with the
    least work per byte, a W together with its I where the I neither takes nor returns any itself.
    """
    if not takers:
        return 0
    index, actions, own = jobs.compiled.index, jobs.compiled.actions, set(takers)
    items = []
    for j in on_rank:
        if not jobs.free[j]:
            continue
        work = jobs.durations[j] if jobs.machine[j] == machine and j not in own else 0
        action = actions[j]
        before = index.get(Action(action.stage, ActionKind.I, action.microbatch))
        if (action.kind is ActionKind.W and before is not None and jobs.machine[before] == machine
                and not jobs.free[before] and before not in own):
            work += jobs.durations[before]
        items.append((work / jobs.free[j], work, jobs.free[j]))
    items += [(0.0, 0, -jobs.alloc[j]) for j in on_rank if jobs.alloc[j] < 0]  # returned as it starts
    short = sum(jobs.alloc[j] for j in takers) - jobs.capacity[machine // 2]
    total = sum(jobs.durations[j] for j in takers) - max(jobs.durations[j] for j in takers)
    for _, work, size in sorted(items):
        if short <= 0:
            break
        total += work * min(short, size) // size
        short -= size
    return total


def _channel_bound(jobs: Jobs, heads: list[int], tails: list[int]) -> Bound:
    items: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    clock.ask()
    for producer, releases in enumerate(jobs.compiled.releases):
        for consumer, channel, duration, _, _, occupied in releases:
            if channel >= 0 and occupied:
                items[channel].append((heads[producer] + jobs.durations[producer], occupied,
                                       duration - occupied + tails[consumer]))
    ranks = jobs.view.problem.num_ranks
    found = [Bound(preemptive_bound(jobs_on), f"channel {channel // ranks}->{channel % ranks}: earliest start + load"
                   " + what must follow") for channel, jobs_on in items.items()]
    return max(found, key=lambda bound: bound.ns, default=Bound(0, "channels"))


def _memory_bound(jobs: Jobs, heads: list[int], tails: list[int]) -> Bound:
    """Bytes x time of all activations on a rank over its capacity, after its first F and before its last free."""
    view = jobs.view
    area: dict[int, int] = defaultdict(int)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    saved = [[held for held in holdings(view, stage) if held.since is ActionKind.F] for stage in range(view.num_stages)]
    for forward, until, end in _residences(jobs):
        action = jobs.compiled.actions[forward]
        rank = jobs.machine[forward] // 2
        area[rank] += sum(held.num_bytes[action.microbatch] * until[held.until] for held in saved[action.stage])
        first[rank] = min(first.get(rank, heads[forward]), heads[forward])
        after = tails[end] - jobs.durations[end]
        last[rank] = min(last.get(rank, after), after)
    found = [Bound(first[rank] + -(-size // jobs.capacity[rank]) + last[rank],
                   f"memory of rank {rank}: bytes x time of its activations over its capacity")
             for rank, size in area.items() if size and jobs.capacity[rank] > 0]
    return max(found, key=lambda bound: bound.ns, default=Bound(0, "memory"))


def _residences(jobs: Jobs) -> list[tuple[int, dict[ActionKind, int], int]]:
    """(F, least times from F's start to the ends of its I and W, the job that frees the last of it).

    The times are longest paths through the data arcs of one microbatch: FIFO and memory arcs may pass through others.
    """
    view, index = jobs.view, jobs.compiled.index
    if any(stage.recompute for stage in view.placement.stages) or any(
            action.kind not in (ActionKind.F, ActionKind.I, ActionKind.W) for action in jobs.compiled.actions):
        return []
    result = []
    paths: dict[int, list[dict[ActionKind, int] | None]] = {}
    for m, name in enumerate(classes(view)):
        if name not in paths:
            # a microbatch's jobs in topological order: F by stage, then I backwards, W after its I
            order = [index[Action(s, ActionKind.F, m)] for s in range(view.num_stages)]
            order += [index[action] for s in reversed(range(view.num_stages)) for kind in (ActionKind.I, ActionKind.W)
                      if (action := Action(s, kind, m)) in index]
            paths[name] = [_path_through(jobs, stage, m, order[stage:]) for stage in range(view.num_stages)]
        for stage, found in enumerate(paths[name]):
            if found is not None:
                last = ActionKind.I if view.w_ns[stage] is None else ActionKind.W
                result.append((index[Action(stage, ActionKind.F, m)], found, index[Action(stage, last, m)]))
    return result


def _path_through(jobs: Jobs, stage: int, microbatch: int, order: list[int]) -> dict[ActionKind, int] | None:
    """Longest path from the start of F of a stage, first in ``order``, to the ends of its I and W; None without one."""
    index = jobs.compiled.index
    reach = {order[0]: jobs.durations[order[0]]}
    for job in order:
        if job not in reach:
            continue
        for consumer, channel, duration, *_ in jobs.compiled.releases[job]:
            end = reach[job] + (duration if channel >= 0 else 0) + jobs.durations[consumer]
            reach[consumer] = max(reach.get(consumer, 0), end)
    jobs_of = {kind: index[action] for kind in (ActionKind.I, ActionKind.W)
               if (action := Action(stage, kind, microbatch)) in index}
    if not jobs_of or list(jobs_of.values())[-1] not in reach:
        return None
    return {kind: reach.get(job, 0) for kind, job in jobs_of.items()}
