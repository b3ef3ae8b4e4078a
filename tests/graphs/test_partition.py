"""The F/I/W split reproduces autograd, keeps what it says it keeps, and never moves a statistic while tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mipipe.graphs.operator_graph import Phase, SegmentTrace
from mipipe.graphs.serialize import from_data, to_data
from mipipe.graphs.tracing.partition import trace_module
from mipipe.graphs.tracing.trace import build_phase, phase_signature


def run_phases(trace: SegmentTrace, tensors: dict[str, Tensor], grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """All results of F, I and W by name; between phases only what is listed as saved is kept."""
    given, kept, results = {**tensors, **grads}, {}, {}
    for phase in filter(trace.has, Phase):
        arguments, names = phase_signature(trace, phase)
        values = build_phase(trace, phase)(*[kept[name] if name in kept else given[name] for name in arguments])
        made = dict(zip(names, values, strict=True))
        results.update(made)
        kept.update({item.name: made[item.name] for item in trace.saved if item.name in made})
    return results


def close(a: Tensor | None, b: Tensor | None, rtol: float = 1e-12) -> None:
    assert (a is None) == (b is None)
    if a is not None and b is not None:
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.double(), b.double()
        assert (a - b).norm() <= rtol * b.norm() + 1e-300, (a - b).norm() / b.norm()


def check_module(module: nn.Module, inputs: dict[str, Tensor], differentiable: list[bool] | None = None,
                 rtol: float = 1e-12, seed: int = 3) -> SegmentTrace:
    """Compare F, I, W of a module with autograd: outputs, all gradients, buffers; returns the trace."""
    if differentiable is None:
        differentiable = [tensor.is_floating_point() for tensor in inputs.values()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trace = trace_module(module, inputs, differentiable=differentiable)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"tracing changed {name}"
    trace = from_data(to_data(trace), SegmentTrace, "trace")
    state = [*module.named_parameters(), *module.named_buffers()]
    tensors = dict(zip((*trace.inputs, *trace.parameters, *trace.buffers),
                       [*inputs.values(), *[tensor.detach().clone() for _, tensor in state]], strict=True))
    leaves = [x.clone().requires_grad_(flag) for x, flag in zip(inputs.values(), differentiable, strict=True)]
    torch.manual_seed(seed)
    outputs = module(*[leaf.clone() for leaf in leaves])
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(5)
    grads = {name: torch.randn(output.shape, generator=generator, dtype=output.dtype)
             for name, output in zip(trace.output_grads, outputs, strict=True) if name is not None}
    module.zero_grad()
    ends = [output for output, name in zip(outputs, trace.output_grads, strict=True) if name is not None]
    if ends:
        torch.autograd.backward(ends, list(grads.values()))
    torch.manual_seed(seed)
    found = run_phases(trace, tensors, grads)
    for name, output in zip(trace.outputs, outputs, strict=True):
        close(found[name], output.detach(), rtol)
        assert found[name].is_contiguous()
    for leaf, name in zip(leaves, trace.input_grads, strict=True):
        close(None if name is None else found[name], leaf.grad, rtol)
    for (_, param), name in zip(module.named_parameters(), trace.parameter_grads, strict=True):
        close(None if name is None else found[name], param.grad, rtol)
    for (name, buffer), argument in zip(module.named_buffers(), trace.buffers, strict=True):
        updated = trace.buffer_updates.get(argument)
        close(found[updated] if updated else before[name], buffer, rtol)
    return trace


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, size: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.norm, self.heads, self.causal = Norm(size), heads, causal
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, size))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(self.norm(self.conv(x)))


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.table(ids)
        return h + x, (h @ self.table.weight.t()).transpose(0, 1), ids + 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_attention_block_equals_autograd() -> None:
    trace = check_module(Attention(8, 2).double(), {"x": torch.randn(2, 5, 8, dtype=torch.float64)})
    kinds = [item.kind for item in trace.operators]
    assert "mipipe.attention.default" in kinds
    assert trace.flops(Phase.F) == trace.flops(Phase.W) + 4 * 2 * 2 * 5 * 5 * 4
    assert all(item.alias is None or item.alias in (*trace.inputs, "grad_0") for item in trace.saved)


class BiasedAttention(nn.Module):
    """Attention whose additive mask is learned: a gradient the attention operator does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x * 0.5, x + 1, attn_mask=self.bias)


class Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.split(3, dim=-1)
        return torch.sigmoid(gate) * up.unbind(0)[0]


def test_views_and_lists_of_views_move_no_bytes() -> None:
    """Splitting reads nothing; what reads the parts reads their bytes, not the whole tensor's."""
    trace = check_module(Split().double(), {"x": torch.randn(2, 6, dtype=torch.float64)})
    moved = {item.kind.split(".")[1]: (item.bytes_read, item.bytes_written) for item in trace.phase_operators(Phase.F)
             if item.kind != "getitem"}
    assert moved["split"] == (0, 0) and moved.get("unbind", (0, 0)) == (0, 0) and moved["sigmoid"] == (48, 48)
    assert moved["mul"] == (48 + 24, 48)


def test_learned_mask_gets_its_gradient() -> None:
    trace = check_module(BiasedAttention().double(), {"x": torch.randn(3, 2, 5, 4, dtype=torch.float64)})
    assert trace.parameter_grads[0] is not None


def test_convolution_splits_and_batch_norm_is_untouched() -> None:
    trace = check_module(Convolution().double(), {"x": torch.randn(2, 3, 5, 5, dtype=torch.float64)})
    assert set(trace.buffer_updates) == {"norm_running_mean", "norm_running_var", "norm_num_batches_tracked"}
    assert [item.phase for item in trace.operators if "convolution_backward" in item.kind] == [Phase.I, Phase.W]


def test_integer_inputs_tied_weights_and_transposed_outputs() -> None:
    ids = torch.randint(0, 11, (2, 3))
    trace = check_module(TwoOutputs().double(), {"ids": ids, "x": torch.randn(2, 3, 6, dtype=torch.float64)})
    assert trace.output_grads[2] is None and trace.input_grads[0] is None
    assert len(trace.parameters) == 1


@pytest.mark.parametrize("module", [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.GELU()), nn.LayerNorm(6),
                                    nn.Sequential(nn.SiLU(inplace=True), nn.Linear(6, 3))])
def test_small_modules(module: nn.Module) -> None:
    check_module(module.double(), {"x": torch.randn(4, 6, dtype=torch.float64)})


def test_frozen_module_has_no_w_and_frozen_input_has_no_i() -> None:
    module = nn.Linear(4, 3).double()
    x = {"x": torch.randn(2, 4, dtype=torch.float64)}
    assert not check_module(module, x, [False]).has(Phase.I)
    module.requires_grad_(False)
    assert not check_module(module, x, [True]).has(Phase.W)
    trace = check_module(module, x, [False])
    assert not trace.has(Phase.I) and not trace.has(Phase.W) and not trace.saved


def test_input_that_passes_through_gets_a_gradient_of_its_own() -> None:
    class Pass(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x, x + y

    x, y = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    trace = check_module(Pass(), {"x": x, "y": y})
    assert len({*trace.input_grads, *[name for name in trace.output_grads if name]}) == 4
