"""Rules for operators that move elements and compute nothing: views, slices, concatenations, expansions.

All are linear, so sums over members pass through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from mipipe.graphs.operators.collectives import block_lengths
from mipipe.graphs.sharding.case import Case, Choice, positive
from mipipe.graphs.sharding.parts import (
    PARTIAL,
    WHOLE,
    Kind,
    Part,
    divided,
    local_shape,
    reshaped,
    side_by_side,
    within,
)

Rule = Callable[[Case], Iterator[Choice | None]]


def _linear(case: Case, name: str) -> Iterator[Choice | None]:
    if case.parts[name].kind is Kind.PARTIAL:
        yield case.choice({name: PARTIAL}, *(PARTIAL,) * len(case.op.outputs))


def view(case: Case) -> Iterator[Choice | None]:
    """Another shape of the same elements in row-major order."""
    name = case.name(0)
    assert name is not None
    yield from _linear(case, name)
    part = case.parts[name]
    if part.kind is Kind.OWNED and case.out[0] == case.shape(name)[0]:
        yield case.choice({name: part}, part)
    if part.kind is Kind.DIVIDED:
        made = reshaped(case.shape(name), case.out, part, case.size)
        if made is not None:
            yield case.choice({name: part}, made, args={1: _sizes(case, made)})


def _sizes(case: Case, made: Part) -> list[int]:
    """A member's sizes in place of those at 1; -1 stays, where the number of rows is that of the argument."""
    asked = case.value(1)
    return asked if asked[made.dim] == -1 else list(local_shape(case.out, made, case.size))


def _mapped(case: Case, target: Mapping[int, int], owned: bool = False) -> Iterator[Choice | None]:
    """An operator whose dimension ``target[d]`` is dimension d of its argument."""
    name = case.name(0)
    assert name is not None
    yield from _linear(case, name)
    part = case.parts[name]
    if part.kind is Kind.OWNED and owned:
        yield case.choice({name: part}, part)
    if part.kind is Kind.DIVIDED and part.dim in target:
        yield case.choice({name: part}, part.at(target[part.dim]))


def transpose(case: Case) -> Iterator[Choice | None]:
    dims = len(case.out)
    a, b = (positive(case.value(1 + i), dims) for i in range(2)) if len(case.op.args) > 1 else (0, dims - 1)
    swap = {dim: {a: b, b: a}.get(dim, dim) for dim in range(dims)}
    return _mapped(case, swap, 0 not in (a, b) or a == b)


def permute(case: Case) -> Iterator[Choice | None]:
    order = [positive(dim, len(case.out)) for dim in case.value(1)]
    return _mapped(case, {dim: place for place, dim in enumerate(order)}, order[:1] == [0])


def unsqueeze(case: Case) -> Iterator[Choice | None]:
    dim = positive(case.value(1), len(case.out))
    return _mapped(case, {old: old + (old >= dim) for old in range(len(case.out) - 1)}, dim > 0)


def squeeze(case: Case) -> Iterator[Choice | None]:
    shape = case.shape(case.name(0) or "")
    asked = case.value(1, list(range(len(shape))))
    gone = {positive(dim, len(shape)) for dim in (asked if isinstance(asked, list) else [asked])}
    gone = {dim for dim in gone if shape[dim] == 1}
    left = [dim for dim in range(len(shape)) if dim not in gone]
    return _mapped(case, {dim: place for place, dim in enumerate(left)}, 0 not in gone)


def select(case: Case) -> Iterator[Choice | None]:
    shape = case.shape(case.name(0) or "")
    dim = positive(case.value(1), len(shape))
    return _mapped(case, {old: old - (old > dim) for old in range(len(shape)) if old != dim}, dim > 0)


def expand(case: Case) -> Iterator[Choice | None]:
    """Dimensions of size 1, or new ones in front, become larger."""
    name = case.name(0)
    assert name is not None
    yield from _linear(case, name)
    part, new = case.parts[name], len(case.out) - len(case.shape(name))
    if part.kind is Kind.DIVIDED and case.out[part.dim + new] == case.shape(name)[part.dim]:
        made = part.at(part.dim + new)
        yield case.choice({name: part}, made, args={1: _sizes(case, made)})
    if part.kind is Kind.OWNED and not new and case.out[0] == case.shape(name)[0]:
        yield case.choice({name: part}, part)


def slice_(case: Case) -> Iterator[Choice | None]:
    """A range of one dimension: any where another is divided, else whole sections."""
    name = case.name(0)
    assert name is not None
    yield from _linear(case, name)
    part, shape = case.parts[name], case.shape(name)
    dim = positive(case.value(1, 0), len(shape))
    if part.kind is Kind.OWNED and dim > 0:
        yield case.choice({name: part}, part)
    if part.kind is not Kind.DIVIDED:
        return
    if part.dim != dim:
        yield case.choice({name: part}, part)
        return
    length = shape[dim]
    low, high, _ = slice(case.value(2), case.value(3), case.value(4, 1)).indices(length)
    made = within(length, part, low, high)
    if case.value(4, 1) == 1 and made is not None:
        yield case.choice({name: part}, made, args={2: low // case.size, 3: high // case.size})


def slice_backward(case: Case) -> Iterator[Choice | None]:
    """``slice_backward(grad, sizes, dim, ...)`` and ``select_backward(grad, sizes, dim, index)``: zeros around."""
    name = case.name(0)
    assert name is not None
    yield from _linear(case, name)
    part, dim = case.parts[name], positive(case.value(2), len(case.out))
    gone = len(case.out) - len(case.shape(name))
    if part.kind is Kind.DIVIDED:
        place = part.dim + (1 if gone and part.dim >= dim else 0)
        if place != dim:
            made = part.at(place)
            yield case.choice({name: part}, made, args={1: list(local_shape(case.out, made, case.size))})
        elif not gone and case.value(5, 1) == 1:
            low, high, _ = slice(case.value(3), case.value(4)).indices(case.out[dim])
            for sections in case.blocks(case.out[dim]):
                made = divided(dim, sections)
                if within(case.out[dim], made, low, high) == part:
                    yield case.choice({name: part}, made, args={
                        1: list(local_shape(case.out, made, case.size)), 3: low // case.size, 4: high // case.size})


def cat(case: Case) -> Iterator[Choice | None]:
    """Along another dimension than the divided one; along the same where all are divided."""
    names = [name for name in case.names(0) if name is not None]
    dim = positive(case.value(1, 0), len(case.out))
    kinds = {case.parts[name].kind for name in names}
    if kinds == {Kind.PARTIAL}:
        yield case.choice(dict.fromkeys(names, PARTIAL), PARTIAL)
    owned = [case.parts[name] for name in names if case.parts[name].kind is Kind.OWNED]
    if owned and dim > 0:
        yield case.choice({name: part if part.kind is Kind.OWNED else WHOLE for name in names
                           for part in [case.parts[name]]}, owned[0])
    for part in case.divisions(*names):
        if part.dim != dim:
            yield case.choice(dict.fromkeys(names, part), part)
        elif all(case.parts[name].kind is Kind.DIVIDED and case.parts[name].dim == dim for name in names):
            lengths = [length for name in names
                       for length in block_lengths(case.shape(name)[dim], case.parts[name].sections)]
            yield case.choice({name: case.parts[name] for name in names}, divided(dim, side_by_side(lengths)))
            return


def stack(case: Case) -> Iterator[Choice | None]:
    """Side by side along a new dimension: divided as all of them are."""
    names = [name for name in case.names(0) if name is not None]
    dim = positive(case.value(1, 0), len(case.out))
    if {case.parts[name].kind for name in names} == {Kind.PARTIAL}:
        yield case.choice(dict.fromkeys(names, PARTIAL), PARTIAL)
    for part in case.divisions(*names):
        yield case.choice(dict.fromkeys(names, part), part.at(part.dim + (part.dim >= dim)))


def split(case: Case) -> Iterator[Choice | None]:
    """``split(x, size or sizes, dim)``, ``unbind(x, dim)``: any dimension but the divided one, or whole sections."""
    name = case.name(0)
    assert name is not None
    yield from _linear(case, name)
    part, shape = case.parts[name], case.shape(name)
    unbound = case.op.kind.startswith("aten.unbind")
    dim = positive(case.value(1 if unbound else 2, 0), len(shape))
    count = len(case.op.outputs)
    if part.kind is Kind.OWNED and dim > 0 and not unbound:
        yield case.choice({name: part}, *(part,) * count)
    if part.kind is not Kind.DIVIDED:
        return
    if part.dim != dim:
        yield case.choice({name: part}, *(part.at(part.dim - (unbound and part.dim > dim)),) * count)
    elif not unbound:
        ends = [0, *accumulate(spec.shape[dim] for spec in case.op.outputs)]
        made = [within(shape[dim], part, *ends[place:place + 2]) for place in range(count)]
        if None not in made:
            sizes = case.value(1)
            local = [length // case.size for length in sizes] if isinstance(sizes, list) else sizes // case.size
            yield case.choice({name: part}, *filter(None, made), args={1: local})


def slice_scatter(case: Case) -> Iterator[Choice | None]:
    """``slice_scatter(x, source, dim, ...)``: x with a range of a dimension replaced; any other may be divided."""
    x, source = case.name(0), case.name(1)
    assert x is not None and source is not None
    dim = positive(case.value(2, 0), len(case.out))
    if case.parts[source].kind is Kind.PARTIAL and (case.is_zero(x) or case.parts[x].kind is Kind.PARTIAL):
        yield case.choice({x: WHOLE if case.is_zero(x) else PARTIAL, source: PARTIAL}, PARTIAL)
    for part in case.divisions(x, source):
        if part.dim != dim:
            yield case.choice({x: part, source: part}, part)


VIEWS: dict[str, Rule] = {
    "aten.view.default": view, "aten._unsafe_view.default": view, "aten.reshape.default": view,
    "aten.t.default": transpose, "aten.transpose.int": transpose, "aten.permute.default": permute,
    "aten.unsqueeze.default": unsqueeze, "aten.squeeze.dim": squeeze, "aten.squeeze.dims": squeeze,
    "aten.squeeze.default": squeeze, "aten.select.int": select, "aten.expand.default": expand,
    "aten.slice.Tensor": slice_, "aten.slice_backward.default": slice_backward,
    "aten.select_backward.default": slice_backward, "aten.cat.default": cat, "aten.stack.default": stack,
    "aten.split.Tensor": split, "aten.slice_scatter.default": slice_scatter, "aten.split_with_sizes.default": split,
    "aten.unbind.int": split,
}
