"""The phase functions of a graph's traces, built once and shared by all segments of one trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment, SegmentTrace
from mipipe.graphs.tracing.operator_kinds import resolve_operator
from mipipe.graphs.tracing.trace import CONSTANT, GETITEM, build_phase, phase_signature, uses_random
from mipipe.runtime.engine.compiling.compile_phases import Compiler
from mipipe.runtime.engine.compiling.rehearsal import Rehearsal
from mipipe.runtime.engine.compiling.team_calls import TeamCalls, can_order


@dataclass(frozen=True, slots=True)
class PhaseCode:
    """A function of explicit tensors, the names of its arguments and results.

    ``owned[k]``: result k is fresh memory nobody else refers to. ``random``: it draws random numbers. W's function
    takes a callable first and hands (k, gradient) to it, one gradient after the other; it returns nothing.
    """

    function: Callable[..., tuple[torch.Tensor, ...]]
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    owned: tuple[bool, ...]
    random: bool


class Phases:
    """Phase functions by trace and phase; ``compile`` passes them through torch.compile.

    The engine runs a whole step without autograd, so the functions' own guard (a microsecond or two for each call) is
    taken off. ``given`` has implementations of operators by kind for segments that need their own (expert parallelism);
    these have sizes that change, and are never compiled. The operators of ``team``, by which members talk, and our own
    are compiled as calls (`TeamCalls`): these choose kernels, and read numbers of rows, by themselves. ``warm`` runs
    once, on zeros, what talks to nobody (None: on CUDA).
    """

    def __init__(self, graph: OperatorGraph, device: torch.device, compile: bool = False,
                 given: Mapping[str, Mapping[str, Callable[..., Any]]] | None = None,
                 team: Mapping[str, Callable[..., Any]] | None = None, warm: bool | None = None) -> None:
        self.device = device
        self._given, self._team = given or {}, team or {}
        self._warm = device.type == "cuda" if warm is None else warm
        self._rehearsal = Rehearsal(device)
        self._compiler = Compiler(self._rehearsal) if compile else None
        self._calls = TeamCalls(self._team) if compile and self._team and can_order() else None
        self._traces = {trace.digest: trace for trace in graph.traces}
        self._codes: dict[tuple[str, Phase, str], PhaseCode] = {}

    def trace(self, segment: Segment) -> SegmentTrace:
        """The trace of a segment."""
        return self._traces[segment.trace]

    def compiles(self, trace: SegmentTrace, segment: str) -> bool:
        """Whether the phases of a segment with this trace go through torch.compile."""
        return self._compiler is not None and segment not in self._given and (
            self._calls is not None or not self._in_team(trace))

    def _in_team(self, trace: SegmentTrace) -> bool:
        """Whether members of a team talk in a trace."""
        return any(operator.kind in self._team for operator in trace.operators)

    def code(self, trace: SegmentTrace, phase: Phase, segment: str = "") -> PhaseCode:
        """The function of one phase of a trace; ``segment`` matters where it has operators of its own."""
        own = self._given.get(segment)
        given = {**self._team, **(own or {})}
        key = (trace.digest, phase, "" if own is None else segment)
        found = self._codes.get(key)
        if found is None:
            arguments, results = phase_signature(trace, phase)
            compiled = self.compiles(trace, segment) and trace.has(phase)
            handing = phase is Phase.W and not compiled
            if compiled:
                given = {**as_calls(trace), **(self._calls.calls if self._calls is not None else {})}
            function = inspect.unwrap(build_phase(trace, phase, device=self.device, given=given, handing=handing))
            owned = _owned(trace, phase, results)
            if compiled:
                function, owned = self._compiled(function, trace, phase)
                function = _handing(function) if phase is Phase.W else function
            elif self._warm and trace.has(phase) and segment not in self._given and not self._in_team(trace):
                self._rehearsal.run(function, trace, phase, handing)
            if phase is Phase.W:
                self._rehearsal.forget(trace)
            random = phase is Phase.F and (uses_random(trace) or _draws(given))
            found = PhaseCode(function, arguments, results, owned, random)
            self._codes[key] = found
        return found

    def _compiled(self, function: Callable[..., Any], trace: SegmentTrace,
                  phase: Phase) -> tuple[Callable[..., Any], tuple[bool, ...]]:
        """The function through torch.compile, and which of its results are fresh."""
        assert self._compiler is not None
        if self._calls is None:
            return self._compiler.compile(function, trace, phase)
        with self._calls.quiet():
            compiled, owned = self._compiler.compile(function, trace, phase)
        compiled.team_calls = self._calls  # type: ignore[attr-defined]  # its operators are there as long as it is
        return compiled, owned


def as_calls(trace: SegmentTrace) -> dict[str, Callable[..., Any]]:
    """Our own operators of a trace as the dispatcher has them, which torch.compile does not look into."""
    return {item.kind: resolve_operator(item.kind) for item in trace.operators
            if item.kind.startswith("mipipe.") and item.kind != CONSTANT}


def _draws(given: Mapping[str, Callable[..., Any]] | None) -> bool:
    """Whether an implementation of its own makes a segment draw random numbers."""
    return any(getattr(function, "random", False) for function in (given or {}).values())


def _handing(function: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A function that hands over the other's results one by one."""
    def handed(give: Callable[[int, torch.Tensor], None], *arguments: Any) -> tuple[torch.Tensor, ...]:
        for position, result in enumerate(function(*arguments)):
            give(position, result)
        return ()

    return handed


def _owned(trace: SegmentTrace, phase: Phase, results: tuple[str, ...]) -> tuple[bool, ...]:
    """For each result: made in this phase by an operator that returns no view, and contiguous as such."""
    makers = {operator.name: operator for operator in trace.phase_operators(phase)}
    fresh = []
    for name in results:
        kind = makers[name].kind if name in makers else GETITEM
        schema = None if kind in (CONSTANT, GETITEM) else getattr(resolve_operator(kind), "_schema", None)
        fresh.append(schema is not None and all(item.alias_info is None for item in schema.returns))
    return tuple(fresh)
