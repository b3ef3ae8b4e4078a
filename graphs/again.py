"""A trace some of whose F runs again in the backward, so that what it makes does not stay in memory in between."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from mipipe.graphs.operator_graph import Phase, SavedTensor, SegmentTrace
from mipipe.graphs.serialize import digest
from mipipe.graphs.trace_rules import GETITEM

ATTENTION = "mipipe.attention.default"
MOVES = {GETITEM, "aten.view.default", "aten._unsafe_view.default", "aten.transpose.int", "aten.permute.default",
         "aten.clone.default", "aten.reshape.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.t.default"}
"""Operators that only move what another has made, and run again with it."""
AGAIN = "_again"
"""How the names of copies end."""


def with_attention_again(trace: SegmentTrace) -> SegmentTrace:
    """The trace with its attention run again in the backward, where that reads what it makes."""
    return with_again(trace, {op.name for op in trace.phase_operators(Phase.F) if op.kind == ATTENTION})


def with_again(trace: SegmentTrace, roots: Collection[str], light: Collection[str] = ()) -> SegmentTrace:
    """The trace with copies of these operators of F, and of what moves their results, in the first phase of the
    backward; the trace itself where the backward reads none of them.

    ``light``: other operators of F that run again where they read what does, or where they are views for it.
    """
    forward = {op.name: op for op in trace.phase_operators(Phase.F)}
    made, views = set[str](), set[str]()
    for op in forward.values():
        moved = op.kind in MOVES and len(op.inputs) == 1 and op.inputs[0] in made
        if op.name in roots or moved or (op.name in light and any(name in made for name in op.inputs)):
            made.add(op.name)
        elif op.name in light and op.inputs and not (op.bytes_read or op.bytes_written) and (
                op.kind != GETITEM or op.inputs[0] in views):
            views.add(op.name)
    late = [op for op in trace.operators if op.phase is not Phase.F]
    read = {name for op in late for name in op.inputs}
    pending = [name for name in forward if name in read and name in made and name not in trace.outputs]
    needed: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in needed:
            needed.add(name)
            pending += [other for other in forward[name].inputs if other in made or (other in views - read)]
    if not needed:
        return trace
    first = Phase.I if trace.has(Phase.I) else Phase.W
    names = {name: f"{name}{AGAIN}" for name in needed}
    copies = [replace(op, name=names[name], phase=first, args=renamed(op.args, names),
                      kwargs=renamed(op.kwargs, names)) for name, op in forward.items() if name in needed]
    changed = [replace(op, args=renamed(op.args, names), kwargs=renamed(op.kwargs, names)) for op in late]
    specs = trace.specs | {names[name]: trace.specs[name] for name in needed if name in trace.specs}
    found = replace(trace, digest="", operators=(*forward.values(), *copies, *changed), specs=specs)
    found = replace(found, saved=tuple(_saved(found, trace, names)))
    return replace(found, digest=digest(found))


def copied(name: str) -> str | None:
    """The name of the operator of F that the operator of this name runs again; None: it is no copy."""
    return name.removesuffix(AGAIN) if name.endswith(AGAIN) else None


def renamed(item: Any, names: Mapping[str, str]) -> Any:
    """An operator's encoded arguments with references to other names."""
    if isinstance(item, list):
        return [renamed(part, names) for part in item]
    if isinstance(item, dict):
        if set(item) == {"ref"}:
            return {"ref": names.get(item["ref"], item["ref"])}
        return {key: renamed(part, names) for key, part in item.items()}
    return item


def _saved(trace: SegmentTrace, before: SegmentTrace, names: dict[str, str]) -> Iterator[SavedTensor]:
    """What crosses phases now, with the sizes that the tensors had before."""
    order = list(Phase)
    source = {op.name: op.phase for op in trace.operators} | dict.fromkeys(
        (*trace.inputs, *trace.parameters, *trace.buffers), Phase.F)
    known = {item.name: item for item in before.saved}
    original = {again: name for name, again in names.items()}
    specs = {op.name: op.outputs[0] for op in trace.operators if op.outputs} | trace.specs
    last: dict[str, Phase] = {}
    for op in trace.operators:
        for name in op.inputs:
            made = source.get(name)
            if made is not None and order.index(op.phase) > order.index(made):
                last[name] = max(last.get(name, op.phase), op.phase, key=order.index)
    for phase, results in ((Phase.I, trace.input_grads), (Phase.W, trace.parameter_grads)):
        for name in filter(None, results):
            if name in source and order.index(phase) > order.index(source[name]):
                last[name] = max(last.get(name, phase), phase, key=order.index)
    for name, phase in last.items():
        found = known.get(original.get(name, name))
        num_bytes = found.num_bytes if found is not None else specs[name].num_bytes
        if found is None and name in (*trace.parameters, *trace.buffers):
            continue
        yield SavedTensor(name, num_bytes, source[name], phase, found.alias if found is not None else None)
