"""Models whose forward changes parameters in place or reads ``.data``: values, gradients and the change are eager's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import GraphError
from mipipe.graphs.tracing.compose import parameter_tensors, run_step

F64 = torch.float64


class Clipped(nn.Module):
    """Clips a weight in its forward, as Gemma3n and Flava do; ``how`` says in which words."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head, self.how = nn.Linear(4, 3), how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.layers:
            if self.how == "data":
                layer.weight.data.clamp_(-0.1, 0.1)
            elif self.how == "no_grad":
                with torch.no_grad():
                    layer.weight.clamp_(-0.1, 0.1)
                    layer.bias.mul_(0.5)
            elif self.how == "view":
                layer.weight.data.t()[1].mul_(0.5)
            x = torch.tanh(layer(x))
        return nn.functional.cross_entropy(self.head(x), y)


class Averaged(nn.Module):
    """A teacher that follows its student by a moving average in the forward and gives it targets, as BYOL does."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        self.teacher.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for mine, other in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
            other.data.mul_(0.9).add_(mine.data, alpha=0.1)
        return (self.student(x) - self.teacher(x).data).square().mean() + 0 * y.sum()


@pytest.mark.parametrize("module", [Clipped("data"), Clipped("no_grad"), Clipped("view"), Averaged()],
                         ids=["data", "no_grad", "view", "teacher"])
def test_parameters_changed_in_the_forward(module: nn.Module) -> None:
    torch.manual_seed(0)
    module = copy.deepcopy(module).to(F64)
    batch = {"x": torch.randn(3, 4, dtype=F64), "y": torch.randint(0, 3, (3,))}
    graph = capture_module(module, batch)
    state = {name: item.clone() for name, item in parameter_tensors(graph, dict(module.named_parameters())).items()}
    for _ in range(2):
        step = run_step(graph, state, batch)
        loss = module(**batch)
        torch.testing.assert_close(step.outputs[graph.loss], loss.detach(), rtol=1e-12, atol=0)
        module.zero_grad()
        loss.backward()
        expected = {name: item.grad for name, item in module.named_parameters() if item.grad is not None}
        assert set(step.gradients) == set(expected)
        for name, grad in expected.items():
            torch.testing.assert_close(step.gradients[name], grad, rtol=1e-12, atol=1e-300)
        assert step.buffers
        state.update(step.buffers)
        for name, item in module.named_parameters():
            torch.testing.assert_close(state[name], item.detach(), rtol=1e-12, atol=0)


def test_assigning_to_data_is_refused() -> None:
    class Assigning(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.clamp(-1, 1)
            return super().forward(x).sum()

    with pytest.raises(GraphError, match=r"assigns to \.data.*copy_"):
        capture_module(Assigning(4, 4), {"x": torch.randn(2, 4)})


class Follows(nn.Module):
    """Keeps a moving average in a buffer of a part of it: assigned anew, or changed in place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.layer, self.how = nn.Linear(4, 4), how
        self.layer.register_buffer("average", torch.zeros(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.how == "assigned":
            self.layer.average = 0.9 * self.layer.average + 0.1 * self.layer(x).mean(0)
        elif self.how == "assigned twice":
            self.layer.average = 0.9 * self.layer.average
            self.layer.average = self.layer.average + 0.1 * self.layer(x).detach().mean(0)
        else:
            with torch.no_grad():
                self.layer.average.mul_(0.9).add_(0.1 * self.layer(x).mean(0))
        return nn.functional.cross_entropy(self.layer(x) - self.layer.average.detach(), y)


@pytest.mark.parametrize("how", ["assigned", "assigned twice", "in place"])
def test_buffers_keep_what_a_forward_assigns(how: str) -> None:
    torch.manual_seed(0)
    module, batch = Follows(how).to(F64), {"x": torch.randn(3, 4, dtype=F64), "y": torch.randint(0, 3, (3,))}
    graph = capture_module(module, batch)
    start = {**dict(module.named_parameters()), **{key: item.clone() for key, item in module.named_buffers()}}
    assert type(module.layer.average) is Tensor and not module.layer.average.any()
    step = run_step(graph, parameter_tensors(graph, start), batch)
    loss = module(**batch)
    loss.backward()
    torch.testing.assert_close(step.outputs["loss"], loss.detach())
    torch.testing.assert_close(step.buffers["layer.average"], module.layer.average.detach())
    for name, item in module.named_parameters():
        torch.testing.assert_close(step.gradients[name], item.grad)
