"""Flops of single operators against the plain counts of their definitions."""

from __future__ import annotations

import pytest
import torch

from mipipe.graphs.operators.flops import count_flops


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
