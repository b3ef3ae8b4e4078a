"""REAM: experts merged around the most salient ones, whose router rows stay (arXiv 2604.04356).

A layer's experts are ranked by REAP's saliency (arXiv 2510.13999): the mean over the tokens that chose an expert of its
router weight times the norm of its output. The first ``groups`` lead. From the most salient leader on, each takes the
``size - 1`` experts that are most like it and not taken yet, until none is left, so most groups stay single: likeness
is the mean of (1 + cos) / 2 of the experts' mean outputs, gated for every token, and of 1 - d / max d with d the
distance of their unit vectors of router logits over all tokens. Inside a group hidden units are matched to the
leader's by the least sum of two distances, of unit vectors of activations over all tokens and of weights (gate row, up
row, down column), and the expert is the mean weighted by saliency. The next layer's statistics are of the model as
merged so far (``sequential``).

Formulas and defaults are those of the authors' program (SamsungSAILMontreal/ream), read for facts, and the paper's
abstract, with these differences: the router weights of saliency are those that the layer itself adds outputs with; all
tokens count in the distances of activations, the same ones for both experts (there up to 32,768 samples, drawn for each
expert anew); weights are compared whole (there 64 principal components).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mipipe.graphs.converting.decisions import pseudo_groups
from mipipe.graphs.converting.recipe import Ream
from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import write_text
from mipipe.runtime.calibration.decoder import Decoder
from mipipe.runtime.calibration.tokens import Samples
from mipipe.runtime.convert.collect import hooked, layer_states, open_decoder, rows_of
from mipipe.runtime.convert.merge_experts import check_kept, kept_config, pruned_tensors
from mipipe.runtime.convert.output import Conversion, OutputTensor, Unit, copied, written_dtype
from mipipe.runtime.convert.source import PARTS, Matrices, MoeLayer, Source, is_bank, is_expert, moe_layers
from mipipe.runtime.merge.align import assign

SeeGroups = Callable[[Sequence[MoeLayer], "Result"], None]
"""Runs the model on the texts and decides every layer's groups."""


@dataclass(frozen=True)
class Groups:
    """A layer's groups by their leaders' numbers, the leader first; all experts' saliency; for members the order of
    hidden units that fits their leader's."""

    members: tuple[tuple[int, ...], ...]
    saliency: tuple[float, ...]
    orders: Mapping[int, Tensor]


class Statistics:
    """What a layer's experts do with all tokens: saliency, mean gated outputs, router logits."""

    def __init__(self, experts: int, hidden: int, scores: Callable[[Tensor], Tensor]) -> None:
        self._scores = scores
        self.total, self.count = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
        self.outputs = torch.zeros(experts, hidden, dtype=torch.float64)
        self.gram = torch.zeros(experts, experts, dtype=torch.float64)

    def add(self, bank: Any, states: Tensor, logits: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Count tokens: states [T,H], logits [T,E], chosen experts and their weights [T,k]."""
        gates = self._scores(logits.double())
        self.gram += logits.double().T @ logits.double()
        for expert in range(len(self.total)):
            made = nn.functional.linear(activations(bank, expert, states), bank.down_proj[expert]).double()
            self.outputs[expert] += gates[:, expert] @ made
            token, place = (chosen == expert).nonzero(as_tuple=True)
            self.total[expert] += (made[token].norm(dim=1) * weights[token, place].double()).sum()
            self.count[expert] += len(token)

    @property
    def saliency(self) -> list[float]:
        """Of experts that no token chose the least of the others', so that they can be merged."""
        values = self.total / self.count.clamp_min(1)
        used = values[values > 0]
        return [float(value) for value in torch.where(values > 0, values, used.min() if len(used) else 1.0)]

    @property
    def distance(self) -> Tensor:
        """1 - likeness, [E,E]."""
        unit = self.outputs / self.outputs.norm(dim=1, keepdim=True).clamp_min(1e-30)
        scale = self.gram.diagonal().clamp_min(1e-30).sqrt()
        apart = (2 - 2 * self.gram / (scale[:, None] * scale)).clamp_min(0).sqrt()
        apart.fill_diagonal_(0)
        return 1 - ((1 + unit @ unit.T) / 2 + 1 - apart / apart.max().clamp_min(1e-30)) / 2


def activations(bank: Any, expert: int, states: Tensor) -> Tensor:
    """What goes into an expert's down projection, [T,I]."""
    gate, up = nn.functional.linear(states, bank.gate_up_proj[expert]).chunk(2, dim=-1)
    found: Tensor = bank.act_fn(gate) * up
    return found


class Alike:
    """Inner products over all tokens of a leader's activations with its members', unit by unit."""

    def __init__(self, groups: Sequence[Sequence[int]], inner: int) -> None:
        self._groups = [group for group in groups if len(group) > 1]
        self.cross = {member: torch.zeros(inner, inner, dtype=torch.float64)
                      for group in self._groups for member in group[1:]}
        self.squares = {expert: torch.zeros(inner, dtype=torch.float64) for group in self._groups for expert in group}

    def add(self, bank: Any, states: Tensor) -> None:
        for group in self._groups:
            leader = activations(bank, group[0], states).double()
            self.squares[group[0]] += (leader ** 2).sum(0)
            for member in group[1:]:
                other = activations(bank, member, states).double()
                self.squares[member] += (other ** 2).sum(0)
                self.cross[member] += leader.T @ other

    def distance(self, leader: int, member: int) -> Tensor:
        """Of unit vectors, [I,I]; a unit that is never active is a zero vector."""
        one, two = self.squares[leader], self.squares[member]
        cosine = self.cross[member] / (one[:, None] * two).clamp_min(1e-60).sqrt()
        return ((one > 0).double()[:, None] + (two > 0).double() - 2 * cosine).clamp_min(0).sqrt()


def weight_distance(leader: Matrices, member: Matrices) -> Tensor:
    """Distances of hidden units by their gate rows, up rows and down columns, scaled to unit length together: [I,I]."""
    one, two = (torch.cat([item["gate_proj"], item["up_proj"], item["down_proj"].T], 1).double()
                for item in (leader, member))
    one, two = (value / value.norm(dim=1, keepdim=True).clamp_min(1e-30) for value in (one, two))
    return torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")


def merged_expert(source: Source, layer: MoeLayer, groups: Groups, group: Sequence[int]) -> Matrices:
    """The mean of a group's experts weighted by saliency."""
    first = source.matrices(layer.experts[group[0]])
    total = sum(groups.saliency[expert] for expert in group)
    made = {part: first[part].clone() for part in PARTS}
    for expert in group[1:]:
        other, order = source.matrices(layer.experts[expert]), groups.orders[expert]
        for part in PARTS:  # from the first: what equals it adds nothing, not even rounding
            fitted = other[part][:, order] if part == "down_proj" else other[part][order]
            made[part] += groups.saliency[expert] / total * (fitted - first[part])
    return made


class Result:
    """The merged model's tensors by name, each made when it is read; layers are decided one after another."""

    def __init__(self, source: Source, layers: Sequence[MoeLayer], count: int) -> None:
        self.source, self.layers, self.decided = source, {layer.number: layer for layer in layers}, dict[int, Groups]()
        self.routers = {item.name: (layer, item) for layer in layers for item in (layer.router, layer.bias)
                        if item is not None}
        self.experts = {name: (layer, place, part) for layer in layers for place in range(count)
                        for part, name in pruned_tensors(layer, place, place).items()}
        self._last: tuple[tuple[int, int], Matrices] | None = None

    def read(self, name: str) -> Tensor:
        if name in self.experts:
            layer, place, part = self.experts[name]
            return self.expert(layer, place)[part]
        if name in self.routers:
            layer, item = self.routers[name]
            return self.source.read(item)[self.leaders(layer)]
        return self.source.read(self.source.tensors[name])

    def leaders(self, layer: MoeLayer) -> list[int]:
        return [group[0] for group in self.decided[layer.number].members]

    def expert(self, layer: MoeLayer, place: int) -> Matrices:
        key = layer.number, place
        if self._last is None or self._last[0] != key:
            groups = self.decided[layer.number]
            self._last = key, merged_expert(self.source, layer, groups, groups.members[place])
        return self._last[1]

    def decoder(self, folder: Path, config: Mapping[str, Any]) -> Decoder:
        """The merged model, to be run layer by layer; ``folder`` gets its config."""
        write_text(folder / "config.json", json.dumps(dict(config)))
        first = next(iter(self.layers.values())).experts[0]
        tensors = {name: tensor for name, tensor in self.source.tensors.items()
                   if not is_expert(name) and not is_bank(name) and name not in self.routers}
        tensors |= {name: replace(first[part], name=name) for name, (_, _, part) in self.experts.items()}
        count = len(self.experts) // (len(PARTS) * len(self.layers))
        tensors |= {name: replace(item, shape=(count, *item.shape[1:])) for name, (_, item) in self.routers.items()}
        return Decoder(self.source.files.source, str(folder), tensors, self.read,
                       lambda name, rows: rows_of(self.source, name, rows), self.source.dtype)


def decide(recipe: Ream, source: Source, samples: Samples, layers: Sequence[MoeLayer], result: Result,
           config: Mapping[str, Any], scratch: Path) -> None:
    """Decide every layer's groups in ``result``, running the model on samples with one layer in memory."""
    whole, by_number = open_decoder(source), {layer.number: layer for layer in layers}
    with layer_states(source, samples, scratch) as run:
        after = result.decoder(scratch, config) if recipe.sequential else whole
        run.start(whole)
        if after is not whole:
            run.start(after)
        for number in range(max(by_number) + 1):
            stack = whole.load_layer(number)
            if number in by_number:
                result.decided[number] = _decide_layer(recipe, source, by_number[number], stack.mlp,
                                                       functools.partial(run.passes, whole, number))
            if after is not whole:
                whole.drop_layer(number)
                after.load_layer(number)
            run.advance(after, number)
            after.drop_layer(number)


def _decide_layer(recipe: Ream, source: Source, layer: MoeLayer, block: Any,
                  run: Callable[[], Iterator[Callable[[Tensor], Tensor]]]) -> Groups:
    inner, hidden = layer.sizes
    found = Statistics(len(layer.experts), hidden, torch.sigmoid if layer.bias is not None else lambda z: z.softmax(-1))
    logits: list[Tensor] = []
    real: list[Callable[[Tensor], Tensor]] = []

    def routed(_module: nn.Module, _inputs: Any, output: Any) -> None:
        logits[:] = [output[0] if isinstance(output, tuple) else output]

    def chosen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.add(module, *(real[0](item) for item in (inputs[0], logits[0], inputs[1], inputs[2])))

    with hooked([block.gate.register_forward_hook(routed), block.experts.register_forward_pre_hook(chosen)]):
        for mask in run():
            real[:] = [mask]
    saliency = found.saliency
    groups = pseudo_groups(saliency, found.distance.numpy(), recipe.kept(len(layer.experts)), recipe.group_size)
    alike = Alike(groups, inner)
    if recipe.align in ("both", "activations") and alike.cross:
        with hooked([block.experts.register_forward_pre_hook(
                lambda module, inputs: alike.add(module, real[0](inputs[0])))]):
            for mask in run():
                real[:] = [mask]
    orders: dict[int, Tensor] = {}
    for group in groups:
        leader = source.matrices(layer.experts[group[0]]) if len(group) > 1 else {}
        for member in group[1:]:
            cost = torch.zeros(inner, inner, dtype=torch.float64)
            if recipe.align in ("both", "activations"):
                cost += alike.distance(group[0], member)
            if recipe.align in ("both", "weights"):
                cost += weight_distance(leader, source.matrices(layer.experts[member]))
            orders[member] = torch.arange(inner) if recipe.align == "none" else torch.tensor(assign(-cost))
    return Groups(tuple(tuple(group) for group in groups), tuple(saliency), orders)


def plan_ream(recipe: Ream, source: Source, see: SeeGroups) -> Conversion:
    """The conversion, in the model's own architecture.

    Raises:
        InputError: as of `check_kept`; groups that cannot take all experts.
    """
    layers = moe_layers(source)
    count = len(layers[0].experts)
    kept = recipe.kept(count)
    check_kept(recipe.model, source, kept, count, recipe.experts_per_token, "groups")
    if kept * recipe.group_size < count:
        raise InputError(f"group_size: found {recipe.group_size}, but {kept} groups of so many hold fewer than the"
                         f" {count} experts of a layer; expected at least {-(-count // kept)}")
    result = Result(source, layers, kept)
    see(layers, result)
    units = [_unit(recipe, result, layer, place) for layer in layers for place in range(kept)]
    units += [_router(recipe, result, name) for name in result.routers]
    units += copied(source, lambda name: is_expert(name) or is_bank(name) or name in result.routers,
                    out_dtype=recipe.out_dtype)
    figures = {"groups": {str(number): [list(group) for group in item.members]
                          for number, item in result.decided.items()},
               "saliency": {str(number): list(item.saliency) for number, item in result.decided.items()}}
    return Conversion(kept_config(source, kept, recipe.experts_per_token), tuple(units), figures, False,
                      lambda record: f"{count} experts a layer, merged into {kept}.")


def _unit(recipe: Ream, result: Result, layer: MoeLayer, place: int) -> Unit:
    names = pruned_tensors(layer, place, place)
    pieces = tuple(OutputTensor(name, written_dtype(layer.experts[place][part], recipe.out_dtype),
                                layer.experts[place][part].shape) for part, name in names.items())
    return Unit(pieces, lambda: ({name: result.expert(layer, place)[part] for part, name in names.items()}, {}))


def _router(recipe: Ream, result: Result, name: str) -> Unit:
    layer, item = result.routers[name]
    piece = OutputTensor(name, written_dtype(item, recipe.out_dtype), (len(result.leaders(layer)), *item.shape[1:]))
    return Unit((piece,), lambda: ({name: result.source.read_as_stored(item)[result.leaders(layer)]}, {}))
