"""Which elementary action of a placement reads which: F along the graph, I against it, W after I.

The same for every microbatch, so written once per stage. Times, arcs, the simulated program and the exact model read
this; `mipipe.planner.check` has its own account of it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from mipipe.planner.actions import ActionKind
from mipipe.planner.jobs.stages import StageView

KINDS = (ActionKind.F, ActionKind.RECOMPUTE, ActionKind.I, ActionKind.W)
"""The elementary kinds, in the order in which a stage runs those it has."""

StageKind = tuple[int, ActionKind]
"""(stage, kind): the actions of one phase of a stage, one per microbatch."""


@dataclass(frozen=True, slots=True)
class Dependency:
    """``reader`` of a microbatch starts after ``maker`` of the same has ended and its values have arrived.

    ``edge`` (-1 within a stage) and ``num_bytes`` per microbatch say what travels where the two are on two ranks.
    """

    maker: StageKind
    reader: StageKind
    edge: int = -1
    num_bytes: tuple[int, ...] = ()

    @property
    def backward(self) -> bool:
        """Whether gradients are read."""
        return self.maker[1] is ActionKind.I


def kinds_of(view: StageView, stage: int) -> tuple[ActionKind, ...]:
    """The elementary kinds a stage has, in their order: RECOMPUTE only where a gradient follows."""
    has_i, has_w = view.i_ns[stage] is not None, view.w_ns[stage] is not None
    again = view.placement.stages[stage].recompute and (has_i or has_w)
    return tuple(kind for kind, present in zip(KINDS, (True, again, has_i, has_w), strict=True) if present)


def gradient_kind(view: StageView, stage: int) -> ActionKind | None:
    """The phase that reads the gradients of a stage's outputs: I, or W where there is no I, or none."""
    return next((kind for kind in kinds_of(view, stage) if kind in (ActionKind.I, ActionKind.W)), None)


def dependencies(view: StageView) -> list[Dependency]:
    """Everything that is read, by the stage that makes forward values: within it, then edge by edge."""
    found = []
    for stage in range(view.num_stages):
        kinds = kinds_of(view, stage)
        found += [Dependency((stage, maker), (stage, reader)) for maker, reader in pairwise(kinds)]
        gradient = gradient_kind(view, stage)
        for number in view.outgoing[stage]:
            edge = view.edges[number]
            found.append(Dependency((stage, ActionKind.F), (edge.target, ActionKind.F), number, edge.num_bytes))
            if edge.grad_bytes is not None and gradient is not None:
                found.append(Dependency((edge.target, ActionKind.I), (stage, gradient), number, edge.grad_bytes))
    return found


def inputs(view: StageView) -> dict[StageKind, list[StageKind]]:
    """What the actions of every phase read, their own stage's first."""
    found: dict[StageKind, list[StageKind]] = defaultdict(list)
    for one in dependencies(view):
        found[one.reader].append(one.maker)
    return found
