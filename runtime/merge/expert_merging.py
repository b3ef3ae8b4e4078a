"""Expert Merging (arXiv 2509.25712): coefficients for every tensor, learned so that the merged model answers as each
expert.

For a mergeable tensor ``theta = theta_0 + sum_k alpha_k tau_k`` with ``alpha = sigmoid(u)``; only ``u`` is trained, on
a few samples of each expert's data with the expert as teacher. A sample's loss is ``w_h`` times the mean squared
distance of all layers' outputs, plus ``Tm^2`` times the cross-entropy of the merged model's distribution under the
expert's, plus ``gamma`` times the mean distance of the coefficients from where they began.

Expert Merging++ (``budget`` above 0) then gives important tensors several coefficients, one for each of their
contiguous parts, unimportant ones none, and trains again.

All models are in memory at once, in the compute dtype; the merge itself is planned and streamed as any.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.merging.graph import MergeGraph
from mipipe.graphs.serialize import digest, write_text
from mipipe.runtime.calibration.decoder import Decoder
from mipipe.runtime.calibration.tokens import Samples
from mipipe.runtime.merge.methods.directed import merged_tensor

METHOD = "expert_merging"
RESTART, GROWTH, FLOOR = 50, 2, 0.1
"""The learning rate's cosine begins anew after so many steps, each time so much longer, and falls to this share."""
DECAY, CLIP = 1e-5, 1.0


@dataclass(frozen=True)
class Teacher:
    """What an expert says about one sample: its layers' outputs ``[layers, length, hidden]`` and logits."""

    ids: Tensor
    states: Tensor
    logits: Tensor


def chunk_counts(importance: Sequence[float], budget: float, kappa: float) -> list[int]:
    """``floor(B I^kappa / sum I^kappa)`` coefficients for each tensor."""
    powers = [value ** kappa for value in importance]
    total = sum(powers)
    return [math.floor(budget * power / total + 1e-9) if total > 0 else 0 for power in powers]


class Fit:
    """Training the coefficients. ``values`` are recipe parameters; models are state dicts by the decoder's own
    names."""

    def __init__(self, decoder: Decoder, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]],
                 teachers: Sequence[Sequence[Teacher]], values: Mapping[str, Any], seed: int) -> None:
        self._decoder, self._base, self._teachers, self._values, self._seed = decoder, base, teachers, values, seed
        pattern = re.compile(values["exclude"]) if values["exclude"] else None
        self.names = [name for name, value in base.items() if value.is_floating_point() and decoder.parts(name)
                      and not (pattern is not None and pattern.search(name))]
        if not self.names:
            raise InputError(f"{METHOD}: exclude: {values['exclude']!r} leaves no tensor to be merged")
        if decoder.tied and any(decoder.table in decoder.parts(name) for name in self.names):
            raise InputError(f"{METHOD}: exclude: the token table is also the head and cannot have a coefficient;"
                             f" leave it"
                             " excluded (embed)")
        self._deltas = {name: [expert[name] - base[name] for expert in experts] for name in self.names}
        self._start = math.log(values["start"] / (1 - values["start"]))
        self.losses: list[float] = []

    def run(self, counts: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """Coefficients ``[models, parts]`` of every mergeable tensor; of one with no part, where it began."""
        models = len(self._teachers)
        free = {name: torch.full((models, max(1, 1 if counts is None else counts[name])), self._start,
                                 dtype=torch.float64, requires_grad=counts is None or counts[name] > 0)
                for name in self.names}
        trained = [value for value in free.values() if value.requires_grad]
        values = self._values
        if trained:
            rate = float(values["learning_rate"])
            optimizer = torch.optim.AdamW(trained, rate, weight_decay=DECAY)
            schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, RESTART, GROWTH, FLOOR * rate)
            order = self._order()
            for start in range(0, len(order), values["accumulate"]):
                group = order[start:start + values["accumulate"]]
                optimizer.zero_grad()
                for expert, sample in group:
                    loss = self.loss(free, expert, sample) / len(group)
                    loss.backward()
                    self.losses.append(float(loss.detach()) * len(group))
                torch.nn.utils.clip_grad_norm_(trained, CLIP)
                optimizer.step()
                schedule.step()
        return {name: torch.sigmoid(value.detach()) for name, value in free.items()}

    def _order(self) -> list[tuple[int, int]]:
        """Samples in turn over the experts, each epoch in an order of its own."""
        generator = torch.Generator().manual_seed(self._seed)
        most, found = max(map(len, self._teachers)), []
        for _ in range(self._values["epochs"]):
            rows = [torch.randperm(len(items), generator=generator).tolist() for items in self._teachers]
            found += [(expert, row[place % len(row)]) for place in range(most) for expert, row in enumerate(rows)]
        return found

    def loss(self, free: Mapping[str, Tensor], expert: int, sample: int) -> Tensor:
        """A sample's loss, with gradients to the coefficients only."""
        values, teacher = self._values, self._teachers[expert][sample]
        alphas = {name: torch.sigmoid(value) for name, value in free.items()}
        weights = dict(self._base) | {name: merged_tensor(self._base[name], self._deltas[name],
                                                          alphas[name].to(self._base[name].dtype))
                                      for name in self.names}
        states, logits = answers(self._decoder, weights, teacher.ids)
        temperature = values["temperature"]
        hidden = ((states.float() - teacher.states.float()) ** 2).mean((1, 2)).mean()
        wanted = torch.softmax(teacher.logits.float() / temperature, -1)
        word = -(wanted * torch.log_softmax(logits.float() / temperature, -1)).sum(-1).mean() * temperature ** 2
        away = torch.stack([(value - values["start"]).abs().mean(1).sum() for value in alphas.values()]).sum()
        return values["hidden"] * hidden + word + values["gamma"] * away / len(alphas)

    def importance(self, alphas: Mapping[str, Tensor]) -> list[float]:
        """``sum_k |alpha_k| mean|tau_k| n`` of every tensor, as shares."""
        found = [sum(float(alphas[name][number].mean().abs() * delta.abs().sum())
                     for number, delta in enumerate(self._deltas[name])) for name in self.names]
        total = sum(found)
        return [value / total if total > 0 else 0.0 for value in found]


def answers(decoder: Decoder, weights: Mapping[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
    """All layers' outputs ``[layers, length, hidden]`` and logits ``[length, vocabulary]`` of a model with these
    weights."""
    found = torch.func.functional_call(decoder.model, dict(weights), (), {
        "input_ids": ids[None], "use_cache": False, "output_hidden_states": True})
    return torch.cat(found.hidden_states[1:]), found.logits[0]


def whole_state(decoder: Decoder) -> dict[str, Tensor]:
    """All weights of a model by its own names."""
    decoder.load_all()
    return {name: value.detach() for name, value in decoder.model.state_dict().items()}


def learn(graph: MergeGraph, decoders: Sequence[Decoder], samples: Sequence[Samples], values: Mapping[str, Any],
          folder: Path) -> MergeGraph:
    """The graph with learned coefficients in its units; ``decoders`` are of the base and the experts.

    ``folder`` keeps them for the same merge when it runs again.
    """
    seal = digest(dataclasses.replace(graph, units=())) + "-" + "-".join(item.digest for item in samples) + "-" + \
        "-".join(f"{key}={value}" for key, value in sorted(values.items()))
    file = folder / "coefficients.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    if kept.get("seal") != seal:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the coefficients shall not depend on how many there are
        try:
            kept = {"seal": seal, "alphas": _learned(graph, decoders, samples, values)}
        finally:
            torch.set_num_threads(threads)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(kept))
    none = [[0.0]] * len(samples)
    units = tuple(dataclasses.replace(unit, parameters={**unit.parameters,
                                                        "coefficients": kept["alphas"].get(unit.name, none)})
                  if unit.method == METHOD else unit for unit in graph.units)
    return dataclasses.replace(graph, units=units)


def _learned(graph: MergeGraph, decoders: Sequence[Decoder], samples: Sequence[Samples],
             values: Mapping[str, Any]) -> dict[str, list[list[float]]]:
    states = [whole_state(decoder) for decoder in decoders]
    teachers = []
    with torch.no_grad():
        for state, found in zip(states[1:], samples, strict=True):
            rows = [torch.from_numpy(row[:length]).long()
                    for row, length in zip(found.ids, found.lengths.tolist(), strict=True)]
            teachers.append([Teacher(ids, *answers(decoders[0], state, ids)) for ids in rows])
    with torch.enable_grad():
        fit = Fit(decoders[0], states[0], states[1:], teachers, values, graph.seed)
        alphas = fit.run()
        if values["budget"] > 0:
            counts = chunk_counts(fit.importance(alphas), values["budget"] * len(fit.names), values["kappa"])
            alphas = fit.run(dict(zip(fit.names, counts, strict=True)))
    found_alphas: dict[str, list[list[float]]] = {}
    for own, value in alphas.items():
        for name in decoders[0].parts(own):
            found_alphas[name] = value.tolist() if decoders[0].stored(own) is not None else \
                value.mean(1, keepdim=True).tolist()
    return found_alphas
