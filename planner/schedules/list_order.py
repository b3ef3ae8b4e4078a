"""Orders by list scheduling: a clock runs over the stages, and every rank that is free takes its most urgent action.

Activations are counted in stages, from the start of F to the end of W, and capped.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mipipe.planner import clock
from mipipe.planner.actions import Action, ActionKind
from mipipe.planner.schedules.pattern import EvenTimes


@dataclass(frozen=True, slots=True)
class ListProblem:
    """What is scheduled: ``rank_of(stage, microbatch)``, durations of a stage, and the cap of activations per rank.

    ``fused``: I and W are one action B. ``entries``: per direction its microbatches, which enter stage 0 in this order.
    """

    num_ranks: int
    num_stages: int
    num_microbatches: int
    rank_of: Callable[[int, int], int]
    times: EvenTimes
    cap: int
    entries: tuple[Sequence[int], ...]
    fused: bool = False


Urgency = Callable[[ActionKind, int, int], tuple[Any, ...]]
"""Of (kind, stage, microbatch): smaller runs first. Weight gradients only fill what would stay idle."""


@dataclass(slots=True)
class _Rank:
    free_ns: int = 0
    held: int = 0
    order: list[Action] = field(default_factory=list)
    arrived: list[tuple[int, tuple[Any, ...], ActionKind, int, int]] = field(default_factory=list)
    put_off: list[tuple[int, int]] = field(default_factory=list)


def list_order(shop: ListProblem, urgency: Urgency) -> tuple[int, list[list[Action]]] | None:
    """(makespan, order per rank); None where the rule runs into its memory limit for good."""
    ranks = [_Rank() for _ in range(shop.num_ranks)]
    events: list[tuple[int, int]] = []

    def offer(kind: ActionKind, stage: int, microbatch: int, time_ns: int) -> None:
        rank = shop.rank_of(stage, microbatch)
        ranks[rank].arrived.append((time_ns, urgency(kind, stage, microbatch), kind, stage, microbatch))
        heapq.heappush(events, (time_ns, rank))

    next_entry: dict[int, int] = {}
    for line in shop.entries:
        next_entry.update(pairwise(line))
        offer(ActionKind.F, 0, line[0], 0)
    remaining = shop.num_stages * shop.num_microbatches * (2 if shop.fused else 3)
    end = 0
    while events:
        now, number = heapq.heappop(events)
        clock.ask()
        rank = ranks[number]
        if rank.free_ns > now:
            continue
        choice = _choose(shop, rank, now)
        if choice is None:
            continue
        kind, stage, microbatch = choice
        rank.free_ns = now + _duration(shop, kind)
        end = max(end, rank.free_ns)
        rank.order.append(Action(stage, kind, microbatch))
        remaining -= 1
        heapq.heappush(events, (rank.free_ns, number))
        if kind is ActionKind.F and stage == 0 and microbatch in next_entry:
            offer(kind, 0, next_entry[microbatch], now)
        step = 1 if kind is ActionKind.F else -1
        follower = stage + step
        if kind is ActionKind.F and follower == shop.num_stages:
            offer(_gradient(shop), stage, microbatch, rank.free_ns)
        elif kind is not ActionKind.W and 0 <= follower < shop.num_stages:
            moved = shop.rank_of(follower, microbatch) != number
            offer(ActionKind.F if step > 0 else _gradient(shop), follower, microbatch,
                  rank.free_ns + (shop.times.comm if moved else 0))
    return None if remaining else (end, [rank.order for rank in ranks])


def _gradient(shop: ListProblem) -> ActionKind:
    return ActionKind.B if shop.fused else ActionKind.I


def _duration(shop: ListProblem, kind: ActionKind) -> int:
    times = shop.times
    return {ActionKind.F: times.f, ActionKind.I: times.i, ActionKind.W: times.w}.get(kind, times.i + times.w)


def _choose(shop: ListProblem, rank: _Rank, now: int) -> tuple[ActionKind, int, int] | None:
    """The most urgent action that may start now, taken off the rank's lists."""
    fits = [entry for entry in rank.arrived if entry[0] <= now
            and (entry[2] is not ActionKind.F or rank.held < shop.cap)]
    if fits:
        best = min(fits, key=lambda entry: entry[1])
        rank.arrived.remove(best)
        _, _, kind, stage, microbatch = best
        if kind is ActionKind.F:
            rank.held += 1
        elif kind is ActionKind.I:
            rank.put_off.append((stage, microbatch))
        else:
            rank.held -= 1
        return kind, stage, microbatch
    if rank.put_off:
        rank.held -= 1
        return (ActionKind.W, *rank.put_off.pop(0))
    return None


def order_time(shop: ListProblem, orders: Sequence[Sequence[Action]]) -> int:
    """The makespan of given orders under the shop's durations (transfers without queueing)."""
    done: dict[tuple[ActionKind, int, int], tuple[int, int]] = {}
    places, free = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for number, order in enumerate(orders):
            while places[number] < len(order):
                action = order[places[number]]
                source = _source(shop, action)
                if source is not None and source not in done:
                    break
                if source is not None:
                    end, where = done[source]
                    free[number] = max(free[number], end + (shop.times.comm if where != number else 0))
                free[number] += _duration(shop, action.kind)
                done[action.kind, action.stage, action.microbatch] = (free[number], number)
                places[number] += 1
                moved = True
    assert places == [len(order) for order in orders], "the orders deadlock"
    return max(free)


def _source(shop: ListProblem, action: Action) -> tuple[ActionKind, int, int] | None:
    """What an action waits for beside its rank's order."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind is ActionKind.F:
        return (ActionKind.F, stage - 1, microbatch) if stage else None
    if action.kind is ActionKind.W:
        return (ActionKind.I, stage, microbatch)
    if stage == shop.num_stages - 1:
        return (ActionKind.F, stage, microbatch)
    return (_gradient(shop), stage + 1, microbatch)


def best_order(shop: ListProblem, rules: Sequence[Urgency] = (),
               given: Sequence[Sequence[Sequence[Action]]] = ()) -> list[list[Action]]:
    """The orders with the smallest makespan among the rules' and the given ones (the first of equals)."""
    found = [(order_time(shop, orders), [list(order) for order in orders]) for orders in given]
    found += [result for result in (list_order(shop, rule) for rule in rules) if result is not None]
    assert found, "no rule fits the memory limit"
    return min(found, key=lambda result: result[0])[1]
