"""MoLAE: groups of experts share a projection into a latent space (arXiv 2503.23100; how experts are grouped is
inferred).

Of each matrix W_e of a group (first its best approximation of rank ``rank``), stacked as M = U S V^T, the shared map is
B = V_h^T and an expert's own A_e = W_e B^T. No B of h rows leaves less: the residual is the tail of S beyond h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.converting.decisions import alike_neighbours
from mipipe.graphs.converting.recipe import Molae
from mipipe.graphs.errors import InputError
from mipipe.runtime.convert.output import Conversion, OutputTensor, Unit, converted_config, copied, written_dtype
from mipipe.runtime.convert.source import MoeLayer, Source, is_bank, is_expert, module_name, moe_layers


def truncated(matrix: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    if rank >= min(matrix.shape):
        return matrix
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def factorise(matrices: list[Tensor], latent: int) -> tuple[Tensor, list[Tensor], float]:
    """The shared map [h, n], each matrix's own [m, h], and the norm of what no such maps can represent."""
    stack = torch.cat(matrices)
    values, right = torch.linalg.svd(stack, full_matrices=False)[1:]
    shared = right[:latent]
    if len(shared) < latent:  # fewer rows than asked for: the rest of the latent space is empty
        shared = torch.cat([shared, shared.new_zeros(latent - len(shared), stack.shape[1])])
    return shared, [matrix @ shared.T for matrix in matrices], float(values[latent:].norm())


def plan_molae(recipe: Molae, source: Source) -> Conversion:
    """The conversion, layer by layer.

    Raises:
        InputError: a latent space or rank beyond the sizes, experts that are routed by groups of their own.
    """
    layers = moe_layers(source)
    inner, hidden = layers[0].sizes
    count = len(layers[0].experts)
    latent, group = recipe.latent or inner, min(recipe.group, count)
    if latent > hidden or (recipe.rank or 1) > inner:
        raise InputError(f"{recipe.model}: latent {latent}, rank {recipe.rank}; expected at most the hidden size"
                         f" {hidden} and the experts' inner size {inner}")
    if recipe.grouping == "similar" and (source.files.config.get("n_group") or 1) > 1:
        raise InputError(f"{recipe.model}: routes by {source.files.config['n_group']} groups of neighbouring experts,"
                         " which grouping similar would tear apart; use consecutive")
    settings = {"experts": "latent", "num_experts": count, "inner": inner, "group": group, "latent": latent,
                "layers": {str(layer.number): {} for layer in layers}}
    units = [_unit(recipe, source, layer, group, latent) for layer in layers]
    routers = {item.name for layer in layers for item in (layer.router, layer.bias) if item is not None} \
        if recipe.grouping == "similar" else set()
    units += copied(source, lambda name: is_expert(name) or name in routers or is_bank(name), module_name,
                    recipe.out_dtype)
    groups = -(-count // group)
    before, after = 2 * count * inner * hidden, 2 * (groups * latent * hidden + count * inner * latent)
    return Conversion(converted_config(source, settings), tuple(units),
                      {"gate_up_parameters": after, "gate_up_parameters_before": before}, True, _describe)


def _describe(record: Mapping[str, Any]) -> str:
    share = record["gate_up_parameters"] / record["gate_up_parameters_before"]
    worst = max(row["error"] for row in record["layers"].values())
    return (f"Gate and up projections of a layer keep {share:.1%} of their parameters; relative error at most"
            f" {worst:.3g}.")


def _unit(recipe: Molae, source: Source, layer: MoeLayer, group: int, latent: int) -> Unit:
    inner, hidden = layer.sizes
    count, dtype = len(layer.experts), written_dtype(layer.experts[0]["gate_proj"], recipe.out_dtype)
    block = module_name(layer.block)
    shapes = {"gate_up_latent": (-(-count // group), 2 * latent, hidden), "gate_proj": (count, inner, latent),
              "up_proj": (count, inner, latent), "down_proj": (count, hidden, inner)}
    pieces = [OutputTensor(f"{block}.experts.{name}", dtype, shape) for name, shape in shapes.items()]
    routers = [item for item in (layer.router, layer.bias) if item is not None and recipe.grouping == "similar"]
    pieces += [OutputTensor(module_name(item.name), written_dtype(item, recipe.out_dtype), item.shape)
               for item in routers]

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        experts = [source.matrices(item) for item in layer.experts]
        order = list(range(count))
        if recipe.grouping == "similar":
            order = alike_neighbours(row_similarity([torch.cat([item["gate_proj"], item["up_proj"]])
                                                     for item in experts]).numpy(), group)
            experts = [experts[place] for place in order]
        made: dict[str, list[Tensor]] = {"gate_proj": [], "up_proj": []}
        shared: list[Tensor] = []
        error = tail = norm = 0.0
        for first in range(0, count, group):
            halves = []
            for name in ("gate_proj", "up_proj"):
                whole = [item[name] for item in experts[first:first + group]]
                reduced = [truncated(item, recipe.rank or inner) for item in whole]
                common, own, left = factorise(reduced, latent)
                halves.append(common)
                made[name] += own
                tail += left ** 2 + sum(float((a - b).norm()) ** 2 for a, b in zip(whole, reduced, strict=True))
                error += sum(float((a - b @ common).norm()) ** 2 for a, b in zip(whole, own, strict=True))
                norm += sum(float(item.norm()) ** 2 for item in whole)
            shared.append(torch.cat(halves))
        tensors = {f"{block}.experts.gate_up_latent": torch.stack(shared),
                   **{f"{block}.experts.{name}": torch.stack(items) for name, items in made.items()},
                   f"{block}.experts.down_proj": torch.stack([item["down_proj"] for item in experts])}
        tensors |= {module_name(item.name): source.read_as_stored(item)[order] for item in routers}
        figures = {"error": (error / norm) ** 0.5, "optimal_error": (tail / norm) ** 0.5}
        return tensors, {str(layer.number): figures | ({"order": order} if routers else {})}

    return Unit(tuple(pieces), make)


def row_similarity(matrices: list[Tensor]) -> Tensor:
    """How alike the row spaces of matrices are: the cosine between their W^T W, [E,E]."""
    count = len(matrices)
    table = torch.empty(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1):
            table[i, j] = table[j, i] = (matrices[i] @ matrices[j].T).norm() ** 2
    scale = table.diagonal().sqrt()
    return table / (scale[:, None] * scale[None, :])
