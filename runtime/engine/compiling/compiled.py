"""One rank of a plan as the executor needs it: every instruction with all it needs, resolved once.

The handlers of `mipipe.runtime.engine.executor` get these values and look nothing up while a step runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.planner.plan import Plan
from mipipe.planner.program import Program
from mipipe.runtime.engine.compiling.flow import GradientFlow
from mipipe.runtime.engine.compiling.instructions import Ready
from mipipe.runtime.engine.compiling.stage import StageCode
from mipipe.runtime.engine.mesh import Mesh
from mipipe.runtime.experts.elastic import CoActivation
from mipipe.runtime.experts.exchange import Exchange
from mipipe.runtime.weights.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRank:
    """What one rank holds of a plan. ``holders[name]``: the ranks with a parameter; ``exclusive``: parameters of one
    stage only; ``graded``: local trainable parameters that get a gradient; ``experts``: the group that shares the
    experts of this rank's layers, ``banks`` the parameters of these, which differ between copies; ``counters``: routing
    counts of this rank's MoE layers by their number in the graph."""

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
