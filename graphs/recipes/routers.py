"""Losses of routers by name, and routers that do not train.

- balance: the load-balancing loss that the model's class computes (Switch Transformers, arXiv 2101.03961);
- z: the mean over layers and tokens of logsumexp(router logits)^2 (ST-MoE, arXiv 2202.08906).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.serialize import STRICT


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Of a MoE model: coefficients of the balance and z-losses (None: the model's own balance loss, if it has one), and
    whether routers are frozen."""

    __pydantic_config__: ClassVar = STRICT
    balance: float | None = None
    z: float = 0.0
    freeze: bool = False

    def __post_init__(self) -> None:
        for name, value in (("balance", self.balance or 0.0), ("z", self.z)):
            if not 0 <= value < math.inf:
                raise InputError(f"router: {name}: found {value}, expected a coefficient of at least 0")
        if self.balance is None and not self.z and not self.freeze:
            raise InputError("router: says nothing; give balance, z or freeze, or leave it out")


def routers_of(model: nn.Module) -> list[Any]:
    """The routers of a MoE model: modules beside experts, with weights [experts, hidden] that give logits.

    Raises:
        InputError: it has none.
    """
    found = [part for part in model.modules() if type(part).__name__.endswith("Router")
             and isinstance(getattr(part, "weight", None), nn.Parameter)]
    if not found:
        raise InputError(f"router: {type(model).__name__} has no routers with weights [experts, hidden]")
    return found


def freeze_routers(model: nn.Module) -> None:
    """Switch the gradients of all routers' parameters off."""
    for part in routers_of(model):
        part.requires_grad_(False)


def with_z_loss(model: nn.Module) -> None:
    """Let a model's outputs have a ``z_loss``; the logits are computed once more."""
    terms: list[Tensor] = []
    for part in routers_of(model):
        part.forward = _recording(part, part.forward, terms)
    forward = model.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        terms.clear()
        output = forward(*args, **kwargs)
        output.z_loss = torch.stack(terms).mean()
        terms.clear()
        return output

    model.forward = run


def _recording(part: Any, forward: Callable[..., Any], terms: list[Tensor]) -> Callable[..., Any]:
    def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), part.weight)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        terms.append(wide.logsumexp(-1).square().mean())
        return forward(hidden, *args, **kwargs)

    return run
