"""Fused attention with sinks, windows, other head sizes and grouped heads is attention by its formulas."""

import itertools

import pytest
import torch

from mipipe.graphs.operators import dense_attention as dense
from mipipe.graphs.operators import efficient_attention as efficient
from mipipe.graphs.operators import flash_attention as flash
from mipipe.graphs.operators.attention_options import AttentionOptions
from mipipe.graphs.operators.attention_trust import AttentionKind, agrees
from mipipe.graphs.operators.kernels import EFFICIENT, FLASH, attention, attention_backward

CASES = [(causal, window, sinks, sizes, groups, lengths) for causal, window, sinks, sizes, groups, lengths in
         itertools.product((True, False), (0, 3), (True, False), ((8, 8), (12, 8), (8, 20)), (4, 2),
                           ((9, 9), (5, 9)))]


def drawn(case, dtype=torch.float64):
    """q, k, v, sinks, a gradient, and the options of a case."""
    causal, window, sinks, (size, value), groups, (queries, keys) = case
    generator = torch.Generator().manual_seed(sum(case[3]) + queries)
    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return (draw(2, 4, queries, size), draw(2, groups, keys, size), draw(2, groups, keys, value),
            draw(4) if sinks else None, draw(2, 4, queries, value), AttentionOptions(causal, window, size ** -0.5))


def by_formula(q, k, v, sinks, grad, options, mask=None):
    """Output and gradients of q, k, v and the sinks, by autograd through the plain softmax."""
    leaves = [item.detach().clone().requires_grad_() for item in (q, k, v)]
    extra = None if sinks is None else sinks.detach().clone().requires_grad_()
    wide_k, wide_v = (item.repeat_interleave(q.shape[1] // item.shape[1], 1) for item in leaves[1:])
    scores = leaves[0] @ wide_k.transpose(-1, -2) * options.scale
    distance = (torch.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]) - torch.arange(k.shape[2])
    seen = torch.ones_like(distance, dtype=torch.bool)
    if options.causal:
        seen &= distance >= 0
    if options.window:
        seen &= distance.abs() < options.window
    if mask is not None:
        seen = seen & mask
    scores = scores.masked_fill(~seen, float("-inf"))
    if extra is not None:
        scores = torch.cat([scores, extra[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    out = scores.softmax(-1)[..., :k.shape[2]] @ wide_v
    out.backward(grad)
    return out.detach(), *(item.grad for item in leaves), None if extra is None else extra.grad


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpus_kernel(case):
    q, k, v, sinks, grad, options = drawn(case)
    rest = (options.causal, options.window, options.scale, 0.0)
    out, lse = attention(q, k, v, None, sinks, *rest)
    found = (out, *attention_backward(grad, q, k, v, None, sinks, out, lse, *rest),
             None if sinks is None else dense.sink_gradient(grad, sinks, out, lse))
    for here, there in zip(found, by_formula(q, k, v, sinks, grad, options), strict=True):
        assert (here is None) == (there is None)
        if here is not None:
            torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)


def test_a_mask_with_sinks_and_rows_that_see_nothing():
    q, k, v, sinks, grad, options = drawn((False, 0, True, (8, 12), 2, (5, 9)))
    mask = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(1)) > 0.5
    mask[0, :, 2] = False
    rest = (False, 0, options.scale, 0.0)
    out, lse = attention(q, k, v, mask, sinks, *rest)
    assert not out[0, :, 2].any()
    found = out, *attention_backward(grad, q, k, v, mask, sinks, out, lse, *rest)
    for here, there in zip(found, by_formula(q, k, v, sinks, grad, options, mask), strict=False):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)


def band(queries, keys, causal, left, right):
    """What CUDA's kernel hides by its documentation: the last query sits at the last key; -1 or none: no limit."""
    distance = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None and left >= 0:
        hidden |= distance > left
    if causal or (right is not None and right >= 0):
        hidden |= distance < -(0 if causal else right)
    return torch.zeros(queries, keys, dtype=torch.float64).masked_fill_(hidden, float("-inf"))


def kernel_forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale,
                   window_size_left=None, window_size_right=None):
    """CUDA's forward as documented: [B,S,H,D] in, grouped heads, equal head sizes that are multiples of 8."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and not dropout
    assert (max_q, max_k) == (q.shape[1], k.shape[1])
    wide = [dense.expand_heads(item.transpose(1, 2), q.shape[2]) for item in (k, v)]
    bias = band(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    out, lse = dense.forward(q.transpose(1, 2), *wide, bias, None, scale, 0.0)
    return out.transpose(1, 2).contiguous(), lse, torch.zeros(2), torch.zeros(()), torch.zeros(())


def kernel_backward(grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, unused, *, scale,
                    window_size_left=None, window_size_right=None):
    """CUDA's backward as documented, from the output and logsumexp that it is given."""
    assert grad.shape == out.shape == q.shape
    inside = [item.transpose(1, 2) for item in (grad, q, k, v, out)]
    wide = [dense.expand_heads(item, q.shape[2]) for item in inside[2:4]]
    bias = band(q.shape[1], k.shape[1], causal, window_size_left, window_size_right)
    dq, dk, dv = dense.backward(inside[0], inside[1], *wide, bias, inside[4], lse, scale, 0.0)
    found = dq, dense.sum_heads(dk, k.shape[2]), dense.sum_heads(dv, k.shape[2])
    return tuple(item.transpose(1, 2) for item in found)


def efficient_bias(q, k, bias, causal):
    """The scores' mask of the memory-efficient kernel, and what it asks of one: finite, in rows of whole 16 bytes."""
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    if bias is None:
        return torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf")) if causal else None
    assert not causal and bias.shape == (*q.shape[:3], k.shape[2]) and bias.isfinite().all()
    assert all(step * bias.element_size() % 16 == 0 for step in bias.stride()[:-1]) and bias.stride(-1) == 1
    return bias


def efficient_forward(q, k, v, bias, compute_lse, dropout=0.0, causal=False, *, scale=None):
    """The memory-efficient forward as documented: heads and head sizes equal, logsumexp in whole 32 queries."""
    assert q.shape[1] == k.shape[1] == v.shape[1] and q.shape[-1] == v.shape[-1] and compute_lse and not dropout
    assert q.shape[-1] * q.element_size() % 16 == 0
    out, lse = dense.forward(q, k, v, efficient_bias(q, k, bias, causal), None, scale, 0.0)
    return out, torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=7.0), torch.zeros(()), torch.zeros(())


def efficient_backward(grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal=False, *, scale=None):
    """The memory-efficient backward: queries beyond the last one have an infinite logsumexp."""
    assert lse.shape[-1] % 32 == 0 and lse[..., q.shape[2]:].isposinf().all() and wanted == [True, True, True, False]
    assert grad.shape == out.shape == q.shape
    found = dense.backward(grad, q, k, v, efficient_bias(q, k, bias, causal), out, lse[..., :q.shape[2]], scale, 0.0)
    return *found, torch.empty(0)


@pytest.fixture
def documented():
    """CUDA's kernels on the CPU, by their documentation."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernel_forward, "CPU")
    library.impl("_flash_attention_backward", kernel_backward, "CPU")
    library.impl("_scaled_dot_product_efficient_attention", efficient_forward, "CPU")
    library.impl("_scaled_dot_product_efficient_attention_backward", efficient_backward, "CPU")
    agrees.cache_clear()
    yield
    agrees.cache_clear()
    library._destroy()


@pytest.mark.parametrize("kernel", [FLASH, EFFICIENT], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_how_cudas_kernels_are_called(case, kernel, documented):
    q, k, v, sinks, grad, options = drawn(case)
    out, lse = kernel.forward(q, k, v, None, sinks, options)
    found = (out, *kernel.backward(grad, q, k, v, None, out, lse, options))
    for here, there in zip(found, by_formula(q, k, v, sinks, grad, options), strict=False):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_masks_on_cuda(added, causal, documented):
    """Boolean or added, for all heads or for each, with a query that sees nothing."""
    q, k, v, sinks, grad, options = drawn((causal, 0, True, (8, 12), 2, (5, 9)))
    for heads in (1, 4):
        mask = torch.rand(2, heads, 5, 9, generator=torch.Generator().manual_seed(1)) > 0.5
        mask[0, :, 2] = False
        given = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf")) if added else mask
        out, lse = EFFICIENT.forward(q, k, v, given, sinks, options)
        assert not out[0, :, 2].any()
        found = out, *EFFICIENT.backward(grad, q, k, v, given, out, lse, options)
        for here, there in zip(found, by_formula(q, k, v, sinks, grad, options, mask), strict=False):
            torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)


KIND = AttentionKind(torch.bfloat16, (16, 16), True, True, True, True, True, "none")


def test_a_kernel_is_used_after_it_agreed_with_the_formulas(documented, monkeypatch):
    kinds = [(FLASH, KIND), (EFFICIENT, KIND), (EFFICIENT, KIND._replace(masked="bool", square=False)),
             (EFFICIENT, KIND._replace(masked="added", dtype=torch.float32))]
    assert all(agrees(kernel, torch.device("cpu"), kind) for kernel, kind in kinds)
    agrees.cache_clear()
    monkeypatch.setattr(flash, "_cuda_window", lambda q, k, options: (options.window, 0))  # one key too many
    monkeypatch.setattr(efficient, "_bias", lambda q, k, mask, options: (None, None))  # no mask at all
    with pytest.warns(RuntimeWarning, match=r"attention: the .* kernel on cpu is not used .*: differs by") as told:
        assert not any(agrees(kernel, torch.device("cpu"), kind) for kernel, kind in kinds)
        assert not any(agrees(kernel, torch.device("cpu"), kind) for kernel, kind in kinds)
    assert len(told) == len(kinds)


def test_a_kernel_that_fails_is_not_used():
    """On this device there is none."""
    agrees.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"is not used for AttentionKind.*: Could not run 'aten::"):
        assert not agrees(FLASH, torch.device("cpu"), KIND) and not agrees(EFFICIENT, torch.device("cpu"), KIND)
    agrees.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), TypeError("an argument that torch took away")])
def test_what_says_nothing_of_a_kernel_is_no_verdict(error, monkeypatch):
    """A device that is full at the moment, and a fault of ours, end with their own error."""
    agrees.cache_clear()

    def fail(*arguments):
        raise error

    with pytest.raises(type(error)):
        agrees(FLASH._replace(forward=fail), torch.device("cpu"), KIND)
    assert not agrees.cache_info().currsize
