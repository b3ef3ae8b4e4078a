"""The tensors a rank holds between actions: one frame for each (stage, microbatch) alive, and transfers in flight.

A frame is a list with one slot for each tensor the stage's functions exchange (`mipipe.runtime.engine.compiling.stage`
numbers them); it starts as a copy of the stage's template, which already holds parameters and constants, and its slots
are emptied after their last reader. So memory follows the program, not the garbage collector.

Between two actions a rank holds, to the byte, what the plan says is saved and waiting (less where two groups of a stage
save the same tensor, and without what lies in the batch's own memory). During an action it holds at most what the
simulation says, which keeps all that I frees to its end and all that I makes from its start: the run frees and makes
group by group. So a rank's peak is never above the simulated one, nor above the plan's cap.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

Frame = list[Any]


class Buffers:
    """Frames by number, and the tensors and works of started transfers by transfer index."""

    __slots__ = ("frames", "incoming", "outgoing")

    def __init__(self) -> None:
        self.frames: dict[int, Frame] = {}
        self.incoming: dict[int, tuple[list[torch.Tensor], list[Any]]] = {}
        self.outgoing: dict[int, tuple[list[torch.Tensor], list[Any]]] = {}

    def frame(self, number: int, template: Frame) -> Frame:
        """The frame of that number, made from the template when it is not there yet."""
        frame = self.frames.get(number)
        if frame is None:
            frame = self.frames.setdefault(number, template.copy())  # at once: two streams may deliver to it
        return frame

    def clear(self) -> None:
        """Drop everything (after a failed step)."""
        self.frames.clear()
        self.incoming.clear()
        self.outgoing.clear()

    def num_bytes(self, static: Iterable[int]) -> int:
        """Bytes of all distinct storages held, without those whose data pointers are in ``static`` (weights, batch)."""
        sizes: dict[int, int] = {}
        for tensor in self._tensors():
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        for pointer in static:
            sizes.pop(pointer, None)
        return sum(sizes.values())

    def _tensors(self) -> Iterable[torch.Tensor]:
        for frame in self.frames.values():
            for item in frame:
                if isinstance(item, torch.Tensor):
                    yield item
        for tensors, _ in (*self.incoming.values(), *self.outgoing.values()):
            yield from tensors
