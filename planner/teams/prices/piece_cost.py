"""What a piece costs a member of a team, as values: seconds of phases and at a step's end, and bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mipipe.graphs.operator_graph import Phase
from mipipe.planner.problems.from_layers import LayerTimes

Axis = Literal["tensor", "context", "expert", "data"]
AXES: tuple[Axis, ...] = ("tensor", "context", "expert", "data")


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """Seconds of one phase of a piece for one microbatch: its own kernels, and collectives by axis."""

    compute: float = 0.0
    talk: dict[Axis, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.compute + sum(self.talk.values())

    def plus(self, other: PhaseCost) -> PhaseCost:
        """Both, one after the other."""
        return PhaseCost(self.compute + other.compute, {axis: self.talk.get(axis, 0.0) + other.talk.get(axis, 0.0)
                                                        for axis in {**self.talk, **other.talk}})


@dataclass(frozen=True, slots=True)
class PieceCost:
    """One piece on one member: phases (None: it has no such phase), bytes, and what it takes at the end of a step.

    ``kept`` stays from F to the end of the backward, ``late`` from I to W, per microbatch; ``again`` is ``kept`` of a
    piece whose F runs again, which it holds while its backward runs; ``rerun`` is what it makes again meanwhile where a
    part of F runs again; ``until_w`` is the part of ``kept`` (of ``again``) that W reads: the inputs of products with
    parameters. ``reduce``, ``gather``: seconds of the gradients' way between copies and of the updated parameters' way
    back, ``optimizer`` of the update itself. ``gathered``: whole gradients, and parameters of this piece and the next,
    where copies hold parts of them; ``buffers``: the largest tensor of a collective, ``workspace`` what is alive within
    a phase of the backward beside arguments and results (of a head: the loss's gradients by the logits).
    ``forward_space``: all that it needs while its F runs beside what is kept: gathered parameters, the largest tensor
    of a collective, and the most that F has in memory at once of what does not stay.
    """

    f: PhaseCost
    i: PhaseCost | None
    w: PhaseCost | None
    kept: int
    late: int
    again: int
    weights: int
    gradients: int
    state: int
    reduce: float
    gather: float
    optimizer: float
    gathered: int = 0
    buffers: int = 0
    until_w: int = 0
    workspace: int = 0
    rerun: int = 0
    forward_space: int = 0

    @property
    def backward(self) -> float:
        return (self.i.total if self.i else 0.0) + (self.w.total if self.w else 0.0)

    @property
    def resident(self) -> int:
        return self.weights + self.gradients + self.state

    @property
    def while_running(self) -> int:
        """Bytes that the piece needs while its backward runs, I and W at once, beside what is kept."""
        return self.again + self.rerun + self.gathered + self.buffers + max(self.workspace, self.late)


def as_measured(found: Mapping[Phase, PhaseCost], measured: LayerTimes) -> dict[Phase, PhaseCost]:
    """Phases as long as they were measured; where W was not measured apart, I is the whole backward."""
    times = {Phase.F: measured.forward, Phase.I: measured.backward}
    if measured.weights is not None:
        times = {phase: seconds for phase, seconds in (times | {Phase.W: measured.weights}).items() if phase in found}
    return {phase: PhaseCost(seconds) for phase, seconds in times.items()}


def phase_beside(cost: PhaseCost, seconds: float) -> PhaseCost:
    """A phase with a transfer of so many seconds under way beside it: only what is longer than the phase shows."""
    return cost.plus(PhaseCost(0.0, {"data": max(0.0, seconds - cost.total)}))
