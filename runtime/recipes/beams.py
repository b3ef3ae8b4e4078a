"""BeamLoRA (arXiv 2502.13604): ranks of adapters scored, the weak pruned and grown again from what strong ones were.

Every ``period`` steps, but for the last: the scores of all layers are sorted, and ranks beyond the share p of their sum
are pruned; in its layer a pruned rank takes the A row, the B column and AdamW's moments that a strong rank had half a
period before, and both get the mean of their gates. p rises from ``keep`` to 1 by the cosine over the run. Layers may
lie on different ranks of a plan, so scores are gathered, and pairs are drawn from the seed and the step, alike on all.

Left out: sharded optimizer state and teams, which are refused; the state of half a period before is not in
checkpoints, so a run resumed after it grows nothing at the end of that period.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.graphs.errors import InputError
from mipipe.graphs.recipes.adapters import DOWN, GATE, UP, AdapterConfig, scores
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import gather


def kept_share(step: int, steps: int, keep: float) -> float:
    """p after ``step`` of ``steps``: 1 - (1 - keep) cos(pi/2 step / steps), from ``keep`` to 1."""
    return 1.0 - (1.0 - keep) * math.cos(0.5 * math.pi * min(1.0, step / steps))


def pruned(found: Mapping[str, Sequence[float]], share: float) -> dict[str, list[int]]:
    """The ranks to prune in each layer: from where the cumulative sum of all sorted scores exceeds its share."""
    flat = sorted(((score, layer, place) for layer, row in found.items() for place, score in enumerate(row)),
                  key=lambda item: (-item[0], item[1], item[2]))
    limit, total = share * sum(len(row) for row in found.values()), 0.0
    chosen: dict[str, list[int]] = {layer: [] for layer in found}
    for score, layer, place in flat:
        total += score
        if total > limit:
            chosen[layer].append(place)
    return {layer: sorted(places) for layer, places in chosen.items()}


def pairs(row: Sequence[float], weak: Sequence[int], generator: torch.Generator) -> list[tuple[int, int]]:
    """(pruned rank, its strong partner): the best unpruned ranks in random order; no more pairs than there are."""
    strong = sorted((place for place in range(len(row)) if place not in weak), key=lambda place: -row[place])
    strong, weak = strong[:len(weak)], list(weak)[:len(strong)]
    order = torch.randperm(len(strong), generator=generator).tolist()
    return [(place, strong[number]) for place, number in zip(weak, order, strict=True)]


class Beams:
    """What a rank of a run does for its adapters after every step."""

    def __init__(self, engine: Engine, config: AdapterConfig, optimizer: torch.optim.Optimizer | None, steps: int,
                 seed: int) -> None:
        divided = any(name in engine.compiled.divisions for name, _ in engine.named_parameters())
        if hasattr(optimizer, "optim") or divided:
            raise InputError("adapters: ranks that grow (period) move whole ones and their optimizer state, which does"
                             " not go with teams or optimizer.shard; leave period out, or plan without them")
        self._config, self._optimizer, self._steps, self._seed = config, optimizer, steps, seed
        named = dict(engine.named_parameters())
        self._layers = {name.rpartition(".")[0]: {part: named[f"{name.rpartition('.')[0]}.{part}"]
                                                  for part in (DOWN, UP, GATE)}
                        for name in named if name.endswith(f".{GATE}")}
        self._before: dict[str, dict[str, Tensor]] = {}

    def after(self, done: int) -> int:
        """Keep states, or prune and grow, after ``done`` steps; how many ranks were grown here. All ranks must call."""
        period = self._config.period
        if not period or done > self._steps - period:
            return 0
        if done % period == period // 2:
            self._before = {layer: self._state(parts) for layer, parts in self._layers.items()}
        if done % period or not done:
            return 0
        own = {layer: scores(parts[GATE].detach().double(), self._config.tau).tolist()
               for layer, parts in self._layers.items()}
        every: dict[str, list[float]] = {}
        for part in gather(own):
            every.update(part)
        weak = pruned(every, kept_share(done, self._steps, self._config.keep))
        draw = torch.Generator().manual_seed((self._seed << 32) + done)
        chosen = {layer: pairs(every[layer], weak[layer], draw) for layer in sorted(every)}
        for layer, parts in self._layers.items():
            if layer in self._before:
                self._grow(parts, self._before[layer], chosen[layer])
        return sum(len(chosen[layer]) for layer in self._layers)

    def _state(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A and B and their moments, copied."""
        return {key: item.detach().clone() for key, item in self._tensors(parts).items()}

    def _tensors(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in (DOWN, UP):
            found[part] = parts[part]
            held: Any = self._optimizer.state.get(parts[part], {}) if self._optimizer is not None else {}
            found.update({f"{part}.{key}": item for key, item in held.items()
                          if isinstance(item, Tensor) and item.shape == parts[part].shape})
        return found

    @torch.no_grad()
    def _grow(self, parts: Mapping[str, Tensor], before: Mapping[str, Tensor], chosen: list[tuple[int, int]]) -> None:
        """Pruned ranks take what their partners were; both get the mean gate, without moments."""
        for weak, strong in chosen:
            for key, item in self._tensors(parts).items():
                if key not in before:
                    continue
                if key.startswith(DOWN):
                    item[weak] = before[key][strong]
                else:
                    item[:, weak] = before[key][:, strong]
            gate = parts[GATE]
            gate[weak] = gate[strong] = (gate[weak] + gate[strong]) / 2
        if chosen and self._optimizer is not None:
            for item in self._optimizer.state.get(parts[GATE], {}).values():
                if isinstance(item, Tensor) and item.shape == parts[GATE].shape:
                    item.zero_()
