"""The norm of all gradients of a plan, and clipping by it: on the device, without the host.

A host that reads a norm between the backward and the optimizer waits until the device has nothing left to do. So the
norm is summed, and the gradients are scaled, where they are; the number comes to the host with the step's loss
(`Engine.carry`), where one that is not finite ends the run.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from mipipe.graphs.errors import RunError
from mipipe.runtime.engine.engine import Engine
from mipipe.runtime.experts.moves import expert_squares
from mipipe.runtime.ranks import comm

TINY = 1e-6
"""What torch.nn.utils.clip_grad_norm_ adds to a norm before it divides by it."""


def gradient_norm(engine: Engine) -> float:
    """The 2-norm of all gradients of the plan; tied and replicated parameters and experts count once. All ranks must
    call.

    Raises:
        RunError: the norm is not finite, or a rank did not make its part in time.
    """
    return clip_gradients(engine, None)


def clip_gradients(engine: Engine, max_norm: float | None) -> float:
    """The gradient norm before clipping; with ``max_norm`` all gradients are scaled down to it. All ranks must call.

    Raises:
        RunError: as `gradient_norm`.
    """
    clip = Clip(engine, max_norm)
    clip.clip()
    return clip.finish()


class Clip:
    """Scales gradients down to a norm of at most ``max_norm`` (None: measures it only), step by step.

    ``late``: by the norm of the step before, whose sum over the ranks is made meanwhile, for steps that do not wait for
    each other; the first step takes its own. All ranks must call alike.
    """

    def __init__(self, engine: Engine, max_norm: float | None, late: bool = False) -> None:
        self._engine, self._max_norm, self._late = engine, max_norm, late
        self._square: torch.Tensor | None = None
        self._works: list[Any] = []
        self._step = self._decided = 0

    def clip(self) -> None:
        """Scale the gradients; the norm that decided comes to the host with the step's loss, see `carried`."""
        before, self._decided = (self._waited() if self._late else None), self._step
        self._square, self._step = own_square(self._engine), self._engine.steps_done + 1
        group = self._engine.mesh.all_group or self._engine.mesh.plan_group
        self._works = [] if group is None else [comm.start_all_reduce(group, self._square)]
        square = before
        if square is None:
            square, self._decided = self._waited(), self._step
        assert square is not None
        self._engine.carry(square)
        gradients = [item.grad for item in self._engine.parameters() if item.grad is not None]
        if self._max_norm is not None and gradients:
            factor = (self._max_norm / (square.sqrt() + TINY)).clamp(max=1.0)
            by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
            for gradient in gradients:
                by_dtype.setdefault(gradient.dtype, []).append(gradient)
            for dtype, members in by_dtype.items():  # in one launch where the factor has their dtype
                torch._foreach_mul_(members, factor if dtype is torch.float64 else factor.float())

    def carried(self) -> float:
        """The norm by which the last step was scaled, as the step's loss brought it to the host.

        Raises:
            RunError: it is not finite.
        """
        return norm_of(self._engine.carried, self._decided)

    def finish(self) -> float:
        """The norm of the last step, read on the host; 0.0 before any.

        Raises:
            RunError: it is not finite, or a rank did not make its part in time.
        """
        square = self._waited()
        if square is None:
            return 0.0
        self._engine.compiled.waits.settle()
        return norm_of(float(square), self._step)

    def _waited(self) -> torch.Tensor | None:
        works, self._works = self._works, []
        self._engine.compiled.waits.wait(
            works, lambda: f"{self._engine.mesh.text}, step {self._step}: the gradient norm")
        return self._square


def norm_of(square: float, step: int) -> float:
    """The norm of a step's gradients, of its square.

    Raises:
        RunError: it is not finite.
    """
    norm = square ** 0.5 if square >= 0 else math.nan
    if not math.isfinite(norm):
        raise RunError(f"step {step}: the gradient norm is {norm}; lower the learning rate, or look for bad data in"
                       " this step's batch")
    return norm


def own_square(engine: Engine) -> torch.Tensor:
    """The squared 2-norm of what this rank counts of the plan's gradients: [], float64."""
    owned = [item.grad for name, item in engine.named_parameters()
             if item.grad is not None and engine.compiled.counts(name) and name not in engine.compiled.banks]
    parts = [norm.double() for norm in torch._foreach_norm(owned)] if owned else []
    total = torch.stack(parts).square().sum() if parts else \
        torch.zeros((), dtype=torch.float64, device=engine.mesh.device)
    if engine.compiled.experts is not None:  # all of a group's: once in a copy where each is summed up, else once
        size, across, seat = engine.compiled.experts.size, engine.compiled.across, engine.mesh.seat
        experts = expert_squares(engine.compiled.experts, engine.weights, lambda name: (
            not across or seat < size or engine.compiled.apart(name)))  # of parts each device has its own
        total = total if (seat % size if across else engine.mesh.member) else total + experts
    return total
