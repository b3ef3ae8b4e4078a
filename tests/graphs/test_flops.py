"""Flops of single operators against the plain counts of their definitions."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mipipe.graphs.operator_graph import Phase, TensorSpec
from mipipe.graphs.operators import dense_attention as dense
from mipipe.graphs.operators.flops import count_flops, inside_bytes
from mipipe.graphs.tracing.partition import trace_segment


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_both_gradients_of_a_convolution_cost_a_forward_each(groups: int, transposed: bool) -> None:
    """One multiply-add for each weight that meets a place, in groups as well."""
    x = torch.zeros(3, 8, 20)
    weight = torch.zeros((8, 16 // groups, 4) if transposed else (16, 8 // groups, 4))
    value = torch.ops.aten.convolution(x, weight, None, [1], [0], [1], transposed, [0], groups)
    forward = count_flops(torch.ops.aten.convolution.default, (x, weight, None, [1], [0], [1], transposed, [0], groups),
                          {}, value)
    assert forward == 2 * 3 * (x if transposed else value).shape[2] * weight.numel()
    for mask, times in (([True, False, False], 1), ([False, True, False], 1), ([True, True, False], 2)):
        args = (value, x, weight, None, [1], [0], [1], transposed, [0], groups, mask)
        found = torch.ops.aten.convolution_backward(*args)
        assert count_flops(torch.ops.aten.convolution_backward.default, args, {}, found) == times * forward


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write, views apart, and the most that are alive at once of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.most = 0, 0
        self._made: list[tuple[weakref.ref[torch.Tensor], int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given, made = ([item for item in tree_leaves(tree) if isinstance(item, torch.Tensor)]
                       for tree in ((args, kwargs), result))
        if all(item.alias_info is None for item in func._schema.returns):
            self.moved += sum(item.nbytes for item in (*given, *made))
            self._made += [(weakref.ref(item), item.nbytes) for item in made]
        self.most = max(self.most, sum(size for item, size in self._made if item() is not None))
        return result


def test_whole_scores_are_charged_where_no_device_has_a_kernel() -> None:
    """A softcap: what the formulas move and hold, in units of scores; nothing without one."""
    batch, heads, queries, keys = 2, 3, 96, 128
    q, k = torch.randn(batch, heads, queries, 4), torch.randn(batch, heads, keys, 4)
    with Traffic() as forward:
        out, lse = dense.forward(q, k, k, None, None, 0.5, 30.0)
    with Traffic() as backward:
        dense.backward(out, q, k, k, None, out, lse, 0.5, 30.0)
    ahead, back = torch.ops.mipipe.attention.default, torch.ops.mipipe.attention_backward.default
    rest = (None, None, False, 0, 0.5)
    assert inside_bytes(ahead, (q, k, k, *rest, 0.0)) == inside_bytes(torch.ops.aten.mm.default, (q, k)) == (0, 0)
    moved, held = inside_bytes(ahead, (q, k, k, *rest, 30.0))
    assert moved == pytest.approx(forward.moved, rel=0.05) and held == pytest.approx(forward.most, rel=0.05)
    moved, held = inside_bytes(back, (out, q, k, k, None, None, out, lse, False, 0, 0.5, 30.0))
    assert moved == pytest.approx(backward.moved, rel=0.05) and held == pytest.approx(backward.most, rel=0.05)


def test_a_softcap_s_scores_are_in_the_workspace() -> None:
    def attend(x: torch.Tensor, scale: torch.Tensor, softcap: float) -> tuple[torch.Tensor, ...]:
        q = x * scale
        return (torch.ops.mipipe.attention(q, q, q, None, None, True, 0, 0.5, softcap)[0],)

    x, scale = TensorSpec((2, 3, 64, 4), "float32"), TensorSpec((), "float32")
    plain, capped = (trace_segment(functools.partial(attend, softcap=softcap), {"x": x}, {"scale": scale})
                     for softcap in (0.0, 30.0))
    scores = 4 * 2 * 3 * 64 * 64
    for phase, held in ((Phase.F, 3 * scores), (Phase.I, 6 * scores)):
        assert held <= capped.workspace_bytes[phase] <= plain.workspace_bytes[phase] + held
