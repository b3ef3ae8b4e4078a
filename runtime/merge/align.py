"""Experts of different checkpoints put in the base's order before they are merged, by the likeness of their weights.

Two fine-tuned models of one base have their experts in the same order; models that were trained apart, or whose experts
were renumbered, have not, and averaging expert 3 with expert 3 mixes strangers. For each MoE layer the experts of every
model are matched to the reference's (base, else first model) by the largest sum of inner products (a linear assignment
problem); the router's rows follow. On request the hidden units inside each expert are matched the same way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mipipe.graphs.merging.checkpoints.tensor_classes import is_stacked
from mipipe.graphs.merging.graph import Input, MergeUnit, columns_of
from mipipe.runtime.merge.exchange import MergeRanks
from mipipe.runtime.merge.reordering import Reordering
from mipipe.runtime.merge.sources import Surroundings

_SINGLE = re.compile(r"\.experts\.(\d+)\.")
_ROUTER = re.compile(r"\.(?:gate|router)(?:\.weight|\.linear\.weight|\.bias|\.e_score_correction_bias)$"
                     r"|\.e_score_correction_bias$")
_DOWN = re.compile(r"(?:down_proj|w2)(?:\.weight)?$")


def match_experts(around: Surroundings, units: Sequence[MergeUnit], exchange: MergeRanks) -> Surroundings:
    """Surroundings with the reorderings of every model's experts; layers are shared among ranks."""
    layers: dict[str, list[MergeUnit]] = {}
    for unit in units:
        if unit.experts and unit.method != "copy":
            layers.setdefault(unit.experts, []).append(unit)
    found: dict[tuple[int, str], Reordering] = {}
    for number, layer in enumerate(sorted(layers)):
        if number % exchange.size == exchange.rank:
            found.update(_match_layer(layers[layer], around))
    orders: dict[tuple[int, str], Reordering] = {}
    for part in exchange.gather(found):
        orders.update(part)
    return dataclasses.replace(around, orders=orders)


def _match_layer(units: Sequence[MergeUnit], around: Surroundings) -> dict[tuple[int, str], Reordering]:
    reference = units[0].inputs[0].model
    count = num_experts(units)
    experts = [unit for unit in units if _SINGLE.search(unit.name) or is_stacked(unit.name, unit.shape)]
    models = sorted({item.model for unit in experts for item in unit.inputs} - {reference})
    found: dict[tuple[int, str], Reordering] = {}
    for model in models:
        score = torch.zeros(count, count, dtype=torch.float64)
        for group in [*_same_place(experts), *_routers(units, count)]:
            score += _bank(group, reference, count, around) @ _bank(group, model, count, around).T
        order = assign(score)
        hidden = _match_hidden(experts, reference, model, order, around) if around.graph.align_hidden_units else {}
        for unit in units:
            if any(item.model == model for item in unit.inputs):
                found.update(_reorder(unit, model, order, hidden, count))
    return found


def assign(score: Tensor) -> tuple[int, ...]:
    """For every row the column it is matched to, so that the total score is largest."""
    from scipy.optimize import linear_sum_assignment  # here: most merges match nothing, and scipy takes 40 MB

    return tuple(int(column) for column in linear_sum_assignment(np.asarray(score), maximize=True)[1])


def num_experts(units: Sequence[MergeUnit]) -> int:
    """How many experts a layer's tensors hold."""
    numbers = [int(match[1]) for unit in units if (match := _SINGLE.search(unit.name))]
    stacked = [unit.shape[0] for unit in units if is_stacked(unit.name, unit.shape)]
    return max([*stacked, *(number + 1 for number in numbers)])


def _same_place(experts: Sequence[MergeUnit]) -> list[list[MergeUnit]]:
    """Expert tensors by projection: one stacked unit, or the units of all experts in their order."""
    groups: dict[str, list[MergeUnit]] = {}
    for unit in experts:
        groups.setdefault(_SINGLE.sub(".experts.", unit.name), []).append(unit)
    return [sorted(group, key=lambda unit: int(match[1]) if (match := _SINGLE.search(unit.name)) else 0)
            for _, group in sorted(groups.items())]


def _routers(units: Sequence[MergeUnit], count: int) -> list[list[MergeUnit]]:
    """Router tensors: one row per expert."""
    return [[unit] for unit in units if _is_router(unit, count)]


def _is_router(unit: MergeUnit, count: int) -> bool:
    return _ROUTER.search(unit.name) is not None and unit.shape[:1] == (count,)


def _input(unit: MergeUnit, model: int) -> Input:
    return next(item for item in unit.inputs if item.model == model)


def _bank(group: Sequence[MergeUnit], model: int, count: int, around: Surroundings) -> Tensor:
    """What tells the experts of a model apart in one projection, float64 ``[experts, features]``.

    All entries; or, where hidden units may be in another order, what does not depend on it: their sum.
    """
    table = torch.cat([_read(_input(unit, model), unit, around) for unit in group]).double().cpu()
    if not around.graph.align_hidden_units or _is_router(group[0], count):
        return table.reshape(count, -1)
    blocks = table.reshape(count, -1, table.shape[1])
    if _DOWN.search(group[0].name):
        return blocks.sum(2)
    halves = 2 if "gate_up" in group[0].name else 1
    return blocks.reshape(count, halves, -1, table.shape[1]).sum(2).reshape(count, -1)


def _read(item: Input, unit: MergeUnit, around: Surroundings) -> Tensor:
    columns = columns_of(unit, item.tensor.shape)
    rows = 1
    for size in item.tensor.shape:
        rows *= size
    return around.shelf.read_rows(item.folder, item.tensor, 0, rows // columns, columns).to(around.dtype)


def _match_hidden(experts: Sequence[MergeUnit], reference: int, model: int, order: Sequence[int],
                  around: Surroundings) -> dict[int, Tensor]:
    """Per expert (in the reference's order) the order of the model's hidden units that fits the reference's best."""
    found = {}
    for expert, source in enumerate(order):
        score: Tensor | None = None
        for group in _same_place(experts):
            ours, theirs = (_one(group, who, number, around)
                            for who, number in ((reference, expert), (model, source)))
            part = hidden_score(group[0].name, ours, theirs)
            score = part if score is None else score + part
        assert score is not None
        found[expert] = torch.tensor(assign(score))
    return found


def hidden_score(name: str, ours: Tensor, theirs: Tensor) -> Tensor:
    """Inner products of hidden units: columns of the down projection, rows of the others (both halves of gate_up)."""
    if _DOWN.search(name):
        return ours.T @ theirs
    if "gate_up" in name:
        half = len(ours) // 2
        return ours[:half] @ theirs[:half].T + ours[half:] @ theirs[half:].T
    return ours @ theirs.T


def _one(group: Sequence[MergeUnit], model: int, expert: int, around: Surroundings) -> Tensor:
    if len(group) > 1 or _SINGLE.search(group[0].name):
        return _read(_input(group[expert], model), group[expert], around).double()
    unit = group[0]
    item = _input(unit, model)
    rows, columns = unit.shape[1], unit.shape[2]
    return around.shelf.read_rows(item.folder, item.tensor, expert * rows, (expert + 1) * rows, columns).double()


def _reorder(unit: MergeUnit, model: int, order: Sequence[int], hidden: dict[int, Tensor],
             count: int) -> dict[tuple[int, str], Reordering]:
    """The reordering of one unit's input of a model: of expert blocks, router rows, or another expert's tensor."""
    key = (model, unit.name)
    single = _SINGLE.search(unit.name)
    if single is not None:
        expert = int(single[1])
        rows, columns = _hidden_maps(unit, {0: hidden[expert]} if hidden else {})
        size = unit.shape[0]
        return {key: Reordering(None, size, rows, columns, _SINGLE.sub(f".experts.{order[expert]}.", unit.name))}
    if is_stacked(unit.name, unit.shape):
        rows, columns = _hidden_maps(unit, hidden)
        return {key: Reordering(tuple(order), unit.shape[1], rows, columns)}
    if _is_router(unit, count):
        return {key: Reordering(tuple(order), 1)}
    return {}


def _hidden_maps(unit: MergeUnit, hidden: dict[int, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Row and column orders of every block for a projection."""
    if _DOWN.search(unit.name):
        return {}, hidden
    if "gate_up" in unit.name:
        return {block: torch.cat([order, order + len(order)]) for block, order in hidden.items()}, {}
    return hidden, {}
