"""Adapters put onto a model's linear layers, whose names and classes' code stay: LoRA, DoRA and BeamLoRA.

A layer keeps its ``weight`` and gets ``lora_A`` [r,in] and ``lora_B`` [out,r] beside it (DoRA: ``lora_magnitude``
[out]; BeamLoRA: ``lora_gate`` [r]); all else of the model is frozen. So what reads a model's weights by their names
still does.

- LoRA (arXiv 2106.09685): W x + s B A x with s = alpha / r.
- DoRA (arXiv 2402.09353): the rows of W + s B A get the norms ``lora_magnitude``; the norms they had are constants of
  the backward.
- BeamLoRA (arXiv 2502.13604): s B ((A x) * r softmax(gate / tau)).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError, shown
from mipipe.graphs.expressions import check_expression, search
from mipipe.graphs.serialize import STRICT

DOWN, UP, GATE, MAGNITUDE = "lora_A", "lora_B", "lora_gate", "lora_magnitude"
PARTS = (DOWN, UP, GATE, MAGNITUDE)


@dataclass(frozen=True, slots=True)
class LightConfig:
    """Light-PEFT (arXiv 2406.03792) in a run: after ``steps`` steps with masks on heads and feed-forward units, these
    shares of heads (of every layer), units, adapters and ranks (of all) go, and the rest of the run trains what is left
    of the model, captured and planned anew.

    ``folder``: what the first stage leaves, its decisions and adapters. ``penalty``: the weight of sum |mask|.
    ``multiple``: a layer keeps a multiple of so many units. ``second``: this graph, or run, is of the second stage.
    """

    __pydantic_config__: ClassVar = STRICT
    steps: int
    folder: str
    heads: float = 1 / 3
    units: float = 1 / 3
    modules: float = 0.75
    ranks: float = 0.5
    penalty: float = 1e-4
    multiple: int = 1
    second: bool = False

    def __post_init__(self) -> None:
        for name in ("heads", "units", "modules", "ranks"):
            share = getattr(self, name)
            if not 0 <= share < 1:
                raise InputError(f"adapters: light: {name}: found {share}, expected a share from 0 to below 1")
        if self.steps < 2 or self.penalty < 0 or self.multiple < 1:
            raise InputError(f"adapters: light: steps {self.steps}, penalty {self.penalty}, multiple {self.multiple};"
                             " expected at least 2 steps (the second half is watched), a penalty of at least 0, and a"
                             " multiple of at least 1")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Adapters of rank ``rank`` on the linear layers that ``targets`` names: a list of last names (``q_proj``), or
    ``re:`` and a regular expression on whole names.

    ``alpha``: None for the rank (BeamLoRA: twice the rank). ``tau``: temperature of BeamLoRA's gates. Every ``period``
    steps it prunes and grows ranks (0: never); the share of scores kept rises from ``keep`` to 1 over the run.
    ``light-peft`` is LoRA with a first stage that says what goes (`LightConfig`).
    """

    __pydantic_config__: ClassVar = STRICT
    targets: str | tuple[str, ...]
    method: Literal["lora", "dora", "beamlora", "light-peft"] = "lora"
    rank: int = 16
    alpha: float | None = None
    tau: float = 0.05
    period: int = 0
    keep: float = 0.95
    light: LightConfig | None = None

    def __post_init__(self) -> None:
        if (self.light is not None) != (self.method == "light-peft"):
            raise InputError("adapters: light goes with the method light-peft, which needs it: {steps: 100, folder:"
                             f" light}}; found method {self.method}" + (" with light" if self.light else " alone"))
        if self.rank < 1 or (self.alpha is not None and not self.alpha > 0) or not self.tau > 0:
            raise InputError(f"adapters: rank {self.rank}, alpha {self.alpha}, tau {self.tau}; expected a rank of at"
                             " least 1, and alpha and tau above 0")
        if self.period < 0 or self.period % 2 or not 0 < self.keep <= 1:
            raise InputError(f"adapters: period {self.period}, keep {self.keep}; expected an even number of steps (its"
                             " half is when states are kept), and keep above 0, at most 1")
        if self.period and self.method != "beamlora":
            raise InputError(f"adapters: period goes with beamlora, not {self.method}; leave it out")
        if isinstance(self.targets, str):
            if not self.targets.startswith("re:"):
                raise InputError(f"adapters: targets: found {shown(self.targets)}, expected a list of names such as"
                                 " [q_proj, v_proj], or re: and a regular expression")
            check_expression(self.expression, "adapters: targets")

    @property
    def expression(self) -> str:
        """The regular expression of the targets."""
        if isinstance(self.targets, str):
            return self.targets.removeprefix("re:")
        return rf"(^|\.)({'|'.join(map(re.escape, self.targets))})$"

    @property
    def scale(self) -> float:
        """s = alpha / r."""
        return self.lora_alpha / self.rank

    @property
    def lora_alpha(self) -> float:
        return self.alpha if self.alpha is not None else float(self.rank * (2 if self.method == "beamlora" else 1))


class AdaptedLinear(nn.Linear):
    """A linear layer with an adapter; made of a plain one by `adapt`."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_gate: nn.Parameter
    lora_magnitude: nn.Parameter
    config: AdapterConfig

    def forward(self, x: Tensor) -> Tensor:
        config = self.config
        inner = nn.functional.linear(x, self.lora_A)
        if config.method == "beamlora":
            inner = inner * scores(self.lora_gate, config.tau)
        added = nn.functional.linear(inner, self.lora_B) * config.scale
        if config.method != "dora":
            return super().forward(x) + added
        norm = torch.linalg.vector_norm((self.weight + config.scale * self.lora_B @ self.lora_A).detach(), dim=1)
        made = (nn.functional.linear(x, self.weight) + added) * (self.lora_magnitude / norm)
        return made if self.bias is None else made + self.bias


def scores(gate: Tensor, tau: float) -> Tensor:
    """The score of every rank, softmax(gate / tau) r [r]; they sum to r."""
    return torch.softmax(gate / tau, dim=-1) * gate.shape[-1]


def adapt(module: nn.Module, config: AdapterConfig, seed: int = 0) -> nn.Module:
    """The module, changed: an adapter on every target, everything else frozen; ``seed`` as in `initial`.

    Raises:
        InputError: the targets name no layer, or one that is not linear.
    """
    found = [(name, child) for name, child in module.named_modules() if name and search(config.expression, name)]
    chosen = [(name, child) for name, child in found if type(child) is nn.Linear]
    if not chosen:
        kinds = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name, child in module.named_modules()
                                        if type(child) is nn.Linear))
        what = f"names {found[0][0]}, a {type(found[0][1]).__name__}" if found else "matches no module of the model"
        raise InputError(f"adapters: targets: {shown(config.targets)} {what}; its linear layers are {kinds or 'none'}")
    module.requires_grad_(False)
    for _, child in chosen:
        sizes = adapter_sizes(config, child.in_features, child.out_features)
        child.__class__ = AdaptedLinear
        child.config = config  # type: ignore[assignment]
        for part, size in sizes.items():
            made = torch.zeros(size, dtype=child.weight.dtype, device=child.weight.device)
            child.register_parameter(part, nn.Parameter(made))
    if not any(item.is_meta for item in module.parameters()):
        weights = dict(module.named_parameters())
        with torch.no_grad():
            for name, item in weights.items():
                if is_adapter(name):
                    item.copy_(initial(name, item, config, seed, weights.__getitem__))
    return module


def adapter_sizes(config: AdapterConfig, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's parts."""
    made: dict[str, tuple[int, ...]] = {DOWN: (config.rank, inputs), UP: (outputs, config.rank)}
    if config.method == "beamlora":
        made[GATE] = (config.rank,)
    if config.method == "dora":
        made[MAGNITUDE] = (outputs,)
    return made


def is_adapter(name: str) -> bool:
    """Whether a parameter is part of an adapter."""
    return name.rpartition(".")[2] in PARTS


def initial(name: str, like: Tensor, config: AdapterConfig, seed: int, read: Callable[[str], Tensor]) -> Tensor:
    """What a part of an adapter starts with: A as PEFT draws it (uniform within 1/sqrt(in)), from the seed and the
    name; B and gates zero; DoRA's magnitudes the norms of the weight's rows, which ``read`` gives."""
    layer, _, part = name.rpartition(".")
    if part == DOWN:
        draw = torch.Generator().manual_seed(zlib.crc32(name.encode()) + (seed << 32))
        bound = 1.0 / math.sqrt(like.shape[1])
        return ((torch.rand(like.shape, dtype=torch.float64, generator=draw) * 2 - 1) * bound).to(like.dtype)
    if part == MAGNITUDE:
        return torch.linalg.vector_norm(read(f"{layer}.weight"), dim=1).to(like.dtype)
    return torch.zeros(like.shape, dtype=like.dtype)


def peft_config(config: AdapterConfig, targets: list[str], base: str) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT reads it; ``targets`` are whole names of layers."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": config.rank,
            "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
            "use_dora": config.method == "dora", "use_rslora": False, "init_lora_weights": True,
            "inference_mode": True, "modules_to_save": None, "target_modules": targets}


def peft_tensors(tensors: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names; BeamLoRA's scores are folded into A."""
    made = {}
    for name, item in tensors.items():
        layer, _, part = name.rpartition(".")
        if part == GATE:
            continue
        if part == DOWN and f"{layer}.{GATE}" in tensors:
            item = scores(tensors[f"{layer}.{GATE}"], config.tau)[:, None] * item
        last = "lora_magnitude_vector" if part == MAGNITUDE else f"{part}.weight"
        made[f"base_model.model.{layer}.{last}"] = item.contiguous()
    return made
