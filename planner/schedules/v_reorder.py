"""A repeated building block with its two ends pulled together (Qi et al., Pipeline Parallelism with Controllable
Memory, 2024; steps and tie rules are those of the authors' own scheduler, so that its figures are reached).

Time is a grid of slots, one for each F, I or W of a half stage. In the middle of a step the block repeats; in the
warm-up and the cool-down it leaves slots empty, because microbatches that are not there any more (or not yet) had
them. Every action of the ends moves to the first empty slot after what it waits for, as long as the rank holds no more
activations than the repeated block did. Twice: first with the weight gradients in the slots that the block has for
them, then, in the cool-down, with all of those free again. In the end each weight gradient takes the first slot left
empty. Durations play no part.

The phases of a half stage's pair on a rank are numbered in the order in which a microbatch passes them: F of the near
stage (0), F of the far one (1), I of the far one (2), I of the near one (3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mipipe.planner import clock
from mipipe.planner.actions import Action
from mipipe.planner.schedules.pattern import forward, input_gradient, weight_gradient

_PHASES = _WEIGHTS = 4
"""Phases of a rank, numbered from 0; beside them, under the next number, its weight gradients of both stages."""

INTERVAL = _PHASES + 2
"""Slots after which a building block repeats: the actions of one microbatch on a rank, its phases and both stages'
weight gradients."""

Slots = list[list[list[int]]]
"""``[rank][phase][microbatch]``: the slot of an action; with weight gradients, these are the fifth list of a rank."""


def pulled_together(starts: Sequence[Sequence[int]], microbatches: int) -> list[list[Action]]:
    """The order of every rank of a V for a block with ``starts[rank][phase]``, its ends pulled together."""
    slots = [[[start + INTERVAL * m for m in range(microbatches)] for start in row] for row in starts]
    full = [[*row, [slot for slot, _ in _weight_slots(row)]] for row in slots]
    slots = [row[:_PHASES] for row in _as_early_as_possible(_moved_beside_weights(full))]
    moved = _moved_over_weights(slots)
    full = [[*row, [slot for slot, _ in _weight_slots(row)]] for row in moved]
    slots = [row[:_PHASES] for row in _as_early_as_possible(full)]
    return [_order(row, rank, len(slots)) for rank, row in enumerate(slots)]


def _order(row: list[list[int]], rank: int, ranks: int) -> list[Action]:
    """A rank's actions by their slots, weight gradients in what is empty."""
    near, far = rank, 2 * ranks - 1 - rank
    makers = ((forward, near), (forward, far), (input_gradient, far), (input_gradient, near))
    timed = [(slot, make(stage, m)) for (make, stage), line in zip(makers, row, strict=True)
             for m, slot in enumerate(line)]
    counts = {far: 0, near: 0}
    for slot, is_far in _weight_slots(row):
        stage = far if is_far else near
        timed.append((slot, weight_gradient(stage, counts[stage])))
        counts[stage] += 1
    return [action for _, action in sorted(timed, key=lambda entry: entry[0])]


def _weight_slots(row: list[list[int]]) -> Iterator[tuple[int, bool]]:
    """The slots of a rank's weight gradients, each the first empty one, and whether it is the far stage's; that stage's
    go first."""
    taken = {slot: phase for phase, line in enumerate(row) for slot in line}
    last, waiting, slot = max(taken), {True: 0, False: 0}, 0
    while slot <= last or any(waiting.values()):
        clock.ask()
        phase = taken.get(slot)
        if phase is None and any(waiting.values()):
            far = waiting[True] > 0
            waiting[far] -= 1
            yield slot, far
        elif phase in (2, 3):
            waiting[phase == 2] += 1
        slot += 1


def _in_time(slots: Slots) -> list[tuple[int, int, int, int]]:
    """(slot, rank, phase, microbatch) of all actions, the earliest first."""
    return sorted((slot, rank, phase, m) for rank, row in enumerate(slots) for phase, line in enumerate(row)
                  for m, slot in enumerate(line))


def _as_early_as_possible(slots: Slots) -> Slots:
    """Every action at the first slot after its rank's previous one and what it waits for; the orders stay."""
    found = [[[0] * len(line) for line in row] for row in slots]
    free = [0] * len(slots)
    for _, rank, phase, m in _in_time(slots):
        slot = max(free[rank], _earliest(found, rank, phase, m))
        found[rank][phase][m] = slot
        free[rank] = slot + 1
    return found


def _earliest(slots: Slots, rank: int, phase: int, m: int) -> int:
    """The first slot after the microbatch's previous action and after the phase's previous microbatch."""
    earliest = slots[rank][phase][m - 1] + 1 if m else 0
    if phase < _PHASES:
        source = rank - 1 if phase in (0, 2) else rank + 1
        if 0 <= source < len(slots):
            earliest = max(earliest, slots[source][phase][m] + 1)
        if phase:
            earliest = max(earliest, slots[rank][phase - 1][m] + 1)
    return earliest


def _ends_of(slots: Slots) -> tuple[tuple[int, int], tuple[int, int]]:
    """(slot, rank) with which the warm-up ends and the cool-down begins: the first rank's first gradient that leaves
    the pipeline, and its last forward."""
    warm = slots[0][3][0]
    return (warm, 0), (max(warm, slots[0][0][-1]), 0)


def _moved_beside_weights(slots: Slots) -> Slots:
    """The actions of both ends moved to earlier empty slots, weight gradients with them."""
    slots = [[list(line) for line in row] for row in slots]
    warm, cool = _ends_of(slots)
    taken = [{slot for line in row for slot in line} for row in slots]
    held = [_held(row) for row in slots]
    cap = max(map(max, held))
    for slot, rank, phase, m in _in_time(slots):
        if warm <= (slot, rank) <= cool:
            continue
        earliest = _earliest(slots, rank, phase, m)
        if phase == _WEIGHTS:
            earliest = max(earliest, sorted(slots[rank][2] + slots[rank][3])[m] + 1)
        if phase < 2:  # an activation more from the new slot to the old one
            earliest = next((t + 1 for t in range(slot - 1, earliest - 1, -1) if held[rank][t] >= cap), earliest)
        moved = next((t for t in range(earliest, slot) if t not in taken[rank]), slot)
        taken[rank].discard(slot)
        taken[rank].add(moved)
        slots[rank][phase][m] = moved
        change = {0: 1, 1: 1, _WEIGHTS: -1}.get(phase, 0)
        for t in range(moved, slot) if change else ():
            held[rank][t] += change
    return slots


def _held(row: list[list[int]]) -> list[int]:
    """Activations of a rank after every slot: from its forwards to its weight gradients."""
    change = [0] * (max(line[-1] for line in row) + 1)
    for phase, line in enumerate(row):
        for slot in line:
            change[slot] += {0: 1, 1: 1, _WEIGHTS: -1}.get(phase, 0)
    return np.cumsum(change).tolist()


@dataclass(slots=True)
class _Line:
    """A rank's slots: ``step`` is 1 for a gradient, -1 for an empty slot, 0 for a forward; ``forwards`` has a 1 for
    each of these. ``waiting`` and ``held`` are, after every slot, the weight gradients that can be run and the
    activations, if each empty slot takes a weight gradient where there is one."""

    step: np.ndarray
    forwards: np.ndarray
    waiting: np.ndarray
    held: np.ndarray

    def from_slot(self, first: int) -> tuple[np.ndarray, np.ndarray]:
        """``waiting`` and ``held`` from a slot on."""
        before = int(self.waiting[first - 1]) if first else 0
        walk = before + np.cumsum(self.step[first:])
        waiting = walk - np.minimum(0, np.minimum.accumulate(walk))  # a queue: it never holds less than none
        run = before + np.cumsum(self.step[first:] == 1) - waiting
        held = (int(self.held[first - 1]) if first else 0) + np.cumsum(self.forwards[first:]) - run
        return waiting, held


def _line(row: list[list[int]], size: int) -> _Line:
    step, forwards = np.full(size, -1, dtype=np.int64), np.zeros(size, dtype=np.int64)
    for phase, line in enumerate(row):
        step[line] = 1 if phase >= 2 else 0
        forwards[line] = 0 if phase >= 2 else 1
    made = _Line(step, forwards, np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64))
    made.waiting[:], made.held[:] = made.from_slot(0)
    return made


def _moved_over_weights(slots: Slots) -> Slots:
    """The actions of the cool-down moved to earlier slots without regard to weight gradients, which may still be run in
    what stays empty."""
    slots = [[list(line) for line in row] for row in slots]
    _, cool = _ends_of(slots)
    size = max(line[-1] for row in slots for line in row) + 1
    lines = [_line(row, size) for row in slots]
    cap = max(int(line.held.max()) for line in lines)
    for slot, rank, phase, m in _in_time(slots):
        if (slot, rank) <= cool:
            continue
        line = lines[rank]
        kind, forwards = int(line.step[slot]), int(line.forwards[slot])
        line.step[slot], line.forwards[slot] = -1, 0
        earliest = _earliest(slots, rank, phase, m)
        for moved in [*(earliest + np.flatnonzero(line.step[earliest:slot] == -1)).tolist(), slot]:
            line.step[moved], line.forwards[moved] = kind, forwards
            waiting, held = line.from_slot(moved)
            if moved == slot or held.max() <= cap:
                line.waiting[moved:], line.held[moved:] = waiting, held
                break
            line.step[moved], line.forwards[moved] = -1, 0
        slots[rank][phase][m] = moved
    return slots
