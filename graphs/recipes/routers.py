"""Losses of routers by name, and routers that do not train.

- balance: the load-balancing loss that the model's class computes (Switch Transformers, arXiv 2101.03961);
- z: the mean over layers and tokens of logsumexp(router logits)^2 (ST-MoE, arXiv 2202.08906).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from mipipe.graphs.errors import InputError
from mipipe.graphs.operators.routers import routers_of, with_router_loss
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


def freeze_routers(model: nn.Module) -> None:
    """Switch the gradients of all routers' parameters off.

    Raises:
        GraphError: it has none.
    """
    for part in routers_of(model, "router.freeze"):
        part.requires_grad_(False)


def with_z_loss(model: nn.Module) -> None:
    """Let a model's outputs have a ``z_loss``; raises as `freeze_routers`."""
    with_router_loss(model, "z_loss", lambda logits: logits.logsumexp(-1).square())
