"""REG and Muon: momentum, then a matrix as a whole decides its update; AdamW for what is no matrix.

A group with ``matrix: false`` (vectors, embeddings and heads by default) is AdamW's, with torch's own arithmetic. A
bank of experts [E,m,n] is E matrices; a convolution's kernel is a matrix with one row for each output channel.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mipipe.runtime.recipes.matrices import ParameterShard, equilibrate, orthogonalise, whole_sizes, with_rms

SHARD, BANK = "mipipe_shard", "mipipe_bank"
"""Attributes of a parameter: how it lies on several ranks (`ParameterShard`), and whether its first dimension counts
experts."""


class MatrixOptimizer(torch.optim.Optimizer, abc.ABC):
    """Decoupled weight decay, momentum M = beta M + G, and an update of M's shape from `update`.

    ``nesterov``: the update is made of G + beta M. ``betas`` and ``eps`` are AdamW's, for groups without ``matrix``.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.95, nesterov: bool = False,
                 weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 **more: Any) -> None:
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}: expected lr >= 0, momentum"
                             " from 0 to below 1, weight_decay >= 0")
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
                                  "betas": tuple(betas), "eps": eps, "matrix": None, **more})

    @abc.abstractmethod
    def update(self, matrix: Tensor, shard: ParameterShard | None, group: Mapping[str, Any]) -> Tensor:
        """The step for momentum ``matrix``, before the learning rate."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of all groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members = [item for item in group["params"] if item.grad is not None]
            chosen = [item for item in members if _is_matrix(item, group)]
            for item in chosen:
                self._step_matrix(item, group)
            rest = [item for item in members if not _is_matrix(item, group)]
            if rest:
                self._step_rest(rest, group)
        return loss

    def _step_matrix(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(group["momentum"]).add_(gradient)
        used = gradient + group["momentum"] * momentum if group["nesterov"] else momentum
        bank = bool(getattr(parameter, BANK, False))
        matrix = used if parameter.dim() == 2 or bank else used.flatten(1)
        made = self.update(matrix, _in_matrix(parameter), group).reshape(parameter.shape)
        parameter.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(made, alpha=-group["lr"])

    def _step_rest(self, parameters: list[nn.Parameter], group: Mapping[str, Any]) -> None:
        for item in parameters:
            if "exp_avg" not in self.state[item]:
                self.state[item].update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(item),
                                        exp_avg_sq=torch.zeros_like(item))
        states = [self.state[item] for item in parameters]
        gradients = [item.grad for item in parameters if item.grad is not None]
        adamw(list[Tensor](parameters), gradients, [item["exp_avg"] for item in states],
              [item["exp_avg_sq"] for item in states], [], [item["step"] for item in states], amsgrad=False,
              beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
              eps=group["eps"], maximize=False)


class Reg(MatrixOptimizer):
    """REG (arXiv 2510.03691): the momentum, its rows and columns divided by the roots of their norms, with a root mean
    square of ``kappa``, so that AdamW's learning rates carry over."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, kappa: float = 0.2, power: float = 2.0, passes: int = 1,
                 sequential: bool = False, **options: Any) -> None:
        if kappa <= 0 or power < 1 or passes < 1:
            raise ValueError(f"kappa {kappa}, power {power}, passes {passes}: expected kappa above 0, power and passes"
                             " of at least 1")
        super().__init__(params, lr, kappa=kappa, power=power, passes=passes, sequential=sequential, **options)

    def update(self, matrix: Tensor, shard: ParameterShard | None, group: Mapping[str, Any]) -> Tensor:
        made = equilibrate(matrix, shard, power=group["power"], passes=group["passes"], sequential=group["sequential"])
        return with_rms(made, group["kappa"], shard)


class Muon(MatrixOptimizer):
    """Muon (Jordan et al., 2024): the momentum, orthogonalised, times 0.2 sqrt(max(m, n)) (arXiv 2502.16982), with
    which AdamW's learning rates carry over; ``scale: original`` is sqrt(max(1, m / n))."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, steps: int = 5, scale: str = "adamw",
                 nesterov: bool = True, **options: Any) -> None:
        if scale not in ("adamw", "original") or steps < 1:
            raise ValueError(f"scale {scale!r}, steps {steps}: expected scale adamw or original, and at least one step")
        super().__init__(params, lr, nesterov=nesterov, steps=steps, scale=scale, **options)

    def update(self, matrix: Tensor, shard: ParameterShard | None, group: Mapping[str, Any]) -> Tensor:
        rows, columns = whole_sizes(matrix, shard)
        factor = 0.2 * max(rows, columns) ** 0.5 if group["scale"] == "adamw" else max(1.0, rows / columns) ** 0.5
        return orthogonalise(matrix, shard, steps=group["steps"]) * factor


def _is_matrix(parameter: nn.Parameter, group: Mapping[str, Any]) -> bool:
    """Whether a parameter's update is a matrix's: as the group says, or by its dimensions."""
    return parameter.dim() > 1 if group["matrix"] is None else bool(group["matrix"]) and parameter.dim() > 1


def _in_matrix(parameter: nn.Parameter) -> ParameterShard | None:
    """The parameter's shard in terms of its matrix: rows are dimension -2, columns -1; None where no norm needs it."""
    shard: ParameterShard | None = getattr(parameter, SHARD, None)
    if shard is None:
        return None
    bank = bool(getattr(parameter, BANK, False))
    kept = tuple(replace(item, dimension=item.dimension - 3 if bank else -2 if item.dimension == 0 else -1)
                 for item in shard.divisions if not bank or item.dimension)
    return replace(shard, divisions=kept) if kept else None


OPTIMIZERS: dict[str, type[MatrixOptimizer]] = {"reg": Reg, "muon": Muon}
"""By the name that ``optimizer.name`` has."""
