"""Weight gradients one by one: handed over as soon as they are made, added up, never shared between parameters."""

import weakref

import pytest
import torch
from torch import nn

from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.tracing.partition import trace_module
from mipipe.graphs.tracing.trace import build_phase, phase_signature
from mipipe.runtime.engine.compiling.calls import accumulator


def test_few_gradients_are_alive_at_a_time():
    """W of eight layers in one segment: at most two of its weight gradients exist at once, and all are autograd's."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh()) for _ in range(8)))
    x = torch.randn(3, 6)
    trace = trace_module(module, {"x": x}, differentiable=[True])
    values = dict(zip(trace.inputs, [x], strict=True)) | dict(zip(trace.parameters, module.parameters(), strict=True))
    values |= {name: torch.ones(3, 6) for name in trace.output_grads}
    for phase in (Phase.F, Phase.I):
        arguments, results = phase_signature(trace, phase)
        values |= zip(results, build_phase(trace, phase)(*(values[name] for name in arguments)), strict=True)
    arguments, results = phase_signature(trace, Phase.W)
    alive, most, found = [], 0, {}

    def give(position, gradient):
        nonlocal most
        alive.append(weakref.ref(gradient))
        most = max(most, sum(item() is not None for item in alive))
        found[results[position]] = gradient.clone()

    assert build_phase(trace, Phase.W, handing=True)(give, *(values[name] for name in arguments)) == ()
    assert len(alive) == 8 and most <= 2
    module(x).sum().backward()
    for name, parameter in zip(trace.parameter_grads, module.parameters(), strict=True):
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("owned", [True, False])
def test_gradients_add_up_in_memory_of_their_own(owned):
    """Kept as it is only where one parameter takes it; a second microbatch is added."""
    one, two, three = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    add = accumulator([(0, one, owned), (1, two, owned), (1, three, owned)])
    for _ in range(2):
        add(0, torch.ones(2))
        add(1, torch.full((2,), 2.0))
        add(2, torch.ones(2))
    assert [item.grad.tolist() for item in (one, two, three)] == [[2, 2], [4, 4], [4, 4]]
    two.grad.zero_()
    assert three.grad.tolist() == [4, 4]
