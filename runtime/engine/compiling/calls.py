"""What an action does on a frame: calls of segments' phase functions, one after another.

Everything that can be decided before the first step is in a `Call`: where its arguments are, which gradients meet in a
sum first, where results go, and which slots are empty afterwards. `run_calls` walks over them.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mipipe.graphs.operators.expert_kernels import count_into
from mipipe.runtime.engine.compiling.buffers import Frame


@dataclass(slots=True)
class Call:
    """One segment's function of one phase, bound to slots of the stage's frame.

    ``sums`` are done first: (slot, slots of the contributions). ``stores`` are (result, slot), ``updates`` (result,
    buffer), ``gradients`` (result, parameter, whether its memory may be kept): these W's function adds itself, see
    `accumulator`. ``segment`` numbers the segment in the graph where its operators draw random numbers, else -1.
    ``drops`` are empty afterwards. ``counted``: the slot of the experts chosen by a router, and the counter [experts]
    that they are added to.
    """

    function: Callable[..., tuple[torch.Tensor, ...]]
    arguments: Callable[[Frame], tuple[Any, ...]]
    reads: tuple[int, ...]
    sums: tuple[tuple[int, tuple[int, ...]], ...] = ()
    stores: tuple[tuple[int, int], ...] = ()
    gradients: tuple[tuple[int, torch.nn.Parameter, bool], ...] = ()
    updates: tuple[tuple[int, torch.Tensor], ...] = ()
    segment: int = -1
    drops: tuple[int, ...] = ()
    counted: tuple[int, torch.Tensor] | None = None

    def touched(self) -> set[int]:
        """All slots it reads or writes."""
        return {*self.reads, *(slot for _, slot in self.stores), *(slot for slot, _ in self.sums),
                *(slot for _, parts in self.sums for slot in parts)}


@dataclass(frozen=True, slots=True)
class ActionCode:
    """What one action does: calls in order; ``drops`` are empty after its results have been delivered."""

    calls: tuple[Call, ...]
    drops: tuple[int, ...] = ()


def run_calls(calls: Sequence[Call], frame: Frame, seed: Callable[[int], int]) -> None:
    """Make the calls; ``seed`` gives the generator's seed for the number of a segment that draws random numbers."""
    for call in calls:
        for slot, parts in call.sums:
            total = frame[parts[0]]
            for part in parts[1:]:
                total = total + frame[part]
            frame[slot] = total
        if call.segment >= 0:
            torch.manual_seed(seed(call.segment))
        if call.counted is not None:
            slot, counter = call.counted
            count_into(counter, frame[slot].reshape(-1))
        results = call.function(*call.arguments(frame))
        for position, slot in call.stores:
            frame[slot] = results[position]
        for position, buffer in call.updates:
            buffer.copy_(results[position])
        for slot in call.drops:
            frame[slot] = None


def accumulator(gradients: Sequence[tuple[int, torch.nn.Parameter, bool]],
                homes: Mapping[torch.nn.Parameter, Callable[[], torch.Tensor]]) -> Callable[[int, torch.Tensor], None]:
    """What W's function hands its gradients to: (position, gradient) is added to the parameters of that position.

    ``homes`` are those of `Weights`, looked up when a gradient comes.
    """
    takers: dict[int, list[tuple[torch.nn.Parameter, bool]]] = {}
    for position, parameter, owned in gradients:
        takers.setdefault(position, []).append((parameter, owned))

    def add(position: int, gradient: torch.Tensor) -> None:
        found = takers.get(position, ())
        for parameter, owned in found:
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
            elif parameter in homes:
                parameter.grad = homes[parameter]().copy_(gradient)
            elif owned and len(found) == 1 and gradient.dtype is parameter.dtype and gradient.is_contiguous():
                parameter.grad = gradient
            else:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)

    return add


def random_key(seed: int, step: int, microbatch: int, segment: int) -> int:
    """The generator's seed for one segment's F: the same on whatever rank and however often it runs (splitmix64)."""
    key = 0
    for part in (seed, step, microbatch, segment):
        key = (key + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        key ^= key >> 31
    return key >> 1


def split_parts(actions: list[tuple[list[Call], set[int]]], static: set[int]) -> list[ActionCode]:
    """The actions of one microbatch in this order as parts, every slot dropped after its last use.

    Each action is its calls and the slots read when its results are delivered.
    """
    last: dict[int, tuple[int, int]] = {}
    for number, (calls, delivered) in enumerate(actions):
        for position, call in enumerate(calls):
            last.update(dict.fromkeys(call.touched(), (number, position)))
        last.update(dict.fromkeys(delivered, (number, len(calls))))
    drops: dict[tuple[int, int], list[int]] = {}
    for slot, where in last.items():
        if slot not in static:
            drops.setdefault(where, []).append(slot)
    parts = []
    for number, (calls, _) in enumerate(actions):
        fresh = tuple(dataclasses.replace(call, drops=tuple(drops.get((number, position), ())))
                      for position, call in enumerate(calls))
        parts.append(ActionCode(fresh, tuple(drops.get((number, len(calls)), ()))))
    return parts


def without_updates(call: Call) -> Call:
    """The call for a second run of F: buffers were changed and experts counted by the first."""
    return dataclasses.replace(call, updates=(), counted=None)


def nothing() -> tuple[torch.Tensor, ...]:
    return ()


def getter(slots: tuple[int, ...]) -> Callable[[Frame], tuple[Any, ...]]:
    """A function that takes these slots out of a frame, in C where there is more than one."""
    if len(slots) > 1:
        return operator.itemgetter(*slots)
    if slots:
        only = slots[0]
        return lambda frame: (frame[only],)
    return lambda frame: ()
