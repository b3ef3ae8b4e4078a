"""What a recipe's loss needs to know of a whole step: counts over all microbatches and copies, groups, advantages.

These follow from the batch alone, so they are made before a step, and enter the graph as inputs: a response's weight in
the sum (``scales`` [B]) and its advantage (``advantages`` [B]). A loss is then a sum over responses whatever the number
of ranks, microbatches and copies, and one number divides it. ``source["loss"]`` of such a graph has ``reduction: rows``
and names the inputs that a batch has (``batch``) and those made here (``derived``).

Left out: groups over several copies of a plan, which are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import BatchError
from mipipe.graphs.models.loss import MEAN, weight
from mipipe.graphs.operator_graph import OperatorGraph, TensorSpec
from mipipe.graphs.recipes.options import GROUPED

Microbatch = Mapping[str, Tensor]

STATISTICS = 4
"""How many numbers `statistics` gives at most."""


def info_of(graph: OperatorGraph) -> Mapping[str, Any]:
    """How the loss of a graph is normalised."""
    found: Mapping[str, Any] = graph.source.get("loss", MEAN)
    return found


def batch_inputs(graph: OperatorGraph) -> dict[str, TensorSpec]:
    """The inputs that a microbatch has, as the loader gives it: the graph's, without those that follow from others."""
    specs = {value.name: value.spec for value in graph.values if value.source is None}
    info = info_of(graph)
    found = {name: specs[name] for name in graph.inputs if name not in info.get("derived", ())}
    for name, (shape, dtype) in info.get("batch", {}).items():
        found.setdefault(name, TensorSpec(tuple(shape), dtype))
    return found


def statistics(graph: OperatorGraph, microbatches: Sequence[Microbatch]) -> list[float]:
    """What is summed over the copies of a plan before a step; `complete` takes the sums.

    Raises:
        BatchError: numbers for the loss that are no finite ones, groups of one response.
    """
    info = info_of(graph)
    if info["reduction"] != "rows":
        return [float(sum(weight(graph, piece) for piece in microbatches))]
    tokens = float(sum(int(_mask(info, piece).sum()) for piece in microbatches))
    name, rows = info["name"], float(sum(piece[info["labels"]].shape[0] for piece in microbatches))
    for key in info["batch"]:
        if not all(bool(torch.isfinite(piece[key]).all()) for piece in microbatches):
            raise BatchError(f"loss {name}: {key} has values that are no finite numbers")
    if name == "rift":
        signs = [float(sum(int((sign * piece["rewards"] > 0).sum()) for piece in microbatches)) for sign in (1, -1)]
        return [tokens, rows, *signs]
    if name in GROUPED:
        sizes = torch.unique(_all(microbatches, "group_ids"), return_counts=True)[1]
        if info["options"]["advantage_from"] == "rewards" and int(sizes.max()) < 2:
            raise BatchError(f"loss {name}: each of the {int(rows)} responses is a group of its own, so no advantage"
                             " can be made; responses of one prompt have one number in group_ids")
        return [tokens, float(len(sizes))]
    return [tokens, rows / 2 if name == "dpo" else rows]


def groups_of(graph: OperatorGraph, microbatches: Sequence[Microbatch]) -> Tensor | None:
    """The numbers of the groups of a copy's batch [rows], which no other copy may have; None where there are none."""
    info = info_of(graph)
    return _all(microbatches, "group_ids") if info["reduction"] == "rows" and info["name"] in GROUPED else None


def check_apart(name: str, groups: Sequence[Tensor]) -> None:
    """Raise `BatchError` where two copies of a plan have responses of one group."""
    seen: dict[int, int] = {}
    for copy, ids in enumerate(groups):
        for number in torch.unique(ids).tolist():
            if seen.setdefault(number, copy) != copy:
                raise BatchError(f"loss {name}: group {number} has responses on copies {seen[number]} and {copy} of the"
                                 " plan; give all responses of a prompt to one copy, and prompts numbers of their own")


def complete(graph: OperatorGraph, microbatches: Sequence[Microbatch],
             sums: Sequence[float]) -> tuple[list[dict[str, Tensor]], float]:
    """The microbatches with all inputs of the graph, and what the step's loss is divided by.

    ``sums``: `statistics` over all copies.
    """
    info = info_of(graph)
    pieces = [dict(piece) for piece in microbatches]
    if info["reduction"] != "rows":
        return pieces, sums[0]
    if not sums[0]:  # no response token at all
        return pieces, 0.0
    name, options, divisor = info["name"], info["options"], sums[1]
    if name == "rift":
        _scale_rift(pieces, options["means"], sums)
    elif name in GROUPED:
        _scale_groups(pieces, options)
    if name in ("distill", "cross_entropy", "fuse") or (name == "grpo" and options["average"] == "token"):
        divisor = sums[0]
    specs = {value.name: value.spec for value in graph.values if value.source is None}
    return [{key: item.to(getattr(torch, specs[key].dtype)) if key in info["derived"] else item
             for key, item in piece.items() if key in specs} for piece in pieces], divisor


def _mask(info: Mapping[str, Any], piece: Microbatch) -> Tensor:
    """Where tokens of responses are predicted [B,T]."""
    mask = piece[info["labels"]] != info["ignore_index"]
    if "response_mask" in info["batch"]:
        mask = mask & (piece["response_mask"] != 0)
    return mask[:, 1:] if info["shift"] else mask


def _all(microbatches: Sequence[Microbatch], name: str) -> Tensor:
    return torch.cat([piece[name].reshape(-1) for piece in microbatches])


def _scale_rift(pieces: Sequence[dict[str, Tensor]], means: str, sums: Sequence[float]) -> None:
    """``scales``: 1, or the inverse share of a response's sign among all, so that each sign is a mean of its own."""
    _, rows, positive, negative = sums
    for piece in pieces:
        rewards = piece["rewards"].double()
        piece["scales"] = torch.ones_like(rewards)
        if means == "separate":
            piece["scales"][rewards > 0] = rows / max(positive, 1.0)
            piece["scales"][rewards < 0] = rows / max(negative, 1.0)


def _scale_groups(pieces: Sequence[dict[str, Tensor]], options: Mapping[str, Any]) -> None:
    """``scales``: one over the size of the group; ``advantages``: the reward less the group's mean."""
    _, place, sizes = torch.unique(_all(pieces, "group_ids"), return_inverse=True, return_counts=True)
    parts = [len(piece["group_ids"]) for piece in pieces]
    for piece, scales in zip(pieces, (1.0 / sizes.double())[place].split(parts), strict=True):
        piece["scales"] = scales
    if options["advantage_from"] == "batch":
        return
    rewards = _all(pieces, "rewards").double()
    apart = rewards - torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, place, rewards)[place] / sizes[place]
    if options["deviation"]:
        squares = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, place, apart**2)
        apart = apart / ((squares / sizes).sqrt()[place] + 1e-6)
    for piece, advantages in zip(pieces, apart.split(parts), strict=True):
        piece["advantages"] = advantages
