"""Parameters of several dtypes, complex ones too, train through the engine as eager autograd trains them."""

from __future__ import annotations

import copy

import pytest
import runtime_equal as equal
import runtime_steps
import torch
from torch import Tensor, nn

from mipipe.graphs.capture.model import capture_module
from mipipe.planner.options import PlanOptions
from mipipe.planner.solve import plan as solve

pytestmark = pytest.mark.distributed


class Spectral(nn.Module):
    """Mixes with a complex filter between linear layers in float64 and float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6).double(), nn.Linear(6, 3)
        self.filter = nn.Parameter(torch.ones(4, dtype=torch.complex128))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=6)
        return nn.functional.cross_entropy(self.last(x.float()), y)


@pytest.mark.slow
def test_parameters_of_several_dtypes_train(pool) -> None:
    torch.manual_seed(0)
    module = Spectral()
    batches = [[{"x": torch.randn(4, 6, dtype=torch.float64), "y": torch.randint(0, 3, (4,))} for _ in range(2)]
               for _ in range(3)]
    graph = capture_module(module, batches[0][0])
    result = solve(equal.problem(graph, 1, 2), PlanOptions(time_limit_s=1, use_milp=False, threads=1))
    state = {name: item.detach().clone() for name, item in module.named_parameters()}
    (losses,) = pool.run(1, runtime_steps.__file__, "train_steps", result.plan, graph, state, batches, timeout=120.0)
    reference = copy.deepcopy(module)
    optimizer = torch.optim.SGD(reference.parameters(), lr=runtime_steps.RATE)
    expected = []
    for batch in batches:
        optimizer.zero_grad()
        loss = sum(reference(**piece) for piece in batch) / 2
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, rel=1e-6)
    assert len(set(expected)) == 3
