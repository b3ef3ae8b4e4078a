"""The simulated timeline of a large plan by arrays, where an order alone gives all times, as when it is measured.

Lowering and simulating takes 100 microseconds an action: half a minute for 64 ranks x 1,024 microbatches. Where every
action is elementary and what is transferred takes neither memory nor channels, the same spans and memory come from the
arrays in 2 s. A test holds the two against each other.
"""

from __future__ import annotations

import numpy as np

from mipipe.planner.actions import Action, ActionKind, Stream
from mipipe.planner.execution.lower import lower
from mipipe.planner.execution.measure import timed
from mipipe.planner.execution.simulate import simulate
from mipipe.planner.jobs.arrays import Instance
from mipipe.planner.jobs.dependencies import KINDS, dependencies
from mipipe.planner.jobs.stages import StageView, view
from mipipe.planner.plan import Plan
from mipipe.planner.program import Transfer
from mipipe.planner.timeline import Span, Timeline

LARGE = 20_000
"""Actions from which arrays are worth it: fewer are lowered and simulated in 2 s."""


def timeline_of(plan: Plan, large: int = LARGE) -> Timeline:
    """The simulated timeline of a plan, by arrays if it has at least ``large`` actions and they allow it."""
    count = sum(len(order.compute) for order in plan.schedule.ranks)
    found = by_arrays(plan) if count >= large else None
    return found if found is not None else simulate(plan, lower(plan))


def by_arrays(plan: Plan) -> Timeline | None:
    """The timeline where arrays can say it, else None."""
    if not all(action.kind in KINDS for order in plan.schedule.ranks for action in order.compute):
        return None
    stage_view = view(plan.problem, plan.placement)
    if any(order.collective for order in plan.schedule.ranks) and _reduced(stage_view):
        return None  # sums of gradients run behind all collectives of their ranks
    quick = timed(stage_view, plan.schedule)
    if quick is None:
        return None
    instance, start, _ = quick
    end = start + instance.dur
    spans = [*_actions(instance, start), *_transfers(stage_view, instance, end),
             *_reductions(stage_view, instance, end)]
    spans.sort(key=lambda span: (span.start_ns, span.rank, span.stream, span.end_ns))
    return Timeline("simulated", plan.problem.num_ranks, tuple(spans), _memory(stage_view, instance, start),
                    stage_view.resident_bytes, plan.problem.unit_ns, {"plan": plan.name})


def _actions(instance: Instance, start: np.ndarray) -> list[Span]:
    columns = (instance.machine, instance.kind, instance.depth, instance.own_microbatch, start, start + instance.dur)
    spans = []
    for machine, kind, stage, m, begin, end in zip(*(column.tolist() for column in columns), strict=True):
        rank, stream = instance.machine_key[machine]
        spans.append(Span(rank, stream, KINDS[kind], str(Action(stage, KINDS[kind], m)), begin, end, stage, m))
    return spans


def _transfers(stage_view: StageView, instance: Instance, end: np.ndarray) -> list[Span]:
    """What goes from rank to rank, each from its producer's end on."""
    table = np.zeros((stage_view.num_stages, len(KINDS), stage_view.problem.num_microbatches), np.int64)
    table[instance.depth, instance.kind, instance.own_microbatch] = end
    topology, routes = stage_view.problem.topology, stage_view.placement.routes
    spans = []
    for one in dependencies(stage_view):
        if one.edge < 0:
            continue
        (source, kind), (target, _) = one.maker, one.reader
        made = table[source, KINDS.index(kind)].tolist()
        for m, (here, there) in enumerate(zip(routes[source], routes[target], strict=True)):
            if here != there:
                label = str(Transfer(source, target, m, here, there, one.backward, 0))
                spans.append(Span(here, Stream.CHANNEL, ActionKind.SEND, label, made[m],
                                  made[m] + topology.transfer_ns(here, there, 0), source, m, peer=there))
    return spans


def _reductions(stage_view: StageView, instance: Instance, end: np.ndarray) -> list[Span]:
    """The sums of replicas' gradients, which take no time here, each at the end of its stage's last W."""
    weights = instance.kind == KINDS.index(ActionKind.W)
    spans = []
    for stage in _reduced(stage_view):
        ready = int(end[weights & (instance.depth == stage)].max())
        spans += [Span(rank, Stream.COLLECTIVE, ActionKind.ALL_REDUCE, f"reduce {stage}", ready, ready, stage)
                  for rank in stage_view.placement.stages[stage].ranks]
    return spans


def _reduced(stage_view: StageView) -> list[int]:
    """The stages whose gradients are summed over replicas."""
    return [stage for stage, placed in enumerate(stage_view.placement.stages)
            if len(placed.ranks) > 1 and stage_view.w_ns[stage] is not None]


def _memory(stage_view: StageView, instance: Instance, start: np.ndarray) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Per rank the steps of its memory, resident bytes included; a moment's changes are one step."""
    moments = np.concatenate([start, start + instance.dur])
    change = np.concatenate([instance.alloc + instance.work, -instance.free - instance.work])
    owner = np.concatenate([instance.rank, instance.rank])
    curves = []
    for rank, resident in enumerate(stage_view.resident_bytes):
        own = owner == rank
        when, place = np.unique(np.concatenate([[0], moments[own]]), return_inverse=True)
        sums = np.zeros(len(when), dtype=np.int64)
        np.add.at(sums, place, np.concatenate([[resident], change[own]]))
        steps = (sums != 0) | (np.arange(len(when)) == 0)
        curves.append(tuple(zip(when[steps].tolist(), np.cumsum(sums)[steps].tolist(), strict=True)))
    return tuple(curves)
