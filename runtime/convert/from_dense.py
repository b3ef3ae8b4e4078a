"""Mixtures made of dense models: DIVE's pruned experts, SparseUnifiedModel's dealt neurons.

DIVE (arXiv 2506.09351; the measure of affinity and the linkage are reconstructed): a channel's score in a layer is
Var(h_c) * sum of D[:, c]^2, with h what goes into the down projection on the texts of a group of domains. An expert has
the channels of highest score; the others' mean goes into its bias. The router's noise during training, a few 1e-4, is
left out.

SparseUnifiedModel (arXiv 2512.02351): neurons are dealt to experts by their summed magnitude; an expert's weight is one
plus its router logit, so a router of zeros that takes all experts is the dense MLP.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mipipe.graphs.converting.decisions import cluster_domains, snake_deal
from mipipe.graphs.converting.recipe import Dive, MoeAdaptation
from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.checkpoints.files import StoredTensor
from mipipe.runtime.calibration.tokens import Samples
from mipipe.runtime.convert import collect
from mipipe.runtime.convert.output import Conversion, OutputTensor, Unit, converted_config, copied, written_dtype
from mipipe.runtime.convert.source import Matrices, Source, dense_layers, is_dense


def scores(moments: collect.ChannelMoments, down: Tensor) -> Tensor:
    """The fluctuation of every channel in the output: its variance times the squared norm of its column."""
    return moments.variance * (down.double() ** 2).sum(0)


def pruned(matrices: Matrices, kept: Sequence[int], mean: Tensor, compensate: bool = True) -> tuple[Matrices, Tensor]:
    """An expert of the channels ``kept``, and the output that the others have on average."""
    left = torch.ones(len(mean), dtype=torch.bool)
    left[list(kept)] = False
    down = matrices["down_proj"]
    bias = down[:, left].double() @ mean[left] if compensate else torch.zeros(len(down), dtype=torch.float64)
    return _channels(matrices, kept), bias.to(down.dtype)


def _channels(matrices: Matrices, kept: Sequence[int]) -> Matrices:
    order = list(kept)
    return {part: item[:, order] if part == "down_proj" else item[order] for part, item in matrices.items()}


def _keep(values: Tensor, count: int) -> list[int]:
    """The channels of highest score, in their order."""
    order = sorted(range(len(values)), key=lambda channel: (-float(values[channel]), channel))
    return sorted(order[:count])


Channels = Mapping[int, collect.ChannelMoments]
"""What a layer's channels do, by its number."""


def plan_dive(recipe: Dive, source: Source, domains: Sequence[Samples], see: Callable[[Samples], Channels],
              model: Callable[[], Any]) -> Conversion:
    """The conversion, after the model has seen every domain's texts with ``see``; ``model`` loads it as a whole, which
    the affinity of domains takes."""
    layers = dense_layers(source)
    inner = layers[next(iter(layers))]["gate_proj"].shape[0]
    count = max(1, round((1 - recipe.pruned) * inner))
    downs = {number: source.read(parts["down_proj"]) for number, parts in layers.items()}
    moments_of = [see(samples) for samples in domains]
    groups = [[number] for number in range(len(domains))]
    figures: dict[str, Any] = {}
    if len(domains) > recipe.experts:
        losses = _affinity(model(), domains, moments_of, downs, count, recipe.compensate)
        groups = cluster_domains(losses, recipe.experts)
        figures["domain_losses"] = losses.tolist()
    figures["domains"] = groups
    seen = [_joined([moments_of[item] for item in group]) for group in groups]
    kept = {number: [_keep(scores(moments[number], downs[number]), count) for moments in seen] for number in layers}
    figures["overlap"] = {str(number): _overlap(rows) for number, rows in kept.items()}
    settings = {"experts": "banks", "num_experts": recipe.experts, "inner": count, "router": "softmax", "bias": True,
                "layers": {str(number): {} for number in layers}}
    units = []
    for number, parts in layers.items():
        means = [moments[number].mean for moments in seen]
        units.append(_dive_unit(recipe, source, number, parts, kept[number], means))
    units += copied(source, lambda name: is_dense(name, layers), out_dtype=recipe.out_dtype)
    config = converted_config(source, settings, num_experts_per_tok=recipe.experts_per_token)
    return Conversion(config, tuple(units), figures, True,
                      lambda record: f"{recipe.experts} experts of {count} of {inner} channels; two of them share"
                      f" {sum(record['overlap'].values()) / len(layers):.0%} of theirs on average.")


def _joined(parts: Sequence[Channels]) -> Channels:
    """What channels do on several domains together."""
    found = {number: collect.ChannelMoments.of(len(item.mean)) for number, item in parts[0].items()}
    for part in parts:
        for number, item in part.items():
            found[number].join(item)
    return found


def _overlap(kept: Sequence[Sequence[int]]) -> float:
    """The share of its channels that an expert has in common with another, on average."""
    pairs = [(a, b) for place, a in enumerate(kept) for b in kept[:place]]
    return float(np.mean([len(set(a) & set(b)) / len(a) for a, b in pairs])) if pairs else 1.0


def _affinity(model: Any, domains: Sequence[Samples], seen: Sequence[Channels], downs: Mapping[int, Tensor], count: int,
              compensate: bool) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[a, b]: the loss on domain b of the model pruned for a."""
    table = np.empty((len(domains), len(domains)))
    for row in range(len(domains)):
        factors, offsets = {}, {}
        for number, moments in seen[row].items():
            factors[number] = torch.zeros(len(moments.mean))
            factors[number][_keep(scores(moments, downs[number]), count)] = 1.0
            if compensate:
                offsets[number] = downs[number].double() @ (moments.mean * (1 - factors[number]))
        for column, other in enumerate(domains):
            table[row, column] = collect.mean_loss(model, other, factors, offsets)
    return table


def _block(parts: Mapping[str, StoredTensor]) -> str:
    return parts["gate_proj"].name.removesuffix(".gate_proj.weight")


def _router(source: Source, number: int, experts: int, hidden: int, std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    return std * torch.randn(experts, hidden, generator=generator).to(source.dtype)


def _stacked(block: str, experts: Sequence[Matrices]) -> dict[str, Tensor]:
    return {f"{block}.experts.gate_up_proj": torch.stack([torch.cat([item["gate_proj"], item["up_proj"]])
                                                          for item in experts]),
            f"{block}.experts.down_proj": torch.stack([item["down_proj"] for item in experts])}


def _dive_unit(recipe: Dive, source: Source, number: int, parts: Mapping[str, StoredTensor],
               kept: Sequence[Sequence[int]], means: Sequence[Tensor]) -> Unit:
    hidden, count = parts["gate_proj"].shape[1], len(kept[0])
    block, dtype = _block(parts), written_dtype(parts["gate_proj"], recipe.out_dtype)
    pieces = (OutputTensor(f"{block}.experts.gate_up_proj", dtype, (recipe.experts, 2 * count, hidden)),
              OutputTensor(f"{block}.experts.down_proj", dtype, (recipe.experts, hidden, count)),
              OutputTensor(f"{block}.experts.down_proj_bias", dtype, (recipe.experts, hidden)),
              OutputTensor(f"{block}.gate.weight", dtype, (recipe.experts, hidden)))

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        whole = source.matrices(parts)
        made = [pruned(whole, channels, mean, recipe.compensate) for channels, mean in zip(kept, means, strict=True)]
        std = float(source.files.config.get("initializer_range", 0.02))
        return {**_stacked(block, [item for item, _ in made]),
                f"{block}.experts.down_proj_bias": torch.stack([bias for _, bias in made]),
                f"{block}.gate.weight": _router(source, number, recipe.experts, hidden, std, recipe.seed)}, {}

    return Unit(pieces, make)


def plan_adaptation(recipe: MoeAdaptation, source: Source, see: Callable[[Mapping[int, int]], Channels]) -> Conversion:
    """The conversion, after the model has seen the texts.

    Raises:
        InputError: every layer is to stay dense, or there are more experts than neurons.
    """
    layers = dense_layers(source)
    total = max(layers) + 1
    stay = {number % total for number in recipe.dense_layers if -total <= number < total}
    layers = {number: parts for number, parts in layers.items() if number not in stay}
    if not layers:
        raise InputError(f"dense_layers: leaves no layer of the model's {total} to convert")
    inner = layers[next(iter(layers))]["gate_proj"].shape[0]
    if recipe.experts > inner:
        raise InputError(f"experts: found {recipe.experts}, expected at most {inner}, the neurons of a layer")
    seen = see(dict.fromkeys(layers, inner))
    dealt = {number: snake_deal(seen[number].magnitude.tolist(), recipe.experts, int(inner * recipe.shared_ratio))
             for number in layers}
    shared, experts = dealt[next(iter(dealt))]
    settings = {"experts": "banks", "num_experts": recipe.experts, "inner": len(experts[0]), "router": "residual",
                "shared": len(shared), "layers": {str(number): {} for number in layers}}
    units = [_dealt_unit(recipe, source, number, parts, *dealt[number]) for number, parts in layers.items()]
    units += copied(source, lambda name: is_dense(name, layers), out_dtype=recipe.out_dtype)
    config = converted_config(source, settings, num_experts_per_tok=recipe.experts_per_token)
    spread = {str(number): _spread(seen[number].magnitude, dealt[number][1]) for number in layers}
    return Conversion(config, tuple(units), {"importance_max_over_mean": spread}, True,
                      lambda record: f"{recipe.experts} experts of {len(experts[0])} of {inner} neurons, {len(shared)}"
                      f" in a shared one, in {len(layers)} of {total} layers; the most important expert has"
                      f" {max(record['importance_max_over_mean'].values()):.3g} times the mean.")


def _spread(magnitude: Tensor, experts: Sequence[Sequence[int]]) -> float:
    sums = torch.tensor([float(magnitude[list(expert)].sum()) for expert in experts])
    return float(sums.max() / sums.mean().clamp_min(1e-30))


def _dealt_unit(recipe: MoeAdaptation, source: Source, number: int, parts: Mapping[str, StoredTensor],
                shared: Sequence[int], experts: Sequence[Sequence[int]]) -> Unit:
    hidden, count = parts["gate_proj"].shape[1], len(experts[0])
    block, dtype = _block(parts), written_dtype(parts["gate_proj"], recipe.out_dtype)
    pieces = [OutputTensor(f"{block}.experts.gate_up_proj", dtype, (len(experts), 2 * count, hidden)),
              OutputTensor(f"{block}.experts.down_proj", dtype, (len(experts), hidden, count)),
              OutputTensor(f"{block}.gate.weight", dtype, (len(experts), hidden))]
    if shared:
        pieces += [OutputTensor(f"{block}.shared_expert.gate_up_proj.weight", dtype, (2 * len(shared), hidden)),
                   OutputTensor(f"{block}.shared_expert.down_proj.weight", dtype, (hidden, len(shared))),
                   OutputTensor(f"{block}.shared_expert.weight_gate.weight", dtype, (1, hidden))]

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        whole = source.matrices(parts)
        made = _stacked(block, [_channels(whole, expert) for expert in experts])
        made[f"{block}.gate.weight"] = _router(source, number, len(experts), hidden, recipe.router_std, recipe.seed)
        if shared:
            common = _channels(whole, shared)
            made[f"{block}.shared_expert.gate_up_proj.weight"] = torch.cat([common["gate_proj"], common["up_proj"]])
            made[f"{block}.shared_expert.down_proj.weight"] = common["down_proj"]
            made[f"{block}.shared_expert.weight_gate.weight"] = torch.zeros(1, hidden)
        return made, {}

    return Unit(tuple(pieces), make)
