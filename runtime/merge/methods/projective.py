"""Optimised task vectors: OptMerge (arXiv 2505.19892), WUDI (arXiv 2503.08099) and DOGE (arXiv 2501.01230).

They descend on one matrix at a time with the optimiser that their authors used; gradients are written out, so no
autograd engine runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mipipe.runtime.merge.methods.arithmetic import mean_from
from mipipe.runtime.merge.methods.method import Round, Tile
from mipipe.runtime.merge.methods.sparsify import Cutoffs, threshold_rounds
from mipipe.runtime.merge.methods.spectral import svd


class Adam:
    """Adam (Kingma and Ba 2015) on one tensor, with its usual constants."""

    def __init__(self, like: Tensor, rate: float) -> None:
        self.rate, self.step = rate, 0
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)

    def update(self, value: Tensor, gradient: Tensor) -> None:
        """Moves ``value`` one step along its gradient."""
        self.step += 1
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = (self.square / (1 - 0.999**self.step)).sqrt_().add_(1e-8)
        value.addcdiv_(self.mean, root, value=-self.rate / (1 - 0.9**self.step))


# OptMerge -------------------------------------------------------------------------------------------------------------


def optmerge_targets(deltas: Sequence[Tensor], rank: int, centred: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Denoised targets ``[m, n]`` and input maps ``[k, n]`` of the experts.

    The map is ``S_k V_k^T / ||tau||`` of the task vector; the target its best rank-k approximation, about the mean of
    all task vectors when ``centred`` (full fine-tuning). Zero task vectors are left out by the caller.
    """
    mean = torch.zeros_like(deltas[0])
    for delta in deltas:
        mean.add_(delta, alpha=1.0 / len(deltas))
    targets, maps = [], []
    for delta in deltas:
        _, values, right = svd(delta)
        maps.append((values[:rank, None] * right[:rank] / delta.norm()).to(delta.dtype))
        offset = mean if centred else torch.zeros_like(mean)
        left, values, right = svd(delta - offset)
        targets.append(((left[:, :rank] * values[:rank]) @ right[:rank]).to(delta.dtype) + offset)
    return targets, maps


def optmerge_closed_form(start: Tensor, targets: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """The minimiser of ``sum_i ||(X - target_i) L_i^T||^2 / ||tau_i||^2`` (the norm is inside the maps) nearest to the
    start: ``(sum target_i G_i) (sum G_i)^+ + X_0 (I - P)``.

    ``G_i = L_i^T L_i``; descent never moves the part of ``X_0`` outside the range P of ``sum G_i``.
    """
    stacked = torch.cat(list(maps), 0).double()
    _, values, right = torch.linalg.svd(stacked, full_matrices=False)
    live = values > 1e-7 * values[:1]
    right, values = right[live], values[live]
    pulled = torch.zeros_like(start, dtype=torch.float64)
    for target, part in zip(targets, maps, strict=True):
        pulled += (target.double() @ part.double().T) @ part.double()
    solved = (pulled @ right.T / values.square()) @ right
    kept = start.double()
    return (solved + kept - (kept @ right.T) @ right).to(start.dtype)


def optmerge_ridge(start: Tensor, targets: Sequence[Tensor], maps: Sequence[Tensor], strength: float) -> Tensor:
    """The minimiser of the loss plus ``mu ||X - X_0||^2``: ``(sum target_i G_i + mu X_0) (sum G_i + mu I)^-1``.

    ``mu`` is ``strength`` times the mean eigenvalue of ``sum G_i``. Task vectors of full rank leave directions in which
    the loss is nearly flat and its minimiser anywhere; there X stays at the start, as in the authors' short descent.
    """
    curvature = torch.zeros(start.shape[1], start.shape[1], dtype=torch.float64, device=start.device)
    pulled = torch.zeros_like(start, dtype=torch.float64)
    for target, part in zip(targets, maps, strict=True):
        wide = part.double()
        curvature += wide.T @ wide
        pulled += (target.double() @ wide.T) @ wide
    pull = strength * float(curvature.trace()) / len(curvature)
    curvature.diagonal().add_(pull)
    solved: Tensor = torch.linalg.solve(curvature, (pulled + pull * start.double()).T).T
    return solved.to(start.dtype)


def optmerge(tile: Tile, _stats: Any, *, lambda_: float, solver: str, ridge: float, centred: bool, start: str,
             learning_rate: float, steps: int) -> Tensor:
    """``theta_0 + lambda X``, X minimising the experts' interference after low-rank denoising.

    ``solver``: the minimiser near the start (`optmerge_ridge`), the plain one, or the authors' descents (``adam`` from
    the sum for full fine-tuning, ``sgd`` with momentum 0.9 from the mean for LoRA). Wants float32.
    """
    deltas = [delta for delta in tile.deltas() if float(delta.norm()) > 0]
    rank = min(tile.origin.shape) // max(1, len(tile.models))
    if not deltas or rank == 0:
        return mean_from(tile.origin, tile.models, lambda_)
    targets, maps = optmerge_targets(deltas, rank, centred)
    value = torch.zeros_like(deltas[0])
    for delta in deltas:
        value.add_(delta, alpha=1.0 if start == "sum" else 1.0 / len(deltas))
    return tile.origin + lambda_ * _minimised(value, targets, maps, solver, ridge, learning_rate, steps)


def _minimised(value: Tensor, targets: Sequence[Tensor], maps: Sequence[Tensor], solver: str, ridge: float, rate: float,
               steps: int) -> Tensor:
    """OptMerge's problem solved from a start, as ``solver`` says."""
    if solver == "ridge":
        return optmerge_ridge(value, targets, maps, ridge)
    if solver == "closed_form":
        return optmerge_closed_form(value, targets, maps)
    return optmerge_descent(value, targets, maps, solver, rate, steps)


def optmerge_descent(value: Tensor, targets: Sequence[Tensor], maps: Sequence[Tensor], solver: str, rate: float,
                     steps: int) -> Tensor:
    """Gradient steps on the loss: ``2 sum_i ((X - target_i) L_i^T) L_i``."""
    value = value.clone()
    adam, momentum = Adam(value, rate), torch.zeros_like(value)
    for _ in range(steps):
        gradient = torch.zeros_like(value)
        for target, part in zip(targets, maps, strict=True):
            gradient.add_(((value - target) @ part.T) @ part, alpha=2.0)
        if solver == "adam":
            adam.update(value, gradient)
        else:
            momentum.mul_(0.9).add_(gradient)
            value.sub_(momentum, alpha=rate)
    return value


# WUDI -----------------------------------------------------------------------------------------------------------------


def wudi(tile: Tile, _stats: Any, *, lambda_: float, solver: str, ridge: float, learning_rate: float,
         steps: int) -> Tensor:
    """``theta_0 + lambda X``, X minimising ``sum_i ||(X - tau_i) tau_i^T||^2 / ||tau_i||^2`` from the sum of the task
    vectors (WUDI-Merging, arXiv 2503.08099).

    OptMerge's problem with whole task vectors as targets and maps. ``solver``: the authors' 300 steps of Adam, or the
    minimiser, near the start (`optmerge_ridge`) or plain. Wants float32.
    """
    deltas = [delta for delta in tile.deltas() if float(delta.norm()) > 0]
    if not deltas:
        return tile.origin.clone()
    value, maps = torch.stack(deltas).sum(0), [delta / delta.norm() for delta in deltas]
    return tile.origin + lambda_ * _minimised(value, deltas, maps, solver, ridge, learning_rate, steps)


# DOGE -----------------------------------------------------------------------------------------------------------------


def _doge_counts(entries: list[int], _nonzero: list[int], *, density: float, **_params: Any) -> list[list[int]]:
    # k-th value rule: entries at least as large as the (d - k)-th smallest, k + 1 when all differ.
    return [[min(size, math.floor(density * size + 1e-9) + 1)] for size in entries]


def _task_vectors(tile: Tile, **_params: Any) -> list[Tensor]:
    return tile.deltas()


def doge_rounds(**_params: Any) -> tuple[Round, ...]:
    return threshold_rounds(_task_vectors, _doge_counts, keep_ties=True)


def doge_lambdas(deltas: Sequence[Tensor], eta: float) -> list[float]:
    """``eta_0 / ||tau_i||``; 0 for a task vector that is zero."""
    norms = [float(delta.norm()) for delta in deltas]
    return [eta / norm if norm > 0 else 0.0 for norm in norms]


def shared_subspace(deltas: Sequence[Tensor], divisor: int) -> Tensor:
    """Orthonormal columns ``[m, floor(r / divisor)]`` of the subspace the tasks share."""
    rank = min(deltas[0].shape)
    count = rank // len(deltas)
    joined = torch.cat([svd(delta)[0][:, :count] for delta in deltas], 1)
    return svd(joined)[0][:, :rank // divisor] if joined.shape[1] else joined


def doge_loss(deltas: Sequence[Tensor], lambdas: Sequence[float], shift: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in the shift: ``sum_j sum_rows <tau_j, tau_j - sum_i lambda_i (tau_i + shift)>^2``."""
    total = sum(lambdas)
    merged = shift * total
    for weight, delta in zip(lambdas, deltas, strict=True):
        merged = merged + weight * delta
    loss, gradient = torch.zeros((), dtype=shift.dtype, device=shift.device), torch.zeros_like(shift)
    for delta in deltas:
        inner = (delta * (delta - merged)).sum(1)
        loss = loss + inner.square().sum()
        gradient = gradient - 2 * total * inner[:, None] * delta
    return loss, gradient


def doge_shift(deltas: Sequence[Tensor], lambdas: Sequence[float], subspace: Tensor, rate: float, steps: int,
               reproject: bool) -> Tensor:
    """The shared shift: Adam on gradients projected away from the shared subspace.

    Adam's scaling leaks back into the subspace although every gradient is projected (about a fifth);
    ``reproject`` removes that after each step.
    """
    shift = torch.zeros_like(deltas[0])
    adam = Adam(shift, rate)
    for _ in range(steps):
        _, gradient = doge_loss(deltas, lambdas, shift)
        adam.update(shift, gradient - subspace @ (subspace.T @ gradient))
        if reproject:
            shift = shift - subspace @ (subspace.T @ shift)
    return shift


def doge(tile: Tile, cutoffs: Cutoffs, *, eta: float, divisor: int, learning_rate: float, steps: int,
         reproject: bool, density: float) -> Tensor:
    """``theta_0 + sum_i lambda_i mask_i (tau_i + shift)``, the masks by magnitude over the whole model."""
    deltas = tile.deltas()
    lambdas = doge_lambdas(deltas, eta)
    subspace = shared_subspace(deltas, divisor).to(tile.origin.dtype)
    shift = doge_shift(deltas, lambdas, subspace, learning_rate, steps, reproject)
    merged = tile.origin.clone()
    for weight, delta, selection in zip(lambdas, deltas, cutoffs, strict=True):
        merged.add_(selection[0].mask(delta) * (delta + shift), alpha=weight)
    return merged
