"""A module and data of your own: ten lines that `mipipe` needs to know them. From this folder:

    mipipe capture own_model:factory -o graph.json
    mipipe profile graph.json --workers 2 -o costs.json
    mipipe plan graph.json --cluster cluster_2cpu.yaml --microbatches 4 --costs costs.json -o plan.json
    mipipe train --model own_model:factory --plan plan.json --graph graph.json --config own_model.yaml
"""

import torch
from torch import nn


class Regressor(nn.Module):
    """Any module whose result has a scalar ``loss`` will do; its arguments are the keys of a batch."""

    def __init__(self, width=64, depth=6):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))
        self.head = nn.Linear(width, 1)

    def forward(self, x, y):
        return {"loss": (self.head(self.layers(x)).squeeze(-1) - y).square().mean()}


def factory(width=64, depth=6):
    """The module, and example inputs of one microbatch. ``--set width=128`` gives arguments."""
    return Regressor(width, depth), {"x": torch.zeros(16, width), "y": torch.zeros(16)}


def make_loader(graph, rows, seed, copy=0):
    """Batches of ``rows`` rows, which are cut into microbatches; ``copy`` numbers the data-parallel copies."""
    generator = torch.Generator().manual_seed(1000 * copy + seed)
    while True:
        x = torch.randn(rows, 64, generator=generator)
        yield {"x": x, "y": x[:, :8].sum(dim=1)}
