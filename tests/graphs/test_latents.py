"""Queries, keys and values made of latents: found in the trace alone, and made again without a change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mipipe.graphs.capture.model import capture_module
from mipipe.graphs.costs.latents import graph_with_latents_again, up_projections, with_latents_again
from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import OperatorGraph, Phase, SegmentTrace
from mipipe.graphs.tracing.compose import parameter_tensors, run_step

HIDDEN, LATENT, HEADS, WIDTH, ROWS = 16, 4, 4, 8, 6


class Attention(nn.Module):
    """Self-attention whose queries, keys and values come of a latent (with dropout before or after the up-projection),
    of adapters beside matrices, or of a matrix."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, wide = kind, 3 * HEADS * WIDTH
        self.down, self.norm = nn.Linear(HIDDEN, LATENT, bias=False), nn.LayerNorm(LATENT)
        self.up, self.out = nn.Linear(LATENT, wide), nn.Linear(HEADS * WIDTH, HIDDEN)
        self.whole = nn.Linear(HIDDEN, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        latent = F.dropout(self.norm(self.down(x)), 0.5, self.kind == "before")
        joined = self.whole(x) if self.kind == "whole" else F.dropout(self.up(latent), 0.5, self.kind == "after")
        joined = joined + self.whole(x) if self.kind == "adapter" else joined
        q, k, v = joined.view(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        made = F.scaled_dot_product_attention(q * q.sigmoid(), F.normalize(k, dim=-1), v, is_causal=True)
        return x + self.out(made.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers; nothing asks for the gradient of what goes into the first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(kind), Attention(kind)])

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(self.layers[1](self.layers[0](x)), target)


def captured(kind: str) -> tuple[Model, dict[str, torch.Tensor], OperatorGraph]:
    torch.manual_seed(5)
    module = Model(kind).double()
    unused = {"whole": ("down", "norm", "up"), "adapter": ()}.get(kind, ("whole",))
    for name in unused:
        for layer in module.layers:
            getattr(layer, name).requires_grad_(False)
    batch = {name: torch.randn(2, ROWS, HIDDEN, dtype=torch.float64) for name in ("x", "target")}
    return module, batch, capture_module(module, batch, granularity="layer")


def own(graph: OperatorGraph) -> dict[str, SegmentTrace]:
    """The traces of the segments with attention."""
    found = {segment.name: graph.trace(segment) for segment in graph.segments}
    return {name: trace for name, trace in found.items() if any("attention" in op.kind for op in trace.operators)}


@pytest.mark.parametrize("kind", ["latent", "before"])
def test_making_them_again_changes_nothing_but_what_is_kept(kind: str) -> None:
    """Losses and gradients are equal to the last bit, also where the latent drops out; less is kept, and the backward
    has the product once more."""
    module, batch, graph = captured(kind)
    made = graph_with_latents_again(graph, graph, own(graph))
    state = parameter_tensors(graph, {**dict(module.named_parameters()), **dict(module.named_buffers())})
    steps = []
    for each in (graph, made):
        torch.manual_seed(1)
        steps.append(run_step(each, state, batch))
    assert torch.equal(steps[0].outputs[graph.loss], steps[1].outputs[graph.loss])
    assert all(torch.equal(gradient, steps[1].gradients[name]) for name, gradient in steps[0].gradients.items())
    up = 2 * 2 * ROWS * LATENT * 3 * HEADS * WIDTH
    assert [trace.has(Phase.I) for trace in own(graph).values()] == [False, True]
    for first, again in zip(own(graph).values(), own(made).values(), strict=True):
        late = Phase.I if first.has(Phase.I) else Phase.W
        assert all(again.flops(phase) == first.flops(phase) + up * (phase is late) for phase in Phase)
        kept = [sum(item.num_bytes for item in trace.saved if item.source is Phase.F) for trace in (first, again)]
        assert kept[1] < kept[0]


@pytest.mark.parametrize("kind", ["adapter", "whole", "after"])
def test_what_is_no_latent_is_left_alone(kind: str) -> None:
    """An adapter's narrow product is added to a wide one that would have to stay in place of the sum; a product of what
    comes in is no up-projection; what draws runs once. A segment without any is refused by name."""
    _, _, graph = captured(kind)
    assert all(up_projections(trace) == () and with_latents_again(trace) is trace for trace in graph.traces)
    with pytest.raises(GraphError, match=f"segment {next(iter(own(graph)))}: has no up-projections of latents"):
        graph_with_latents_again(graph, graph, own(graph))
