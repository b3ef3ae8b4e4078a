"""Light-PEFT in a run (arXiv 2406.03792): what a first stage watches and decides, and what the second starts from.

Before every update of the first stage masks get the penalty's gradient, and from the second half on the gradients of
probes (||dW x|| / ||W x||, summed over microbatches and copies) and of adapters (w times gradient) are counted. In the
end the decisions and the whole adapters go to a folder. The second stage reads the model's own weights, of which it
cuts what went, and saves a model of the old shape: adapters merged, zeros where something is gone.

Left out: counts are not in checkpoints; a first stage that resumes counts from there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import RunError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.recipes.adapters import DOWN, UP, AdapterConfig, is_adapter
from mipipe.graphs.recipes.importance import MASK, PROBE, add_penalty, is_light
from mipipe.graphs.recipes.lightening import Cuts, KeptUnits, choose_kept, cut, cuts_of, uncut
from mipipe.graphs.recipes.source import KEPT, STAGE, recipe_of
from mipipe.graphs.serialize import from_data, save, to_data
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.ranks.processes import rank
from mipipe.runtime.recipes.whole import from_parts, whole_tensors
from mipipe.runtime.train.config import GroupConfig, TrainConfig

RATES = {"o_proj": 100.0, "down_proj": 50.0}
"""How much faster masks learn than the rest: those of heads, and of feed-forward units (arXiv 2406.03792)."""


def mask_groups(lr: float) -> tuple[GroupConfig, ...]:
    """The optimizer's groups of the masks, which no weight decay pulls."""
    return tuple(GroupConfig(rf"{layer}\.{MASK}$", {"lr": lr * factor, "weight_decay": 0.0})
                 for layer, factor in RATES.items())


class Lightening:
    """What a rank of a first stage does before every update and at the end."""

    def __init__(self, engine: Engine, adapters: AdapterConfig, steps: int) -> None:
        assert adapters.light is not None
        self._engine, self._light, self._steps = engine, adapters.light, steps
        self._counted = 0
        self._sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_update(self) -> None:
        """Count this step's gradients, take those of the probes away, and add the penalty's to those of the masks."""
        named = self._engine.named_parameters()
        count = self._engine.steps_done >= self._steps // 2
        self._counted += count
        for name, item in named:
            part = name.rpartition(".")[2]
            if item.grad is None or part not in (PROBE, DOWN, UP):
                continue
            if count:
                seen = item.grad if part == PROBE else item * item.grad
                held = self._sums.setdefault(name, torch.zeros_like(seen, dtype=torch.float64))
                held.add_(seen)
            if part == PROBE:
                item.grad.zero_()
        add_penalty(named, self._light.penalty)

    def write(self, config: TrainConfig, module: nn.Module) -> None:
        """Decide, and leave decisions and adapters in the folder. All ranks must call. ``module``: this stage's model,
        on the meta device.

        Raises:
            RunError: no step was counted, as the run resumed at its end.
        """
        from safetensors.torch import save_file

        whole = whole_tensors(self._engine, lambda name: is_adapter(name) or is_light(name), first_only=True)
        sums = from_parts(self._engine, self._sums, first_only=True)
        if not self._counted:
            raise RunError("light-peft: the first stage resumed after its last step, so nothing was counted; remove its"
                           f" checkpoints in {config.checkpoint and config.checkpoint.folder}, and start it anew")
        if rank():
            return
        for name, item in whole.items():
            if name.endswith(f".{MASK}"):
                setattr(module.get_submodule(name.rpartition(".")[0]), MASK, nn.Parameter(item))
        light, folder = self._light, Path(self._light.folder)
        kept = choose_kept(module, Counts(sums, self._counted * self._engine.plan.problem.num_microbatches
                                          * self._engine.mesh.num_copies, self._counted),
                           heads=light.heads, units=light.units, modules=light.modules, ranks=light.ranks,
                           multiple=light.multiple)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: item.contiguous() for name, item in whole.items() if is_adapter(name)}, folder / STAGE)
        save(kept, folder / KEPT)


class Counts:
    """The importance of adapters, from sums over ``batches`` microbatches and ``steps`` steps."""

    def __init__(self, sums: Mapping[str, Tensor], batches: int, steps: int) -> None:
        self._sums, self._batches, self._steps = sums, batches, steps

    def modules(self) -> dict[str, float]:
        return {name.rpartition(".")[0]: float(item) / self._batches for name, item in self._sums.items()
                if name.endswith(f".{PROBE}")}

    def ranks(self) -> dict[str, Tensor]:
        found = {}
        for name in self.modules():
            down, up = (self._sums[f"{name}.{part}"].abs() / self._steps for part in (DOWN, UP))
            found[name] = down.sum(1) + up.sum(0)
        return found


def first_stage(graph: OperatorGraph) -> OperatorGraph:
    """The graph's record as that of the first stage: the whole model with adapters, masks and probes."""
    recipe = recipe_of(graph)
    assert recipe.adapters is not None and recipe.adapters.light is not None
    adapters = dataclasses.replace(recipe.adapters, light=dataclasses.replace(recipe.adapters.light, second=False))
    source = {name: item for name, item in graph.source.items() if name != "light_kept"}
    return dataclasses.replace(graph, source={**source, "recipe": to_data(dataclasses.replace(recipe,
                                                                                            adapters=adapters))})


def is_second(graph: OperatorGraph) -> bool:
    """Whether a graph is of a second stage."""
    return "light_kept" in graph.source


def cuts_in(graph: OperatorGraph, module: nn.Module) -> Cuts:
    """What stays of the first stage's tensors; ``module`` is its model."""
    return cuts_of(module, from_data(dict(graph.source["light_kept"]), KeptUnits, "graph, light_kept"))


class CutWeights(Mapping[str, Tensor]):
    """What a second stage starts from: the weights of the first, its adapters as it left them, and what stays of
    both."""

    def __init__(self, base: Mapping[str, Tensor], folder: Path, cuts: Cuts) -> None:
        from safetensors.torch import load_file
        self.base, self._adapters, self._cuts = base, load_file(folder / STAGE), cuts

    def __getitem__(self, name: str) -> Tensor:
        whole = self._adapters[name] if name in self._adapters else self.base[name]
        return cut(whole, self._cuts[name]) if name in self._cuts else whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)


def merged(engine: Engine, module: nn.Module, whole: nn.Module, adapters: AdapterConfig) \
        -> Callable[[str, Tensor], Tensor]:
    """(name, weight) -> the weight with its adapter, in the shape that it has in ``whole``. ``module``: the first
    stage's model. All ranks must call."""
    parts, cuts = whole_tensors(engine, is_adapter), cuts_in(engine.graph, module)
    shapes = {name: tuple(item.shape) for name, item in whole.state_dict().items()}

    def fused(name: str, weight: Tensor) -> Tensor:
        weight, layer = weight.detach(), name.rpartition(".")[0]
        if name.endswith(".weight") and f"{layer}.{DOWN}" in parts:
            down, up = (parts[f"{layer}.{part}"].to(weight.device) for part in (DOWN, UP))
            weight = weight + adapters.scale * (up @ down).to(weight.dtype)
        return uncut(weight, shapes[name], cuts[name]) if name in cuts else weight

    return fused
