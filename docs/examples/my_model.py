"""A model of one's own, and the batches it is trained on."""

import torch
from torch import nn


class Classifier(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x, labels):
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return nn.functional.cross_entropy(self.head(x), labels)


def factory(width=64, depth=6):
    """The module, and example inputs of one microbatch by the names of its arguments. It returns its loss."""
    return Classifier(width, depth), {"x": torch.randn(8, width), "labels": torch.zeros(8, dtype=torch.long)}


def make_loader(graph, rows, seed, copy=0, width=64):
    """Batches of ``rows`` samples for ever: the microbatches of one step together, the same on every rank."""
    generator = torch.Generator().manual_seed(1_000 * seed + copy)
    while True:
        labels = torch.randint(10, (rows,), generator=generator)
        x = torch.randn(rows, width, generator=generator)
        yield {"x": x + nn.functional.one_hot(labels, width), "labels": labels}
