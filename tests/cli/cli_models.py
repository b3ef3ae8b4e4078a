"""Models for the command line's tests: one that works, and one for each way in which a user's model can fail."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Two linear layers and a loss; ``kind`` says how it misbehaves."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.second(torch.relu(self.first(x)))
        if self.kind == "branch" and y.sum().item() > 0:
            y = y * 2
        if self.kind == "vector":
            return {"y": y}
        return {"loss": y.square().mean()}


def small(kind: str = "") -> tuple[nn.Module, dict[str, Tensor]]:
    return Small(kind), {"x": torch.zeros(4, 8)}


def raising() -> tuple[nn.Module, dict[str, Tensor]]:
    raise RuntimeError("no such weights")


def no_module() -> tuple[str, dict[str, Tensor]]:
    return "not a module", {"x": torch.zeros(1)}


def no_inputs() -> tuple[nn.Module, dict[str, Tensor]]:
    return Small(), {}
