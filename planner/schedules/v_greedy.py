"""ZB-V by its authors' greedy rule (Qi et al., 2023 and 2024): the order is built rank by rank with a clock for each.

The V is filled first: one microbatch down and up, more of them on the way back where they fit before it arrives, then
rows of forwards until every rank has as many as the rank before it. From there on every rank takes turns, a gradient
and a forward; a weight gradient runs when it fits into a wait, when memory is full, or when waiting would cost the rank
more idle time than some rank has anyway. How much that is becomes known at the end, so the rule is applied again with
what was found, while that helps. Whether the last reason holds before forwards and before gradients of near stages are
two switches (the authors' scheduler tries all four and keeps the least idle time; so the whole is at least as good).

Phases of a rank's two half stages are numbered as in `mipipe.planner.schedules.v_reorder`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mipipe.planner import clock
from mipipe.planner.actions import Action
from mipipe.planner.schedules.pattern import EvenTimes, forward, input_gradient, weight_gradient


@dataclass(slots=True)
class _Rank:
    """A rank's order so far. ``counts`` are the actions made of every phase, ``held`` its activations, ``waited`` its
    idle time since its first action; ``put_off`` are (stage, microbatch) of its weight gradients to come."""

    free_ns: int = 0
    held: int = 0
    waited_ns: int = 0
    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    put_off: deque[tuple[int, int]] = field(default_factory=deque)
    order: list[Action] = field(default_factory=list)


@dataclass(slots=True)
class _Build:
    """A V being filled: ``ends[phase][rank][microbatch]``, the switches, and the idle times of the attempt before."""

    times: EvenTimes
    microbatches: int
    cap: int
    fill_forwards: bool
    fill_gradients: bool
    allowed: list[int] | None
    ranks: list[_Rank]
    ends: list[list[list[int]]]

    def arrival(self, rank: int, phase: int) -> int | None:
        """When the value that the next action of a phase waits for arrives from a neighbour; None where it needs none.

        Raises:
            _StuckError: the neighbour has not made it.
        """
        if not self.has_arrived(rank, phase):
            raise _StuckError
        source = self._source(rank, phase)
        return None if source is None else source[self.ranks[rank].counts[phase]] + self.times.comm

    def has_arrived(self, rank: int, phase: int) -> bool:
        """Whether a neighbour has made what the next action of a phase waits for, or it waits for none."""
        source = self._source(rank, phase)
        return source is None or self.ranks[rank].counts[phase] < len(source)

    def _source(self, rank: int, phase: int) -> list[int] | None:
        """The ends of the neighbour's actions of a phase: near forwards and far gradients go down the ranks."""
        source = rank - 1 if phase in (0, 2) else rank + 1
        return self.ends[phase][source] if 0 <= source < len(self.ranks) else None


class _StuckError(Exception):
    """The rule asks for an action that cannot be run yet: a step of too few microbatches."""


def greedy_v(ranks: int, microbatches: int, times: EvenTimes,
             switches: tuple[bool, bool]) -> list[list[Action]] | None:
    """The order of every rank for ``times`` of half stages, within 1F1B's activations; None where the rule gets stuck.

    ``switches``: whether idle time is a reason to run a weight gradient before forwards, and before gradients of near
    stages.
    """
    best, best_idle, allowed = None, 0, None
    while True:
        build = _Build(times, microbatches, 2 * ranks, *switches, allowed, [_Rank() for _ in range(ranks)],
                       [[[] for _ in range(ranks)] for _ in range(4)])
        try:
            _run(build)
        except _StuckError:
            return best
        idle = [rank.waited_ns for rank in build.ranks]
        if best is not None and max(idle) >= best_idle:
            return best
        best, best_idle, allowed = [rank.order for rank in build.ranks], max(idle), idle


def _run(build: _Build) -> None:
    _fill(build)
    _balance(build)
    for _ in range(2 * build.microbatches):
        clock.ask()
        _gradients(build)
        _forwards(build)
    for number, rank in enumerate(build.ranks):
        while rank.put_off:
            _weight(build, number)


def _fill(build: _Build) -> None:
    """The first microbatch down and up; on the way up, others enter where they end before it arrives and fit."""
    ranks = range(len(build.ranks))
    for number in ranks:
        _put(build, number, 0)
    for number in reversed(ranks):
        rank, arrives = build.ranks[number], build.arrival(number, 1)
        while (arrives is not None and rank.free_ns + build.times.f <= arrives
               and rank.held + 2 * (number + 1) <= build.cap and rank.counts[0] < build.microbatches):
            for before in range(number + 1):
                _put(build, before, 0)
        _put(build, number, 1)


def _balance(build: _Build) -> None:
    """Forwards of near and far stages in turn, from the last rank up to one that has fewer than the rank before it."""
    phase = 0
    for number in range(1, len(build.ranks)):
        own, other = build.ranks[number].counts, build.ranks[number - 1].counts
        while own[0] + own[1] < other[0] + other[1] or own[1] <= other[1] < build.microbatches:
            for below in reversed(range(number, len(build.ranks))):
                if build.ranks[below].counts[phase] < build.microbatches:
                    _put(build, below, phase)
            phase = 1 - phase


def _gradients(build: _Build) -> None:
    """One input gradient on every rank: those that go up the ranks first, from the last rank on."""
    up: list[int] = []
    down: list[int] = []
    for number, rank in enumerate(build.ranks):
        near_next = rank.counts[3] < rank.counts[2] and (
            rank.counts[2] >= build.microbatches or build.has_arrived(number, 3))
        (up if near_next else down).append(number)
    for phase, number in [*((3, number) for number in reversed(up)), *((2, number) for number in down)]:
        _weights_before(build, number, phase, phase == 3 or build.fill_gradients)
        _put(build, number, phase)


def _forwards(build: _Build) -> None:
    """One forward on every rank that has one: of the far stage, where it has arrived."""
    for number, rank in enumerate(build.ranks):
        near, far = rank.counts[:2]
        if far >= build.microbatches:
            continue
        if far < near and build.has_arrived(number, 1):
            phase = 1
        elif far >= near or (near < build.microbatches and build.has_arrived(number, 0)):
            phase = 0
        else:
            continue
        while rank.held >= build.cap:
            _weight(build, number)
        _weights_before(build, number, phase, build.fill_forwards)
        _put(build, number, phase)


def _weights_before(build: _Build, number: int, phase: int, fill: bool) -> None:
    """Weight gradients that fit into the wait for an action; with ``fill`` one more, if the wait is longer than idle
    time that some rank has anyway."""
    rank, arrives = build.ranks[number], build.arrival(number, phase)
    if arrives is None:
        return
    while rank.put_off and arrives >= rank.free_ns + build.times.w:
        _weight(build, number)
    most = max(other.waited_ns for other in build.ranks)
    if build.allowed is not None:
        most = max(most, max(build.allowed) - build.allowed[number])
    if fill and rank.put_off and arrives - rank.free_ns > most - rank.waited_ns:
        _weight(build, number)


def _put(build: _Build, number: int, phase: int) -> None:
    """Run the next microbatch of a phase on a rank, as soon as it can be."""
    rank, arrives = build.ranks[number], build.arrival(number, phase)
    m = rank.counts[phase]
    if m >= build.microbatches or (phase and rank.counts[phase - 1] <= m) or (phase < 2 and rank.held >= build.cap):
        raise _StuckError
    begins = rank.free_ns if arrives is None else max(rank.free_ns, arrives)
    if rank.counts[0]:
        rank.waited_ns += begins - rank.free_ns
    rank.free_ns = begins + (build.times.f if phase < 2 else build.times.i)
    rank.counts[phase] += 1
    build.ends[phase][number].append(rank.free_ns)
    stage = number if phase in (0, 3) else 2 * len(build.ranks) - 1 - number
    rank.order.append((forward if phase < 2 else input_gradient)(stage, m))
    if phase < 2:
        rank.held += 1
    else:
        rank.put_off.append((stage, m))


def _weight(build: _Build, number: int) -> None:
    """Run the oldest weight gradient of a rank.

    Raises:
        _StuckError: it has none.
    """
    rank = build.ranks[number]
    if not rank.put_off:
        raise _StuckError
    rank.free_ns += build.times.w
    rank.held -= 1
    rank.order.append(weight_gradient(*rank.put_off.popleft()))
