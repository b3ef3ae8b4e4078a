"""Small real models for the runtime tests: how each is built, captured, fed, and run in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class SkipTiedTwo(nn.Module):
    """Tied embedding and head, a long skip connection, an auxiliary output that joins the loss, and an unused one."""

    def __init__(self, vocab: int = 11, width: int = 8, layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(),
                                                  nn.Dropout(dropout), nn.Linear(width, width)) for _ in range(layers))
        self.gate = nn.Linear(width, 1)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        first = hidden = self.embed(input_ids)
        gates = []
        for layer in self.layers:
            hidden = hidden + layer(hidden)
            gates.append(self.gate(hidden))
        logits = self.head(self.norm(hidden + first))
        tokens = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": tokens + 0.1 * torch.cat(gates).square().sum(), "logits": logits}


def skip_module(dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return SkipTiedTwo(dropout=dropout).to(dtype)


def token_batch(rows: int, length: int, vocab: int, seed: int = 4) -> dict[str, torch.Tensor]:
    """Random tokens, and labels some of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (rows, length), generator=generator)
    labels = tokens.clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    return {"input_ids": tokens, "labels": labels}


def chunked(batch: dict[str, torch.Tensor], num_microbatches: int) -> list[dict[str, torch.Tensor]]:
    """The microbatches of a batch."""
    return [{name: tensor.chunk(num_microbatches)[m] for name, tensor in batch.items()} for m in range(num_microbatches)]


def eager(module: nn.Module, microbatches: list[dict[str, torch.Tensor]], weight: float,
          loss_of: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the model's own forward and torch's autograd; the sum of losses over ``weight``."""
    module.zero_grad()
    total = 0.0
    for piece in microbatches:
        output = module(**piece)
        loss = (output["loss"] if loss_of is None else loss_of(output, piece)) / weight
        loss.backward()
        total += loss.item()
    return total, {name: item.grad.clone() for name, item in module.named_parameters() if item.grad is not None}
