"""Weight gradients put where a rank would wait, between forwards and input gradients whose order is given."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.schedules.list_order import ListProblem

Part = tuple[ActionKind, int, int]


@dataclass(slots=True)
class _Rank:
    steps: list[Action]
    next: int = 0
    free_ns: int = 0
    held: int = 0
    put_off: deque[tuple[int, int]] = field(default_factory=deque)
    order: list[Action] = field(default_factory=list)


def refill_weights(shop: ListProblem, orders: Sequence[Sequence[Action]], patience: float) -> list[list[Action]] | None:
    """The orders with every W moved: as soon as the rank waits for at least ``patience`` of a W, or memory is full.

    F and I keep their order. None where the memory limit stops it for good.
    """
    ranks = [_Rank([action for action in order if action.kind is not ActionKind.W]) for order in orders]
    ready: dict[Part, int] = {(ActionKind.F, 0, microbatch): 0 for microbatch in range(shop.num_microbatches)}
    events = [(0, number) for number in range(len(ranks))]
    while events:
        clock.ask()
        now, number = heapq.heappop(events)
        rank = ranks[number]
        if rank.free_ns > now:
            continue
        chosen = _choose(shop, rank, ready, now, patience)
        if isinstance(chosen, int):
            heapq.heappush(events, (chosen, number))
        if not isinstance(chosen, Action):
            continue
        rank.order.append(chosen)
        times = shop.times
        rank.free_ns = now + {ActionKind.F: times.f, ActionKind.I: times.i}.get(chosen.kind, times.w)
        heapq.heappush(events, (rank.free_ns, number))
        follower = _after(shop, chosen)
        if follower is not None:
            reader = shop.rank_of(follower[1], follower[2])
            ready[follower] = rank.free_ns + (times.comm if reader != number else 0)
            heapq.heappush(events, (ready[follower], reader))
    done = all(rank.next == len(rank.steps) and not rank.put_off for rank in ranks)
    return [rank.order for rank in ranks] if done else None


def _choose(shop: ListProblem, rank: _Rank, ready: dict[Part, int], now: int, patience: float) -> Action | int | None:
    """The action a free rank starts now, a time at which to look again, or None to wait for a neighbour."""
    if rank.next == len(rank.steps):
        return _weight(rank)
    step = rank.steps[rank.next]
    time_ns = ready.get((step.kind, step.stage, step.microbatch))
    if step.kind is ActionKind.F and rank.held >= shop.cap:
        return _weight(rank)
    if time_ns is not None and time_ns <= now:
        rank.next += 1
        if step.kind is ActionKind.F:
            rank.held += 1
        else:
            rank.put_off.append((step.stage, step.microbatch))
        return step
    if time_ns is None or time_ns - now >= patience * shop.times.w:
        return _weight(rank) or time_ns
    return time_ns


def _weight(rank: _Rank) -> Action | None:
    if not rank.put_off:
        return None
    rank.held -= 1
    stage, microbatch = rank.put_off.popleft()
    return Action(stage, ActionKind.W, microbatch)


def _after(shop: ListProblem, action: Action) -> Part | None:
    """What becomes ready when an action has ended."""
    if action.kind is ActionKind.W or (action.kind is ActionKind.I and action.stage == 0):
        return None
    if action.kind is ActionKind.I:
        return ActionKind.I, action.stage - 1, action.microbatch
    if action.stage == shop.num_stages - 1:
        return ActionKind.I, action.stage, action.microbatch
    return ActionKind.F, action.stage + 1, action.microbatch
