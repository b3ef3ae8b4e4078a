"""What a member runs in place of an operator whose rule says so: the operators with collectives or offsets inside.

Each takes the builder, the choice and the operator's arguments as local tensors, and gives its result (or results).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from mipipe.graphs.sharding.builder import CPU, Builder, aten, team
from mipipe.graphs.sharding.case import Choice
from mipipe.graphs.sharding.parts import WHOLE, Kind, Part

Program = Callable[..., Any]


def _value(node: fx.Node) -> Tensor:
    found: Tensor = node.meta["val"]
    return found


def mean_part(b: Builder, choice: Choice, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """The mean of a member's part, as its part of the mean."""
    return b.emit(aten.mul.Scalar, b.emit(target, *args, **kwargs), 1.0 / b.size)


def copied(b: Builder, choice: Choice, target: Any, x: fx.Node, source: fx.Node, *rest: Any) -> fx.Node:
    """The source of a copy of equal shape and dtype."""
    return b.emit(aten.clone.default, source)


def addmm_part(b: Builder, choice: Choice, target: Any, bias: fx.Node, x: fx.Node, y: fx.Node,
               **kwargs: Any) -> fx.Node:
    """A part of the product and an equal part of the bias."""
    return b.emit(target, b.emit(aten.mul.Scalar, bias, 1.0 / b.size), x, y, **kwargs)


def add_to_sum(b: Builder, choice: Choice, target: Any, x: fx.Node, y: fx.Node, **kwargs: Any) -> fx.Node:
    """A part of a sum, and of what is added to it an equal share where every member has all, else the member's part."""
    def share(item: fx.Node, part: Part) -> fx.Node:
        if part.kind is Kind.DIVIDED:
            return b.among_zeros(item, part)
        return b.emit(aten.mul.Scalar, item, 1.0 / b.size) if part == WHOLE else item

    x, y = (share(item, part) for item, part in zip((x, y), choice.needs.values(), strict=True))
    return b.emit(target, x, y, **kwargs)


def _local(b: Builder, index: fx.Node, rows: int) -> tuple[fx.Node, fx.Node]:
    """Indices into a member's ``rows`` of a table (0 where they are another's), and where they are its own."""
    local = b.emit(aten.sub.Tensor, index, b.first(rows))
    inside = b.emit(aten.logical_and.default, b.emit(aten.ge.Scalar, local, 0), b.emit(aten.lt.Scalar, local, rows))
    return b.emit(aten.where.self, inside, local, b.emit(aten.new_zeros.default, local, [])), inside


def _only(b: Builder, inside: fx.Node, x: fx.Node) -> fx.Node:
    """Rows of x [..,H] where ``inside`` [..], else zero."""
    return b.emit(aten.where.self, b.emit(aten.unsqueeze.default, inside, -1), x,
                  b.emit(aten.new_zeros.default, x, []))


def embedding_rows(b: Builder, choice: Choice, target: Any, table: fx.Node, index: fx.Node, *rest: Any) -> fx.Node:
    """Look up what is in the member's rows."""
    local, inside = _local(b, index, _value(table).shape[0])
    return _only(b, inside, b.emit(target, table, local))


def embedding_rows_backward(b: Builder, choice: Choice, target: Any, grad: fx.Node, index: fx.Node, rows: int,
                            padding: int, scale: bool) -> fx.Node:
    """The gradient of the member's rows."""
    local, inside = _local(b, index, rows // b.size)
    if padding >= 0:
        inside = b.emit(aten.logical_and.default, inside, b.emit(aten.ne.Scalar, index, padding))
    return b.emit(target, _only(b, inside, grad), local, rows // b.size, -1, False)


def log_softmax(b: Builder, choice: Choice, target: Any, x: fx.Node, dim: int, *rest: Any) -> fx.Node:
    """Over divided classes: maximum and sum of each row cross the team."""
    dtype = _value(x).dtype
    wide = b.emit(aten._to_copy.default, x, dtype=torch.float32) if dtype.itemsize < 4 else x
    top = b.all_reduce(b.emit(aten.amax.default, wide, [dim], True), "max")
    shifted = b.emit(aten.sub.Tensor, wide, top)
    total = b.all_reduce(b.emit(aten.sum.dim_IntList, b.emit(aten.exp.default, shifted), [dim], True))
    out = b.emit(aten.sub.Tensor, shifted, b.emit(aten.log.default, total))
    made: torch.dtype = torch.float32 if rest and rest[0] else dtype
    return out if _value(out).dtype == made else b.emit(aten._to_copy.default, out, dtype=made)


def log_softmax_backward(b: Builder, choice: Choice, target: Any, grad: fx.Node, out: fx.Node, dim: int,
                         dtype: torch.dtype) -> fx.Node:
    """``grad - softmax * sum(grad)`` over divided classes."""
    low = _value(grad).dtype.itemsize < 4
    grad, out = (b.emit(aten._to_copy.default, x, dtype=torch.float32) if low else x for x in (grad, out))
    total = b.all_reduce(b.emit(aten.sum.dim_IntList, grad, [dim], True))
    made = b.emit(aten.sub.Tensor, grad, b.emit(aten.mul.Tensor, b.emit(aten.exp.default, out), total))
    return made if _value(made).dtype == dtype else b.emit(aten._to_copy.default, made, dtype=dtype)


def _nll(b: Builder, logp: fx.Node, target: fx.Node, reduction: int, ignored: int) -> Any:
    """Loss and weight of what is local; means are divided by the weight of all members."""
    made = b.emit(aten.nll_loss_forward.default, logp, target, None, 2 if reduction else 0, ignored)
    loss, weight = b.emit(operator.getitem, made, 0), b.emit(operator.getitem, made, 1)
    if reduction == 1:
        loss, weight = b.all_reduce(loss), b.all_reduce(weight)
        loss = b.emit(aten.div.Tensor, loss, weight)
    return loss, weight


def nll_loss_rows(b: Builder, choice: Choice, op: Any, logp: fx.Node, target: fx.Node, weight: None, reduction: int,
                  ignored: int) -> Any:
    """Some of the rows."""
    return _nll(b, logp, target, reduction, ignored)


def _class_targets(b: Builder, target: fx.Node, ignored: int, classes: int) -> fx.Node:
    """Targets among a member's classes; -100 where they are another's or ignored."""
    local, inside = _local(b, target, classes)
    if ignored >= 0:
        inside = b.emit(aten.logical_and.default, inside, b.emit(aten.ne.Scalar, target, ignored))
    return b.emit(aten.where.self, inside, local, b.emit(aten.new_full.default, local, [], -100))


def nll_loss_classes(b: Builder, choice: Choice, op: Any, logp: fx.Node, target: fx.Node, weight: None,
                     reduction: int, ignored: int) -> Any:
    """Some of the classes: other members' targets count as ignored."""
    return _nll(b, logp, _class_targets(b, target, ignored, _value(logp).shape[1]), reduction, -100)


def nll_loss_classes_backward(b: Builder, choice: Choice, op: Any, grad: fx.Node, logp: fx.Node, target: fx.Node,
                              weight: None, reduction: int, ignored: int, total: fx.Node) -> fx.Node:
    """The gradient of a member's classes."""
    local = _class_targets(b, target, ignored, _value(logp).shape[1])
    return b.emit(op, grad, logp, local, None, reduction, -100, total)


def _own_head(b: Builder, x: fx.Node) -> fx.Node:
    """The one key head [B,1,T,D] that a member's query heads read, of fewer heads than members."""
    groups = _value(x).shape[1]
    number = b.emit(aten.floor_divide.default, b.first(1), b.size // groups)
    return b.emit(aten.index_select.default, x, 1, number)


def attention_few_keys(b: Builder, choice: Choice, op: Any, q: fx.Node, k: fx.Node, v: fx.Node,
                       *rest: Any) -> fx.Node:
    """Some of the query heads, with the key head that they share."""
    return b.emit(op, q, _own_head(b, k), _own_head(b, v), *rest)


def attention_few_keys_backward(b: Builder, choice: Choice, op: Any, grad: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node,
                                *rest: Any) -> Any:
    """Gradients of keys and values are summed over the members that share a head."""
    groups = _value(k).shape[1]
    made = b.emit(op, grad, q, _own_head(b, k), _own_head(b, v), *rest)

    def whole(index: int) -> fx.Node:
        gathered = b.emit(team.all_gather.default, b.emit(operator.getitem, made, index), 1, 1, b.size, b.axis)
        batch, heads, *shape = _value(gathered).shape
        split = b.view(gathered, [batch, groups, heads // groups, *shape])
        return b.emit(aten.sum.dim_IntList, split, [2])

    return b.emit(operator.getitem, made, 0), whole(1), whole(2)


def _band(b: Builder, q: fx.Node, k: fx.Node, causal: bool, window: int) -> fx.Node | None:
    """The mask [S/T,T'] of a member's queries; None where they see all keys."""
    if not causal and not window:
        return None
    queries, keys = _value(q).shape[2], _value(k).shape[2]
    places = b.emit(aten.add.Tensor, b.emit(aten.arange.default, queries, device=CPU), b.first(queries))
    places = b.emit(aten.add.Tensor, places, keys - queries * b.size)
    distance = b.emit(aten.sub.Tensor, b.emit(aten.unsqueeze.default, places, 1),
                      b.emit(aten.arange.default, keys, device=CPU))
    if not causal:
        return b.emit(aten.lt.Scalar, b.emit(aten.abs.default, distance), window)
    seen = b.emit(aten.ge.Scalar, distance, 0)
    return b.emit(aten.logical_and.default, seen, b.emit(aten.lt.Scalar, distance, window)) if window else seen


def attention_queries(b: Builder, choice: Choice, op: Any, q: fx.Node, k: fx.Node, v: fx.Node, mask: None, sinks: None,
                      causal: bool, window: int, *rest: Any) -> fx.Node:
    """Some of the queries, with all keys."""
    return b.emit(op, q, k, v, _band(b, q, k, causal, window), None, False, 0, *rest)


def attention_queries_backward(b: Builder, choice: Choice, op: Any, grad: fx.Node, q: fx.Node, k: fx.Node, v: fx.Node,
                               mask: None, sinks: None, out: fx.Node, lse: fx.Node, causal: bool, window: int,
                               *rest: Any) -> fx.Node:
    """Gradients of some of the queries, and parts of those of all keys."""
    return b.emit(op, grad, q, k, v, _band(b, q, k, causal, window), None, out, lse, False, 0, *rest)


def grouped_own(b: Builder, choice: Choice, op: Any, x: fx.Node, bank: fx.Node, offsets: fx.Node) -> fx.Node:
    """The rows of the member's experts."""
    return b.emit(team.owned_mm.default, x, bank, *b.own(offsets), b.size)


def grouped_own_weight(b: Builder, choice: Choice, op: Any, x: fx.Node, grad: fx.Node, offsets: fx.Node) -> fx.Node:
    """The weight gradients of the member's experts."""
    return b.emit(team.owned_mm_weight.default, x, grad, *b.own(offsets), b.size)


PROGRAMS: dict[str, Program] = {function.__name__: function for function in (
    mean_part, copied, addmm_part, add_to_sum, embedding_rows, embedding_rows_backward, log_softmax,
    log_softmax_backward, nll_loss_rows, nll_loss_classes, nll_loss_classes_backward, attention_few_keys,
    attention_few_keys_backward, attention_queries, attention_queries_backward, grouped_own, grouped_own_weight)}
