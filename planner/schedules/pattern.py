"""A published schedule as data: stages on ranks, routes, and every rank's order of actions. No durations, no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mipipe.planner.actions import Action, ActionKind


@dataclass(frozen=True, slots=True)
class EvenTimes:
    """What the automatic schedules look at: an even stage's F, I and W, and a transfer. The others ignore it."""

    f: int
    i: int
    w: int
    comm: int = 0


@dataclass(frozen=True, slots=True)
class StagePattern:
    """``stage_ranks[s]`` are the ranks of stage s, ``routes[s][m]`` the one that microbatch m uses.

    ``orders[rank]`` are a rank's actions in order; ``placement`` names the shape.
    """

    stage_ranks: tuple[tuple[int, ...], ...]
    routes: tuple[tuple[int, ...], ...]
    orders: tuple[tuple[Action, ...], ...]
    placement: str

    @property
    def num_stages(self) -> int:
        return len(self.stage_ranks)


def one_copy(stage_ranks: Iterable[int], num_microbatches: int, orders: Iterable[Iterable[Action]],
             placement: str) -> StagePattern:
    """A pattern in which every stage is on one rank."""
    ranks = tuple(stage_ranks)
    return StagePattern(tuple((rank,) for rank in ranks), tuple((rank,) * num_microbatches for rank in ranks),
                        tuple(map(tuple, orders)), placement)


def forward(stage: int, microbatch: int) -> Action:
    return Action(stage, ActionKind.F, microbatch)


def input_gradient(stage: int, microbatch: int) -> Action:
    return Action(stage, ActionKind.I, microbatch)


def weight_gradient(stage: int, microbatch: int) -> Action:
    return Action(stage, ActionKind.W, microbatch)


def backward(stage: int, microbatch: int) -> Action:
    return Action(stage, ActionKind.B, microbatch)


def overlapped(ahead: tuple[int, int], back: tuple[int, int]) -> Action:
    """The forward of (stage, microbatch) ``ahead`` run together with the backward of ``back``."""
    return Action(ahead[0], ActionKind.OVERLAP_F_B, ahead[1], back)
