"""One rank of a plan as the executor needs it: every instruction with all it needs, resolved once.

The handlers of `mipipe.runtime.engine.executor` get these values and look nothing up while a step runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.sharding.gathered import ALIKE, CONTEXT, COPIES, EXPERT_COPIES
from mipipe.graphs.sharding.team_graph import Division
from mipipe.planner.plan import Plan
from mipipe.planner.program import Program
from mipipe.runtime.engine.compiling.flow import GradientFlow
from mipipe.runtime.engine.compiling.instructions import Ready
from mipipe.runtime.engine.compiling.stage import StageCode
from mipipe.runtime.experts.elastic import CoActivation
from mipipe.runtime.experts.exchange import Exchange
from mipipe.runtime.ranks.comm import Waits
from mipipe.runtime.ranks.mesh import Mesh
from mipipe.runtime.weights.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRank:
    """What one rank holds of a plan. ``holders[name]``: the ranks with a parameter; ``exclusive``: parameters of one
    stage only; ``graded``: local trainable parameters that get a gradient; ``experts``: the group that shares the
    experts of this rank's layers, ``banks`` the parameters of these, which differ in it; ``counters``: routing counts
    of this rank's MoE layers by their number in the graph. ``graph`` is that of one member of the rank's team, whose
    ``divisions`` and ``sums`` of parameters are as `MemberGraph` has them; ``waits``: what the rank waits for;
    ``zero``: what devices that hold the same divide (`EngineOptions`)."""

    plan: Plan
    graph: OperatorGraph
    program: Program
    flow: GradientFlow
    mesh: Mesh
    weights: Weights
    loss_gradient: torch.Tensor
    stages: dict[int, StageCode]
    holders: dict[str, tuple[int, ...]]
    exclusive: frozenset[str]
    graded: tuple[str, ...]
    experts: Exchange | None
    banks: frozenset[str]
    counters: dict[int, torch.Tensor]
    waits: Waits
    divisions: Mapping[str, tuple[Division, ...]] = field(default_factory=dict)
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    zero: int = 0

    def reduction(self, name: str) -> Any:
        """The group that sums the gradients of a parameter; None where nobody else has a part of them."""
        if name in self.banks:
            return None if self.scattered(name) else self.mesh.expert_copies_group
        return self.mesh.reduction(self.holders[name], self.sums.get(name, ()), self.scattered(name))

    def apart(self, name: str) -> bool:
        """Whether the devices that hold the same (copies of the plan, members along the context axis in all of them,
        those with the same experts) hold parts of a parameter."""
        return any(item.axis in ALIKE for item in self.divisions.get(name, ()))

    def scattered(self, name: str) -> bool:
        """Whether they do, and W's gradients are sums over them already, of which each has its part."""
        return self.zero > 1 and self.apart(name)

    @property
    def across(self) -> bool:
        """Whether devices that hold the same have parts of parameters."""
        return self.mesh.all_group is not None

    def counts(self, name: str) -> bool:
        """Whether this process counts a parameter, where each element of all is to be counted once: in a copy, or in
        all copies where there are parts across them."""
        axes = {item.axis for item in self.divisions.get(name, ())}
        mesh, divided = self.mesh, {EXPERT_COPIES, *axes}
        divided |= {CONTEXT} if COPIES in axes else set() if self.across else {COPIES}
        return self.holders[name][0] == mesh.rank and not any(
            place for axis, place in mesh.place.items() if axis not in divided)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled(LocalRank):
    """A rank ready to run: its instructions in training and in evaluation. ``exchanges_aside``: ranks exchange rows,
    and all that do it are stages without parameters on the plan's collective stream; ``uncompiled``: segments here that
    torch.compile was asked for and left out; ``sampler``: what draws experts in training."""

    instructions: tuple[Ready, ...]
    evaluation: tuple[Ready, ...]
    exchanges_aside: bool
    uncompiled: tuple[str, ...] = ()
    sampler: CoActivation | None = None
