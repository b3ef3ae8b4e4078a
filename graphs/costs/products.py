"""Which operators of a trace are products with parameters, and which parameters are banks of experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mipipe.graphs.operator_graph import Operator, Phase, SegmentTrace

ATTENTION = "mipipe.attention"
_PASSED = ("aten._to_copy.",)
"""Operators that a weight passes on its way into a product, beside views."""


def banks_of(trace: SegmentTrace, products: Mapping[str, str]) -> frozenset[str]:
    """The parameters of a trace that are banks of experts, by its products (`products_of`)."""
    return frozenset(products[item.name] for item in trace.phase_operators(Phase.F)
                     if "grouped_mm" in item.kind and item.name in products)


def only_through(trace: SegmentTrace, columns: Collection[str], name: str) -> bool:
    """Whether all that F makes of an input goes through products that members share by ``columns``."""
    reached, through = {name}, False
    for operator in trace.phase_operators(Phase.F):
        if not reached.isdisjoint(operator.inputs):
            if operator.name in columns:
                through = True
            else:
                reached.add(operator.name)
    return through and reached.isdisjoint(trace.outputs)


def weight_of(name: str, trace: SegmentTrace, makers: dict[str, Operator]) -> str | None:
    """The parameter that a value is a view or a copy of."""
    while name not in trace.parameters:
        maker = makers.get(name)
        if maker is None or not maker.inputs or maker.flops:
            return None
        if (maker.bytes_read or maker.bytes_written) and not maker.kind.startswith(_PASSED):
            return None
        name = maker.inputs[0]
    return name


def products_of(trace: SegmentTrace) -> dict[str, str]:
    """Products with a matrix of parameters by the operator's name, and those that make the gradient of one."""
    makers = {operator.name: operator for operator in trace.operators}
    found: dict[str, str] = {}
    for operator in trace.operators:
        if operator.flops and not operator.kind.startswith(ATTENTION) and operator.phase is not Phase.W:
            weights = [weight for name in operator.inputs if (weight := weight_of(name, trace, makers)) is not None
                       and len(trace.specs[weight].shape) > 1]
            if weights:
                found[operator.name] = weights[0]
    for parameter, grad in zip(trace.parameters, trace.parameter_grads, strict=True):
        pending, seen = [grad], set[str | None]()
        while pending:
            name = pending.pop()
            maker = makers.get(name) if name is not None else None
            if maker is None or name in seen or maker.phase is not Phase.W:
                continue
            seen.add(name)
            if maker.flops:
                found[maker.name] = parameter
            else:
                pending += maker.inputs
    return found
