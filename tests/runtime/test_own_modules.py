"""Modules as people write them train through a plan for two ranks as eager autograd trains them: losses, gradients."""

from __future__ import annotations

import copy

import pytest
import runtime_equal as equal
import runtime_steps
import torch
from torch import Tensor, nn
from torch.nn import functional

from mipipe.graphs.capture.model import capture_module
from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan as solve

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WIDTH, STEPS, MICROBATCHES = 8, 3, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Mixing(nn.Module):
    """A Fourier transform along the sequence, times a complex parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(4, WIDTH, dtype=torch.complex128) * 0.1 + 1)
        self.first, self.last, self.head = Block(), Block(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.fft.irfft(torch.fft.rfft(x, dim=1) * self.filter, n=x.shape[1], dim=1)
        return functional.cross_entropy(self.head(self.last(x).mean(1)), y)


class Picking(nn.Module):
    """Rows picked by what the batch says, between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.head = Block(), Block(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = self.first(x)
        x = self.last(x + x[y > 2].mean())
        return functional.cross_entropy(self.head(x.mean(1)), y)


class Experts(nn.Module):
    """The usual loop over experts: `torch.where` and `index_add_`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))
                                     for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = torch.topk(self.gate(flat).softmax(-1), 2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            row, column = torch.where(chosen == number)
            out.index_add_(0, row, expert(flat[row]) * weights[row, column, None])
        return x + out.view_as(x)


class Routing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(20, WIDTH), nn.Sequential(Experts(), Experts())
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(self.layers(self.embed(ids))).flatten(0, 1), labels.flatten())


def batch_of(kind: type[nn.Module]) -> dict[str, Tensor]:
    if kind is Routing:
        return {name: torch.randint(0, 20, (4, 6)) for name in ("ids", "labels")}
    return {"x": torch.randn(4, 6, WIDTH, dtype=torch.float64), "y": torch.tensor([3, 0, 4, 2])[torch.randperm(4)]}


@pytest.mark.parametrize("kind", [Mixing, Picking, Routing])
def test_training_through_a_plan_equals_eager_training(pool, kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind()
    for item in module.parameters():  # `double` would make the complex parameter real
        item.data = item.data if item.is_complex() else item.data.double()
    batches = [[batch_of(kind) for _ in range(MICROBATCHES)] for _ in range(STEPS)]
    graph = capture_module(module, batches[0][0])
    result = solve(equal.problem(graph, 2, MICROBATCHES),
                   PlanOptions(time_limit_s=1, placement="chain", use_milp=False, threads=1))
    assert result.plan is not None, result.reason
    assert {stage.ranks for stage in result.plan.placement.stages} == {(0,), (1,)}
    state = {name: item.detach().clone() for name, item in module.named_parameters()}
    answers = pool.run(2, runtime_steps.__file__, "train_with_gradients", result.plan, graph, state, batches,
                       timeout=120.0)
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=runtime_steps.RATE)
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = sum(reference(**piece) for piece in batch) / MICROBATCHES
        loss.backward()
        wanted = {name: item.grad for name, item in reference.named_parameters() if item.grad is not None}
        found: set[str] = set()
        for answer in answers:
            assert answer[step][0] == pytest.approx(loss.item(), rel=1e-12)
            for name, gradient in answer[step][1].items():
                eager = wanted.get(name, torch.zeros_like(gradient))
                torch.testing.assert_close(gradient, eager, rtol=1e-9, atol=1e-14)
                found.add(name)
        assert {name for name, item in wanted.items() if item.any()} <= found
        optimizer.step()
