"""Elastic MoE's co-activation sampling: in training a token's experts are now and then drawn from a larger pool.

With probability ``p`` a token's k experts are drawn evenly, without replacement, from its ``pool`` best ones instead of
being the k best (arXiv 2509.21892; the probability is reconstructed from the abstract), so that at inference up to
``pool`` experts work well together. Weights are the router's own for the chosen ones, whatever the model does to them.

The router's ``topk`` gets another implementation in F of its segment; nothing else changes, neither plan nor memory. It
draws from the generator that is seeded by step, microbatch and segment, so every plan makes the same choices.
Evaluation draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph, Phase, SegmentTrace
from mipipe.runtime.experts.layers import RoutedLayer, routed_layers

TOPK = "aten.topk.default"


class CoActivation:
    """A ``topk`` that samples while it is ``active``. ``pool``: the best experts of which k are drawn; ``probability``:
    of a draw, for each token."""

    random = True

    def __init__(self, pool: int, probability: float) -> None:
        self.pool, self.probability, self.active = pool, probability, True

    def __call__(self, scores: torch.Tensor, count: int, dim: int = -1, largest: bool = True,
                 ordered: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and places [T,k] of scores [T,E]."""
        if not self.active:
            best = torch.topk(scores, count, dim, largest, ordered)
            return best.values, best.indices
        places = torch.topk(scores, self.pool, dim, largest, True).indices
        drawn = torch.rand(places.shape, device=scores.device).topk(count, dim=-1).indices
        draws = torch.rand(places.shape[0], 1, device=scores.device) < self.probability
        chosen = torch.where(draws, places.gather(-1, drawn), places[:, :count])
        return scores.gather(-1, chosen), chosen


def sampled_routers(graph: OperatorGraph, sampler: CoActivation) -> dict[str, Mapping[str, Callable[..., Any]]]:
    """The segments whose ``topk`` routes, each with the sampler in its place.

    Raises:
        InputError: the graph shows no routing, a router that chooses in another way, a pool that is smaller than the
            experts per token or larger than the experts.
    """
    layers = routed_layers(graph)
    if not layers:
        raise InputError("train config: experts.elastic samples the choices of routers, but this graph shows none;"
                         " capture a MoE model with --granularity block")
    traces = {trace.digest: trace for trace in graph.traces}
    maker = {value: segment for segment in graph.segments for value in segment.outputs}
    homes = {segment.name: segment for segment in graph.segments}
    found: dict[str, Mapping[str, Callable[..., Any]]] = {}
    for layer in layers:
        segment = maker[layer.index] if layer.index in maker else homes[layer.segment]
        trace = traces[segment.trace]
        count, experts = _chosen(trace, layer)
        if not count <= sampler.pool <= experts:
            raise InputError(f"train config: experts.elastic: pool is {sampler.pool}; expected {count}, the experts per"
                             f" token of {layer.name}, to {experts}, all of them")
        found[segment.name] = {TOPK: sampler}
    return found


Kernels = Mapping[str, Mapping[str, Callable[..., Any]]]
"""Implementations by segment and kind of operator."""


def joined_kernels(first: Kernels, second: Kernels) -> Kernels:
    """Both, where a segment may be in either."""
    return {name: {**first.get(name, {}), **second.get(name, {})} for name in {**first, **second}}


def _chosen(trace: SegmentTrace, layer: RoutedLayer) -> tuple[int, int]:
    """How many experts a router chooses of how many; raises unless it does so by one ``topk``, in F."""
    forward = list(trace.phase_operators(Phase.F))
    choices = [item for item in forward if item.kind == TOPK]
    everywhere = [item for item in trace.operators if item.kind == TOPK]
    if len(choices) != 1 or len(everywhere) != 1:
        raise InputError(f"train config: experts.elastic: {layer.name} chooses its experts by {len(everywhere)} topk"
                         " operators (of groups first, for example); expected one")
    scores = choices[0].inputs[0]
    spec = trace.specs.get(scores) or next(item.outputs[0] for item in forward if item.name == scores)
    return int(choices[0].args[1]), int(spec.shape[-1])
