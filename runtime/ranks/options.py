"""What a user may choose of an engine; none of it changes the mathematics of a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mipipe.planner.experts.balance.maps import ExpertMap


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """``seed`` keys random operators; ``timeout_s`` bounds every wait; ``compile`` uses torch.compile.

    ``master_dtype`` keeps weights and gradients in another dtype than the graph computes in. ``share_loss`` returns the
    loss on every rank (one small all-reduce), else only where it is computed. ``track_memory`` measures after every
    instruction, slowly. Memory beyond the plan's buys independence of the other ranks' delays: ``hold_sends`` keeps
    what was sent to the end of the step instead of waiting where the program frees it (None: on CUDA, where computing
    would wait, if the plan leaves room for all of it), ``prepost`` posts every receive that many compute actions
    earlier than the program does. ``overlap`` runs the plan's collective stream beside its compute stream where ranks
    exchange rows (a thread, on CPUs). Without ``barrier`` no step waits for the last rank's end: the loss is summed
    meanwhile, and `Engine.step` returns that of the step before. ``zero``: what devices that hold the same divide among
    them (`mipipe.graphs.sharding.gathered`): nothing, optimizer state (1), gradients (2), parameters, gathered for each
    segment (3); `Engine.parameters` then are this device's parts, which a step gathers before it reads them. For graphs
    captured for expert parallelism: ``expert_map`` places the experts on the copies of the plan (None: in equal
    blocks), ``load_factor`` caps the rows that a copy accepts, in even shares. ``elastic``: the pool and probability of
    co-activation sampling (`mipipe.runtime.experts.elastic`), which does change what is trained.
    """

    seed: int = 0
    timeout_s: float = 60.0
    compile: bool = False
    master_dtype: torch.dtype | None = None
    share_loss: bool = True
    track_memory: bool = False
    hold_sends: bool | None = None
    prepost: int = 0
    overlap: bool = True
    barrier: bool = True
    zero: int = 0
    expert_map: ExpertMap | None = None
    load_factor: float | None = None
    elastic: tuple[int, float] | None = None
