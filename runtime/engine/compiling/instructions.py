"""A rank's instructions with everything resolved: what the executor's handlers get as their argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mipipe.planner.actions import ActionKind
from mipipe.runtime.engine.compiling.buffers import Frame
from mipipe.runtime.engine.compiling.calls import ActionCode


@dataclass(frozen=True, slots=True)
class Transport:
    """One end of a transfer: the peer, its place in the channel's group, and where the values come from or go to."""

    index: int
    text: str
    peer: int
    group: Any
    place: int
    specs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    slots: tuple[int, ...]
    frame: int
    template: Frame


@dataclass(frozen=True, slots=True)
class ActionPart:
    """One part of an action on one frame.

    ``batch``: (slot, input name) taken from the microbatch; ``deliveries``: (slot, frame, template, slot there) within
    the rank; ``outgoing``: (transfer, slots) to be sent; ``keeps``: (value, slot) for the caller; ``last``: the frame
    is done.
    """

    frame: int
    microbatch: int
    template: Frame
    part: ActionCode
    evaluation: ActionCode
    batch: tuple[tuple[int, str], ...] = ()
    deliveries: tuple[tuple[int, int, Frame, int], ...] = ()
    outgoing: tuple[tuple[int, tuple[int, ...]], ...] = ()
    keeps: tuple[tuple[str, int], ...] = ()
    last: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """A compute instruction: the receives it waits for, then its pieces; ``aside``: on the collective stream."""

    index: int
    waits: tuple[Transport, ...]
    pieces: tuple[ActionPart, ...]
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    """An instruction with its handler's argument, and the text that errors and timelines show."""

    kind: ActionKind
    argument: Any
    label: str
