"""The memory rule of `mipipe.planner.problem`: who holds how much from when to when, and what a rank has for it.

Written once, as intervals between phases of one stage and microbatch (`holdings`); what each action takes and returns
(`effects`) follows. Bounds, formulations, searches and the simulator read it; `mipipe.planner.check` has its own
account of it. Where a phase does not exist, what would be returned at its end is returned with the gradient phase that
does exist, or else with F.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mipipe.graphs.errors import PlanError
from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.jobs.dependencies import dependencies, kinds_of
from mipipe.planner.jobs.stages import StageView
from mipipe.planner.problem import PlanningProblem


def resident_room(problem: PlanningProblem, rank: int) -> int:
    """Bytes of weights, gradients and optimizer state a rank may hold."""
    return _room(problem, rank, problem.limits.resident_bytes)


def activation_room(problem: PlanningProblem, rank: int) -> int:
    """Bytes of all else a rank may hold, if it held nothing resident."""
    return _room(problem, rank, problem.limits.activation_bytes)


def _room(problem: PlanningProblem, rank: int, limit: int | None) -> int:
    memory = problem.topology.devices[rank].memory_bytes
    return memory if limit is None else min(memory, limit)


@dataclass(frozen=True, slots=True)
class Holding:
    """``num_bytes[m]`` on the rank of microbatch m, from the start of its ``since`` to the end of its ``until``.

    ``replaced``: only to the start of ``until``, which takes its own instead.
    """

    since: ActionKind
    until: ActionKind
    num_bytes: tuple[int, ...]
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class Effects:
    """Bytes per microbatch that an elementary action takes at its start, returns at its end, and needs in between
    beside the stage's workspace, which is its stage's alone."""

    alloc: np.ndarray
    free: np.ndarray
    beside: np.ndarray

    @property
    def taken(self) -> np.ndarray:
        """Bytes from its start on, what it returns itself included."""
        return self.alloc + self.beside

    @property
    def returned(self) -> np.ndarray:
        """Bytes no longer there from its end on."""
        return self.free + self.beside


def holdings(view: StageView, stage: int) -> list[Holding]:
    """What a stage saves of each microbatch; without the workspace of running actions and values in flight."""
    kinds, start = kinds_of(view, stage), ActionKind.F
    found = []
    if ActionKind.RECOMPUTE in kinds:
        start = ActionKind.RECOMPUTE
        found.append(Holding(ActionKind.F, start, view.kept[stage], replaced=True))
    has_i, has_w = ActionKind.I in kinds, ActionKind.W in kinds
    end_i = ActionKind.I if has_i else kinds[-1]
    found += [Holding(start, end_i, view.saved_fi[stage]), Holding(start, kinds[-1], view.saved_fw[stage])]
    if has_i and has_w:
        found.append(Holding(ActionKind.I, ActionKind.W, view.saved_iw[stage]))
    return found


def effects(view: StageView, stage: int) -> dict[ActionKind, Effects]:
    """What each elementary action of a stage does to its rank's memory."""
    count = view.problem.num_microbatches
    found = {kind: Effects(*(np.zeros(count, dtype=np.int64) for _ in range(3))) for kind in kinds_of(view, stage)}
    for held in holdings(view, stage):
        size = np.array(held.num_bytes, dtype=np.int64)
        if held.since is held.until:
            found[held.since].beside[:] += size
            continue
        found[held.since].alloc[:] += size
        if held.replaced:
            found[held.until].alloc[:] -= size
        else:
            found[held.until].free[:] += size
    return found


def workspace(view: StageView, action: Action) -> int:
    """Workspace of a running action; an overlapped pair needs its forward's and its backward's, of one stage the
    larger."""
    if action.partner is None:
        return view.workspace_of(action.kind, action.stage)
    both = view.forward_workspace[action.stage], view.workspace[action.partner[0]]
    return max(both) if action.partner[0] == action.stage else sum(both)


def capacity(view: StageView, rank: int) -> int:
    """Bytes rank ``rank`` has for activations, workspace and values in flight: its memory without resident bytes, and
    the problem's limit."""
    room = view.problem.topology.devices[rank].memory_bytes - view.resident_bytes[rank]
    limit = view.problem.limits.activation_bytes
    return room if limit is None else min(room, limit)


def capacities(view: StageView) -> list[int]:
    """The capacity of every rank.

    Raises:
        PlanError: the resident bytes alone do not fit.
    """
    for rank, device in enumerate(view.problem.topology.devices):
        if device.memory_bytes < view.resident_bytes[rank]:
            raise PlanError(f"rank {rank}: its stages hold {view.resident_bytes[rank]} resident bytes, but the device"
                            f" has {device.memory_bytes}; place fewer groups on it")
    return [capacity(view, rank) for rank in range(view.problem.num_ranks)]


def peaks(rank: np.ndarray, start: np.ndarray, end: np.ndarray, taken: np.ndarray, returned: np.ndarray,
          ranks: int) -> list[int]:
    """Per rank the most bytes held at once; what ends at a moment is gone before what begins there comes.

    Args:
        rank, start, end: of every action, in nanoseconds.
        taken, returned: bytes at its start and at its end, its workspace in both.
        ranks: how many there are.
    """
    owner, moment = np.concatenate([rank, rank]), np.concatenate([start, end])
    change, begins = np.concatenate([taken, -returned]), np.repeat([1, 0], len(rank))
    order = np.lexsort((begins, moment, owner))
    held = np.cumsum(change[order])  # all is returned in the end, so every rank begins at 0
    most = np.zeros(ranks, dtype=np.int64)
    np.maximum.at(most, owner[order], held)
    return most.tolist()


def carries_bytes(view: StageView) -> bool:
    """Whether values in flight take memory; if none does, saved tensors and workspace are all there is."""
    return any(any(one.num_bytes) for one in dependencies(view))


def searches_see_all(view: StageView) -> bool:
    """Whether what searches count is all that ranks hold: saved tensors, and the workspace of one action at a time. Not
    where values in flight take memory, or a rank's two streams may run at once and each needs a workspace, or where the
    collective stream saves tensors: nothing orders its actions and those of the compute stream that share the memory.
    """
    if any(stream is Stream.COLLECTIVE and any(map(any, (view.saved_fi[stage], view.saved_fw[stage],
                                                         view.saved_iw[stage])))
           for stage, stream in enumerate(view.streams)):
        return False
    needing = [{rank for stage, route in enumerate(view.placement.routes)
                if (view.workspace[stage] or view.forward_workspace[stage])
                and (view.streams[stage] is Stream.COLLECTIVE) is collective for rank in route}
               for collective in (False, True)]
    return not (needing[0] & needing[1] or carries_bytes(view))


def in_flight(view: StageView) -> np.ndarray:
    """Bytes per rank that values in flight usually take: two arriving (one waits, one is on its way), one leaving.

    Fewer and the schedules found overfill a rank by a value or two; more wastes memory that activations could use.
    """
    arriving = np.zeros(view.problem.num_ranks, dtype=np.int64)
    leaving = arriving.copy()
    routes = view.placement.routes
    for one in dependencies(view):
        for source, target, size in zip(routes[one.maker[0]], routes[one.reader[0]], one.num_bytes, strict=False):
            if source != target:
                arriving[target] = max(arriving[target], size)
                leaving[source] = max(leaving[source], size)
    return 2 * arriving + leaving
