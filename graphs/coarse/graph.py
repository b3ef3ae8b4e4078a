"""What the planner sees of a model: groups of segments with totals, and the values that cross them.

A `CoarseGraph` keeps the map back to segments, so that a planned group can be executed; its totals equal those of the
operator graph it came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from mipipe.graphs.errors import GraphError
from mipipe.graphs.operator_graph import Phase, Tags
from mipipe.graphs.serialize import STRICT, Amount


@dataclass(frozen=True, slots=True)
class OpGroup:
    """A convex set of segments that is placed as one.

    ``flops`` and ``bytes_moved`` (read + written) are per phase and microbatch; a phase that does not exist (no
    trainable parameter, or none upstream) has no entry. ``parameter_bytes`` is all that stays resident, buffers
    included; a tied tensor counts once in each group that reads it. ``saved_fi_bytes`` live from F to I,
    ``saved_fw_bytes`` from F to W, ``saved_iw_bytes`` from I to W. ``input_bytes`` is what recomputation would keep
    instead.
    """

    __pydantic_config__: ClassVar = STRICT
    name: str
    segments: tuple[str, ...]
    flops: dict[Phase, Amount]
    bytes_moved: dict[Phase, Amount]
    parameter_bytes: Amount = 0
    trainable_bytes: Amount = 0
    saved_fi_bytes: Amount = 0
    saved_fw_bytes: Amount = 0
    saved_iw_bytes: Amount = 0
    input_bytes: Amount = 0
    workspace_bytes: dict[Phase, Amount] = field(default_factory=dict)
    tags: Tags = Tags()
    structure: str = ""
    """Equal for groups with equal traces in equal order: they share one profile."""
    collective: bool = False
    """All segments are collectives (all-to-all): they run on the communication stream."""
    single: bool = False
    """The group has one replica: its F changes buffers (batch statistics), one microbatch after the other, or it is of
    an expert-parallel layer, whose replicas are the copies of the plan."""


@dataclass(frozen=True, slots=True)
class GroupValue:
    """A tensor made by one group and read by others. ``grad_bytes`` is None where no gradient flows back."""

    __pydantic_config__: ClassVar = STRICT
    name: str
    source: int
    targets: tuple[int, ...]
    num_bytes: Amount
    grad_bytes: Amount | None


@dataclass(frozen=True, slots=True)
class CoarseGraph:
    """Groups in a topological order and the values between them. ``graph_digest`` names the operator graph.

    ``notes`` records how the groups were asked for (``groups``, ``granularity``), so that they can be made again.
    """

    FORMAT: ClassVar = "mipipe.coarse_graph"
    VERSION: ClassVar = 2
    __pydantic_config__: ClassVar = STRICT
    model: str
    graph_digest: str
    groups: tuple[OpGroup, ...]
    values: tuple[GroupValue, ...]
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in self.values:
            late = [target for target in value.targets if target <= value.source]
            if late:
                raise GraphError(f"coarse graph of {self.model}: value {value.name} flows from group"
                                 f" {value.source} back to group {late[0]}; groups must be in a topological order")
