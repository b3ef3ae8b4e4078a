"""Rules for tables, losses, indexing, convolutions and attention."""

from __future__ import annotations

from collections.abc import Iterator

from mipipe.graphs.modes import CollectiveKind
from mipipe.graphs.sharding.case import Case, Choice, positive
from mipipe.graphs.sharding.parts import PARTIAL, WHOLE, Kind, Part, divided
from mipipe.graphs.sharding.rules_views import Rule


def embedding(case: Case) -> Iterator[Choice | None]:
    """``embedding(table, index)``: by the index, also where that comes whole and the result is wanted in parts, by the
    table's columns, or by its rows (parts of a sum)."""
    table, index = case.name(0), case.name(1)
    assert table is not None and index is not None
    last = len(case.out) - 1
    wanted = [case.goal] if case.goal is not None and case.goal.kind is Kind.DIVIDED and case.goal.dim < last else []
    for part in dict.fromkeys([*case.divisions(index), *wanted]):
        yield case.choice({table: WHOLE, index: part}, part)
    for part in case.divisions(table):
        if part.dim == 1:
            yield case.choice({table: part, index: WHOLE}, part.at(last))
        elif part.sections == 1:
            yield case.choice({table: part, index: WHOLE}, PARTIAL, program="embedding_rows")


def embedding_backward(case: Case) -> Iterator[Choice | None]:
    """``embedding_dense_backward(grad, index, rows, padding, scale)``."""
    grad, index = case.name(0), case.name(1)
    assert grad is not None and index is not None
    last = len(case.shape(grad)) - 1
    if case.value(4):
        return
    for part in case.divisions(grad, index):
        if part.dim < last:
            yield case.choice({grad: part, index: part}, PARTIAL)
        elif part.dim == last:
            yield case.choice({grad: part, index: WHOLE}, part.at(1))
    if case.goal is not None and case.goal.kind is Kind.DIVIDED and case.goal.dim == 0 and case.goal.sections == 1:
        yield case.choice({grad: WHOLE, index: WHOLE}, case.goal, program="embedding_rows_backward")


def nll_loss(case: Case) -> Iterator[Choice | None]:
    """``nll_loss_forward(logp, target, weight, reduction, ignored)``: by rows, or by classes."""
    logp, target, reduction = case.name(0), case.name(1), case.value(3)
    assert logp is not None and target is not None
    if case.name(2) is not None or len(case.shape(logp)) != 2:
        return
    for part in case.divisions(logp, target):
        if part.dim == 0 and reduction == 0:
            yield case.choice({logp: part, target: part}, part, PARTIAL)
        elif part.dim == 0:
            yield case.choice({logp: part, target: part}, *_sums(reduction), program="nll_loss_rows")
    for part in case.divisions(logp):
        if part.dim == 1 and part.sections == 1:
            yield case.choice({logp: part, target: WHOLE}, *_sums(reduction), program="nll_loss_classes")


def _sums(reduction: int) -> tuple[Part, Part]:
    """A mean (1) is divided by the members' common weight, so both results are whole; sums are left to be added."""
    return (WHOLE, WHOLE) if reduction == 1 else (PARTIAL, PARTIAL)


def nll_loss_backward(case: Case) -> Iterator[Choice | None]:
    """``nll_loss_backward(grad, logp, target, weight, reduction, ignored, total)``."""
    grad, logp, target, total = (case.name(index) for index in (0, 1, 2, 6))
    assert grad is not None and logp is not None and target is not None
    if case.name(3) is not None or len(case.shape(logp)) != 2:
        return
    rows = len(case.shape(grad)) == 1
    mean: dict[str | None, Part] = {total: WHOLE} if case.value(4) == 1 else {}  # else the total is not read
    for part in case.divisions(logp, target):
        if part.dim == 0:
            yield case.choice({grad: part if rows else WHOLE, logp: part, target: part, **mean}, part)
    for part in case.divisions(logp):
        if part.dim == 1 and part.sections == 1:
            yield case.choice({grad: WHOLE, logp: part, target: WHOLE, **mean}, part,
                              program="nll_loss_classes_backward")


def head_in_blocks(case: Case) -> Iterator[Choice | None]:
    """A head that makes logits in blocks of the vocabulary (`mipipe.graphs.operators.vocabulary`): by rows; gradients
    of its weights are sums over them."""
    kind = case.op.kind.split(".")[1]
    rows = [case.name(place) for place in _ROWS[kind]]
    for part in case.divisions(*rows):
        if part.dim == 0:
            needs: dict[str | None, Part] = {**dict.fromkeys(case.op.inputs, WHOLE), **dict.fromkeys(rows, part)}
            made = PARTIAL if kind.endswith("_weight") else part
            yield case.choice(needs, *(made,) * len(case.op.outputs), share=1.0 / case.size)


_ROWS = {"label_log_probs": (0, 3), "teacher_distance": (0, 3),
         **{f"label_log_probs_{made}": (0, 1, 4, 5) for made in ("input", "weight")},
         **{f"teacher_distance_{made}": (0, 1, 4, 7, 8) for made in ("input", "weight")}}
"""Which arguments have a row for each position."""


def index(case: Case) -> Iterator[Choice | None]:
    """``index(x, [indices])``: linear in x; by the index where it stands first and alone, or by what is not indexed."""
    x, indices = case.name(0), case.names(1)
    assert x is not None
    first = next((place for place, name in enumerate(indices) if name is not None), 0)
    chosen = [name for name in indices if name is not None]
    whole: dict[str | None, Part] = dict.fromkeys(chosen, WHOLE)
    part = case.parts[x]
    if part.kind in (Kind.PARTIAL, Kind.OWNED):
        yield case.choice({**whole, x: PARTIAL}, PARTIAL)
    if part.kind is Kind.DIVIDED and len(chosen) == 1:
        width = len(case.shape(chosen[0]))
        if part.dim != first:
            yield case.choice({**whole, x: part}, part.at(part.dim + (width - 1 if part.dim > first else 0)))
    if len(chosen) == 1:
        for found in case.divisions(chosen[0]):
            yield case.choice({chosen[0]: found, x: WHOLE}, found.at(first + found.dim))


def index_put(case: Case) -> Iterator[Choice | None]:
    """``index_put(zeros, [.., index], values, accumulate)``, one index, at any dimension: linear in the values where
    the first argument is zero."""
    base, indices, values = case.name(0), case.names(1), case.name(2)
    assert base is not None and values is not None
    chosen = [name for name in indices if name is not None]
    whole: dict[str | None, Part] = dict.fromkeys(chosen, WHOLE)
    plain = len(chosen) == 1 and (
        len(case.shape(values)) == len(case.shape(chosen[0])) + len(case.shape(base)) - 1)
    if not case.is_zero(base) or not plain:
        return
    part, width, first = case.parts[values], len(case.shape(chosen[0])), indices.index(chosen[0])
    adds = bool(case.value(3, False))
    if part.kind is Kind.PARTIAL or (part.kind is Kind.OWNED and not first):
        yield case.choice({**whole, base: WHOLE, values: PARTIAL}, PARTIAL)
    elif part.kind is Kind.DIVIDED and not first <= part.dim < first + width:
        made = part if part.dim < first else part.at(part.dim - width + 1)
        yield case.choice({**whole, base: made, values: part}, made)
    elif part.kind is Kind.DIVIDED and adds and width == 1 and not first:
        yield case.choice({chosen[0]: part, base: WHOLE, values: part}, PARTIAL)


def along_dim(case: Case) -> Iterator[Choice | None]:
    """``gather(x, dim, index)`` and ``scatter(x, dim, index, values)``: by other dimensions; scatter is linear."""
    dims = len(case.out)
    dim = positive(case.value(1), dims)
    for part in case.divisions(*case.op.inputs):
        shapes = {case.shape(name)[part.dim] for name in case.op.inputs}
        if part.dim != dim and len(shapes) == 1:
            yield case.choice(dict.fromkeys(case.op.inputs, part), part)


def convolution(case: Case) -> Iterator[Choice | None]:
    """By samples."""
    x = case.name(0)
    for part in case.divisions(x):
        if part.dim == 0:
            yield case.choice({x: part, case.name(1): WHOLE, case.name(2): WHOLE}, part, share=1.0 / case.size)


def convolution_backward(case: Case) -> Iterator[Choice | None]:
    """By samples: weight gradients are parts of a sum."""
    grad, x = case.name(0), case.name(1)
    for part in case.divisions(grad, x):
        if part.dim == 0:
            needs: dict[str | None, Part] = {grad: part, x: part, case.name(2): WHOLE}
            yield case.choice(needs, part, PARTIAL, PARTIAL, share=1.0 / case.size)


def attention(case: Case) -> Iterator[Choice | None]:
    """By heads or samples; queries along the sequence, where keys and values are whole.

    ``attention(q, k, v, mask, sinks, causal, window, ...)`` and, with the gradient in front and the results behind the
    sinks, its backward.
    """
    back = 1 if case.op.kind.startswith("mipipe.attention_backward") else 0
    tensors = [case.name(index) for index in range(5 + 3 * bool(back))]
    grad, (q, k, v, mask, sinks) = tensors[0] if back else None, tensors[back:back + 5]
    kept = [case.name(6), case.name(7)] if back else []
    assert q is not None and k is not None
    queries: list[str | None] = [grad, q, *kept]
    share = 1.0 / case.size
    heads, groups = case.shape(q)[1], case.shape(k)[1]
    for part in case.divisions(*queries, k, v):
        dim = part.dim
        covers = mask is not None and len(case.shape(mask)) == 4 and case.shape(mask)[dim] > 1
        masked = {mask: part if covers else WHOLE}
        if dim == 0:
            needs: dict[str | None, Part] = dict.fromkeys([*queries, k, v], part)
            yield case.choice({**needs, **masked, sinks: WHOLE}, *(part,) * (3 if back else 2), share=share)
        elif dim == 1 and part.sections == 1:
            whole_heads = {**dict.fromkeys(queries, part), **masked, sinks: divided(0)}
            if groups % case.size == 0:
                yield case.choice({**whole_heads, k: part, v: part}, *(part,) * (3 if back else 2), share=share)
            elif heads % case.size == 0 and case.size % groups == 0:
                gives = (part, WHOLE, WHOLE) if back else (part, part)
                each = CollectiveKind.ALL_GATHER, case.specs[k].num_bytes * case.size // groups
                yield case.choice({**whole_heads, k: WHOLE, v: WHOLE}, *gives, share=share,
                                  inside=(each, each) if back else (),
                                  program="attention_few_keys_backward" if back else "attention_few_keys")
        elif dim == 2 and mask is None and sinks is None and part.sections == 1:
            needs = {**dict.fromkeys(queries, part), k: WHOLE, v: WHOLE}
            gives = (part, PARTIAL, PARTIAL) if back else (part, part)
            yield case.choice(needs, *gives, share=share,
                              program="attention_queries_backward" if back else "attention_queries")


def sink_gradient(case: Case) -> Iterator[Choice | None]:
    """``sink_gradient(grad, sinks, out, lse)``: by heads; over samples and queries it is a sum."""
    grad, sinks, out, lse = (case.name(index) for index in range(4))
    for part in case.divisions(grad, out, lse):
        needs: dict[str | None, Part] = {grad: part, out: part, lse: part}
        if part.dim == 1 and part.sections == 1:
            yield case.choice({**needs, sinks: divided(0)}, divided(0))
        elif part.dim in (0, 2):
            yield case.choice({**needs, sinks: WHOLE}, PARTIAL)


def by_samples(case: Case) -> Iterator[Choice | None]:
    """An operator without parameters that treats samples alike and apart: pooling, resizing, padding."""
    for part in case.divisions(*case.op.inputs):
        if part.dim == 0:
            yield case.choice(dict.fromkeys(case.op.inputs, part), *(part,) * len(case.op.outputs))


MODEL: dict[str, Rule] = {
    "aten.embedding.default": embedding, "aten.embedding_dense_backward.default": embedding_backward,
    "aten.nll_loss_forward.default": nll_loss, "aten.nll_loss_backward.default": nll_loss_backward,
    "aten.index.Tensor": index, "aten.index_put.default": index_put, "aten.gather.default": along_dim,
    "aten.scatter.src": along_dim, "aten.scatter.value": along_dim, "aten.scatter_add.default": along_dim,
    "aten.convolution.default": convolution, "aten.convolution_backward.default": convolution_backward,
    "mipipe.attention.default": attention, "mipipe.attention_backward.default": attention,
    "mipipe.sink_gradient.default": sink_gradient,
    **{f"mipipe.{name}.default": head_in_blocks for name in _ROWS},
    **{f"aten.{name}.default": by_samples for name in (
        "avg_pool2d", "avg_pool2d_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward",
        "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "upsample_bicubic2d", "upsample_bilinear2d",
        "upsample_nearest2d", "reflection_pad2d")},
}
