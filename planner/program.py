"""`Program`: exactly what every rank does, action by action, with peers and buffers. What the workers execute.

A rank walks its instructions in order:

- F, I, W, B, OVERLAP_F_B, RECOMPUTE run on the rank's compute (or collective) stream, one at a time in this order, and
  wait for the receives that bring their inputs.
- RECV posts a receive of ``edge`` from ``peer`` and goes on; its buffer exists from here on. It is posted when the
  compute actions before it have ended.
- SEND starts a transfer of ``edge`` to ``peer`` when the action that makes its values has ended, and goes on.
- FREE waits for the send of ``edge`` and drops the sender's reference.
- ALL_REDUCE sums the gradients of ``stage`` over ``peers`` on the collective stream, after the rank's last W of it.
- OPTIMIZER_STEP updates the rank's parameters; the last instruction.

The program of a merge (`mipipe.planner.merging.lower`) has the tensors of the output for stages and their portions for
microbatches, and four kinds of its own: LOAD starts reading a portion of every input and goes on; MEASURE and COMBINE
wait for it, add to the method's statistics or merge it (task vectors are taken here, tile by tile); SAVE writes what
COMBINE made. FREE drops what was read; ALL_REDUCE joins the statistics of all ranks.
CALIBRATE runs a layer of one or more models on samples of text, for methods that read what that finds out.

Each directed channel has one queue: the k-th SEND on it meets the k-th RECV. Values between the same two stages for one
microbatch and direction travel together as one `Transfer`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mipipe.graphs.serialize import STRICT, Amount
from mipipe.planner.actions import Action, ActionKind, Stream


@dataclass(frozen=True, slots=True)
class Transfer:
    """The values of one microbatch that go from one stage to another, on different ranks.

    ``backward`` is False for activations (source stage before target) and True for gradients (source after target).
    ``values`` are value names of the operator graph, in the order they are packed.
    """

    __pydantic_config__: ClassVar = STRICT
    source_stage: Amount
    target_stage: Amount
    microbatch: Amount
    source_rank: Amount
    target_rank: Amount
    backward: bool
    num_bytes: Amount
    values: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source_stage}{'⇐' if self.backward else '⇒'}{self.target_stage}:{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step of a rank. ``action`` is set for compute kinds, ``transfer`` (an index into the program) for SEND, RECV
    and FREE, ``stage`` and ``peers`` (all members, this rank included) for ALL_REDUCE."""

    __pydantic_config__: ClassVar = STRICT
    kind: ActionKind
    stream: Stream
    action: Action | None = None
    transfer: Amount | None = None
    stage: Amount | None = None
    peers: tuple[Amount, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """The instructions of every rank, and the transfers they name. ``plan_digest`` ties it to its plan."""

    FORMAT: ClassVar = "mipipe.program"
    VERSION: ClassVar = 1
    __pydantic_config__: ClassVar = STRICT
    ranks: tuple[tuple[Instruction, ...], ...]
    transfers: tuple[Transfer, ...]
    plan_digest: str = ""
