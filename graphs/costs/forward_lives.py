"""What F makes and holds for a while: from when to when every value of a trace's forward is in memory.

Values that stay for the backward are counted elsewhere; the others are there from the operator that makes them to the
last that reads them, results to the end. Runs of fused elementwise operators write what other kernels of F read, and
results; what is between them stays on the chip, and what such runs read stays until they write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mipipe.graphs.costs.fusion import heavy, moves, origins, size_of
from mipipe.graphs.operator_graph import Phase, SegmentTrace


@dataclass(frozen=True, slots=True)
class Life:
    """A value that F makes: its name and bytes, there from its ``first`` operator of F to the ``last`` that reads it,
    both by their positions; results until after the last operator."""

    name: str
    num_bytes: int
    first: int
    last: int


def forward_lives(trace: SegmentTrace, fused: bool) -> tuple[Life, ...]:
    """The lives of all values that F has in memory; ``fused``: elementwise operators are."""
    origin, makers = origins(trace), {operator.name: operator for operator in trace.operators}
    operators = list(trace.phase_operators(Phase.F))
    results = {origin.get(name, name) for name in trace.outputs}
    written = {name for operator in operators if heavy(operator) for name in (
        operator.name, *(origin.get(source, source) for source in operator.inputs))} | results
    last = dict.fromkeys(results, len(operators))
    found = []
    for position, operator in reversed(list(enumerate(operators))):
        own = origin.get(operator.name, operator.name)
        until = max(position, last.setdefault(own, position))
        if moves(operator) and (not fused or operator.name in written):
            found.append(Life(operator.name, size_of(operator.name, trace, makers), position, until))
            until = position
        for name in {origin.get(source, source) for source in operator.inputs}:
            last[name] = max(last.get(name, 0), until if moves(operator) else position)
    return tuple(reversed(found))


def most_alive(lives: Sequence[Life], parts: Callable[[str], int]) -> float:
    """The most bytes of lives at once, each value divided into ``parts`` by its name."""
    change = [0.0] * (max((life.last for life in lives), default=-1) + 2)
    for life in lives:
        size = life.num_bytes / parts(life.name)
        change[life.first] += size
        change[life.last + 1] -= size
    return max(accumulate(change), default=0.0)
