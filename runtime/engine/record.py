"""What a step leaves behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch


@dataclass(slots=True)
class StepRecord:
    """What a step left. ``losses`` by microbatch; ``outputs`` of an evaluation by value and microbatch; ``events``
    (instruction, start, end) and ``transfer_times`` (transfer, 0 sent or 1 received, moment) in nanoseconds of this
    process's clock, taken by ``clock``; ``memory`` (moment, bytes) where it is tracked; ``talk``
    (axis, what, start, end) of the waits for collectives of the team, by the host's clock."""

    losses: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    events: list[tuple[int, int, int]] = field(default_factory=list)
    transfer_times: list[tuple[int, int, int]] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    talk: list[tuple[str, str, int, int]] = field(default_factory=list)
    clock: Literal["host", "events"] = "host"
