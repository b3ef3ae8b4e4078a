"""The phase functions of a graph's traces, built once and shared by all segments of one trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mipipe.graphs.operator_graph import OperatorGraph, Phase, Segment, SegmentTrace
from mipipe.graphs.trace import CONSTANT, GETITEM, build_phase, phase_signature, resolve, uses_random


@dataclass(frozen=True, slots=True)
class PhaseCode:
    """A function of explicit tensors, the names of its arguments and results.

    ``owned[k]``: result k is fresh memory nobody else refers to. ``random``: it draws random numbers.
    """

    function: Callable[..., tuple[torch.Tensor, ...]]
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    owned: tuple[bool, ...]
    random: bool


class Phases:
    """Phase functions by trace and phase; ``compile`` passes them through torch.compile.

    The engine runs a whole step without autograd, so the functions' own guard (a microsecond or two for each call) is
    taken off.
    """

    def __init__(self, graph: OperatorGraph, device: torch.device, compile: bool = False) -> None:
        self.device = device
        self._compile = compile
        self._traces = {trace.digest: trace for trace in graph.traces}
        self._codes: dict[tuple[str, Phase], PhaseCode] = {}

    def trace(self, segment: Segment) -> SegmentTrace:
        """The trace of a segment."""
        return self._traces[segment.trace]

    def code(self, trace: SegmentTrace, phase: Phase) -> PhaseCode:
        """The function of one phase of a trace."""
        found = self._codes.get((trace.digest, phase))
        if found is None:
            arguments, results = phase_signature(trace, phase)
            function = inspect.unwrap(build_phase(trace, phase, device=self.device))
            if self._compile:
                function = torch.compile(function, dynamic=False)
            found = PhaseCode(function, arguments, results, _owned(trace, phase, results),
                              phase is Phase.F and uses_random(trace))
            self._codes[trace.digest, phase] = found
        return found


def _owned(trace: SegmentTrace, phase: Phase, results: tuple[str, ...]) -> tuple[bool, ...]:
    """For each result: made in this phase by an operator that returns no view, and contiguous as such."""
    makers = {operator.name: operator for operator in trace.phase_operators(phase)}
    fresh = []
    for name in results:
        kind = makers[name].kind if name in makers else GETITEM
        schema = None if kind in (CONSTANT, GETITEM) else getattr(resolve(kind), "_schema", None)
        fresh.append(schema is not None and all(item.alias_info is None for item in schema.returns))
    return tuple(fresh)
