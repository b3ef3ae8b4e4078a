"""Traces as data: encoding, exact flops and saved bytes; and mipipe's own operators against plain formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import Phase, TensorSpec
from mipipe.graphs.operators import kernels
from mipipe.graphs.tracing.operator_kinds import resolve_operator
from mipipe.graphs.tracing.partition import trace_module, trace_segment
from mipipe.graphs.tracing.trace import build_phase, decode, encode, identifier, phase_signature

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-2**62, 2**62), st.floats(allow_nan=False),
                    st.text(max_size=5), st.complex_numbers(allow_nan=False, allow_infinity=False),
                    st.sampled_from([torch.float32, torch.bool, torch.strided, torch.channels_last, slice(1, None, 2)]))


@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=6))
def test_encoding_round_trips(value: Any) -> None:
    assert decode(encode(value), torch.device("cpu")) == value


def test_encoding_of_what_json_lacks() -> None:
    assert math.isnan(decode(encode(math.nan), torch.device("cpu")))
    assert decode(encode(torch.device("meta")), torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(GraphError, match="cannot be stored"):
        encode(object())
    with pytest.raises(GraphError, match="does not have it"):
        resolve_operator("aten.no_such_operator.default")


@given(st.text(min_size=1, max_size=12))
def test_identifiers(name: str) -> None:
    assert identifier(name).isidentifier()


class Mlp(nn.Module):
    def __init__(self, size: int = 6, inner: int = 10) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(size), nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))


def test_flops_equal_torch_counter_and_the_closed_form() -> None:
    module, x = Mlp(), torch.randn(7, 6)
    trace = trace_module(module, {"x": x})
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    assert trace.flops(Phase.F) == forward.get_total_flops() == 2 * 2 * 7 * 6 * 10
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert trace.flops(Phase.I) + trace.flops(Phase.W) == backward.get_total_flops()
    assert trace.flops(Phase.W) == trace.flops(Phase.F)


def test_attention_and_grouped_flops_are_counted() -> None:
    shape = TensorSpec((2, 4, 8, 5), "float32")
    trace = trace_segment(lambda q, k, v: [nn.functional.scaled_dot_product_attention(q, k, v)],
                          {"q": shape, "k": shape, "v": shape})
    assert trace.flops(Phase.F) == 4 * 2 * 4 * 8 * 8 * 5
    assert trace.flops(Phase.I) == 10 * 2 * 4 * 8 * 8 * 5
    assert max(math.prod(item.shape) for item in trace.specs.values()) < 2 * 4 * 8 * 8  # no scores are kept
    trace = trace_segment(lambda x, o, w: [torch.ops.mipipe.grouped_mm(x, w, o)],
                          {"x": TensorSpec((12, 3), "float32"), "o": TensorSpec((4,), "int32")},
                          {"w": TensorSpec((4, 3, 5), "float32")})
    assert [trace.flops(phase) for phase in Phase] == [2 * 12 * 3 * 5] * 3


@pytest.mark.parametrize("module", [
    Mlp(), nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU()), nn.Softmax(-1)])
def test_saved_bytes_are_what_f_and_i_really_keep(module: nn.Module) -> None:
    """Storages of the tensors F and I return for later phases, each counted once, inputs included where kept."""
    x = torch.randn(2, 3, 6)
    trace = trace_module(module, {"x": x})
    state = [*module.parameters(), *module.buffers()]
    known: dict[str, Tensor] = dict(zip((*trace.inputs, *trace.parameters, *trace.buffers), [x, *state], strict=True))
    known["grad_0"] = torch.randn(trace.specs["grad_0"].shape)
    for phase in (Phase.F, Phase.I):
        arguments, results = phase_signature(trace, phase)
        made = build_phase(trace, phase)(*[known[name] for name in arguments])
        known.update(zip(results, made, strict=True))
        saved = [item for item in trace.saved if item.source is phase]
        storages = {kept._cdata: kept.nbytes() for kept in (known[item.name].untyped_storage() for item in saved)}
        assert sum(item.num_bytes for item in saved) == sum(storages.values())


def test_cheap_recomputation_beats_saving_but_only_where_it_saves() -> None:
    """x*x*x: the backward needs 3x^2; keeping x alone is cheapest, so F saves nothing but its input."""
    trace = trace_segment(lambda x: [x.pow(3)], {"x": TensorSpec((5,), "float32")})
    assert [(item.name, item.alias) for item in trace.saved] == [("x", "x")]
    wide = trace_segment(lambda x: [x.double().sum(1, keepdim=True).pow(3)], {"x": TensorSpec((5, 9), "float32")})
    assert [item.num_bytes for item in wide.saved] == [5 * 8]  # the row sums, not x


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, causal: bool, window: int,
          scale: float, softcap: float) -> Tensor:
    """Attention by its definition, in the inputs' own precision."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    distance = torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2] - torch.arange(k.shape[2])[None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen = seen & (distance >= 0) if causal else seen
    seen = seen & (distance < window if causal else distance.abs() < window) if window else seen
    scores = scores.masked_fill(~(seen if mask is None else seen & mask), -math.inf)
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v
    return torch.nan_to_num(scores.softmax(-1)) @ v


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_attention_equals_its_definition(data: st.DataObject) -> None:
    draw = data.draw
    groups, rep, queries = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), draw(st.integers(1, 5))
    keys, size = queries + draw(st.integers(0, 3)), draw(st.sampled_from([2, 4]))
    torch.manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(2, groups * rep, queries, size, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, groups, keys, size, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, groups, keys, draw(st.sampled_from([size, 3])), dtype=torch.float64, requires_grad=True)
    mask = (torch.rand(2, 1, queries, keys) > 0.3) if draw(st.booleans()) else None
    sinks = torch.randn(groups * rep, dtype=torch.float64, requires_grad=True) if draw(st.booleans()) else None
    options = (draw(st.booleans()), draw(st.sampled_from([0, 2])), 0.7, draw(st.sampled_from([0.0, 2.0])))
    if mask is not None:
        mask[..., 0] = True
        options = (False, 0, *options[2:])
    out, _ = torch.ops.mipipe.attention(q, k, v, mask, sinks, *options)
    expected = dense(q, k, v, mask, sinks, *options)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    leaves = [x for x in (q, k, v, sinks) if x is not None]
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_queries_that_see_nothing_give_zeros() -> None:
    q = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, True], [False, False, False], [True, False, True]])[None, None]
    out, _ = torch.ops.mipipe.attention(q, q, q, mask, None, False, 0, 0.5, 0.0)
    assert (out[0, 0, 1] == 0).all()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("offsets", [[3, 3, 7, 7], [0, 0, 0, 0], [9, 9, 9, 9], [2, 4, 6, 9]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grouped_mm_with_empty_groups_and_poisoned_rows(offsets: list[int], dtype: torch.dtype) -> None:
    """Experts without tokens give zero gradients; rows beyond the last offset hold NaN and touch nothing."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 3, dtype=dtype), torch.randn(4, 3, 5, dtype=dtype)
    x[offsets[-1]:] = math.nan
    ends, starts = torch.tensor(offsets, dtype=torch.int32), [0, *offsets[:-1]]
    out = kernels.grouped_mm(x, weight, ends)
    grad = kernels.grouped_mm_weight(x, out, ends)
    assert (out[offsets[-1]:] == 0).all()
    for expert, (start, end) in enumerate(zip(starts, offsets, strict=True)):
        torch.testing.assert_close(out[start:end], x[start:end] @ weight[expert])
        torch.testing.assert_close(grad[expert], x[start:end].T @ out[start:end])


def test_histogram_counts_integers_and_ignores_the_rest() -> None:
    counts = torch.ops.mipipe.histogram(torch.tensor([0, 2, 2, 5, 3, 4]), 4, 0, 3)
    assert counts.tolist() == [1, 0, 2, 1]
