"""Rules for pointwise operators, reductions, softmax, norms and matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.operator_graph import DTYPE_BYTES
from mipipe.graphs.sharding.case import Case, Choice, positive
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part
from mipipe.graphs.sharding.rules_views import Rule

_LINEAR = {"aten.neg.default", "aten.clone.default", "aten.mul.Scalar", "aten.div.Scalar", "aten.mul.Tensor",
           "aten.div.Tensor", "aten.add.Tensor", "aten.sub.Tensor"}
"""Pointwise operators that are linear in one tensor (with a number beside it), or, the last two, in both."""


def _is_linear(case: Case) -> bool:
    """Whether a pointwise operator on sums over members may work on the members' parts, all of them partial."""
    tensors = sum(isinstance(value, dict) and set(value) == {"ref"} for value in case.op.args)
    if case.op.kind in ("aten.add.Tensor", "aten.sub.Tensor"):
        return tensors == 2
    return case.op.kind in _LINEAR and tensors == 1


def pointwise(case: Case) -> Iterator[Choice | None]:
    """Every result element from the elements at its place, under broadcasting."""
    names, out = case.op.inputs, case.out
    kinds = [case.parts[name].kind for name in names]
    if set(kinds) == {Kind.PARTIAL} and _is_linear(case) and all(case.shape(name) == out for name in names):
        yield case.choice(dict.fromkeys(names, PARTIAL), PARTIAL)
    adds = case.op.kind == "aten.add.Tensor"
    if case.deferred and kinds.count(Kind.PARTIAL) == 1 and set(kinds) <= (
            {Kind.PARTIAL, Kind.WHOLE, Kind.DIVIDED} if adds else {Kind.PARTIAL, Kind.WHOLE}):
        yield case.choice({name: case.parts[name] for name in names}, PARTIAL, program="add_to_sum" if adds else "")
    wanted: dict[Part, None] = {}
    for name in names:
        part, shift = case.parts[name], len(out) - len(case.shape(name))
        if part.kind is Kind.DIVIDED and out[part.dim + shift] == case.shape(name)[part.dim]:
            wanted[part.at(part.dim + shift)] = None
        elif part.kind is Kind.OWNED and not shift and case.shape(name)[0] == out[0]:
            wanted[part] = None
        elif part.kind is Kind.PARTIAL and case.scatter(out) is not None and case.shape(name) == out:
            wanted[case.scatter(out) or part] = None
    for part in wanted:
        needs = {name: _aligned(case, name, part) for name in names}
        yield case.choice(needs, *(part,) * len(case.op.outputs))


def _aligned(case: Case, name: str, part: Part) -> Part:
    """How an argument of a pointwise operator lies where the result lies as ``part``."""
    shape, shift = case.shape(name), len(case.out) - len(case.shape(name))
    if part.kind is Kind.OWNED:
        return case.parts[name] if case.parts[name] == part else WHOLE
    if part.dim < shift or shape[part.dim - shift] == 1 < case.out[part.dim]:
        return WHOLE
    return part.at(part.dim - shift)


def like(case: Case) -> Iterator[Choice | None]:
    """A new tensor of the argument's shape: its values do not matter."""
    name = case.op.inputs[0]
    part = case.parts[name]
    yield case.choice({}, WHOLE) if part.kind is not Kind.DIVIDED else case.choice({name: part}, part)


def made_whole(case: Case) -> Iterator[Choice | None]:
    """A new tensor of a given shape: the argument only says which device and dtype."""
    yield case.choice({}, WHOLE)


def copy(case: Case) -> Iterator[Choice | None]:
    """``copy(x, source)``: the source in the dtype of x; where both have one shape and dtype, the source."""
    x, source = case.name(0), case.name(1)
    if x is not None and source is not None and case.specs[x] == case.specs[source]:
        yield case.choice({source: case.parts[source]}, case.parts[source], program="copied")


def along(case: Case) -> Iterator[Choice | None]:
    """An operator that works along given dimensions and on each place of the others alone."""
    name = case.name(0)
    assert name is not None
    shape = case.shape(name)
    value = case.value(_DIM.get(case.op.kind, 1), -1)
    dims = {positive(dim, len(shape)) for dim in (value if isinstance(value, list) else [value])}
    keeps = len(case.out) == len(shape)
    for part in case.divisions(*case.op.inputs):
        if part.dim not in dims:
            gone = 0 if keeps else sum(dim < part.dim for dim in dims)
            yield case.choice(dict.fromkeys(case.op.inputs, part), *(part.at(part.dim - gone),) * len(case.op.outputs))
    part = case.parts[name]
    if part.kind is Kind.OWNED and 0 not in dims and len(case.op.inputs) == 1:
        yield case.choice({name: part}, *(part,) * len(case.op.outputs))


_DIM = {"aten._softmax_backward_data.default": 2, "aten._log_softmax_backward_data.default": 2,
        "aten.topk.default": 2}
"""Where an operator along dimensions carries them; else at 1."""


def total(case: Case) -> Iterator[Choice | None]:
    """Sums and means: over a divided dimension the members' results are parts of the sum."""
    name = case.name(0)
    assert name is not None
    part, shape = case.parts[name], case.shape(name)
    listed = case.value(1)
    dims = {positive(dim, len(shape)) for dim in listed} if isinstance(listed, list) and listed else set(
        range(len(shape)))
    keeps = len(case.out) == len(shape)
    if part.kind is Kind.PARTIAL:
        yield case.choice({name: PARTIAL}, PARTIAL)
    if part.kind is Kind.OWNED and 0 not in dims:
        yield case.choice({name: part}, part)
    if part.kind is not Kind.DIVIDED:
        return
    if part.dim in dims:
        mean = case.op.kind.startswith("aten.mean")
        yield case.choice({name: part}, PARTIAL, program="mean_part" if mean else "")
    else:
        gone = 0 if keeps else sum(dim < part.dim for dim in dims)
        yield case.choice({name: part}, part.at(part.dim - gone))


def log_softmax(case: Case) -> Iterator[Choice | None]:
    """Also along a divided dimension (the vocabulary): maximum and sum of each row cross the team, no logits do."""
    yield from along(case)
    backward = case.op.kind == "aten._log_softmax_backward_data.default"
    name = case.name(0)
    assert name is not None
    shape = case.shape(name)
    dim = positive(case.value(2 if backward else 1), len(shape))
    for part in case.divisions(*case.op.inputs):
        if part.dim == dim:
            rows = math.prod(shape) // shape[dim] * max(4, DTYPE_BYTES[case.specs[name].dtype])
            yield case.choice(dict.fromkeys(case.op.inputs, part), part,
                              inside=((CollectiveKind.ALL_REDUCE, rows),) * (1 if backward else 2),
                              program="log_softmax_backward" if backward else "log_softmax")


def layer_norm(case: Case) -> Iterator[Choice | None]:
    """``native_layer_norm(x, shape, weight, bias, eps)``: divided along what is not normalised."""
    x = case.name(0)
    assert x is not None
    lead = len(case.shape(x)) - len(case.value(1))
    for part in case.divisions(x):
        if part.dim < lead:
            yield case.choice({x: part, case.name(2): WHOLE, case.name(3): WHOLE}, part, part, part)


def layer_norm_backward(case: Case) -> Iterator[Choice | None]:
    """``native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, mask)``: weight gradients are sums."""
    grad, x = case.name(0), case.name(1)
    assert x is not None and grad is not None
    lead = len(case.shape(x)) - len(case.value(2))
    wanted = case.divisions(grad, x)
    offered = case.scatter(case.shape(x)) if case.parts[grad].kind is Kind.PARTIAL else None
    for part in dict.fromkeys([*wanted, *([offered] if offered else [])]):
        if part.dim < lead:
            needs: dict[str | None, Part] = {case.name(index): part for index in (0, 1, 3, 4)}
            yield case.choice({**needs, case.name(5): WHOLE, case.name(6): WHOLE}, part, PARTIAL, PARTIAL)


def product(case: Case) -> Iterator[Choice | None]:
    """``mm`` and ``bmm``: rows, columns, batches, or the inner dimension, which gives parts of a sum."""
    a, b = case.name(0), case.name(1)
    assert a is not None and b is not None
    yield from _products(case, a, b, len(case.out) - 2)


def product_with_bias(case: Case) -> Iterator[Choice | None]:
    """``addmm(bias, a, b)``, ``baddbmm``: where the inner dimension is divided, each member adds its share of the
    bias."""
    bias, a, b = (case.name(index) for index in range(3))
    assert bias is not None and a is not None and b is not None
    shift = len(case.out) - len(case.shape(bias))
    for choice in _products(case, a, b, len(case.out) - 2):
        if choice is None:
            continue
        made = choice.gives[0]
        if made.kind is Kind.PARTIAL:
            yield case.choice({**choice.needs, bias: WHOLE}, PARTIAL, share=choice.share, program="addmm_part")
            continue
        place = made.dim - shift
        part = made.at(place) if place >= 0 and case.shape(bias)[place] != 1 else WHOLE
        yield case.choice({**choice.needs, bias: part}, made, share=choice.share)


def _products(case: Case, a: str, b: str, lead: int) -> Iterator[Choice | None]:
    share = 1.0 / case.size
    found: dict[tuple[Part, Part, Part], None] = {}
    for part in case.divisions(a):
        if part.dim < lead:
            found[part, part, part] = None
        elif part.dim == lead:
            found[part, WHOLE, part] = None
        else:
            found[part, part.at(lead), PARTIAL] = None
    offered = case.scatter(case.shape(a)) if case.parts[a].kind is Kind.PARTIAL else None
    if offered is not None and offered.dim == lead:
        found[offered, WHOLE, offered] = None
    for part in case.divisions(b):
        if part.dim < lead:
            found[part, part, part] = None
        elif part.dim == lead:
            found[part.at(lead + 1), part, PARTIAL] = None
        else:
            found[WHOLE, part, part] = None
    for need_a, need_b, gives in found:
        needs = {a: need_a, b: need_b}
        if a == b and need_a != need_b:
            continue
        yield case.choice(needs, gives, share=share)


MATH: dict[str, Rule] = {
    "aten.mm.default": product, "aten.bmm.default": product, "aten.addmm.default": product_with_bias,
    "aten.baddbmm.default": product_with_bias,
    "aten.sum.dim_IntList": total, "aten.sum.default": total, "aten.mean.dim": total, "aten.mean.default": total,
    "aten._softmax.default": along, "aten._softmax_backward_data.default": along,
    "aten._log_softmax.default": log_softmax, "aten._log_softmax_backward_data.default": log_softmax,
    "aten.amax.default": along, "aten.amin.default": along, "aten.cumsum.default": along, "aten.topk.default": along,
    "aten.sort.default": along, "aten.argmax.default": along, "aten.logsumexp.default": along,
    "aten.native_layer_norm.default": layer_norm, "aten.native_layer_norm_backward.default": layer_norm_backward,
    "aten.zeros_like.default": like, "aten.ones_like.default": like, "aten.empty_like.default": like,
    "aten.full_like.default": like, "aten.new_zeros.default": made_whole, "aten.new_empty.default": made_whole,
    "aten.new_empty_strided.default": made_whole, "aten.copy.default": copy,
    "aten.new_full.default": made_whole, "aten.new_ones.default": made_whole,
}
