"""`ModelStream`: models run side by side, layer by layer, and what is measured on the way.

A stream's members see each their own samples (often the same). Streams share nothing, so any rank can run any stream;
one is walked in steps: the embedding, every layer forward, the head, and where gradients are wanted every layer
backward from the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

from mipipe.graphs.serialize import STRICT


class Who(StrEnum):
    """Which of a unit's models a need is about; each becomes a stream."""

    MODELS = "models"
    """Every merged model on its own data."""
    BASE = "base"
    PAIRS = "pairs"
    """The base beside every merged model, on that model's data."""
    LAST = "last"
    """The base beside the last merged model."""
    TOGETHER = "together"
    """All merged models side by side, each on its own data."""
    SAME = "same"
    """All merged models side by side, on the same data: the last one's."""


@dataclass(frozen=True, slots=True)
class Need:
    """A statistic that a merge method reads. ``gradients``: it takes a backward pass."""

    statistic: str
    who: Who
    gradients: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """A model (index into the graph's) on samples of a data source."""

    __pydantic_config__: ClassVar = STRICT
    model: int
    data: str


@dataclass(frozen=True, slots=True)
class ModelStream:
    """Models that run side by side, and the statistics taken; ``part`` of ``num_parts`` of their samples."""

    __pydantic_config__: ClassVar = STRICT
    members: tuple[Member, ...]
    statistics: tuple[str, ...]
    gradients: bool = False
    part: int = 0
    num_parts: int = 1

    @property
    def key(self) -> int:
        """The model by which a unit finds the stream's results."""
        return self.members[-1].model

    def num_steps(self, num_layers: int) -> int:
        """Embedding, layers, and the head (with gradients the loss); with gradients the layers once more."""
        return 2 + num_layers + (num_layers if self.gradients else 0)


@dataclass(frozen=True, slots=True)
class CalibrationPlan:
    """The streams of a merge. ``digests``: of the samples drawn from every data source, once they are."""

    __pydantic_config__: ClassVar = STRICT
    samples: int
    length: int
    batch: int
    seed: int
    num_layers: int
    streams: tuple[ModelStream, ...]
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> tuple[str, ...]:
        """Every data source once."""
        return tuple(dict.fromkeys(member.data for stream in self.streams for member in stream.members))

    def rows(self, stream: ModelStream, total: int) -> tuple[int, int]:
        """The samples ``[first, stop)`` of ``total`` that a stream's part runs on."""
        return (total * stream.part // stream.num_parts, total * (stream.part + 1) // stream.num_parts)
