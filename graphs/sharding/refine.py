"""Sums made later and gradients gathered earlier than an assignment does by itself, where that sends less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mipipe.graphs.operator_graph import Operator, SegmentTrace, TensorSpec
from mipipe.graphs.sharding.assign import Layouts, assign, specs_of
from mipipe.graphs.sharding.parts import PARTIAL, Kind

_SHORT = ("float32", "bfloat16", "float16")


def refine(trace: SegmentTrace, layouts: Layouts) -> Layouts:
    """The layouts with those products deferred and those gradients gathered early that make it send less.

    Sums over members may shrink before they travel (a token's experts are added up), and gradients grow before they
    are needed whole (each token's for all of its experts).
    """
    specs = specs_of(trace)
    now, chosen = assign(trace, layouts, specs), layouts
    early = [name for name in trace.output_grads if name is not None and now.born[name].kind is Kind.DIVIDED
             and not now.born[name].routed]
    products = [op for op in trace.operators
                if (op.kind == "aten.mul.Tensor" and len(op.inputs) == 2) or casts(op, specs)]
    sums = [op for op in trace.operators if adds(op, specs)]

    def better(made: Layouts) -> bool:
        nonlocal now, chosen
        found = assign(trace, made, specs)
        if found.sent < now.sent:
            now, chosen = found, made
            return True
        return False

    for name in early:
        better(replace(chosen, early=chosen.early | {name}))
    def summed(ops: Sequence[Operator]) -> frozenset[str]:
        """Those of the operators that read a sum and are not deferred yet."""
        return frozenset(op.name for op in ops
                         if PARTIAL in [now.born[name] for name in op.inputs]) - chosen.deferred

    while any((more := summed(ops)) and better(replace(chosen, deferred=chosen.deferred | more))
              for ops in (sums, products)):
        pass
    for name in sorted(chosen.deferred):
        better(replace(chosen, deferred=chosen.deferred - {name}))
    return chosen


def adds(op: Operator, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether an operator adds two tensors of one shape: to a sum each member may add its share of the other."""
    return (op.kind == "aten.add.Tensor" and len(op.inputs) == 2
            and all(specs[name] == op.outputs[0] for name in op.inputs))


def casts(op: Operator, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether an operator casts between floating types of 32 bits or fewer: sums may be made in any of them."""
    return (op.kind == "aten._to_copy.default" and len(op.inputs) == 1 and op.outputs[0].dtype in _SHORT
            and specs[op.inputs[0]].dtype in _SHORT)
