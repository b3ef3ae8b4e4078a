"""What a rank does to train a few steps of a plan; see `test_families_train`."""

from __future__ import annotations

from typing import Any

import torch

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.plan import Plan
from mipipe.runtime.engine.engine import Engine

RATE = 0.01


def train_steps(plan: Plan, graph: OperatorGraph, state: Any,
                batches: list[list[dict[str, torch.Tensor]]]) -> list[float]:
    """The loss of every step of plain gradient descent, one list of microbatches for each step."""
    engine = Engine(plan, graph, {name: tensor.clone() for name, tensor in state.items()})
    optimizer = torch.optim.SGD(engine.parameters(), lr=RATE)
    losses = []
    for batch in batches:
        losses.append(engine.step(batch))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_with_gradients(plan: Plan, graph: OperatorGraph, state: Any,
                         batches: list[list[dict[str, torch.Tensor]]]) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The loss of every step of `train_steps` and the gradients that this rank had, by name."""
    engine = Engine(plan, graph, {name: tensor.clone() for name, tensor in state.items()})
    optimizer = torch.optim.SGD(engine.parameters(), lr=RATE)
    steps = []
    for batch in batches:
        loss = engine.step(batch)
        steps.append((loss, {name: item.grad.clone() for name, item in engine.named_parameters()
                             if item.grad is not None}))
        optimizer.step()
        optimizer.zero_grad()
    return steps
