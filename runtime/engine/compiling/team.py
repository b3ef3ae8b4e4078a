"""A member of a team: the collectives of its programs, bound to the process groups of the team's axes.

`mipipe.graphs.sharding` makes a member's program of a segment's trace; its operators name an axis. `team_operators`
gives them to `build_phase`: one process group for each axis, whose ranks are the members in order. Every collective is
waited for where it stands in the program, by the rank's own `Waits`: a member that is gone is named on every backend.

Legend: T members along an axis.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mipipe.graphs.again import with_attention_again
from mipipe.graphs.costs.latents import graph_with_latents_again
from mipipe.graphs.errors import GraphError, InputError, RunError
from mipipe.graphs.operator_graph import OperatorGraph
from mipipe.graphs.operators.collectives import part_of, whole_of
from mipipe.graphs.sharding.team_graph import Division, MemberGraph
from mipipe.planner.team import Team
from mipipe.runtime.ranks import comm
from mipipe.runtime.ranks.mesh import Mesh
from mipipe.runtime.weights.pieces import Piece, piece_of

Reduction = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


@dataclass(frozen=True)
class Axis:
    """One axis of a team: its process group, in which this member has the number ``member``."""

    name: str
    group: Any
    member: int
    size: int
    waits: comm.Waits

    @classmethod
    def of(cls, name: str, group: Any, waits: comm.Waits) -> Axis:
        """The axis whose members are the ranks of a process group."""
        return cls(name, group, dist.get_rank(group), dist.get_world_size(group), waits)

    def wait(self, work: Any, what: str) -> None:
        """Until a collective is done (on CUDA: until the stream has it).

        Raises:
            RunError: another member is gone, or does not take part in time.
        """
        self.waits.wait_along(self.name, what, work, lambda: f"member {self.member} of axis {self.name}: {what}")

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        out = x.contiguous().clone()
        self.wait(comm.start_all_reduce(self.group, out, Reduction[op]), "all-reduce")
        return out

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors of all members, in order."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.wait(comm.start_all_gather(self.group, parts, x), "all-gather")
        return parts

    def reduce_scatter(self, x: Tensor, dim: int, sections: int | Sequence[int]) -> Tensor:
        """This member's part of the sum; gloo's own reduce-scatter is slower than its sum of whole tensors."""
        if not x.is_cuda:
            return part_of(self.all_reduce(x, "sum"), self.member, self.size, dim, sections).clone()
        parts = torch.stack([part_of(x, member, self.size, dim, sections) for member in range(self.size)])
        out = torch.empty_like(parts[0])
        self.wait(comm.start_reduce_scatter(self.group, out, parts), "reduce-scatter")
        return out

    def exchange(self, parts: Tensor) -> Tensor:
        """[T,...]: part m goes to member m; what comes from member m is part m of the result."""
        out = torch.empty_like(parts)
        work = comm.start_all_to_all(self.group, out, parts.contiguous())
        self.wait(work, "all-to-all")
        return out


def member_graph(team: Team, graph: OperatorGraph) -> MemberGraph:
    """The graph of one member of a team, with attention and up-projections of latents that run again where they are
    to; the graph itself where a rank is one device.

    Raises:
        InputError: the graph cannot be divided so.
    """
    made = MemberGraph(graph)
    try:
        for axis, size in team.axes.items():
            made = made.divided(axis, size, team.modes_along(axis, [segment.name for segment in graph.segments]))
        again = _with_attention_again(made.graph, set(team.attention_again))
        again = graph_with_latents_again(again, graph, set(team.latents_again)) if team.latents_again else again
    except GraphError as error:
        raise InputError(f"team ({team.text()}): {error}") from None
    return replace(made, graph=again)


def _with_attention_again(graph: OperatorGraph, names: set[str]) -> OperatorGraph:
    """The graph with attention run again in the backward of some segments."""
    if not names:
        return graph
    traces = {trace.digest: trace for trace in graph.traces}
    again = {digest: with_attention_again(traces[digest])
             for digest in {segment.trace for segment in graph.segments if segment.name in names}}
    traces.update((trace.digest, trace) for trace in again.values())
    segments = tuple(replace(segment, trace=again[segment.trace].digest) if segment.name in names else segment
                     for segment in graph.segments)
    return replace(graph, segments=segments, traces=tuple(traces.values()))


def axes_of(mesh: Mesh, waits: comm.Waits) -> dict[str, Axis]:
    """The axes of this process's team, and those of the devices that hold the same where they have parts of it."""
    groups = {**mesh.axes, **(mesh.alike if mesh.all_group is not None else {})}
    return {name: Axis.of(name, group, waits) for name, group in groups.items()}


def member_operators(mesh: Mesh, waits: comm.Waits) -> dict[str, Callable[..., Tensor]]:
    """The operators of this process's team; none where a rank is one device.

    Raises:
        RunError: processes of one team are not numbered in the order of its members.
    """
    axes, place = axes_of(mesh, waits), mesh.place
    if any(axis.member != place[name] for name, axis in axes.items()):
        raise RunError(f"{mesh.text}: the processes of a team are not numbered in the order of its members; start"
                       " torchrun with consecutive ranks on each host")
    return team_operators(axes) if axes else {}


class Divided(Protocol):
    """What has the divisions of parameters and buffers by FQN."""

    @property
    def divisions(self) -> Mapping[str, tuple[Division, ...]]: ...


def member_pieces(member: Divided, whole: OperatorGraph, mesh: Mesh) -> dict[str, Piece]:
    """What this process holds of each parameter and buffer that is divided, by FQN."""
    shapes = {item.fqn: item.spec.shape for item in whole.parameters}
    return {name: piece_of(shapes[name], divisions, mesh.place) for name, divisions in member.divisions.items()}


def team_operators(axes: Mapping[str, Axis]) -> dict[str, Callable[..., Tensor]]:
    """The implementations of a team's operators, by kind, as `build_phase` takes them.

    Raises (when a program runs):
        RunError: the program has an axis or a size that the team does not have.
    """
    def axis_of(name: str, size: int) -> Axis:
        found = axes.get(name)
        if found is None or found.size != size:
            has = ", ".join(f"{axis.name}={axis.size}" for axis in axes.values()) or "no axes"
            raise RunError(f"team: a program is for {name}={size}, but this team has {has}; plan for this team")
        return found

    def all_reduce(x: Tensor, op: str, size: int, axis: str) -> Tensor:
        return axis_of(axis, size).all_reduce(x, op)

    def all_gather(x: Tensor, dim: int, sections: list[int], size: int, axis: str) -> Tensor:
        return whole_of(axis_of(axis, size).gather(x), dim, sections)

    def reduce_scatter(x: Tensor, dim: int, sections: list[int], size: int, axis: str) -> Tensor:
        return axis_of(axis, size).reduce_scatter(x, dim, sections)

    def take_part(x: Tensor, dim: int, sections: list[int], size: int, axis: str) -> Tensor:
        return part_of(x, axis_of(axis, size).member, size, dim, sections).clone()

    def exchange_parts(x: Tensor, source: list[int], target: list[int], size: int, axis: str) -> Tensor:
        parts = torch.stack([part_of(x, member, size, target[0], target[1:]) for member in range(size)])
        return whole_of(list(axis_of(axis, size).exchange(parts)), source[0], source[1:])

    named: dict[str, Callable[..., Tensor]] = {
        "all_reduce": all_reduce, "all_gather": all_gather, "reduce_scatter": reduce_scatter,
        "take_part": take_part, "exchange_parts": exchange_parts}
    return {f"mipipe.{name}.default": function for name, function in named.items()}
