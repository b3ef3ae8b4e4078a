"""Rules for the products with banks of experts, and for tokens that travel to their experts on other devices and back.

What a bank's product reads is whole, or routed: every member sends the experts its own part of the tokens, and computes
what arrives from all devices that share the experts with it (`mipipe.graphs.operators.expert_kernels`). Members, like
copies of the plan, then have parts of the sum that is a bank's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

from mipipe.graphs.operators.expert_kernels import RETURN, ROUTE, SEND
from mipipe.graphs.sharding.case import Case, Choice
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part, divided, routed
from mipipe.graphs.sharding.rules_views import Rule


def route(case: Case) -> Iterator[Choice | None]:
    """``all_to_all_route(index [T,k], experts)``: by tokens, as the index lies, else as the team divides tokens."""
    index = case.name(0)
    assert index is not None
    offered = case.tokens(case.shape(index))
    for part in dict.fromkeys([*case.divisions(index), *([offered] if offered is not None else [])]):
        if part.dim == 0:
            rows, counts = routed(part), routed(part, -1)
            yield case.choice({index: part}, rows, rows, counts, counts)


def send(case: Case) -> Iterator[Choice | None]:
    """``all_to_all_send(rows [T*k,H], order, arrive, splits)``: the rows of a member's own tokens."""
    yield from _travelling(case, away=True)


def give_back(case: Case) -> Iterator[Choice | None]:
    """``all_to_all_return(rows [N,H], order, arrive, splits)``: to the tokens they are of."""
    yield from _travelling(case, away=False)


def _travelling(case: Case, away: bool) -> Iterator[Choice | None]:
    rows, order, arrive, splits = (case.name(index) for index in range(4))
    assert rows is not None and order is not None
    part = case.parts[order]
    if part.routed:
        tokens = divided(0, part.sections)
        needs: dict[str | None, Part] = {rows: tokens if away else part, order: part, arrive: part,
                                         splits: part.at(-1)}
        yield case.choice(needs, part if away else tokens)


def grouped_product(case: Case) -> Iterator[Choice | None]:
    """``grouped_mm(x [N,K], bank [E,K,M], offsets)``: columns, the inner dimension, or by expert; routed rows with the
    whole bank."""
    x, bank, offsets = case.name(0), case.name(1), case.name(2)
    assert x is not None and bank is not None and offsets is not None
    share = 1.0 / case.size
    for part in case.divisions(bank):
        if part.dim == 2:
            yield case.choice({x: WHOLE, bank: part, offsets: WHOLE}, part.at(1), share=share)
        elif part.dim == 1:
            yield case.choice({x: part, bank: part, offsets: WHOLE}, PARTIAL, share=share)
        elif part.sections == 1:
            owned = Part(Kind.OWNED, offsets=offsets)
            given = case.parts[x] if case.parts[x] == owned else WHOLE
            yield case.choice({x: given, bank: part, offsets: WHOLE}, owned, share=share, program="grouped_own")
    for part in case.divisions(x):
        if part.dim == 1:
            yield case.choice({x: part, bank: part.at(1), offsets: WHOLE}, PARTIAL, share=share)
        elif part.routed:
            yield case.choice({x: part, bank: WHOLE, offsets: part.at(-1)}, part, share=share)


def grouped_product_weight(case: Case) -> Iterator[Choice | None]:
    """``grouped_mm_weight(x [N,K], grad [N,M], offsets) -> [E,K,M]``; of routed rows the members' parts of a sum."""
    x, grad, offsets = case.name(0), case.name(1), case.name(2)
    assert x is not None and grad is not None and offsets is not None
    share = 1.0 / case.size
    for part in case.divisions(x):
        if part.dim == 1:
            yield case.choice({x: part, grad: WHOLE, offsets: WHOLE}, part.at(1), share=share)
        elif part.routed:
            yield case.choice({x: part, grad: part, offsets: part.at(-1)}, PARTIAL, share=share)
    for part in case.divisions(grad):
        if part.dim == 1:
            yield case.choice({x: WHOLE, grad: part, offsets: WHOLE}, part.at(2), share=share)
    owned = Part(Kind.OWNED, offsets=offsets)
    if owned in (case.parts[x], case.parts[grad]):
        needs: dict[str | None, Part] = {name: case.parts[name] if case.parts[name] == owned else WHOLE
                                         for name in (x, grad)}
        yield case.choice({**needs, offsets: WHOLE}, divided(0), share=share, program="grouped_own_weight")


EXPERTS: dict[str, Rule] = {
    ROUTE: route, SEND: send, RETURN: give_back,
    "mipipe.grouped_mm.default": grouped_product, "mipipe.grouped_mm_weight.default": grouped_product_weight,
}
