"""What of a model a graph leaves out: parameters that nothing reads, and parameters that should train and do not.

Neither is an error (a vision tower without images, a head of another task), but each is what a person wants to hear
before an expensive run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

from mipipe.graphs.operator_graph import OperatorGraph, ParameterSpec

_SHOWN = 12


def warnings_of(graph: OperatorGraph) -> list[str]:
    """One line for each thing about a captured model that its owner should know."""
    used = {fqn for segment in graph.segments for fqn in segment.parameters}
    traces = {trace.digest: trace for trace in graph.traces}
    moved = {fqn for segment in graph.segments
             for fqn, grad in zip(segment.parameters, traces[segment.trace].parameter_grads, strict=True)
             if grad is not None}
    own = [item for item in graph.parameters if not item.buffer and item.tied_to is None]
    unread = [item for item in own if item.fqn not in used]
    still = [item for item in own if item.fqn in used and item.trainable and item.fqn not in moved]
    found = [str(text) for text in graph.source.get("warnings", ())]
    found += _lines(own, unread, lambda where, size: f"{where} ({size}) is no part of the graph: with these inputs the"
                    " loss does not depend on it, so that it is neither run nor trained")
    return found + _lines(own, still, lambda where, size: f"{where} ({size}) has requires_grad but gets no gradient: it"
                          " stays as it is")


def _lines(own: Sequence[ParameterSpec], chosen: Sequence[ParameterSpec], text: Callable[[str, str], str]) -> list[str]:
    """A text for every module (or parameter) that has only chosen parameters, and its size."""
    names = {item.fqn for item in chosen}
    groups: dict[str, list[ParameterSpec]] = {}
    others = {path for item in own if item.fqn not in names for path in _paths(item.fqn)}
    for item in chosen:
        where = next((path for path in _paths(item.fqn) if path not in others), item.fqn)
        groups.setdefault(where, []).append(item)
    lines = [text(where, _size(members)) for where, members in groups.items()]
    if len(lines) > _SHOWN:
        rest = [item for members in list(groups.values())[_SHOWN:] for item in members]
        lines[_SHOWN:] = [text(f"and {len(lines) - _SHOWN} more modules", _size(rest))]
    return lines


def _paths(fqn: str) -> list[str]:
    """The modules that a parameter is in, and itself, outermost first: ``a.b.c`` -> ``a``, ``a.b``, ``a.b.c``."""
    parts = fqn.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _size(members: Collection[ParameterSpec]) -> str:
    count = sum(math.prod(item.spec.shape) for item in members)
    return f"{count:,} parameters" + (f" in {len(members)} tensors" if len(members) > 1 else "")
