"""M-SMoE: experts merged by what the router does with them (arXiv 2310.01334), and experts pruned by usage.

Inside a group hidden units of every member are permuted to fit those of its most used expert (a linear assignment on
the inner products of gate and up rows and down columns), then each matrix is the mean weighted by usage. Aligning all
experts to the first one before, as the paper's code does, changes the result by a permutation of a merged expert's
hidden units, which no output sees; it is left out except where weights are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipipe.graphs.converting.decisions import groups_per_layer, join_groups
from mipipe.graphs.converting.recipe import MergeExperts, Merging, PruneExperts
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import StoredTensor
from mipipe.runtime.calibration.whole_model import EXPERT_COUNTS
from mipipe.runtime.convert.collect import RoutingCounts
from mipipe.runtime.convert.output import Conversion, OutputTensor, Unit, converted_config, copied, written_dtype
from mipipe.runtime.convert.source import PARTS, Matrices, MoeLayer, Source, is_bank, is_expert, module_name, moe_layers
from mipipe.runtime.merge.align import assign

SeeRouting = Callable[[Sequence[MoeLayer]], Mapping[int, RoutingCounts]]
"""Runs the model on the texts and tells the routing of layers by their numbers."""


@dataclass(frozen=True)
class Grouping:
    """How a layer's experts are grouped: members, the most used first; and their usage."""

    groups: tuple[tuple[int, ...], ...]
    usage: tuple[float, ...]

    @property
    def slots(self) -> list[int]:
        """The group of every expert."""
        place = {expert: number for number, members in enumerate(self.groups) for expert in members}
        return [place[expert] for expert in range(len(self.usage))]


def fitted(reference: Matrices, other: Matrices) -> Matrices:
    """An expert with its hidden units in the order that fits a reference best."""
    score = sum(reference[part] @ other[part].T for part in ("gate_proj", "up_proj"))
    order = list(assign(score + reference["down_proj"].T @ other["down_proj"]))
    return {part: other[part][:, order] if part == "down_proj" else other[part][order] for part in PARTS}


def merged(members: Sequence[Matrices], usage: Sequence[float], align: bool = True) -> Matrices:
    """One expert from several: their mean weighted by usage (equally where nobody used them)."""
    first, total = members[0], sum(usage)
    if len(members) == 1:
        return first
    weights = [share / total for share in usage] if total else [1 / len(members)] * len(members)
    others = [fitted(first, item) if align else item for item in members[1:]]
    made: Matrices = {}
    for part in PARTS:  # from the first: what equals it adds nothing, not even rounding
        made[part] = first[part].clone()
        for weight, item in zip(weights[1:], others, strict=True):
            made[part] += weight * (item[part] - first[part])
    return made


def group_layers(recipe: Merging, source: Source, layers: Sequence[MoeLayer], see: SeeRouting) -> dict[int, Grouping]:
    """The groups of every layer, by what the model does with the texts.

    Raises:
        InputError: more groups than experts, or a layer to leave whole that has no experts.
    """
    count = len(layers[0].experts)
    average = recipe.groups or max(1, count // 2)
    if average > count:
        raise InputError(f"groups: found {average}, expected at most {count}, the number of experts")
    numbers = [layer.number for layer in layers]
    strange = sorted(set(recipe.whole_layers) - set(numbers))
    if strange:
        raise InputError(f"whole_layers: layer {strange[0]} has no experts; those with experts are {numbers}")
    whole = [numbers.index(number) for number in recipe.whole_layers]
    seen = see(layers)
    sizes = groups_per_layer([seen[number].usage for number in numbers], average, whole)
    found: dict[int, Grouping] = {}
    for layer, size in zip(layers, sizes, strict=True):
        usage = seen[layer.number].usage
        table = _similarity(recipe, source, layer, seen[layer.number])
        groups = join_groups(usage, table, size, recipe.capacity)
        found[layer.number] = Grouping(tuple(tuple(group) for group in groups), tuple(usage))
    return found


def _similarity(recipe: Merging, source: Source, layer: MoeLayer, seen: RoutingCounts) -> np.ndarray[Any, Any]:
    if recipe.similarity == "router_logits":
        return np.asarray(seen.similarity)
    if recipe.similarity == "random":
        return np.random.default_rng([recipe.seed, layer.number]).random((len(layer.experts),) * 2)
    if recipe.similarity == "router_weights":
        rows = source.read(layer.router).double()
    else:
        experts = [source.matrices(item) for item in layer.experts]
        if recipe.align:
            experts = [experts[0], *(fitted(experts[0], item) for item in experts[1:])]
        rows = torch.stack([torch.cat([item[part].reshape(-1) for part in PARTS]) for item in experts]).double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return np.asarray(rows @ rows.T)


def plan_merge(recipe: MergeExperts, source: Source, see: SeeRouting) -> Conversion:
    """The conversion.

    Raises:
        InputError: as of `group_layers`.
    """
    layers = moe_layers(source)
    grouping = group_layers(recipe, source, layers, see)
    figures = grouping_figures(grouping)
    if recipe.layout == "expanded":
        units = [_expanded(recipe, source, layer, grouping[layer.number]) for layer in layers]
        units += copied(source, lambda name: is_expert(name) or is_bank(name), out_dtype=recipe.out_dtype)
        return Conversion(dict(source.files.config), tuple(units), figures, False, _describe)
    settings = {"experts": "banks", "num_experts": len(layers[0].experts), "inner": layers[0].sizes[0],
                "layers": {str(number): {"slots": item.slots} for number, item in grouping.items()}}
    units = [_shared(recipe, source, layer, grouping[layer.number]) for layer in layers]
    units += copied(source, lambda name: is_expert(name) or is_bank(name), module_name, recipe.out_dtype)
    return Conversion(converted_config(source, settings), tuple(units), figures, True, _describe)


def grouping_figures(grouping: Mapping[int, Grouping]) -> dict[str, Any]:
    return {"groups": {str(number): [list(group) for group in item.groups] for number, item in grouping.items()},
            "usage": {str(number): list(item.usage) for number, item in grouping.items()}}


def _describe(record: Mapping[str, Any]) -> str:
    sizes = [len(groups) for groups in record["groups"].values()]
    count = len(next(iter(record["usage"].values())))
    return (f"{count} experts a layer, merged into {min(sizes)} to {max(sizes)} ({sum(sizes) / len(sizes):.3g} on"
            " average).")


def make_group(source: Source, layer: MoeLayer, grouping: Grouping, group: Sequence[int], align: bool) -> Matrices:
    """The merged expert of a group."""
    return merged([source.matrices(layer.experts[expert]) for expert in group],
                  [grouping.usage[expert] for expert in group], align)


def _shared(recipe: MergeExperts, source: Source, layer: MoeLayer, grouping: Grouping) -> Unit:
    inner, hidden = layer.sizes
    slots, dtype = len(grouping.groups), written_dtype(layer.experts[0]["gate_proj"], recipe.out_dtype)
    block = f"{module_name(layer.block)}.experts"
    pieces = (OutputTensor(f"{block}.gate_up_proj", dtype, (slots, 2 * inner, hidden)),
              OutputTensor(f"{block}.down_proj", dtype, (slots, hidden, inner)),
              OutputTensor(f"{block}.slots", "I64", (len(grouping.usage),)))

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        made = [make_group(source, layer, grouping, group, recipe.align) for group in grouping.groups]
        joined = [torch.cat([item["gate_proj"], item["up_proj"]]) for item in made]
        return {f"{block}.gate_up_proj": torch.stack(joined),
                f"{block}.down_proj": torch.stack([item["down_proj"] for item in made]),
                f"{block}.slots": torch.tensor(grouping.slots)}, {}

    return Unit(pieces, make)


def _expanded(recipe: MergeExperts, source: Source, layer: MoeLayer, grouping: Grouping) -> Unit:
    """A copy of the merged expert in every member's place."""
    pieces = tuple(OutputTensor(tensor.name, written_dtype(tensor, recipe.out_dtype), tensor.shape)
                   for expert in layer.experts for tensor in expert.values())

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        made: dict[str, Tensor] = {}
        for group in grouping.groups:
            common = make_group(source, layer, grouping, group, recipe.align)
            made |= {layer.experts[expert][part].name: common[part] for expert in group for part in PARTS}
        return made, {}

    return Unit(pieces, make)


def plan_prune(recipe: PruneExperts, source: Source, see: SeeRouting) -> Conversion:
    """The most used experts of every layer, in the model's own architecture.

    Raises:
        InputError: more to keep than there are, fewer than are chosen per token, experts routed in groups.
    """
    layers = moe_layers(source)
    count = len(layers[0].experts)
    check_kept(recipe.model, source, recipe.keep, count, recipe.experts_per_token, "keep")
    seen = see(layers)
    kept = {layer.number: _most_used(seen[layer.number], recipe) for layer in layers}
    units = [_pruned(recipe, source, layer, kept[layer.number]) for layer in layers]
    routers = {item.name for layer in layers for item in (layer.router, layer.bias) if item is not None}
    units += copied(source, lambda name: is_expert(name) or is_bank(name) or name in routers,
                    out_dtype=recipe.out_dtype)
    figures = {"kept": {str(number): experts for number, experts in kept.items()},
               "kept_usage": {str(number): sum(seen[number].usage[expert] for expert in experts)
                              for number, experts in kept.items()}}
    return Conversion(kept_config(source, recipe.keep, recipe.experts_per_token), tuple(units), figures, False,
                      lambda record: f"{recipe.keep} of {count} experts a layer, which had"
                      f" {min(record['kept_usage'].values()):.1%} or more of all choices.")


def check_kept(model: str, source: Source, kept: int, count: int, per_token: int | None, key: str) -> None:
    """Raise where a model's own architecture cannot have ``kept`` of its ``count`` experts.

    Raises:
        InputError: fewer than are chosen per token, more than there are, or experts routed in groups.
    """
    config = source.files.config
    top = per_token or config.get("num_experts_per_tok", 1)
    if not top <= kept <= count:
        raise InputError(f"{key}: found {kept}, expected {top}, the experts per token, to {count}, the number of"
                         " experts")
    if (config.get("n_group") or 1) > 1:
        raise InputError(f"{model}: routes by {config['n_group']} groups of neighbouring experts, of which none"
                         " may lose more than another")


def kept_config(source: Source, kept: int, per_token: int | None) -> dict[str, Any]:
    """The source's config with fewer experts."""
    config = dict(source.files.config)
    top = per_token or config.get("num_experts_per_tok", 1)
    return config | {key: kept for key in EXPERT_COUNTS if key in config} | {"num_experts_per_tok": top}


def pruned_tensors(layer: MoeLayer, expert: int, place: int) -> dict[str, str]:
    """The names of an expert's tensors by part, under a new number."""
    return {part: tensor.name.replace(f".experts.{expert}.", f".experts.{place}.")
            for part, tensor in layer.experts[expert].items()}


def _most_used(seen: RoutingCounts, recipe: PruneExperts) -> list[int]:
    values = (seen.weights if recipe.by == "weight" else seen.chosen).tolist()
    return sorted(sorted(range(len(values)), key=lambda expert: (-values[expert], expert))[:recipe.keep])


def _pruned(recipe: PruneExperts, source: Source, layer: MoeLayer, kept: Sequence[int]) -> Unit:
    """The experts that stay, under their new numbers, and their router's rows."""
    stored: dict[str, StoredTensor] = {}
    for place, expert in enumerate(kept):
        stored |= {name: layer.experts[expert][part] for part, name in pruned_tensors(layer, expert, place).items()}
    routers = [item for item in (layer.router, layer.bias) if item is not None]
    pieces = [OutputTensor(name, written_dtype(tensor, recipe.out_dtype), tensor.shape)
              for name, tensor in stored.items()]
    pieces += [OutputTensor(item.name, written_dtype(item, recipe.out_dtype), (len(kept), *item.shape[1:]))
               for item in routers]

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        made = {name: source.read_as_stored(tensor) for name, tensor in stored.items()}
        return made | {item.name: source.read_as_stored(item)[list(kept)] for item in routers}, {}

    return Unit(tuple(pieces), make)
