"""Weight gradients one by one: handed over as soon as they are made, added up, never shared between parameters."""

import weakref

import pytest
import torch
from torch import nn

from mipipe.graphs.operator_graph import Phase
from mipipe.graphs.tracing.partition import trace_module
from mipipe.graphs.tracing.trace import build_phase, phase_signature
from mipipe.runtime.engine.compiling.calls import accumulator
from mipipe.runtime.engine.reduce import FlatGradients


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
    add = accumulator([(0, one, owned), (1, two, owned), (1, three, owned)], {})
    for _ in range(2):
        add(0, torch.ones(2))
        add(1, torch.full((2,), 2.0))
        add(2, torch.ones(2))
    assert [item.grad.tolist() for item in (one, two, three)] == [[2, 2], [4, 4], [4, 4]]
    two.grad.zero_()
    assert three.grad.tolist() == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_of_a_bucket_lie_side_by_side(dtype):
    """Views of one vector at whole 16 bytes, made with the first; one that nobody made is zero; gaps are zero."""
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3,), (2, 2), (), (5,))]
    flat = FlatGradients(parameters)
    add = accumulator([(place, item, True) for place, item in enumerate(parameters[:3])], flat.homes())
    for _ in range(2):
        for place in (2, 0, 1):
            add(place, torch.full(parameters[place].shape, place + 1.0, dtype=dtype))
    whole = flat.whole()
    assert [item.grad.tolist() for item in parameters] == [[2] * 3, [[4, 4], [4, 4]], 6, [0] * 5]
    assert float(whole.double().sum()) == 2 * 3 + 4 * 4 + 6
    starts = [item.grad.data_ptr() - whole.data_ptr() for item in parameters]
    assert starts == sorted(starts) and all(start % 16 == 0 for start in starts)
    whole.mul_(10)
    assert parameters[1].grad.tolist() == [[40, 40], [40, 40]]
    flat.forget()
    parameters[0].grad = None
    add(0, torch.ones(3, dtype=dtype))
    assert parameters[0].grad.tolist() == [1] * 3 and parameters[1].grad.tolist() == [[40, 40], [40, 40]]
