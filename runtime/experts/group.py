"""From a plan and a mesh to this rank's expert-parallel group, and to the counters of its routers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from mipipe.graphs.errors import InputError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.plan import Plan
from mipipe.runtime.experts.exchange import Exchange, check_map, contiguous_map
from mipipe.runtime.experts.layers import check_together, expert_layers, routed_layers
from mipipe.runtime.ranks.comm import Waits
from mipipe.runtime.ranks.mesh import Mesh
from mipipe.runtime.ranks.options import EngineOptions

Counters = dict[str, tuple[str, torch.Tensor]]
"""Of segments whose routing is counted: the value with the chosen experts, and where to add them."""


def make_exchange(plan: Plan, graph: OperatorGraph, stage_of: Mapping[str, int], mesh: Mesh,
                  options: EngineOptions, waits: Waits) -> Exchange | None:
    """The group of neighbouring devices that shares this rank's experts; None where each has all of them, or the graph
    was captured otherwise. ``waits``: what this rank waits for.

    Raises:
        InputError: an expert map where there is nothing to map, or for another model or number of devices.
        PlanError: the plan separates what must stay together.
    """
    layers = expert_layers(graph)
    if not layers:
        if options.expert_map is not None:
            raise InputError("expert map: this graph has no expert-parallel layers; capture the model with"
                             " --expert-parallel")
        return None
    if mesh.sharing < 2:
        if options.expert_map is not None:
            check_map(options.expert_map, layers, 1)
        return None
    check_together(plan, layers, stage_of)
    local = [number for number, layer in enumerate(layers)
             if mesh.rank in plan.placement.stages[stage_of[layer.segments[0]]].ranks]
    expert_map = options.expert_map or contiguous_map(layers, mesh.sharing, graph.model)
    return Exchange(layers, local, expert_map, mesh.exchange_group, mesh.seat % mesh.sharing, mesh.sharing, mesh.device,
                    waits, options.load_factor)


def routing_counters(graph: OperatorGraph, whole: OperatorGraph, stage_of: Mapping[str, int], local: Iterable[int],
                     device: torch.device) -> tuple[dict[int, torch.Tensor], Counters]:
    """Counters [experts] by the number of the MoE layer in the graph, and what `build_stage` needs to fill them.

    A layer is counted on the rank (and in the copy) that runs its first expert segment. Routers choose among all
    experts of ``whole``, whose banks members or copies may hold in parts (``graph``).
    """
    experts = {layer.name: layer.num_experts for layer in routed_layers(whole)}
    counters: dict[int, torch.Tensor] = {}
    watched: Counters = {}
    here = set(local)
    for number, layer in enumerate(routed_layers(graph)):
        if stage_of[layer.segment] in here:
            counters[number] = torch.zeros(experts[layer.name], dtype=torch.int64, device=device)
            watched[layer.segment] = layer.index, counters[number]
    return counters, watched
