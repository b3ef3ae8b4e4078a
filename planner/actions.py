"""What a rank can do: action kinds, and compute actions with their text form.

The text form is torch.distributed.pipelining's: ``2F0`` is the forward of stage 2 on microbatch 0, ``2I0`` its input
gradient, ``2W0`` its weight gradient, ``2B0`` both gradients as one action, ``(0F3;1B2)OVERLAP_F_B`` a forward and a
backward that run interleaved as one action.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from mipipe.graphs.errors import PlanError


class ActionKind(StrEnum):
    """Everything a program may contain; see `mipipe.planner.program` for what each does."""

    F = "F"
    I = "I"  # noqa: E741
    W = "W"
    B = "B"
    OVERLAP_F_B = "OVERLAP_F_B"
    RECOMPUTE = "RECOMPUTE"
    SEND = "SEND"
    RECV = "RECV"
    ALL_TO_ALL = "ALL_TO_ALL"
    ALL_REDUCE = "ALL_REDUCE"
    FREE = "FREE"
    OPTIMIZER_STEP = "OPTIMIZER_STEP"
    LOAD = "LOAD"
    MEASURE = "MEASURE"
    COMBINE = "COMBINE"
    SAVE = "SAVE"
    CALIBRATE = "CALIBRATE"


class Stream(StrEnum):
    """The queues of one rank. Compute and collective run one action at a time each; transfers have their channels."""

    COMPUTE = "compute"
    COLLECTIVE = "collective"
    CHANNEL = "channel"


@dataclass(frozen=True, slots=True, order=True)
class Action:
    """One compute action: ``kind`` of ``stage`` on ``microbatch``.

    For OVERLAP_F_B these are the forward's, and ``partner`` holds the backward's (stage, microbatch).
    """

    stage: int
    kind: ActionKind
    microbatch: int
    partner: tuple[int, int] | None = None

    def __str__(self) -> str:
        if self.partner is not None:
            return f"({self.stage}F{self.microbatch};{self.partner[0]}B{self.partner[1]})OVERLAP_F_B"
        letter = "R" if self.kind is ActionKind.RECOMPUTE else self.kind.value
        return f"{self.stage}{letter}{self.microbatch}"

    def parts(self) -> tuple[tuple[ActionKind, int, int], ...]:
        """The elementary (kind, stage, microbatch) it performs: B is I and W; OVERLAP_F_B is F, I and W."""
        if self.kind is ActionKind.B:
            return ((ActionKind.I, self.stage, self.microbatch), (ActionKind.W, self.stage, self.microbatch))
        if self.partner is not None:
            stage, microbatch = self.partner
            return ((ActionKind.F, self.stage, self.microbatch), (ActionKind.I, stage, microbatch),
                    (ActionKind.W, stage, microbatch))
        return ((self.kind, self.stage, self.microbatch),)

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action written as ``text``.

        Raises:
            PlanError: the text is no action.
        """
        match = _SIMPLE.fullmatch(text)
        if match:
            kind = ActionKind.RECOMPUTE if match[2] == "R" else ActionKind(match[2])
            return cls(int(match[1]), kind, int(match[3]))
        match = _OVERLAP.fullmatch(text)
        if match:
            return cls(int(match[1]), ActionKind.OVERLAP_F_B, int(match[2]), (int(match[3]), int(match[4])))
        raise PlanError(f"action {text!r}: expected <stage><F|I|W|B|R><microbatch>, such as 2F0, or"
                        " (0F3;1B2)OVERLAP_F_B")


_SIMPLE = re.compile(r"([0-9]+)(F|I|W|B|R)([0-9]+)")
_OVERLAP = re.compile(r"\(([0-9]+)F([0-9]+);([0-9]+)B([0-9]+)\)OVERLAP_F_B")


def _read_order(value: Any) -> Any:
    return tuple(map(Action.parse, value.split())) if isinstance(value, str) else value


Order = Annotated[
    tuple[Action, ...],
    BeforeValidator(_read_order),
    PlainSerializer(lambda order: " ".join(map(str, order)), return_type=str),
]
"""A sequence of compute actions; in files one string, ``"0F0 0F1 0I0"``."""
