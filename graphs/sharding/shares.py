"""What modes divide of a graph's segments, as `mipipe.graphs.sharding.modes` makes their programs, without writing
these."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from mipipe.graphs.costs.team_share import TeamShare
from mipipe.graphs.modes import Collective
from mipipe.graphs.operator_graph import OperatorGraph, Phase, Role, SegmentTrace
from mipipe.graphs.sharding.assign import Assignment, Layouts
from mipipe.graphs.sharding.boundaries import Streams, boundary_parts
from mipipe.graphs.sharding.modes import AXES, assigned, reasons, settle_shared
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part
from mipipe.graphs.sharding.recipe import banks


class TeamShares:
    """The shares of a graph's traces, each found when it is first asked for."""

    def __init__(self, graph: OperatorGraph) -> None:
        self._graph = graph
        self._found: dict[tuple[str, str, int, bool, bool], TeamShare] = {}
        self._lies: dict[tuple[str, int, bool], Mapping[str, Part]] = {}
        self._settled: dict[tuple[str, int], Mapping[str, Mapping[str, Part]]] = {}
        self._recipes: dict[object, Mapping[str, Part]] = {}

    @cached_property
    def _streams(self) -> Streams:
        return Streams(self._graph)

    def of(self, trace: SegmentTrace, mode: str, size: int, apart: bool = False, within: bool = False) -> TeamShare:
        """The share of one member of ``size``, where all segments run in this mode.

        Args:
            trace: one of the graph's.
            mode: of the segment.
            size: of the axis.
            apart: banks of experts are not divided along it, as experts are divided otherwise.
            within: segments of experts run in ``expert`` mode along it.

        Raises:
            GraphError: tokens do not divide.
        """
        key = trace.digest, mode, size, apart, within
        if key not in self._found:
            graph, place = self._graph, (mode, size)
            modes = {item.name: "expert" if within and item.tags.role is Role.EXPERTS else mode
                     for item in graph.segments}
            own = next(modes[item.name] for item in graph.segments if item.trace == trace.digest)
            if (*place, within) not in self._lies:
                self._lies[*place, within] = boundary_parts(graph, modes, self._streams, size)
            if place not in self._settled:
                self._settled[place] = settle_shared(graph, mode, size, self._recipes)
            fixed = {**(self._settled[place].get(trace.digest, {}) if own == mode else {}),
                     **dict.fromkeys(banks(trace) if apart else (), WHOLE)}
            boundary, assignment = assigned(graph, trace, own, size, fixed, lies=self._lies[*place, within],
                                            recipes=self._recipes)
            self._found[key] = _share(trace, own, AXES[mode], boundary, assignment)
        return self._found[key]


def _share(trace: SegmentTrace, mode: str, axis: str, boundary: Layouts, assignment: Assignment) -> TeamShare:
    grads = dict(zip(trace.parameters, trace.parameter_grads, strict=True))
    collectives: dict[Phase, list[tuple[Collective, str]]] = {phase: [] for phase in Phase if trace.has(phase)}
    made = {op.name: op.phase for op in trace.operators}
    for phase, kind, size, name in assignment.collectives:
        if phase is not Phase.W or made.get(name, Phase.F) is not Phase.F or name in trace.output_grads:
            collectives.setdefault(phase, []).append((Collective(kind, axis, size), name))
    return TeamShare(
        axis, boundary.size, {name: boundary.given[name].dim for name in (*trace.parameters, *trace.buffers)
                        if boundary.given.get(name, WHOLE).kind is Kind.DIVIDED},
        frozenset(name for name, part in assignment.born.items() if part.kind is Kind.DIVIDED),
        frozenset(name for name, choice in assignment.choices.items() if choice.share < 1),
        frozenset(name for name, grad in grads.items() if grad is not None and assignment.ends[grad] == PARTIAL),
        {phase: tuple(items) for phase, items in collectives.items()},
        tuple(reasons(trace, boundary, assignment, mode)))
