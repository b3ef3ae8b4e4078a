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


class Pictured(nn.Module):
    """Token numbers [2, 8], and two images for each of the two sequences; ``layered`` has a list of blocks."""

    def __init__(self, layered: bool) -> None:
        super().__init__()
        self.vision, self.embed_tokens, self.lm_head = nn.Linear(16, 16), nn.Embedding(64, 16), nn.Linear(16, 64)
        blocks = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(3)]
        if layered:
            self.layers = nn.ModuleList(blocks)
        else:
            self.body = nn.Sequential(*blocks)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> Any:
        images = self.vision(pixel_values).view(input_ids.shape[0], 2, 16).mean(1, keepdim=True)
        hidden = self.embed_tokens(input_ids) + images
        for layer in getattr(self, "layers", ()) or (self.body,):
            hidden = hidden + layer(hidden)
        return {"loss": nn.functional.cross_entropy(self.lm_head(hidden).flatten(0, 1), labels.flatten())}


class IdsFirst(Pictured):
    def forward(self, input_ids: Tensor, pixel_values: Tensor, labels: Tensor) -> Any:
        return super().forward(pixel_values, input_ids, labels)


def pictured(first: str = "images", layered: bool = True) -> tuple[nn.Module, dict[str, Tensor]]:
    ids = torch.zeros(2, 8, dtype=torch.int64)
    images, tokens = {"pixel_values": torch.zeros(4, 16)}, {"input_ids": ids, "labels": ids.clone()}
    return (Pictured(layered), images | tokens) if first == "images" else (IdsFirst(layered), tokens | images)
