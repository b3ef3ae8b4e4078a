"""What several tests of graphs ask: does a captured graph compute what its model computes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.serialize import from_data, to_data
from mipipe.graphs.tracing.compose import parameter_tensors, run_step


def assert_same_step(graph: OperatorGraph, module: nn.Module, batch: Mapping[str, Tensor], loss: Tensor,
                     rtol: float = 1e-12) -> None:
    """F, I, W of all segments give the loss that ``module`` gave and the gradients of its backward (run here)."""
    graph = from_data(to_data(graph), OperatorGraph, "graph")
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: tensor.clone() for name, tensor in parameter_tensors(graph, named).items()}
    torch.manual_seed(1)
    step = run_step(graph, state, batch)
    assert abs(step.outputs[graph.loss] - loss.detach()) <= rtol * abs(loss.detach())
    module.zero_grad()
    loss.backward()
    expected = {name: param.grad for name, param in module.named_parameters() if param.grad is not None}
    tied = {item.tied_to: item.fqn for item in graph.parameters if item.tied_to}
    gradients = {name if name in expected else tied[name]: grad for name, grad in step.gradients.items()}
    assert set(gradients) == set(expected)
    for name, grad in expected.items():
        error = (gradients[name] - grad).norm() / grad.norm().clamp(min=1e-300)
        assert error <= rtol, f"{name}: relative error {error}"
