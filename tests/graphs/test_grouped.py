"""Kernels and their devices: what torch's grouped product takes, that both ways give the same, and no CPU-only ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operators import kernels

SIZES = st.sampled_from((4, 8, 20, 24, 36, 64))


def rows(count, width, layout):
    """[count,width] in bfloat16: in rows, in columns, as a slice of something wider, or one row for all."""
    if layout == "columns":
        return torch.randn(width, count, dtype=torch.bfloat16).t()
    if layout == "slice":
        return torch.randn(count, width + 3, dtype=torch.bfloat16)[:, 3:]
    if layout == "expanded":
        return torch.randn(1, dtype=torch.bfloat16).expand(count, width)
    return torch.randn(count, width, dtype=torch.bfloat16)


@settings(max_examples=60, deadline=None)
@given(inner=SIZES, outer=SIZES, count=st.sampled_from((40, 41)), transposed=st.booleans(),
       layouts=st.tuples(*[st.sampled_from(("rows", "columns", "slice", "expanded"))] * 2))
def test_what_is_taken_runs(inner, outer, count, transposed, layouts):
    """Torch refuses nothing that the rule lets through, forward or weight gradient; plain aligned rows are let
    through."""
    x, grad = rows(count, inner, layouts[0]), rows(count, outer, layouts[1])
    weight = torch.randn(3, outer, inner, dtype=torch.bfloat16).transpose(1, 2) if transposed else \
        torch.randn(3, inner, outer, dtype=torch.bfloat16)
    ends = torch.tensor([7, 7, 33], dtype=torch.int32)
    if kernels.takes_grouped(x, weight):
        assert torch.ops.aten._grouped_mm(x, weight, ends).shape == (count, outer)
    if kernels.takes_grouped(x, grad):
        assert torch.ops.aten._grouped_mm(x.t(), grad, ends).shape == (3, inner, outer)
    if layouts == ("rows", "rows") and inner % 8 == outer % 8 == 0:
        assert kernels.takes_grouped(x, weight) and kernels.takes_grouped(x, grad)


@pytest.mark.parametrize("ends", [(7, 7, 33), (0, 0, 0), (40, 40, 40), (1, 2, 40)])
def test_the_weight_gradient_of_one_product_is_that_of_the_loop(ends):
    """Groups without rows are zero, and rows beyond the last group count nowhere, even where they are not finite."""
    x, grad = torch.randn(40, 16, dtype=torch.bfloat16), torch.randn(40, 24, dtype=torch.bfloat16)
    x[ends[-1]:] = float("nan")
    offsets = torch.tensor(ends, dtype=torch.int32)
    found, wanted = kernels.grouped_weight(x, grad, offsets), kernels.grouped_mm_weight(x, grad, offsets)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert not found[[number for number, (a, b) in enumerate(zip((0, *ends), ends, strict=False)) if a == b]].any()


@pytest.mark.parametrize("ends", [(7, 7, 33), (0, 0, 0), (40, 40, 40), (1, 2, 40)])
def test_the_rows_of_one_product_are_those_of_the_loop(ends, monkeypatch):
    """Rows beyond the last group are zero, whatever the kernel left there."""
    x, weight = torch.randn(40, 16, dtype=torch.bfloat16), torch.randn(3, 16, 24, dtype=torch.bfloat16)
    offsets, product = torch.tensor(ends, dtype=torch.int32), torch.ops.aten._grouped_mm

    def unwritten(*operands):
        out = product(*operands)
        out[ends[-1]:] = float("nan")
        return out

    wanted = kernels.grouped_mm(x, weight, offsets)
    monkeypatch.setattr(torch.ops.aten, "_grouped_mm", unwritten)
    torch.testing.assert_close(kernels.grouped_rows(x, weight, offsets), wanted, rtol=1e-2, atol=1e-2)


def test_other_dtypes_are_for_the_loop():
    for dtype in (torch.float32, torch.float16):
        assert not kernels.takes_grouped(torch.randn(8, 8, dtype=dtype), torch.randn(2, 8, 8, dtype=dtype))
    assert not kernels.takes_grouped(torch.randn(0, 8, dtype=torch.bfloat16))


class CpuAttention(torch.nn.Module):
    """Calls the CPU's kernel by its own name."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        q = (x * self.scale).unsqueeze(1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]


def test_kernels_of_cpus_alone_are_refused_at_capture():
    with pytest.raises(GraphError, match=r"calls aten\._scaled.*_for_cpu.*, which only CPUs have"):
        capture_module(CpuAttention(), {"x": torch.randn(2, 5, 8)}, loss=lambda out, batch: out.sum())


def test_recurrent_layers_are_captured_for_any_device():
    """Torch's own layer is one kernel of the CPU's library; ours is in its place."""
    class Reader(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = torch.nn.LSTM(8, 8, batch_first=True), torch.nn.Linear(8, 4)

        def forward(self, x):
            return self.head(self.layer(x)[0])

    graph = capture_module(Reader(), {"x": torch.randn(2, 5, 8)}, loss=lambda out, batch: out.sum())
    kinds = {item.kind for trace in graph.traces for item in trace.operators}
    assert "mipipe.recurrence.default" in kinds and not any("mkldnn" in kind for kind in kinds)
