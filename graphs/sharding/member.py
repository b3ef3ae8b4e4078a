"""The program of one member of a team: a trace like any other, on local tensors, with collectives among its operators.

All members run the same program; what differs between them (which part is theirs) is in the operators that the team
gives (`mipipe.graphs.operators.collectives`). The phases are those of the whole trace: a weight gradient waits for no
collective of an input gradient that it does not read.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from mipipe.graphs.operator_graph import Operator, Phase, SegmentTrace
from mipipe.graphs.sharding.assign import Assignment, Layouts, first_backward, results_of
from mipipe.graphs.sharding.builder import CPU, Builder
from mipipe.graphs.sharding.parts import WHOLE, Kind, local_shape
from mipipe.graphs.sharding.programs import PROGRAMS
from mipipe.graphs.trace_rules import CONSTANT, GETITEM
from mipipe.graphs.tracing import joint as joint_graph
from mipipe.graphs.tracing.dynamic_rows import DIRECT as ROWS
from mipipe.graphs.tracing.joint import Joint
from mipipe.graphs.tracing.operator_kinds import resolve_operator
from mipipe.graphs.tracing.partition import to_trace
from mipipe.graphs.tracing.storages import own_storages
from mipipe.graphs.tracing.trace import Ref, decode


def has_dynamic_rows(trace: SegmentTrace) -> bool:
    """Whether rows are picked by data: their numbers differ between members, so the trace has no modes."""
    return any(item.kind in ROWS for item in trace.operators)


class _Member:
    """A trace on its way to a member's program."""

    def __init__(self, trace: SegmentTrace, layouts: Layouts, axis: str, assignment: Assignment) -> None:
        self.trace, self.assignment, self.parts = trace, assignment, dict(assignment.born)
        self.builder, self.early = Builder(layouts.size, axis), layouts.early
        self.nodes: dict[str, Any] = {}
        for name in (*trace.inputs, *trace.parameters, *trace.buffers, *(item for item in trace.output_grads if item)):
            spec, part = trace.specs[name], layouts.given.get(name, WHOLE)
            self.nodes[name] = self.builder.argument(name, local_shape(spec.shape, part, layouts.size), spec.dtype)
        self.arguments: dict[str, fx.Node] = dict(self.nodes)

    def laid(self, name: str, need: Any) -> fx.Node:
        """A tensor as an operator needs it; as it is where it does not matter."""
        node, part = self.nodes[name], self.parts[name]
        if need is None or part == need:
            return node
        offsets = None
        if part.kind is Kind.OWNED:
            offsets = self.laid(part.offsets, WHOLE)
        changed = self.builder.change(node, part, need, offsets)
        if part.kind is Kind.PARTIAL:
            self.nodes[name], self.parts[name] = changed, need
        return changed

    def run(self) -> list[fx.Node | None]:
        """Emit every operator; the results as they leave: outputs, updates, input and parameter gradients.

        Results of a phase are laid out before the next phase begins, so that nothing of it comes too late.
        """
        trace = self.trace
        results: list[fx.Node | None] = []
        for phase, names in results_of(trace):
            self._begin(phase)
            for op in trace.phase_operators(phase):
                self.emit(op)
            self.builder.phase, self.builder.path = phase, ""
            results += [None if name is None else self.laid(name, self.assignment.ends[name]) for name in names]
        return results

    def _begin(self, phase: Phase) -> None:
        """Before the backward gradients are gathered that are to be so early; in W what I has gathered stays so."""
        self.builder.phase, self.builder.path = phase, ""
        for name in sorted(self.early) if phase is first_backward(self.trace) else ():
            self.nodes[name], self.parts[name] = self.laid(name, WHOLE), WHOLE
        for name, part in self.parts.items() if phase is Phase.W else ():
            found = self.builder.gathered(self.nodes.get(name)) if part.kind is Kind.DIVIDED else None
            if found is not None:
                self.nodes[name], self.parts[name] = found, WHOLE

    def emit(self, op: Operator) -> None:
        """One operator on local tensors."""
        builder = self.builder
        builder.phase, builder.path = op.phase, op.fqn
        if op.kind == GETITEM:
            source, place = self.nodes[op.args[0]["ref"]], op.args[1]
            self.nodes[op.name] = source[place] if isinstance(source, tuple) else builder.emit(
                operator.getitem, source, place)
            return
        choice = self.assignment.choices[op.name]

        def local(item: Any) -> Any:
            if isinstance(item, list):
                return [local(part) for part in item]
            return self.laid(str(item), choice.needs.get(item)) if isinstance(item, Ref) else item

        args = [local(choice.args.get(index, decode(value, CPU))) for index, value in enumerate(op.args)]
        kwargs = {key: local(decode(value, CPU)) for key, value in op.kwargs.items()}
        target = joint_graph.make_constant if op.kind == CONSTANT else resolve_operator(op.kind)
        if choice.program:
            self.nodes[op.name] = PROGRAMS[choice.program](builder, choice, target, *args, **kwargs)
        else:
            self.nodes[op.name] = builder.run(target, args, kwargs)


def build_member(trace: SegmentTrace, layouts: Layouts, axis: str, assignment: Assignment) -> SegmentTrace:
    """The member's program that an assignment describes."""
    made = _Member(trace, layouts, axis, assignment)
    results = made.run()
    builder, given = made.builder, made.arguments
    first = len(trace.outputs)
    last = first + len(trace.buffer_updates)
    end = builder.graph.output([node for node in results if node is not None])
    owned = own_storages(builder.graph, end, results, builder.mode)
    leaves = [Phase.F] * last + [Phase.I] * len(trace.input_grads) + [Phase.W] * len(trace.parameter_grads)
    for node, phase in zip(owned, leaves, strict=True):
        if node is not None and node.op == "call_function":
            builder.phases.setdefault(node, phase)
    _drop_unused(builder, [node for node in owned if node is not None], end)
    names = (*trace.inputs, *trace.parameters, *trace.buffers)
    arguments = tuple(given[name] for name in names)
    joint = Joint(builder.graph, arguments, tuple(None if name is None else given[name] for name in trace.output_grads),
                  tuple(owned[:first]),
                  {names.index(name): node for name, node in zip(trace.buffer_updates, owned[first:last], strict=True)},
                  (*owned[last:], *[None] * len(trace.buffers)), builder.mode)
    order = {node: builder.phases[node] for node in builder.graph.nodes if node in builder.phases}
    return to_trace(joint, order, (trace.inputs, trace.parameters, trace.buffers), builder.paths)


def _drop_unused(builder: Builder, results: Sequence[fx.Node], end: fx.Node) -> None:
    """Remove operators that nothing reads."""
    end.args = (list(results),)
    for node in reversed(list(builder.graph.nodes)):
        if node.op == "call_function" and not node.users:
            builder.graph.erase_node(node)
            builder.phases.pop(node, None)
