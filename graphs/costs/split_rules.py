"""How a team may share a segment's parameters, seen from its trace alone: columns, then rows.

The structural rule of tensor parallelism (Shoeybi et al., "Megatron-LM", arXiv 1909.08053, section 3): of the products
with parameters in a block, the last ones split their weights by rows and leave partial sums, the nearest ones before
them by columns, and what lies between is split with them (attention by heads). Products further up (the
down-projections of latent attention) stay whole. Pairs are taken from the end of the segment, so a whole layer gives
two. A head is split by its vocabulary, as is an embedding; banks of experts are split by experts, never by rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mipipe.graphs.again import copied
from mipipe.graphs.operator_graph import Operator, Phase, Role, SegmentTrace

Cut = Literal["columns", "rows", "whole", "bank"]

ATTENTION = "mipipe.attention"
_PASSED = ("aten._to_copy.",)
"""Operators that a weight passes on its way into a product, beside views."""


@dataclass(frozen=True, slots=True)
class SplitRules:
    """``cuts`` by parameter name; ``shared``: values of which a member of a team holds its part; ``products``: of every
    operator that is a product with a parameter, or of a parameter's gradient, that parameter."""

    cuts: dict[str, Cut]
    shared: frozenset[str]
    products: dict[str, str]

    def has(self, cut: Cut) -> bool:
        return cut in self.cuts.values()

    def divided(self, operator: Operator) -> bool:
        """Whether a member of a team runs its part of the operator."""
        parameter = self.products.get(operator.name)
        if parameter is not None:
            return self.cuts[parameter] in ("columns", "rows")
        return operator.name in self.shared


def split_rules(trace: SegmentTrace, role: Role) -> SplitRules:
    """The rules for one trace; ``role`` tells a head or an embedding from a product that stays whole."""
    makers = {operator.name: operator for operator in trace.operators}
    products = _products(trace, makers)
    cuts: dict[str, Cut] = dict.fromkeys(trace.parameters, "whole")
    forward = {name: parameter for name, parameter in products.items() if makers[name].phase is Phase.F}
    for name, parameter in forward.items():
        if "grouped_mm" in makers[name].kind:
            cuts[parameter] = "bank"
    left = [name for name, parameter in forward.items() if cuts[parameter] == "whole"]
    if role is Role.HEAD:
        cuts |= {forward[name]: "columns" for name in left[-1:]}
    elif role is Role.EMBEDDING:
        cuts |= {name: "rows" for name in trace.parameters if len(trace.specs[name].shape) == 2}
    else:
        _pair(trace, forward, left, cuts)
    return SplitRules(cuts, _shared(trace, products, cuts), products)


def indivisible(rules: SplitRules, trace: SegmentTrace, members: int, key_heads: int | None) -> dict[str, str]:
    """Parameters that the rules divide and so many members cannot, each with the reason: they stay whole on every one.

    ``key_heads``: of the segment's attention; None where it has none.
    """
    divided = {name: cut for name, cut in rules.cuts.items() if cut in ("columns", "rows")}
    widest = max((trace.specs[name].shape[0] for name, cut in divided.items() if cut == "columns"), default=0)
    found = {}
    for name, cut in divided.items():
        shape = trace.specs[name].shape
        table = cut == "rows" and name not in rules.products.values()
        size = shape[0] if cut == "columns" or table else shape[-1]
        if size % members:
            found[name] = f"{size:,} {'rows' if cut == 'columns' or table else 'columns'}"
        elif key_heads is not None and cut == "columns" and size < widest and key_heads % members:
            found[name] = f"{key_heads} key heads"
    return found


def fitting(rules: SplitRules, trace: SegmentTrace, members: int, key_heads: int | None) -> SplitRules:
    """The rules with what so many members cannot divide left whole (`indivisible`)."""
    left = indivisible(rules, trace, members, key_heads)
    if not left:
        return rules
    cuts: dict[str, Cut] = {name: "whole" if name in left else cut for name, cut in rules.cuts.items()}
    return SplitRules(cuts, _shared(trace, rules.products, cuts), rules.products)


def only_through(trace: SegmentTrace, rules: SplitRules, name: str) -> bool:
    """Whether all that F makes of an input goes through products that members share by columns."""
    reached, through = {name}, False
    for operator in trace.phase_operators(Phase.F):
        if not reached.isdisjoint(operator.inputs):
            if rules.cuts.get(rules.products.get(operator.name, "")) == "columns":
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


def _products(trace: SegmentTrace, makers: dict[str, Operator]) -> dict[str, str]:
    """Products with a matrix of parameters by the operator's name, and those that make the gradient of one."""
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


def _pair(trace: SegmentTrace, forward: dict[str, str], left: list[str], cuts: dict[str, Cut]) -> None:
    """Rows and columns in pairs from the end of the segment, into ``cuts``."""
    before: dict[str, frozenset[str]] = {}
    for operator in trace.phase_operators(Phase.F):
        sources = frozenset[str]().union(*(before.get(name, frozenset()) for name in operator.inputs))
        before[operator.name] = sources | {operator.name} if operator.name in forward else sources
    while left:
        last = [name for name in left if not any(name in before[other] and name != other for other in left)]
        above = [name for name in left if any(name in before[row] and name != row for row in last)]
        near = [name for name in above if not any(name in before[other] and name != other for other in above)]
        if not near:
            return
        rows = [row for row in last if any(name in before[row] for name in near)]
        cuts.update({forward[name]: "rows" for name in rows})
        cuts.update({forward[name]: "columns" for name in near})
        done = set(last) | set(near)
        left[:] = [name for name in left if name not in done]


def _shared(trace: SegmentTrace, products: dict[str, str], cuts: dict[str, Cut]) -> frozenset[str]:
    """Values that are split with the weights: made by columns (backward: by rows), and what is made of them."""
    shared: set[str] = set()
    inside: dict[Phase, Cut] = {Phase.F: "columns", Phase.I: "rows"}
    for operator in trace.operators:
        parameter, first = products.get(operator.name), copied(operator.name)
        if first is not None:
            split = first in shared
        elif parameter is not None:
            split = cuts[parameter] == inside.get(operator.phase)
        else:
            split = any(name in shared for name in operator.inputs)
        if split:
            shared.add(operator.name)
    return frozenset(shared)
